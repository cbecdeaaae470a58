"""PruMerge and PruMerge+ (arXiv 2403.15388) against a slow transcription: kept sets, and what the language model
gets."""

from __future__ import annotations

import math
from typing import Any

import builders as B
import numpy as np
import pytest
import torch
from test_visionzip import check_language_model, chosen, seen, view
from torch import Tensor

import oracles as O
import vtprune
from vtprune.core.select import combine
from vtprune.methods.base import Cut, make

BOTH = ("prumerge", "prumerge+")


def joined(q: Tensor, k: Tensor) -> list[float]:
    """The class token's attention over everything with all heads as one; ``q``, ``k`` ``[n, H, d]``."""
    query = q[0].flatten().tolist()
    logits = [
        sum(u * v for u, v in zip(query, key.flatten().tolist(), strict=True)) / math.sqrt(len(query)) for key in k
    ]
    return O._softmax(logits)[1:]


def outliers(a: list[float], iqr: float) -> list[int]:
    low, high = np.percentile(a, 25), np.percentile(a, 75)
    return [j for j, value in enumerate(a) if value > high + iqr * (high - low)]


def stays(name: str, a: list[float], keep: int | None, options: dict[str, Any]) -> tuple[list[int], bool]:
    """Who stays, and whether there is an extra token."""
    falling = sorted(range(len(a)), key=lambda j: -a[j])
    wanted, n = options.get("extra", True), len(a)
    if keep is None:
        count = max(1, len(outliers(a, options.get("iqr", 1.5))))
        kept = set(falling[:count])
        if name == "prumerge+":
            kept |= set(range(0, n - 1, max(1, n // count // 3)))
        return sorted(kept), wanted and len(kept) < n
    if keep >= n:
        return list(range(n)), False
    extra = wanted and keep > 1
    count = keep - extra
    first = count if name == "prumerge" else min(count, max(1, math.floor(count * options.get("attended", 0.25) + 0.5)))
    kept, rest = falling[:first], sorted(falling[first:])
    kept += [rest[i * len(rest) // (count - first)] for i in range(count - first)]
    assert len(set(kept)) == count
    return sorted(kept), extra


def pruned(
    x: Tensor, keys: list[list[float]], a: list[float], kept: list[int], extra: bool, neighbours: int = 32
) -> dict[int, Tensor]:
    """What is handed over, by place."""
    dropped = [j for j in range(len(a)) if j not in kept]
    if not dropped:
        return {j: x[j] for j in kept}
    length = [math.sqrt(sum(v * v for v in key)) for key in keys]

    def cosine(i: int, j: int) -> float:
        return sum(u * v for u, v in zip(keys[i], keys[j], strict=True)) / length[i] / length[j]

    out = {}
    for i in kept:
        near = sorted((j for j in range(len(a)) if j != i), key=lambda j, i=i: -cosine(i, j))[:neighbours]
        out[i] = x[i] + sum((a[j] * x[j] for j in near), torch.zeros_like(x[i]))
    if extra:
        out[max(dropped, key=lambda j: a[j])] = sum((a[j] * x[j] for j in dropped), torch.zeros_like(x[0]))
    return dict(sorted(out.items()))


CASES: list[tuple[int | None, dict[str, Any]]] = [
    (None, {}),
    (None, {"iqr": -0.3, "neighbours": 5}),
    (None, {"extra": False}),
    (12, {}),
    (9, {"heads": "mean"}),
    (7, {"extra": False, "neighbours": 3}),
    (1, {}),
    (2, {}),
    (35, {}),
    (36, {}),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("keep, options", CASES)
@pytest.mark.parametrize("name", BOTH)
def test_llava_equals_the_transcription(name: str, keep: int | None, options: dict[str, Any], vision: str) -> None:
    model, inputs = B.llava(vision, "llama", layers=2), B.prompts([[4, 9], [7, 2, 5]])
    x = B.embeddings(model, inputs)
    with vtprune.attach(model, name, **({} if keep is None else {"keep": keep}), **options) as handle:
        hidden = B.final(model, inputs)
        records = [(run.records[-1], g) for run, g in handle.passes]
    made = []
    for (record, g), image in zip(records, seen(model.model.vision_tower, inputs["pixel_values"]), strict=True):
        prefix = len(image["k"]) - B.N
        a = by_head(image["q"], image["k"], prefix)
        if prefix and options.get("heads") != "mean":
            a = joined(image["q"], image["k"])
        kept, extra = stays(name, a, keep, options)
        out = pruned(image["x"], image["keys"].flatten(1).tolist(), a, kept, extra, options.get("neighbours", 32))
        assert record.kept[g].tolist() == sorted(out)
        if keep is not None:
            assert len(out) == keep
        made.append(out)
    # received attention is averaged in 32 bits
    check_language_model(model, inputs, hidden, x, made, limit=1e-7 if vision == "siglip" else 1e-9)


def by_head(q: Tensor, k: Tensor, prefix: int) -> list[float]:
    """Mean over heads of the class token's attention, or of all tokens'."""
    total = [0.0] * len(k)
    queries = range(1) if prefix else range(len(q))
    for i in queries:
        for h in range(q.shape[1]):
            row = O._softmax([float(q[i, h] @ k[j, h]) / math.sqrt(q.shape[2]) for j in range(len(k))])
            total = [t + w / q.shape[1] / len(queries) for t, w in zip(total, row, strict=True)]
    return total[prefix:]


@pytest.mark.parametrize("name", BOTH)
def test_behind_the_projector_keys_and_attention_are_noted(name: str) -> None:
    model, inputs = B.llava("clip", "llama", layers=2), B.prompts([[4, 9]])
    x, at = B.embeddings(model, inputs)[0], B.visual_positions(inputs, 0)
    with vtprune.attach(model, name, site="projector") as handle:
        hidden, report = B.final(model, inputs), handle.report()
    (image,) = seen(model.model.vision_tower, inputs["pixel_values"])
    a = joined(image["q"], image["k"])
    out = pruned(x[at], image["keys"].flatten(1).tolist(), a, *stays(name, a, None, {}))
    kept = sorted(out)
    assert report.stages[-1].kept[0].tolist() == kept
    x[at[kept]] = torch.stack([out[j] for j in kept])
    rows = sorted({*range(len(x))} - {*at.tolist()} | {*at[kept].tolist()})
    B.close(hidden[0][rows], B.stack(model.model.language_model, x[rows], rows))


EXAMPLE = torch.tensor([[*[0.02] * 12, 0.20, 0.25, 0.10, 0.21]], dtype=torch.float64)


def adaptive(keys: Tensor, attention: Tensor, name: str = "prumerge", **options: Any) -> Any:
    masks = {k: options.pop(k) for k in ("valid", "protected") if k in options}
    cut = Cut(site="projector", keep=1, adaptive=True, data={"blocks": (2,)})
    return make(name, options).select(view(keys, attention, **masks), cut)


def test_the_example_of_the_specification() -> None:
    """Q1 = 0.02, Q3 = 0.04: four outliers above 0.07, and the extra token at the first of the others."""
    keys = torch.eye(16, dtype=torch.float64)[None]
    assert outliers(EXAMPLE[0].tolist(), 1.5) == [12, 13, 14, 15]
    assert adaptive(keys, EXAMPLE, extra=False).kept[0].tolist() == [12, 13, 14, 15]
    got = adaptive(keys, EXAMPLE)
    assert got.kept[0].tolist() == [0, 12, 13, 14, 15] and got.target[0].tolist() == [*[0] * 12, 1, 2, 3, 4]
    out, size = combine(keys, got, torch.ones(1, 16))
    assert size.tolist() == [[12, 1, 1, 1, 1]]
    assert out[0, 0].tolist() == pytest.approx([0.02] * 12 + [0.0] * 4)
    # 15 neighbours: all others
    assert out[0, 2].tolist() == pytest.approx([*[0.02] * 12, 0.20, 1, 0.10, 0.21])
    plus = adaptive(keys, EXAMPLE, "prumerge+", extra=False)  # int(16 / 4 / 3) = 1: all but the last, an outlier here
    assert plus.kept[0].tolist() == list(range(16))


def test_uniform_attention_keeps_a_token_and_the_extra_one() -> None:
    keys, attention = torch.eye(16)[None], torch.full((1, 16), 1 / 17)
    assert adaptive(keys, attention).kept[0].tolist() == [0, 1]
    assert adaptive(keys, attention, extra=False).kept[0].tolist() == [0]
    assert adaptive(keys, attention, "prumerge+", extra=False).kept[0].tolist() == [0, 5, 10]
    # every int(int(26 / 3) / 3)-th, never the last
    attention = torch.full((1, 26), 0.01)
    attention[0, [3, 11, 12]] = 0.2
    got = adaptive(torch.eye(26)[None], attention, "prumerge+", extra=False)
    assert got.kept[0].tolist() == sorted({3, 11, 12, *range(0, 25, 2)})
    # a dial far to the right keeps one, to the left everything, with nothing left for an extra token
    assert adaptive(keys, EXAMPLE.float(), iqr=100.0).kept[0].tolist() == [13, 15]
    assert adaptive(keys, EXAMPLE.float(), iqr=-2.0).kept.shape == (1, 16)


def test_without_attention_neighbours_change_nothing() -> None:
    keys = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    attention = torch.zeros(1, 9)
    attention[0, 3] = 0.5
    got = chosen(keys, attention, 3, "prumerge")
    out, _ = combine(keys, got, torch.ones(1, 9))
    assert got.kept[0].tolist() == [0, 1, 3]
    assert torch.equal(out[0, 2], keys[0, 3]) and not out[0, 1].any()  # the extra token is a sum of nothing
    B.close(out[0, 0], keys[0, 0] + 0.5 * keys[0, 3], 1e-6)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("keep", [None, 1, 2, 3, 8, 11, 12])
def test_ties_and_ragged_batches_leave_exact_counts(keep: int | None, extra: bool, name: str) -> None:
    """Equal tokens, zeros, tokens without notes, one token."""
    counts = [12, 12, 7, 1, 12, 12]
    valid = torch.arange(12)[None] < torch.tensor(counts)[:, None]
    keys = torch.ones(6, 12, 4)
    keys[1] = 0
    attention = torch.full((6, 12), 1 / 12)
    attention[4, 5:] = keys[4, 5:] = torch.nan
    attention[5] = 0
    if keep is None:
        got = adaptive(keys, attention, name, valid=valid, extra=extra)
    else:
        got = chosen(keys, attention, keep, name, valid=valid, extra=extra)
    rows = [row[row >= 0].tolist() for row in got.kept]
    assert rows == [sorted(set(row)) for row in rows] and all(rows)
    if keep is not None:
        assert [len(row) for row in rows] == [min(keep, c) for c in counts] and got.span == (1, min(keep, 12))
    out, size = combine(keys.nan_to_num(7.0), got, valid.float())
    assert torch.isfinite(out).all()
    for row, target, n, total in zip(rows, got.target, counts, size, strict=True):
        assert target[n:].eq(-1).all() and [target[j] for j in row] == list(range(len(row)))
        assert total.sum() == (target >= 0).sum()
    if keep == 12:
        assert torch.equal(out[valid], keys.nan_to_num(7.0)[valid])


@pytest.mark.parametrize("keep", [None, 6])
@pytest.mark.parametrize("name", BOTH)
def test_a_batch_decides_as_its_images_do(name: str, keep: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 20, 6, generator=generator)
    attention = torch.rand(3, 20, generator=generator) ** 6
    valid = torch.arange(20)[None] < torch.tensor([20, 13, 5])[:, None]
    pick = adaptive if keep is None else lambda k, a, name, **o: chosen(k, a, keep, name, **o)
    both = pick(keys, attention, name, valid=valid, neighbours=7)
    for b, n in enumerate((20, 13, 5)):
        alone = pick(keys[b : b + 1, :n], attention[b : b + 1, :n], name, neighbours=7)
        assert both.kept[b][both.kept[b] >= 0].tolist() == alone.kept[0].tolist()
        assert both.target[b, :n].tolist() == alone.target[0].tolist()
        out = combine(keys, both, valid.float())[0][b, : alone.kept.shape[1]]
        B.close(out, combine(keys[b : b + 1, :n], alone, torch.ones(1, n))[0][0], 1e-6)


@pytest.mark.parametrize("name", BOTH)
def test_protected_tokens_stay_and_unknown_ones_never_merge(name: str) -> None:
    keys = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(1))
    attention = torch.arange(10.0)[None] ** 3
    protected = torch.zeros(1, 10).bool()
    protected[0, :3] = True
    assert {0, 1, 2} < {*chosen(keys, attention, 5, name, protected=protected).kept[0].tolist()}
    assert {0, 1, 2} < {*adaptive(keys, attention, name, protected=protected).kept[0].tolist()}
    attention[0, 4] = torch.nan
    for got in (chosen(keys, attention, 4, name), adaptive(keys, attention, name)):
        assert got.target[0, 4] == -1 and not ((got.mix.token == 4) & (got.mix.slot >= 0)).any()
        assert torch.isfinite(got.mix.weight).all()


def test_the_dial_is_turned_to_a_budget(tiny) -> None:
    model, inputs = tiny("llava", "clip-llama")
    for name in BOTH:
        recipe = vtprune.calibrate(model, name, inputs, effective_tokens=0.6)
        with vtprune.attach(model, recipe) as handle, torch.no_grad():
            model(**inputs)
            report = handle.report()
        got = report.effective_tokens / (sum(report.visual_tokens) / len(report.visual_tokens))
        assert 0.3 < got <= 0.6


@pytest.mark.parametrize("name", BOTH)
def test_only_the_least_is_known_without_a_budget(name: str) -> None:
    from vtprune.core.planning import bind

    geometry = bind(B.llava("clip", "llama", layers=2)).geometry
    for site, where in (("tower", "vision.2"), ("projector", "projector")):
        for keep in (None, 9):
            cut = make(name, {"site": site}).plan(geometry, keep)[-1]
            assert (cut.site, cut.keep, cut.adaptive) == (where, keep or 1, keep is None)
