"""PyramidInfer's prefill against a slow transcription."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from vtprune.models.engine.whole import HEAD

import vtprune
from prompts import best, heads, llama
from vtprune.core.planning import bind, plan
from vtprune.core.recipe import Recipe, Stage


def levels(model, ids, p: float, floor: int, interval: int, recent: float) -> list[list[int]]:
    """For one prompt ``[T]`` the places that each layer reads; every layer is run on what is left."""
    n, depth = len(ids), model.config.num_hidden_layers
    asks = int(recent * n) + 1
    left = list(range(n))
    x, out = model.get_input_embeddings()(ids), []
    for i, block in enumerate(model.model.layers):
        out.append(left)
        queries, keys = heads(model, x, left, i)
        scale = block.self_attn.scaling
        rows = []
        for r in range(len(left) - asks, len(left)):
            mean = [0.0] * len(left)
            for q, k in zip(queries, keys, strict=True):
                logits = [float(q[r] @ k[j]) * scale for j in range(r + 1)]
                top = max(logits)
                total = sum(math.exp(v - top) for v in logits)
                for j, v in enumerate(logits):
                    mean[j] += math.exp(v - top) / total / len(queries)
            rows.append(mean)
        with torch.no_grad():
            places = torch.tensor([left])
            tables = model.model.rotary_emb(x[None], places)
            mask = torch.zeros(1, 1, len(left), len(left), dtype=x.dtype).masked_fill(
                torch.ones(len(left), len(left)).triu(1).bool(), -torch.inf
            )
            x = block(x[None], attention_mask=mask, position_embeddings=tables, position_ids=places)
            x = (x[0] if isinstance(x, tuple) else x)[0]
        if i == 0 or i % interval or i == depth - 1:
            continue
        weights = [1 + 0.2 * t / (asks - 1) for t in range(asks)]
        score = [sum(w * row[j] for w, row in zip(weights, rows, strict=True)) / asks for j in range(len(left))]
        context = [j for j, place in enumerate(left) if place < n - asks]
        share = p + (1 - p) * (1 + math.cos(math.pi * i / depth)) / 2
        count = int(len(context) * share)
        count = count if count > floor else len(context)
        for j in range(HEAD):
            score[j] = max(score) + 1
        stay = [*best(score, context, count), *range(len(context), len(left))]
        x, left = x[stay], [left[j] for j in stay]
    return out


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("p", "floor", "interval", "recent"), [(0.9, 4, 1, 0.2), (0.5, 4, 1, 0.2), (0.3, 12, 2, 0.35), (0.2, 100, 1, 0.2)]
)
def test_what_each_layer_reads(p, floor, interval, recent):
    model, prompts = llama(length=46, samples=2)
    ids = torch.cat([prompts, torch.zeros(2, 5, dtype=torch.long)], 1)
    ids[1] = ids[1].roll(5)
    options = {"p": p, "floor": floor, "interval": interval, "recent": recent}
    with vtprune.attach(model, "pyramidinfer", **options) as handle, torch.no_grad():
        model(input_ids=ids, attention_mask=(ids != 0).long())
        report = handle.report()
    for b, prompt in enumerate(prompts):
        want = levels(model, prompt, **options)
        assert report.layer_tokens[b] == [len(w) - HEAD - 1 for w in want]
        for stage in report.stages:
            at = want[int(stage.site.removeprefix("llm."))]
            assert [*range(HEAD), *(stage.kept[b] + HEAD).tolist(), 45] == at


def test_the_schedule_of_the_specification():
    """n = 2048, 32 layers, p = 0.9: with the shares that are planned 732 tokens are left behind layer 31, if it cut
    too, and the mean of what each layer reads is 0.765 of the prompt."""
    model, _ = llama()
    geometry = replace(bind(model).geometry, llm_layers=32)
    cuts = plan(geometry, Recipe(name="p", stages=(Stage(method="pyramidinfer"),)))[0][2]
    shares = [1.0, *(cut.data["share"] for cut in cuts)]
    assert [cut.site for cut in cuts] == [f"llm.{i}" for i in range(2, 32)] and len(shares) == 31
    recent = int(0.2 * 2048) + 1
    context, held = 2048 - recent, []
    for share in shares:
        held.append(context + recent)
        context = int(context * share)
    held.append(context + recent)
    assert held[-1] == 768 and int(context * (0.9 + 0.1 * (1 + math.cos(math.pi * 31 / 32)) / 2)) + recent == 732
    assert round(sum(held) / 32 / 2048, 3) == 0.765


def test_models_that_read_images_are_refused():
    model, _ = vtprune.load_demo_model()
    with pytest.raises(vtprune.UnsupportedError, match="pyramidinfer needs prompt"):
        vtprune.attach(model, "pyramidinfer")
