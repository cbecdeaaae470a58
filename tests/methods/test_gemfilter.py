"""GemFilter: the choice against a slow transcription, and its second pass against the stock model."""

from __future__ import annotations

import pytest
import torch
from vtprune.models.engine.whole import HEAD

import vtprune
from prompts import best, heads, inputs_of, llama, smoothed
from vtprune.core import cost


def chosen(model, ids, layer: int, keep: int, pool: int) -> list[int]:
    """Algorithm 1 for one prompt ``[T]``: places that stay, the first four and the last among them."""
    n = len(ids)
    queries, keys = heads(model, inputs_of(model, ids, layer), list(range(n)), layer)
    score = [sum(float(q[-1] @ k[j]) for q, k in zip(queries, keys, strict=True)) for j in range(n)]
    inner = list(range(HEAD, n - 1))
    return sorted([*range(HEAD), *best(smoothed(score, pool), inner, keep), n - 1])


@pytest.mark.parametrize(("layer", "keep", "pool"), [(2, 9, 5), (0, 5, 5), (5, 12, 1), (3, 35, 3)])
def test_what_stays(layer, keep, pool):
    model, prompts = llama(samples=2)
    ids = torch.cat([prompts, torch.zeros(2, 7, dtype=torch.long)], 1)
    ids[1] = ids[1].roll(7)  # one prompt is padded in front, the other behind
    mask = (ids != 0).long()
    want = [chosen(model, p, layer, keep, pool) for p in prompts]
    with vtprune.attach(model, "gemfilter", keep=keep, layer=layer, pool=pool) as handle, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        kept = handle.report().stages[0].kept
    assert [[*range(HEAD), *(k + HEAD).tolist(), prompts.shape[1] - 1] for k in kept] == want


def test_the_second_pass_is_the_stock_model_on_what_stays():
    """Bitwise: logits, the cache, and what is generated."""
    model, prompts = llama(length=50)
    model, how = model.float(), {"max_new_tokens": 6, "do_sample": False}
    with vtprune.attach(model, "gemfilter", keep=10, layer=2) as handle, torch.no_grad():
        out = model(input_ids=prompts)
        kept = handle.report().stages[0].kept[0] + HEAD
        answer = model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)[0, 50:]
    places = torch.cat([torch.arange(HEAD), kept, torch.tensor([49])])
    short = prompts[:, places]
    with torch.no_grad():
        stock = model(input_ids=short)
        alone = model.generate(short, attention_mask=torch.ones_like(short), **how)[0, short.shape[1] :]
    assert torch.equal(out.logits[0, places], stock.logits[0])
    assert torch.equal(answer, alone)


def test_the_pass_ahead_leaves_no_trace():
    """No hidden state or attention of it is handed out, no cache is filled, and its FLOPs are counted."""
    model, prompts = llama()
    model.set_attn_implementation("eager")
    with vtprune.attach(model, "gemfilter", keep=6, layer=3) as handle, torch.no_grad():
        out = model(input_ids=prompts, output_hidden_states=True, output_attentions=True)
        report, shapes = handle.report(), handle.adapter.cost
    assert len(out.hidden_states) == 7 and len(out.attentions) == 6
    assert {a.shape[-1] for a in out.attentions} == {6 + HEAD + 1}
    again = sum(cost.decoder_layer(shapes, i, 40) for i in range(3))
    assert report.flops == again + cost.prefill(shapes, [6 + HEAD + 1] * 6)


def test_a_budget_of_flops_counts_the_pass_ahead():
    model, prompts = llama(length=200)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    for share in (0.6, 0.8):
        recipe = vtprune.solve(model, "gemfilter", layer=2, flops=share, inputs=inputs)
        with vtprune.attach(model, recipe) as handle, torch.no_grad():
            model(**inputs)
            report = handle.report()
        assert report.flops / report.dense_flops == pytest.approx(share, abs=0.01)
    with pytest.raises(vtprune.VtpruneError, match="cannot reach"):  # the layers ahead alone take more
        vtprune.solve(model, "gemfilter", layer=5, flops=0.5, inputs=inputs)


def test_original_positions_can_be_had():
    model, prompts = llama()
    with torch.no_grad():
        runs = []
        for positions in (None, "compact", "original"):
            with vtprune.attach(model, "gemfilter", keep=6, layer=3, positions=positions):
                runs.append(model(input_ids=prompts).logits[0, -1])
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])


def test_what_cannot_be_read_ahead_is_refused():
    from vtprune.models.base import ADAPTERS

    model, _ = ADAPTERS.get("causal-lm").tiny["gemma3"]()
    kinds = model.config.layer_types
    mixed = next(i for i in range(6) if len(set(kinds[: i + 1])) > 1)
    with pytest.raises(vtprune.UnsupportedError, match="attend in several ways"):
        vtprune.attach(model, "gemfilter", layer=mixed)
    model, _ = next(iter(ADAPTERS.get("qwen3-vl").tiny.values()))()
    with pytest.raises(vtprune.UnsupportedError, match="DeepStack"):
        vtprune.attach(model, "gemfilter", layer=2)
    model, _ = llama()
    with pytest.raises(vtprune.VtpruneError, match="must be odd"):
        vtprune.attach(model, "gemfilter", pool=4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 5])
def test_a_cache_of_fixed_size_changes_nothing(attention, layer):
    """Its mask has columns that nothing fills yet; the pass ahead has no cache."""
    model, prompts = llama(samples=2, length=40)
    model = model.float()
    model.set_attn_implementation(attention)
    ids = prompts.clone()
    ids[1] = torch.cat([torch.zeros(9, dtype=torch.long), ids[1, 9:]])
    mask, how = (ids != 0).long(), {"max_new_tokens": 5, "do_sample": False}
    found = {}
    for cache in ("dynamic", "static"):
        with vtprune.attach(model, "gemfilter", keep=8, layer=layer) as handle, torch.no_grad():
            out = model.generate(ids, attention_mask=mask, cache_implementation=cache, **how)
            found[cache] = out.tolist(), [k.tolist() for k in handle.report().stages[0].kept]
    assert found["static"] == found["dynamic"]
