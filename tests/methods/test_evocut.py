"""EvoCut (arXiv 2606.01756) against a slow transcription on the hidden states that transformers shows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.core.types import Geometry, TokenView
from vtprune.methods.base import Cut, make

Vector = list[float]


def unit(v: Vector) -> Vector:
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v] if length else v


def cosine(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(unit(a), unit(b), strict=True))


def starts(d: list[Vector], groups: int, init: str) -> list[int]:
    """The patches whose updates K-means starts from."""
    n = len(d)
    if init == "spread":
        return [int((m + 0.5) * (math.sqrt(5) - 1) / 2 % 1 * n) for m in range(groups)]
    nearest = [max(cosine(d[i], d[j]) for j in range(n) if j != i) for i in range(n)]
    chosen = [min(range(n), key=lambda i: nearest[i])]
    while len(chosen) < groups:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(min(rest, key=lambda i: max(cosine(d[i], d[j]) for j in chosen)))
    return chosen


def deviation(d: list[Vector], groups: int, iterations: int, init: str) -> list[float]:
    """``r`` of one block's directions."""
    u = [d[i] for i in starts(d, groups, init)]
    for _ in range(iterations):
        members: list[list[Vector]] = [[] for _ in range(groups)]
        for v in d:
            members[max(range(groups), key=lambda m: cosine(v, u[m]))].append(v)
        u = [
            unit([sum(c) / len(mine) for c in zip(*mine, strict=True)]) if mine else u[m]
            for m, mine in enumerate(members)
        ]
    return [1 - max(cosine(v, w) for w in u) for v in d]


def evolution(states: list[list[Vector]], groups=8, iterations=2, ema=0.95, init="spread") -> list[float]:
    """``s`` from one image's patches behind consecutive blocks."""
    s = [0.0] * len(states[0])
    for before, after in zip(states, states[1:], strict=False):
        d = [unit([b - a for a, b in zip(x, y, strict=True)]) for x, y in zip(before, after, strict=True)]
        r = deviation(d, groups, iterations, init)
        s = [ema * old + (1 - ema) * new for old, new in zip(s, r, strict=True)]
    return s


def best(score: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:keep])


def geometry(depth: int, used: int) -> Geometry:
    return Geometry(
        family="x",
        arch="x",
        tokens=576,
        grid=(24, 24),
        prefix=1,
        vision_layers=used,
        vision_depth=depth,
        llm_layers=2,
        provides={"vision": frozenset(), "projector": frozenset()},
        seen_layers=used,
    )


def view(features: Tensor, index: Tensor, memory: dict[str, Any], grid: tuple[int, int]) -> TokenView:
    valid = index >= 0
    return TokenView(
        features=features,
        valid=valid,
        index=index,
        size=valid.float(),
        protected=torch.zeros_like(valid),
        grid=grid,
        memory=memory,
    )


def through(states: list[Tensor], index: Tensor, keep: int, grid: tuple[int, int], **options: Any) -> list[list[int]]:
    """What is kept of patches ``[B, N, C]`` behind consecutive blocks."""
    method, memory = make("evocut", options), {}
    for x in states[:-1]:
        method.note(view(x, index, memory, grid), Cut(site="vision.0"))
    answer = method.select(view(states[-1], index, memory, grid), Cut(site="vision.1", keep=keep))
    assert torch.isfinite(answer.score).all()
    return [row[row >= 0].tolist() for row in answer.kept]


def test_twelve_updates_of_clip():
    """Blocks 12 to 23, counted from 1, and the one in front of them; their weights sum to .46."""
    cuts = make("evocut", {}).plan(geometry(24, 23), 64)
    assert [c.site for c in cuts] == [f"vision.{i}" for i in range(10, 23)]
    assert [c.keep for c in cuts] == [None] * 12 + [64]
    total = 0.0
    for _ in cuts[1:]:
        total = 0.95 * total + 0.05
    assert round(total, 2) == 0.46
    assert len(make("evocut", {"first": 2}).plan(geometry(24, 23), 64)) == 23
    assert [c.site for c in make("evocut", {}).plan(geometry(24, 3), 64)] == ["vision.1", "vision.2"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options",
    [
        {"keep": 7},
        {"keep": 1},
        {"keep": 36},
        {"keep": 12, "first": 2},
        {"keep": 12, "groups": 3, "iterations": 5},
        {"keep": 12, "iterations": 0},
        {"keep": 12, "init": "farthest"},
        {"keep": 12, "ema": 0.3, "groups": 1},
        {"keep": 12, "site": "projector"},
    ],
)
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_llava_equals_the_transcription(vision, options):
    """Blocks 3 to 5 of six, counted from 1."""
    model, inputs = B.llava(vision, "llama", blocks=6, layers=2), B.prompts([[4, 9], [7, 2, 5]])
    with vtprune.attach(model, "evocut", **options) as handle, torch.no_grad():
        B.final(model, inputs)
        report = handle.report()
    hidden = B.watched(model.model.vision_tower, inputs["pixel_values"])[0]
    how = {k: v for k, v in options.items() if k in ("groups", "iterations", "ema", "init")}
    want = []
    for image in range(3):
        first = options.get("first", 3)
        states = [hidden[i][image, -B.N :].tolist() for i in range(first - 1, 6)]  # [i]: behind block i from 1
        want.append(best(evolution(states, **how), options["keep"]))
    assert report.stages[-1].kept[0].tolist() == want[0]
    assert report.stages[-1].kept[1].tolist() == want[1] + [B.N + i for i in want[2]]


def test_a_bare_tower_equals_the_transcription():
    """timm's blocks change nothing of what they have handed out."""
    model, pixels = B.vit("class", depth=4), B.images(2)
    states: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda m, a, o: states.append(o[:, 1:])) for b in model.blocks[:3]]
    hooks.append(model.blocks[3].register_forward_hook(lambda m, a, o: states.append(o[:, 1:].clone())))
    with torch.no_grad():
        model(pixels)
        for hook in hooks:
            hook.remove()
        with vtprune.attach(model, "evocut", keep=9) as handle:
            model(pixels)
            kept = handle.report().stages[-1].kept
    for image in range(2):
        assert kept[image].tolist() == best(evolution([x[image].tolist() for x in states]), 9)


def test_one_common_direction_scores_nothing():
    """The patch that goes elsewhere has the highest score."""
    torch.manual_seed(0)
    before = torch.randn(1, 40, 16, dtype=torch.float64)
    length = torch.rand(1, 40, 1, dtype=torch.float64) + 0.5
    after = before + length * torch.randn(16, dtype=torch.float64)
    method, memory, index = make("evocut", {}), {}, torch.arange(40)[None]
    method.note(view(before, index, memory, (5, 8)), Cut(site="vision.0"))
    assert float(method.note(view(after, index, memory, (5, 8)), Cut(site="vision.1")).abs().max()) < 1e-12
    after[0, 20] = before[0, 20] + torch.randn(16, dtype=torch.float64)
    assert through([before, after], index, 1, (5, 8), groups=1) == [[20]]


def test_a_group_without_members_keeps_its_direction():
    """All but one patch go the same way, so that the second group is empty."""
    before, step = torch.zeros(1, 12, 4, dtype=torch.float64), torch.ones(12, dtype=torch.float64)
    step[5] = -1
    after = step[None, :, None] * torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    method, memory, index = make("evocut", {"groups": 2}), {}, torch.arange(12)[None]
    method.note(view(before, index, memory, (3, 4)), Cut(site="vision.0"))
    score = method.note(view(after, index, memory, (3, 4)), Cut(site="vision.1"))
    B.close(score, 0.05 * (1 - step)[None])  # 1 - (-1) for the one


def test_scores_follow_tokens_that_move():
    """Tokens dropped by another stage between two blocks do not disturb the others' scores."""
    states = [torch.randn(1, 12, 6, dtype=torch.float64) for _ in range(3)]
    left = torch.tensor([1, 2, 4, 5, 7, 8, 9, 11])
    method, memory = make("evocut", {"groups": 2}), {}
    method.note(view(states[0], torch.arange(12)[None], memory, (3, 4)), Cut(site="vision.0"))
    first = method.note(view(states[1], torch.arange(12)[None], memory, (3, 4)), Cut(site="vision.1"))
    got = method.note(view(states[2][:, left], left[None], memory, (3, 4)), Cut(site="vision.2"))
    r = deviation([unit(v) for v in (states[2] - states[1])[0, left].tolist()], 2, 2, "spread")
    B.close(got, 0.95 * first[:, left] + 0.05 * torch.tensor([r], dtype=torch.float64))


@pytest.mark.parametrize("init", ["spread", "farthest"])
@pytest.mark.parametrize("keep", [1, 2, 7, 11, 12])
def test_counts_are_exact(keep, init):
    """Patches that nothing changes, equal updates, a few that are not numbers, images of one to twelve patches."""
    index = torch.tensor([[*range(12)], [0, 3, 4, 7, 8, 11, *[-1] * 6], [5, *[-1] * 11]])
    still = torch.ones(3, 12, 4)
    broken = torch.randn(3, 12, 4)
    broken[0, [2, 3]] = torch.nan
    for states in ([still, still], [still, still + 1], [still, broken]):
        kept = through(states, index, keep, (3, 4), init=init)
        assert [len(set(row)) for row in kept] == [len(row) for row in kept] == [keep, min(keep, 6), 1]


def test_an_image_does_not_see_its_batch():
    states = [torch.randn(3, 12, 6, dtype=torch.float64) for _ in range(3)]
    index = torch.tensor([[*range(12)], [*range(12)], [*range(7), *[-1] * 5]])
    whole = through(states, index, 4, (3, 4))
    for b, n in enumerate((12, 12, 7)):
        assert through([x[b : b + 1, :n] for x in states], index[b : b + 1, :n], 4, (3, 4)) == [whole[b]]


def test_what_cannot_be_followed_is_refused():
    with pytest.raises(vtprune.VtpruneError, match="first=24 is not one of the 23 blocks"):
        make("evocut", {"first": 24}).plan(geometry(24, 23), 64)
    with pytest.raises(vtprune.UnsupportedError, match="the first block's alone"):
        make("evocut", {}).plan(geometry(24, 1), 64)
    with pytest.raises(vtprune.UnsupportedError, match="does not show"):
        make("evocut", {}).plan(replace(geometry(24, 0), provides={"projector": frozenset()}), 64)
