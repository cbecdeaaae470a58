"""PromptDistill against a slow transcription, one stage and several."""

from __future__ import annotations

import pytest
import torch
from prompts import best, heads, inputs_of, llama, smoothed
from vtprune.models.causal_lm import HEAD

import vtprune


def chosen(model, ids, layer: int, keep: int, pool: int) -> list[int]:
    """One stage for one whole prompt ``[T]``: the places that go on, the first four and the last among them."""
    n, d = len(ids), model.config.hidden_size // model.config.num_attention_heads
    queries, keys = heads(model, inputs_of(model, ids, layer), list(range(n)), layer)
    products = [[float(q[-1] @ k[j]) / d**0.5 for j in range(n)] for q, k in zip(queries, keys, strict=True)]
    score = [sum(p[j] for p in products) / len(products) for j in range(n)]
    score[-1] = 0.0
    return sorted([*range(HEAD), *best(smoothed(score, pool), list(range(HEAD, n - 1)), keep), n - 1])


@pytest.mark.parametrize(("layer", "keep", "pool"), [(2, 9, 5), (0, 5, 5), (4, 12, 1)])
def test_what_goes_on(layer, keep, pool):
    model, prompts = llama(samples=2)
    ids = torch.cat([prompts, torch.zeros(2, 7, dtype=torch.long)], 1)
    ids[1] = ids[1].roll(7)
    want = [chosen(model, p, layer, keep, pool) for p in prompts]
    with vtprune.attach(model, "promptdistill", keep=keep, layers=(layer,), pool=pool) as handle, torch.no_grad():
        model(input_ids=ids, attention_mask=(ids != 0).long())
        report = handle.report()
    assert [[*range(HEAD), *(k + HEAD).tolist(), 39] for k in report.stages[0].kept] == want
    assert report.layer_tokens[0] == [35] * (layer + 1) + [keep] * (5 - layer)


def test_a_second_stage_scores_what_is_left():
    """Pooling and products are over the shortened prompt, at its original places."""
    model, prompts = llama()
    ids = prompts[0]
    first = chosen(model, ids, 1, 15, 5)
    states: list[torch.Tensor] = []
    with vtprune.attach(model, "promptdistill", layers=(1, 3), counts=(15, 6)) as handle, torch.no_grad():
        hook = model.model.layers[3].register_forward_pre_hook(lambda m, a: states.append(a[0][0]))
        model(input_ids=prompts)
        hook.remove()
        report = handle.report()
    assert [*range(HEAD), *(report.stages[0].kept[0] + HEAD).tolist(), 39] == first
    queries, keys = heads(model, states[0], first, 3)
    d = model.config.hidden_size // model.config.num_attention_heads
    score = [
        sum(float(q[-1] @ k[j]) for q, k in zip(queries, keys, strict=True)) / len(queries) / d**0.5
        for j in range(len(first))
    ]
    score[-1] = 0.0
    inner = list(range(HEAD, len(first) - 1))
    want = [first[i] for i in best(smoothed(score, 5), inner, 6)]
    assert (report.stages[1].kept[0] + HEAD).tolist() == want


def test_options():
    model, _ = llama()
    for options, why in (
        ({"layers": (5,)}, "behind the last layer"),
        ({"pool": 2}, "must be odd"),
        ({"layers": (1, 3), "counts": (4,)}, "one for each of"),
        ({"layers": (1, 3), "counts": (4, 8)}, "falling numbers"),
        ({"layers": (3, 1)}, "must ascend"),
    ):
        with pytest.raises(vtprune.VtpruneError, match=why):
            vtprune.attach(model, "promptdistill", **options)
