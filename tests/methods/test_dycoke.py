"""DyCoke (arXiv 2411.15024), its stage in front of the language model, against a slow transcription."""

from __future__ import annotations

import math
from typing import Any

import builders as B
import pytest
import torch
from films import Frame, cosine, framed, geometry, of_type, random, view
from torch import Tensor

import vtprune
from vtprune.core.types import Cut, Selection
from vtprune.methods.base import make


def pairs(frames: int, groups: str) -> dict[int, int]:
    """Which frame each compared one is compared with: pairs of neighbours, then those of each group of four."""
    out = {}
    for i in range(0, frames - 1, 2):
        out[i + 1] = i
    for i in range(0, frames - 4 if groups == "official" else frames - 2, 4):
        out[i + 2] = i
    return out


def dycoke(frames: list[Frame], counts: list[int], groups: str) -> list[int]:
    """Tokens kept; ``counts`` of each compared frame, in order."""
    p, compared, kept = len(frames[0]), pairs(len(frames), groups), []
    left = dict(zip(sorted(compared), counts, strict=True))
    for f, frame in enumerate(frames):
        order = list(range(p))
        if f in compared:
            like = [cosine(a, b) for a, b in zip(frame, frames[compared[f]], strict=True)]
            order = sorted(order, key=lambda i: like[i])[: left[f]]
        kept += [f * p + i for i in sorted(order)]
    return kept


def counts_of(f: int, p: int, groups: str, *, keep: int = 0, ratio: float | None = None) -> list[int]:
    """Tokens of each compared frame: ``keep`` of the frames' tokens, given out one by one in turn."""
    compared = len(pairs(f, groups))
    if ratio is not None:
        return [math.floor(ratio * p)] * compared
    counts = [0] * compared
    for turn in range(max(min(keep, f * p) - (f - compared) * p, 0)):
        counts[turn % compared] += 1
    return counts


def plan(f: int, p: int, keep: int | None = None, loose: int = 0, **options: Any) -> Cut:
    (cut,) = make("dycoke", options).plan(geometry(f, p, loose), keep)
    return cut


def select(x: Tensor, f: int, p: int, keep: int = 0, protected: tuple[int, ...] = (), **options: Any) -> Selection:
    cut = plan(f, p, keep, x.shape[1] - f * p, **options)
    chosen = make("dycoke", options).select(view(x, f, p, protected), cut)
    assert chosen is not None and chosen.kept.shape[1] == cut.keep
    return chosen


def kept(*args: Any, **options: Any) -> list[list[int]]:
    return select(*args, **options).kept.tolist()


def test_who_is_compared_with_whom():
    assert pairs(8, "all") == {1: 0, 2: 0, 3: 2, 5: 4, 6: 4, 7: 6}
    assert pairs(8, "official") == {1: 0, 2: 0, 3: 2, 5: 4, 7: 6}


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 100},
        {"keep": 151},
        {"keep": 252},
        {"keep": 0.5},
        {"keep": 0.8, "groups": "official"},
        {"ratio": 0.3},
        {"ratio": 0.51, "groups": "official"},
    ],
)
def test_the_images_of_a_prompt_are_frames(options):
    """On what a dense run gives the language model; one image alone is none."""
    model, inputs = B.llava(blocks=2, layers=1), B.prompts([[4, 1, 1, 1, 1, 1, 1, 3], [7, 2], [3, 1, 1, 1, 5]])
    dense = B.embeddings(model, inputs)
    with pytest.warns(UserWarning, match="stay whole"), vtprune.attach(model, "dycoke", **options) as handle:
        B.final(model, inputs)
        (stage,) = handle.report().stages
    groups = options.get("groups", "all")
    for b, f in ((0, 7), (2, 4)):
        x, keep = dense[b][B.visual_positions(inputs, b)], options.get("keep", 1.0)
        keep = int(keep * len(x)) if isinstance(keep, float) else keep
        counts = counts_of(f, B.N, groups, keep=keep, ratio=options.get("ratio"))
        assert stage.kept[b].tolist() == dycoke(framed(x, f, B.N), counts, groups)
    assert stage.kept[1].tolist() == list(range(B.N))


@pytest.mark.parametrize(
    ("family", "f", "p", "loose"), [("qwen2.5-vl", 2, 8, 0), ("qwen3-vl", 4, 4, 0), ("llava-onevision", 3, 4, 1)]
)
@pytest.mark.parametrize("options", [{"keep": 9}, {"ratio": 0.5}, {"keep": 10, "groups": "official"}])
@pytest.mark.filterwarnings("ignore:dycoke prunes videos")
def test_videos_of_models(family, f, p, loose, options, tiny):
    model, inputs = tiny(family, "video")
    B.randomise(model, 5)
    _, inputs = of_type(model, inputs, torch.float64)
    (x, _), n = B.embeddings(model, inputs), f * p + loose
    x = x[inputs["input_ids"][0][inputs["attention_mask"][0].bool()] == 4]
    with vtprune.attach(model, "dycoke", **options) as handle, torch.no_grad():
        model(**inputs)
        (stage,) = handle.report().stages
    groups = options.get("groups", "all")
    counts = counts_of(f, p, groups, keep=options.get("keep", 0) - loose, ratio=options.get("ratio"))
    images = (inputs["input_ids"] == B.IMAGE).sum(1).tolist()  # behind the video, and in the other prompt
    assert stage.kept[0].tolist() == dycoke(framed(x, f, p), counts, groups) + list(range(f * p, n + images[0]))
    assert stage.kept[1].tolist() == list(range(images[1]))


@pytest.mark.parametrize("groups", ["all", "official"])
@pytest.mark.parametrize("f", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11])
def test_views(f, groups):
    """Videos of any length, also those that the official code shortens or refuses."""
    p, loose = 5, f % 3
    x = random(2, f * p + loose, 6)
    tail = list(range(f * p, f * p + loose))
    whole = f - len(pairs(f, groups))
    for keep in range(1, f * p + loose + 1):
        counts = counts_of(f, p, groups, keep=keep - loose)
        want = [dycoke(framed(v, f, p), counts, groups) + tail for v in x]
        assert kept(x, f, p, keep, groups=groups) == want
        assert len(want[0]) == max(keep, whole * p + loose)
    for ratio in (0.01, 0.3, 0.5, 0.7, 1.0):
        counts = counts_of(f, p, groups, ratio=ratio)
        assert kept(x, f, p, ratio=ratio, groups=groups) == [dycoke(framed(v, f, p), counts, groups) + tail for v in x]


@pytest.mark.parametrize(("f", "count"), [(32, 3098), (8, 878)])
def test_the_official_counts(f, count):
    """K = 0.7: 32 frames leave 9 * 196 + 23 * 58 tokens."""
    cut = plan(f, 196, ratio=0.3, groups="official")
    assert cut.keep == count
    x = random(1, f * 196, 2)
    assert len(kept(x, f, 196, ratio=0.3, groups="official")[0]) == count


def test_ratios_are_rounded_down():
    """By what is written, not by its nearest double: 0.29 * 100 is 28.999999999999996."""
    for ratio in (0.29, 0.57, 0.58):
        assert plan(2, 100, ratio=ratio).keep == 100 + round(ratio * 100)
    assert plan(4, 196, ratio=0.3).keep == 196 + 3 * 58
    assert plan(4, 10, ratio=0.05).keep == 10
    assert plan(4, 10, loose=1, ratio=1.0).keep == 41


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.8])
def test_a_static_video_keeps_the_first_tokens_of_each_frame(ratio, dtype):
    """Equal tokens are exactly equal, whatever their lengths' rounding."""
    x = random(2, 1, 5, 8).to(dtype).expand(2, 6, 5, 8).flatten(1, 2)
    few = list(range(round(ratio * 5)))
    want = [f * 5 + i for f in range(6) for i in (range(5) if f % 4 == 0 else few)]
    assert kept(x, 6, 5, ratio=ratio) == [want] * 2


def test_the_third_frame_is_compared_with_the_first():
    """The second frame shows something else for a moment; in the fourth, a token moves back."""
    x = random(1, 1, 4, 8).repeat(1, 4, 1, 1)
    x[:, 1, 2] *= -1
    x[:, 2, 3] *= -1
    assert kept(x.flatten(1, 2), 4, 4, ratio=0.25) == [[0, 1, 2, 3, 6, 11, 15]]


def test_tokens_that_must_stay_take_the_last_places():
    """The frames that stay whole, and what belongs to no frame, do not make room for them."""
    x = random(1, 21, 6)
    plain = kept(x, 5, 4, 15)[0]
    assert plain == [*dycoke(framed(x[0], 5, 4), [2, 2, 2], "all"), 20]
    for held in set(range(20)) - set(plain):
        (row,) = kept(x, 5, 4, 15, protected=(held,))
        (gone,) = set(plain) - set(row)
        assert held in row and gone // 4 in (1, 2, 3)
        frame = framed(x[0], 5, 4)
        of = pairs(5, "all")[gone // 4]
        mine = [i for i in plain if i // 4 == gone // 4]
        assert gone == max(mine, key=lambda i: cosine(frame[i // 4][i % 4], frame[of][i % 4]))
    assert kept(x, 5, 4, 15, protected=(0, 20)) == [plain]


def test_minus_the_cosine_is_the_score():
    x = random(2, 21, 6)
    score = select(x, 5, 4, 13).score
    for row, told in zip(x.tolist(), score.tolist(), strict=True):
        frame = [row[f * 4 : f * 4 + 4] for f in range(5)]
        for i, value in enumerate(told):
            of = pairs(5, "all").get(i // 4)
            if of is None:
                assert math.isnan(value)
            else:
                assert value == pytest.approx(-cosine(frame[i // 4][i % 4], frame[of][i % 4]), abs=1e-12)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_odd_numbers_leave_exact_counts(value):
    x = random(1, 24, 4)
    x[0, [0, 5, 13]] = value
    for keep in (1, 13, 15, 23, 24):
        (row,) = kept(x, 6, 4, keep)
        assert len(set(row)) == len(row) == max(keep, 8) and {0, 1, 2, 3, 16, 17, 18, 19} <= set(row)
    assert kept(torch.full((1, 24, 4), value), 6, 4, ratio=0.5)[0][:6] == [0, 1, 2, 3, 4, 5]


def test_a_ratio_is_a_budget(recwarn):
    """Whatever the typical image is, it drops tokens: nobody is told that it changes nothing, and what needs the whole
    raster cannot follow."""
    model = B.llava(blocks=2, layers=1)
    vtprune.attach(model, "dycoke", ratio=0.3).remove()
    assert not list(recwarn)
    stages = (vtprune.Stage(method="dycoke", options={"ratio": 0.3}), vtprune.Stage(method="evs", keep=0.2))
    with pytest.raises(vtprune.VtpruneError, match="needs the whole raster"):
        vtprune.attach(model, vtprune.Recipe(name="both", stages=stages))
    vtprune.attach(model, "dycoke", ratio=1.0).remove()


def test_what_is_refused():
    for options in ({"ratio": 0.0}, {"ratio": 1.5}, {"groups": "some"}):
        with pytest.raises(vtprune.VtpruneError):
            make("dycoke", options)
    assert vtprune.describe("dycoke").keep == 0.5
