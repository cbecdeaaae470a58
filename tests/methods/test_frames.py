"""Whole frames of a video: evenly spaced, or those that differ most."""

from __future__ import annotations

import math

import builders as B
import pytest
import torch
from films import geometry, random, view
from torch import Tensor

import vtprune
from vtprune.methods.base import make


def uniform(f: int, m: int) -> list[int]:
    """The frames in the middle of ``m`` equal spans of time."""
    return [math.floor((k + 0.5) * f / m + 1e-9) for k in range(m)]


def far_apart(frames: list[list[list[float]]], m: int) -> list[int]:
    """A max-min search over the frames' means: first the one that is farthest from its nearest."""
    means = [[sum(c) / len(frame) for c in zip(*frame, strict=True)] for frame in frames]
    f = range(len(means))

    def distance(i: int, j: int) -> float:
        a, b = means[i], means[j]
        dot = sum(v * w for v, w in zip(a, b, strict=True))
        return 1 - dot / math.sqrt(sum(v * v for v in a)) / math.sqrt(sum(v * v for v in b))

    chosen = [max(f, key=lambda j: min((distance(i, j) for i in f if i != j), default=0.0))]
    while len(chosen) < m:
        left = [j for j in f if j not in chosen]
        chosen.append(max(left, key=lambda j: min(distance(i, j) for i in chosen)))
    return sorted(chosen)


def tokens(frames: list[int], p: int, f: int = 0, loose: int = 0) -> list[int]:
    return [t * p + i for t in frames for i in range(p)] + list(range(f * p, f * p + loose))


def kept(name: str, x: Tensor, f: int, p: int, keep: int, protected: tuple[int, ...] = ()) -> list[list[int]]:
    """Of videos ``x`` ``[B, F P + loose, C]``."""
    method = make(name, {})
    (cut,) = method.plan(geometry(f, p, x.shape[1] - f * p), keep)
    chosen = method.select(view(x, f, p, protected), cut)
    assert chosen is not None and (protected or chosen.kept.shape[1] == cut.keep)
    return [row[row >= 0].tolist() for row in chosen.kept]


def test_the_middles_of_spans():
    assert uniform(8, 4) == [1, 3, 5, 7] and uniform(5, 2) == [1, 3] and uniform(9, 1) == [4]
    for f in range(1, 12):
        x = random(1, f, 2)
        for m in range(1, f + 1):
            assert kept("uniform-frames", x, f, 1, m) == [uniform(f, m)]
            assert len(set(uniform(f, m))) == m


@pytest.mark.parametrize("loose", [0, 1, 3])
@pytest.mark.parametrize("name", ["uniform-frames", "key-frames"])
def test_whole_frames_and_what_belongs_to_none(name, loose):
    f, p = 7, 4
    x = random(3, f * p + loose, 6)
    for keep in range(1, f * p + loose + 1):
        m = max((keep - loose) // p, 1)
        want = [
            uniform(f, m) if name == "uniform-frames" else far_apart(v[: f * p].unflatten(0, (f, p)).tolist(), m)
            for v in x
        ]
        assert kept(name, x, f, p, keep) == [tokens(w, p, f, loose) for w in want]


@pytest.mark.parametrize("keep", [1, 36, 80, 130, 500])
@pytest.mark.parametrize("name", ["uniform-frames", "key-frames"])
@pytest.mark.filterwarnings("ignore:.*stay whole")
def test_the_images_of_a_prompt_are_frames(name, keep):
    model, inputs = B.llava(blocks=2, layers=1), B.prompts([[4, 1, 1, 1, 1, 3], [7, 2], [3, 1, 1, 5]])
    dense = B.embeddings(model, inputs)
    with vtprune.attach(model, name, keep=keep) as handle:
        B.final(model, inputs)
        (stage,) = handle.report().stages
    for b, f in ((0, 5), (2, 3)):
        x, m = dense[b][B.visual_positions(inputs, b)], min(max(keep // B.N, 1), f)
        chosen = uniform(f, m) if name == "uniform-frames" else far_apart(x.unflatten(0, (f, B.N)).tolist(), m)
        assert stage.kept[b].tolist() == tokens(chosen, B.N)
    assert stage.kept[1].tolist() == list(range(B.N))


@pytest.mark.parametrize("name", ["uniform-frames", "key-frames"])
@pytest.mark.filterwarnings("ignore:.*stay whole")
def test_the_new_line_token_stays(name, tiny):
    """LLaVA-OneVision: three frames of four tokens and one behind them, beside an image that stays whole."""
    model, inputs = tiny("llava-onevision", "video")
    images = int((inputs["input_ids"] == B.IMAGE).sum())
    for keep, m in ((1, 1), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)):
        with vtprune.attach(model, name, keep=keep) as handle, torch.no_grad():
            model(**inputs)
            (stage,) = handle.report().stages
        assert stage.tokens_out == [4 * m + 1, images] and stage.kept[0][-1] == 12
        if name == "uniform-frames":
            assert stage.kept[0].tolist() == tokens(uniform(3, m), 4, 3, 1)


@pytest.mark.parametrize("name", ["uniform-frames", "key-frames"])
def test_tokens_that_must_stay_are_added(name):
    x = random(1, 20, 6)
    (plain,) = kept(name, x, 5, 4, 8)
    held = next(i for i in range(20) if i not in plain)
    assert kept(name, x, 5, 4, 8, protected=(held,)) == [sorted([*plain, held])]


def test_equal_frames_leave_exact_counts():
    x = torch.ones(2, 20, 6)
    for keep in (4, 8, 12, 19, 20):
        rows = kept("key-frames", x, 5, 4, keep)
        assert [len(set(row)) for row in rows] == [keep // 4 * 4] * 2
        assert rows == kept("key-frames", x * torch.nan, 5, 4, keep)


def test_a_frame_shown_twice_is_chosen_last():
    x = random(1, 1, 3, 8)[:, [0, 0, 0, 0]].clone()
    x[:, 2], x[:, 3] = random(1, 3, 8, seed=1), random(1, 3, 8, seed=2)
    (row,) = kept("key-frames", x.flatten(1, 2), 4, 3, 9)
    assert {i // 3 for i in row} in ({0, 2, 3}, {1, 2, 3})
