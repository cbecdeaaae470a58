"""VidCom2 (arXiv 2505.14454) against a slow transcription of its kernels, shares and choices."""

from __future__ import annotations

import math
from typing import Any

import builders as B
import pytest
import torch
from films import Frame, framed, geometry, of_type, random, view
from torch import Tensor

import vtprune
from vtprune.core.types import Selection
from vtprune.methods.base import make
from vtprune.methods.vidcom2 import quotas


def usual(frames: list[Frame]) -> tuple[list[list[float]], list[list[float]]]:
    """How like the centre of the video (v) and of its frame (u) each token is."""
    tokens = [t for frame in frames for t in frame]
    n, channels = len(tokens), range(len(tokens[0]))
    mean = [sum(t[c] for t in tokens) / n for c in channels]
    variance = [sum((t[c] - mean[c]) ** 2 for t in tokens) / n for c in channels]
    low = sorted(channels, key=lambda c: variance[c])[: len(channels) // 2]

    def direction(t: list[float]) -> list[float]:
        length = math.sqrt(sum(t[c] ** 2 for c in low))
        return [t[c] / length for c in low]

    def centre(some: Frame) -> list[float]:
        return [sum(values) / len(some) for values in zip(*some, strict=True)]

    def kernel(x: list[float], c: list[float]) -> float:
        far = sum((a - b) ** 2 for a, b in zip(x, c, strict=True))
        return sum(math.exp(-far / (2 * 2.0**k)) for k in (-3, -2, -1, 0, 1))

    unit = [[direction(t) for t in frame] for frame in frames]
    whole = centre([t for frame in unit for t in frame])
    v = [[kernel(t, whole) for t in frame] for frame in unit]
    return v, [[kernel(t, centre(frame)) for t in frame] for frame in unit]


def by_frames(v: list[list[float]], share: float) -> list[int]:
    """Tokens of each frame, of a ``share`` of all."""
    p, s = len(v[0]), [-sum(row) / len(row) for row in v]
    e = [math.exp((x - max(s)) / 0.01) for x in s]
    w = [x / sum(e) for x in e]
    scales = [min(1.0, share * (1 + x - sum(w) / len(w))) for x in w]
    return [max(1, round(x * p)) for x in scales]


def vidcom2(frames: list[Frame], keep: int, rounding: str = "exact") -> list[int]:
    """Tokens kept of a video, of a budget of ``keep``."""
    v, u = usual(frames)
    p, like = len(v[0]), [a + b for x, y in zip(v, u, strict=True) for a, b in zip(x, y, strict=True)]
    kept, first = [], []
    for f, quota in enumerate(by_frames(v, keep / (len(v) * p))):
        order = sorted(range(f * p, f * p + p), key=lambda i: like[i])
        kept += order[:quota]
        first.append(order[0])
    if keep == len(like):  # a whole budget is everything
        return list(range(keep))
    if rounding == "exact":
        rest = [i for i in range(len(like)) if i not in kept]
        while len(kept) > keep:
            kept.remove(max((i for i in kept if i not in first), key=lambda i: like[i]))
        while len(kept) < keep:
            kept.append(rest.pop(rest.index(min(rest, key=lambda i: like[i]))))
    return sorted(kept)


def select(x: Tensor, f: int, p: int, keep: int, protected: tuple[int, ...] = (), **options: Any) -> Selection:
    method = make("vidcom2", options)
    (cut,) = method.plan(geometry(f, p, x.shape[1] - f * p), keep)
    chosen = method.select(view(x, f, p, protected), cut)
    assert chosen is not None
    for count in chosen.counts.tolist():
        if not cut.adaptive:
            assert count == cut.keep
        elif not protected:
            assert cut.keep <= count <= cut.most
    return chosen


def kept(*args: Any, **options: Any) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in select(*args, **options).kept]


def uneven(b: int, f: int, p: int, c: int, loose: int = 0, seed: int = 0) -> Tensor:
    """Frames around centres of their own, some close to the video's, in channels that vary differently."""
    x = random(b, f, p, c, seed=seed) * torch.linspace(0.1, 1, f, dtype=torch.float64)[:, None, None] + 1
    x = x * torch.linspace(2, 0.2, c, dtype=torch.float64)
    return torch.cat([x.flatten(1, 2), random(b, loose, c, seed=seed + 1)], 1)


@pytest.mark.parametrize("rounding", ["exact", "frames"])
@pytest.mark.parametrize("keep", [6, 45, 90, 140, 500])
def test_the_images_of_a_prompt_are_frames(keep, rounding):
    """On what a dense run gives the language model; one image alone is none."""
    model, inputs = B.llava(blocks=2, layers=1), B.prompts([[4, 1, 1, 1, 1, 3], [7, 2], [3, 1, 1, 5]])
    dense = B.embeddings(model, inputs)
    attached = vtprune.attach(model, "vidcom2", keep=keep, rounding=rounding)
    with pytest.warns(UserWarning, match="stay whole"), attached as handle:
        B.final(model, inputs)
        (stage,) = handle.report().stages
    for b, f in ((0, 5), (2, 3)):
        x = dense[b][B.visual_positions(inputs, b)]
        assert stage.kept[b].tolist() == vidcom2(framed(x, f, B.N), min(keep, f * B.N), rounding)
    assert stage.kept[1].tolist() == list(range(B.N))
    if rounding == "exact":
        assert stage.tokens_out == [min(keep, 180), 36, min(keep, 108)]


@pytest.mark.parametrize(
    ("family", "f", "p", "loose"), [("qwen2.5-vl", 2, 8, 0), ("qwen3-vl", 4, 4, 0), ("llava-onevision", 3, 4, 1)]
)
@pytest.mark.parametrize("keep", [5, 9])
@pytest.mark.filterwarnings("ignore:vidcom2 prunes videos")
def test_videos_of_models(family, f, p, loose, keep, tiny):
    model, inputs = tiny(family, "video")
    B.randomise(model, 5)
    _, inputs = of_type(model, inputs, torch.float64)
    (x, _), n = B.embeddings(model, inputs), f * p + loose
    x = x[inputs["input_ids"][0][inputs["attention_mask"][0].bool()] == 4]
    counts = (inputs["input_ids"] == B.IMAGE).sum(1).tolist()  # images behind the video, and in the other prompt
    for rounding in ("exact", "frames"):
        with vtprune.attach(model, "vidcom2", keep=keep, rounding=rounding) as handle, torch.no_grad():
            model(**inputs)
            (stage,) = handle.report().stages
        want = vidcom2(framed(x, f, p), keep - loose, rounding) + list(range(f * p, n + counts[0]))
        assert stage.kept[0].tolist() == want
        assert stage.kept[1].tolist() == list(range(counts[1]))


@pytest.mark.parametrize("rounding", ["exact", "frames"])
@pytest.mark.parametrize(("f", "p", "loose", "c"), [(6, 5, 0, 8), (5, 7, 3, 9), (1, 9, 2, 8), (9, 3, 0, 4)])
def test_views(f, p, loose, c, rounding):
    x = uneven(3, f, p, c, loose)
    tail, off = list(range(f * p, f * p + loose)), 0
    for keep in range(f + loose, f * p + loose + 1):
        want = [vidcom2(framed(v, f, p), keep - loose, rounding) + tail for v in x]
        assert kept(x, f, p, keep, rounding=rounding) == want
        off += any(len(row) != keep for row in want)
    assert (off > 0) == (rounding == "frames" and f > 1)


def test_the_paper_s_shares():
    """Worked by hand: a frame unlike the others at R = 1/4, and frames that are all alike."""
    v = torch.zeros(2, 4, 196, dtype=torch.float64)
    v[0, 0] = -1  # w = (1, 0, 0, 0)
    assert quotas(v, 196).tolist() == [[86, 37, 37, 37], [49, 49, 49, 49]]
    v = random(3, 5, 7) * 0.02
    for keep in (1, 5, 9, 20, 35):
        assert quotas(v, keep).tolist() == [by_frames(rows, keep / 35) for rows in v.tolist()]


def test_an_odd_frame_gets_more():
    """86 + 37 + 37 + 37 = 197 of a budget of 196: exact, the most usual one goes."""
    x = random(1, 4, 196, 16)
    x[..., :8] *= 0.3  # half of the channels vary least
    x[:, 1:] = x[:, 1:] * 0.05 + 1
    x[:, 0, :, :8] += torch.tensor([1.0, -1] * 4, dtype=torch.float64)
    x = x.flatten(1, 2)
    (frames,), (exact,) = kept(x, 4, 196, 196, rounding="frames"), kept(x, 4, 196, 196)
    counts = [sum(i // 196 == f for i in frames) for f in range(4)]
    assert counts == [86, 37, 37, 37]
    assert len(exact) == 196 and set(exact) < set(frames)
    (gone,) = set(frames) - set(exact)
    v, u = usual(framed(x[0], 4, 196))
    assert gone == max(frames, key=lambda i: v[i // 196][i % 196] + u[i // 196][i % 196])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_frames_get_as_much(dtype):
    x = random(1, 1, 196, 16).to(dtype).repeat(2, 4, 1, 1).flatten(1, 2)
    for rounding in ("exact", "frames"):
        for row in kept(x, 4, 196, 196, rounding=rounding):
            places = [[i % 196 for i in row if i // 196 == f] for f in range(4)]
            assert [len(p) for p in places] == [49] * 4


def test_samples_do_not_share_centres():
    """The official code is for one sample at a time."""
    x = torch.cat([uneven(1, 4, 6, 8, seed=s) * (s + 1) for s in range(3)])
    for options in ({"rounding": "exact"}, {"rounding": "frames"}):
        assert kept(x, 4, 6, 9, **options) == [kept(row[None], 4, 6, 9, **options)[0] for row in x]


@pytest.mark.parametrize("rounding", ["exact", "frames"])
def test_every_frame_keeps_one(rounding):
    x = uneven(2, 6, 5, 8)
    for row in kept(x, 6, 5, 6, rounding=rounding):
        assert sorted({i // 5 for i in row}) == list(range(6))
    assert {len(row) for row in kept(x, 6, 5, 6)} == {6}


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_less_than_a_token_for_each_frame(keep):
    """Exact: those of the frames' first tokens that are least usual; else one of each."""
    x = uneven(2, 6, 5, 8)
    for row, exact, frames in zip(x, kept(x, 6, 5, keep), kept(x, 6, 5, keep, rounding="frames"), strict=True):
        v, u = usual(framed(row, 6, 5))
        like = [a + b for i, j in zip(v, u, strict=True) for a, b in zip(i, j, strict=True)]
        first = [min(range(f * 5, f * 5 + 5), key=lambda i: like[i]) for f in range(6)]
        assert exact == sorted(sorted(first, key=lambda i: like[i])[:keep])
        assert frames == first


def test_tokens_that_must_stay():
    """Exact: they take the last places; else they are added."""
    x = uneven(1, 5, 6, 8, loose=1)
    plain, frames = set(kept(x, 5, 6, 14)[0]), set(kept(x, 5, 6, 14, rounding="frames")[0])
    v, u = usual(framed(x[0], 5, 6))
    like = [a + b for i, j in zip(v, u, strict=True) for a, b in zip(i, j, strict=True)]
    held = max(range(30), key=lambda i: like[i])
    assert held not in plain | frames
    row = set(kept(x, 5, 6, 14, protected=(held,))[0])
    assert held in row and len(row) == 14 and row - plain == {held} and 30 in row
    assert {i // 6 for i in row} == set(range(6))
    assert set(kept(x, 5, 6, 14, protected=(held,), rounding="frames")[0]) == frames | {held}


def test_similarity_is_the_score():
    x = uneven(2, 3, 4, 6, loose=1)
    for rounding in ("exact", "frames"):
        score = select(x, 3, 4, 7, rounding=rounding).score
        for row, told in zip(x, score.tolist(), strict=True):
            v, u = usual(framed(row, 3, 4))
            want = [-a - b for i, j in zip(v, u, strict=True) for a, b in zip(i, j, strict=True)]
            assert told[:12] == pytest.approx(want, abs=1e-12) and math.isnan(told[12])


def test_only_the_quiet_half_of_the_channels_counts():
    x = uneven(1, 4, 6, 8)
    loud = x.clone()
    loud[..., :4] = 100 * random(1, 24, 4, seed=9)
    quiet = x.clone()
    quiet[..., :4] = 1000 * random(1, 24, 4, seed=10)
    assert kept(loud, 4, 6, 9) == kept(quiet, 4, 6, 9)


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("channels", [1, 4])
def test_equal_tokens_leave_exact_counts(value, channels):
    rows = kept(torch.full((2, 12, channels), value), 3, 4, 7)
    assert all(len(row) == 7 == len(set(row)) for row in rows)


@pytest.mark.parametrize(("keep", "loose"), [(1, 0), (30, 0), (30, 2), (2, 2), (500, 2)])
def test_the_bounds_of_a_plan(keep, loose):
    """Frame by frame the count follows from the video, within what the plan says."""
    for make_x in (uneven, lambda b, f, p, c, loose, seed: random(b, f * p + loose, c, seed=seed)):
        for seed in range(4):
            x = make_x(4, 7, 9, 6, loose=loose, seed=seed)
            select(x, 7, 9, min(keep, 63 + loose), rounding="frames")
    assert vtprune.describe("vidcom2").keep == 0.25
