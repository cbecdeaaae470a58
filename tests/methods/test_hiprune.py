"""HiPrune (arXiv 2508.00553) against a slow transcription on the attention that transformers shows."""

from __future__ import annotations

from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.core.types import TokenView
from vtprune.methods.base import Cut, make


def around(place: int, rows: int, columns: int, wrap: bool) -> set[int]:
    """The neighbours of a patch, by number or on the grid."""
    if wrap:
        return {min(max(place + d, 0), rows * columns - 1) for d in (1, -1, columns, -columns)}
    r, c = divmod(place, columns)
    beside = [(r, c + 1), (r, c - 1), (r + 1, c), (r - 1, c)]
    return {a * columns + b for a, b in beside if 0 <= a < rows and 0 <= b < columns}


def hierarchy(
    middle: list[float], deep: list[float], grid: tuple[int, int], keep: int, alpha: float = 0.1, wrap: bool = True
) -> list[int]:
    """Patches kept, with lists."""
    n = len(deep)
    anchors = sorted(range(n), key=lambda i: -middle[i])[: round(keep * alpha / 5)]
    buffers = {b for a in anchors for b in around(a, *grid, wrap)} - set(anchors)
    kept = (anchors + sorted(buffers, key=lambda i: (-deep[i], i)))[:keep]
    rest = sorted((i for i in range(n) if i not in kept), key=lambda i: (-deep[i], i))
    return sorted(kept + rest[: keep - len(kept)])


def received(weights: Tensor) -> list[float]:
    """Of one image's attention ``[H, P + N, P + N]``, one query and head at a time, what each patch receives."""
    heads, tokens, _ = weights.shape
    prefix = tokens - B.N
    return [
        sum(float(weights[h, r, j]) for h in range(heads) for r in range(tokens)) / heads / tokens
        for j in range(prefix, tokens)
    ]


def view(index: Tensor, grid: tuple[int, int], protected: list[int] | None = None) -> TokenView:
    """A view of the tokens ``index`` ``[B, N]`` (-1: padding)."""
    valid = index >= 0
    held = torch.zeros_like(valid)
    held[:, protected or []] = True
    return TokenView(
        features=torch.zeros(*index.shape, 1),
        valid=valid,
        index=index,
        size=valid.float(),
        protected=held,
        grid=grid,
    )


def chosen(index: Tensor, grid: tuple[int, int], middle: Any, deep: Any, keep: int, protected=None, **options):
    method = make("hiprune", options)
    scores = [torch.as_tensor(s, dtype=torch.float64).expand(index.shape) for s in (middle, deep)]
    answer = method.choose(view(index, grid, protected), scores, Cut(site="projector", keep=keep))
    return [row[row >= 0].tolist() for row in answer.kept]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options",
    [
        {"keep": 30},
        {"keep": 12, "alpha": 0.5},
        {"keep": 17, "alpha": 1.0},
        {"keep": 8, "alpha": 1.0},
        {"keep": 20, "alpha": 0.8, "wrap": False},
        {"keep": 12, "alpha": 0.5, "layer": 6},
        {"keep": 11, "alpha": 0.5, "layer": 7},
        {"keep": 9, "alpha": 0.0},
        {"keep": 12, "alpha": 0.5, "site": "projector"},
        {"keep": 1},
        {"keep": 36},
    ],
)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_llava_equals_the_transcription(vision, options):
    """The third of eight blocks (9 of 24) and the last of the seven that are used."""
    model, inputs = B.llava(vision, "llama", blocks=8, layers=2), B.prompts([[4, 9], [7, 2, 5]])
    with vtprune.attach(model, "hiprune", **options) as handle, torch.no_grad():
        B.final(model, inputs)
        report = handle.report()
    weights = B.watched(model.model.vision_tower, inputs["pixel_values"])[1]
    want = []
    for image in range(3):
        middle, deep = (received(weights[i][image]) for i in (options.get("layer", 3) - 1, 6))
        how = {k: v for k, v in options.items() if k in ("alpha", "wrap")}
        want.append(hierarchy(middle, deep, (B.SIDE, B.SIDE), options["keep"], **how))
    assert report.stages[-1].kept[0].tolist() == want[0]
    assert report.stages[-1].kept[1].tolist() == want[1] + [B.N + i for i in want[2]]


@pytest.mark.parametrize("keep, anchors", [(192, 4), (128, 3), (64, 1), (32, 1), (24, 0)])
def test_as_many_anchors_as_the_official_code(keep, anchors):
    """Anchors are the even patches of every fourth row, away from the border; the deep block prefers the end."""
    places = [r * 24 + c for r in range(2, 22, 4) for c in range(2, 22, 4)][:anchors]
    middle, deep = torch.zeros(576), torch.arange(576.0)
    middle[places] = 1
    (kept,) = chosen(torch.arange(576)[None], (24, 24), middle, deep, keep)
    early = {p + d for p in places for d in (0, 1, -1, 24, -24)}
    assert kept == sorted(early | set(range(576 - keep + len(early), 576)))


@pytest.mark.parametrize(
    "place, wrap, neighbours",
    [
        (23, True, {22, 24, 47, 0}),  # in front of 0 there is nothing but 0
        (23, False, {22, 47}),
        (0, True, {1, 24}),
        (0, False, {1, 24}),
        (24, True, {23, 25, 0, 48}),
        (24, False, {25, 0, 48}),
        (575, True, {574, 551}),
        (100, True, {99, 101, 76, 124}),
        (100, False, {99, 101, 76, 124}),
    ],
)
def test_neighbours(place, wrap, neighbours):
    middle, deep = torch.zeros(576), torch.zeros(576)
    middle[place] = 1
    deep[place] = -1
    kept = chosen(torch.arange(576)[None], (24, 24), middle, deep, len(neighbours) + 1, alpha=1.0, wrap=wrap)
    assert around(place, 24, 24, wrap) - {place} == neighbours
    assert round((len(neighbours) + 1) / 5) == 1, "one anchor"
    assert kept == [sorted(neighbours | {place})]


@pytest.mark.parametrize("keep", [1, 2, 5, 7, 11, 12])
@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_counts_are_exact(keep, alpha):
    """Ties, images of different lengths, tokens that are gone, others that the tower did not make, some that must
    stay."""
    gone = torch.tensor([[0, 2, 3, 5, 6, 7, 8, 10, -1, -1, -1, -1], list(range(12)), [4, *[-1] * 11]])
    unknown = torch.zeros(3, 12)
    unknown[:2, [3, 7]] = torch.nan
    for middle, deep in ((torch.zeros(3, 12), torch.zeros(3, 12)), (unknown, unknown)):
        kept = chosen(gone, (3, 4), middle, deep, keep, alpha=alpha)
        assert [len(set(row)) for row in kept] == [len(row) for row in kept] == [min(keep, 8), keep, 1]
        assert all(row == sorted(row) for row in kept)
    if keep >= 2:
        (row,) = chosen(gone[1:2], (3, 4), torch.zeros(12), torch.zeros(12), keep, [9, 11], alpha=alpha)
        assert {9, 11} <= set(row)


def test_new_line_tokens_go_first():
    """Of 3 x 3 tokens with a new-line token behind each row, none of these is left while there are others."""
    middle = torch.tensor([1.0, 2, torch.nan, 3, 4, torch.nan, 5, 6, torch.nan])
    assert chosen(torch.arange(9)[None], (3, 3), middle, middle, 6, alpha=0.0) == [[0, 1, 3, 4, 6, 7]]


def test_a_block_that_is_not_used_is_refused():
    with pytest.raises(vtprune.VtpruneError, match="layer=8 is not one of the 7 blocks"):
        vtprune.attach(B.llava("clip", "llama", blocks=8, layers=2), "hiprune", layer=8)
