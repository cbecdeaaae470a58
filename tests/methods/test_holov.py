"""HoloV (arXiv 2510.02912) against a slow transcription: strips, shares, kept sets, and what the language model
gets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import builders as B
import pytest
import torch
from test_visionzip import seen, view
from torch import Tensor

import vtprune
from vtprune.methods.base import Cut, make
from vtprune.methods.holov import shared


def scores(x: list[list[float]], a: list[float], strips: list[range], alpha: float) -> list[float]:
    """Of all tokens, one pair at a time."""
    length = [math.sqrt(sum(v * v for v in row)) + 1e-6 for row in x]
    variance = [0.0] * len(x)
    for strip in strips:
        for i in strip:
            s = [
                0.0 if i == j else sum(u * v for u, v in zip(x[i], x[j], strict=True)) / length[i] / length[j]
                for j in strip
            ]
            n = max(len(strip) - 1, 1)
            mean = sum(s) / n
            variance[i] = sum((value - mean) ** 2 for value in s) / n
    ratio = sum(1e3 * v for v in a) / len(a) / (sum(variance) / len(a) + 1e-6)
    return [1e3 * value + alpha * v * ratio for value, v in zip(a, variance, strict=True)]


def shares(weight: list[float], budget: int, open_: list[int]) -> dict[int, int]:
    """One round of sharing among the strips ``open_``."""
    total = sum(weight[p] for p in open_)
    out = {p: math.floor(weight[p] / total * budget) for p in open_}
    for p in sorted(open_, key=lambda p: -weight[p])[: budget - sum(out.values())]:
        out[p] += 1
    return out


def kept(
    x: list[list[float]], a: list[float], keep: int, strips: int | None = 16, alpha: float = 0.09, surplus: str = ""
) -> list[int]:
    n = len(x)
    p = max(1, math.floor(1024 / 576 * n / keep)) if strips is None else strips
    p = min(p, n)
    cuts = [range(i * n // p, (i + 1) * n // p) for i in range(p)]
    score = scores(x, a, cuts, alpha)
    weight = [sum(score[i] for i in strip) / len(strip) for strip in cuts]
    given = dict.fromkeys(range(p), 0)
    while left := keep - sum(given.values()):
        free = [i for i in given if given[i] < len(cuts[i])]
        for i, more in shares(weight, left, free).items():
            given[i] = min(given[i] + more, len(cuts[i]))
        if surplus == "tokens":
            break
    out = [j for i, strip in enumerate(cuts) for j in sorted(strip, key=lambda j: -a[j])[: given[i]]]
    out += sorted(set(range(n)) - {*out}, key=lambda j: -a[j])[: keep - len(out)]
    return sorted(out)


CASES: list[tuple[int, dict[str, Any]]] = [
    (8, {}),
    (1, {}),
    (20, {}),
    (33, {}),
    (36, {}),
    (10, {"strips": 5}),
    (13, {"strips": None}),
    (34, {"strips": None}),
    (11, {"strips": 1}),
    (20, {"surplus": "tokens"}),
    (9, {"strips": 4, "alpha": 50.0}),
    (25, {"strips": 7, "alpha": 0.0}),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("site", ["auto", "tower"])
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("keep, options", CASES)
def test_llava_equals_the_transcription(keep: int, options: dict[str, Any], vision: str, site: str) -> None:
    model, inputs = B.llava(vision, "llama", layers=2), B.prompts([[4, 9], [7, 2, 5]])
    with vtprune.attach(model, "holov", keep=keep, site=site, **options) as handle, torch.no_grad():
        B.final(model, inputs)
        last = handle.report().stages[-1]
    assert last.site == ("projector" if site == "auto" else "vision.2")
    want = []
    for image in seen(model.model.vision_tower, inputs["pixel_values"]):
        with torch.no_grad():
            x = image["x"] if site == "tower" else model.model.multi_modal_projector(image["x"])
        want.append(kept(x.tolist(), image["a"], keep, **options))
    assert [k.tolist() for k in last.kept] == [want[0], want[1] + [j + B.N for j in want[2]]]


def test_the_language_model_gets_rows_of_the_dense_model() -> None:
    model, inputs = B.llava("clip", "llama", layers=2), B.prompts([[4, 9]])
    x, at = B.embeddings(model, inputs)[0], B.visual_positions(inputs, 0)
    with vtprune.attach(model, "holov", keep=12) as handle:
        hidden, stay = B.final(model, inputs), handle.report().stages[-1].kept[0].tolist()
    rows = sorted({*range(len(x))} - {*at.tolist()} | {*at[stay].tolist()})
    B.close(hidden[0][rows], B.stack(model.model.language_model, x[rows], rows))


def test_the_examples_of_the_specification() -> None:
    """Means 4 3 2 1 and T = 7: 3 3 1 0; means .9 .05 .03 .02, four tokens each and T = 10: 10 0 0 0, of which six find
    no room: zeros there, shared among the others here."""
    weight = torch.tensor([[4.0, 3, 2, 1], [0.9, 0.05, 0.03, 0.02]], dtype=torch.float64)
    room, budget = torch.tensor([[9] * 4, [4] * 4]), torch.tensor([7, 10])
    assert shared(weight, room, budget, again=False).tolist() == [[3, 3, 1, 0], [4, 0, 0, 0]]
    assert shared(weight, room + 9, budget, again=False).tolist() == [[3, 3, 1, 0], [10, 0, 0, 0]]
    # six by 5 : 3 : 2 are 3, 1, 1 and one more for the first
    assert shared(weight, room, budget, again=True).tolist() == [[3, 3, 1, 0], [4, 4, 1, 1]]


def test_shares_without_weights_are_equal() -> None:
    zero = torch.zeros(2, 4)
    for again in (True, False):
        assert shared(zero, torch.full((2, 4), 5), torch.tensor([6, 4]), again=again).tolist() == [
            [2, 2, 1, 1],
            [1] * 4,
        ]
    assert shared(zero[:1], torch.tensor([[1, 0, 9, 2]]), torch.tensor([10]), again=True).tolist() == [[1, 0, 7, 2]]


def chosen(features: Tensor, attention: Tensor, keep: int, **options: Any) -> Tensor:
    masks = {k: options.pop(k) for k in ("valid", "protected") if k in options}
    look = replace(view(features, attention, **masks), sources={"note vision.2": lambda: attention})
    cut = Cut(site="projector", keep=keep, data={"blocks": (2,)})
    return make("holov", options).select(look, cut).kept


@pytest.mark.parametrize("surplus", ["strips", "tokens"])
@pytest.mark.parametrize("strips", [None, 1, 5, 16])
@pytest.mark.parametrize("keep", [1, 3, 8, 12])
def test_ties_and_ragged_batches_leave_exact_counts(keep: int, strips: int | None, surplus: str) -> None:
    """Equal tokens, zeros, tokens without notes, one token, all attention on one, features that are no numbers."""
    counts = [12, 12, 7, 1, 12, 12, 12]
    valid = torch.arange(12)[None] < torch.tensor(counts)[:, None]
    keys = torch.ones(7, 12, 4)
    keys[1] = 0
    keys[6, 3:5] = torch.inf
    attention = torch.full((7, 12), 1 / 12)
    attention[4, 5:] = torch.nan
    attention[5] = 0
    attention[5, 2] = 1
    got = chosen(keys, attention, keep, valid=valid, strips=strips, surplus=surplus)
    rows = [row[row >= 0].tolist() for row in got]
    assert [len(set(row)) for row in rows] == [len(row) for row in rows] == [min(keep, c) for c in counts]
    assert rows == [sorted(row) for row in rows] and {0, 1, 2, 3, 4} >= {*rows[4][:5]}
    if strips != 1:
        assert 2 in rows[5]


@pytest.mark.parametrize("options", [{}, {"strips": 3}, {"strips": None, "surplus": "tokens"}])
def test_a_batch_decides_as_its_images_do(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 40, 6, generator=generator)
    attention = torch.rand(3, 40, generator=generator) ** 6
    valid = torch.arange(40)[None] < torch.tensor([40, 23, 5])[:, None]
    both = chosen(keys, attention, 9, valid=valid, **options)
    for b, n in enumerate((40, 23, 5)):
        alone = chosen(keys[b : b + 1, :n], attention[b : b + 1, :n], 9, **options)
        assert both[b][both[b] >= 0].tolist() == alone[0].tolist()
        assert alone[0].tolist() == kept(keys[b, :n].tolist(), attention[b, :n].tolist(), min(9, n), **options)


def test_long_strips_are_compared_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.methods import holov

    generator = torch.Generator().manual_seed(1)
    keys, attention = torch.randn(2, 50, 6, generator=generator), torch.rand(2, 50, generator=generator)
    want = chosen(keys, attention, 11, strips=3, alpha=9.0)
    monkeypatch.setattr(holov, "CHUNK", 700)  # 6 of 17 rows at a time
    assert torch.equal(chosen(keys, attention, 11, strips=3, alpha=9.0), want)


def test_protected_tokens_stay() -> None:
    keys: Tensor = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(2))
    protected = torch.zeros(1, 12).bool()
    protected[0, [0, 7]] = True
    attention = torch.arange(12.0)[None]
    attention[0, [0, 7]] = 0
    rows = chosen(keys, attention, 4, protected=protected, strips=3)[0].tolist()
    assert {0, 7} < {*rows} and len(rows) == 4
