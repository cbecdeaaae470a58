"""EVS (arXiv 2510.14624) against a slow transcription of its mask."""

from __future__ import annotations

from typing import Any

import builders as B
import pytest
import torch
from films import Frame, cosine, framed, geometry, of_type, random, view
from torch import Tensor

import vtprune
from vtprune.core.types import Selection
from vtprune.methods.base import make


def evs(frames: list[Frame], keep: int) -> list[int]:
    """Tokens kept: one stable order over all frames, the first of which leads it."""
    p = len(frames[0])
    change = [255.0] * p
    for before, now in zip(frames, frames[1:], strict=False):
        change += [1 - cosine(a, b) for a, b in zip(before, now, strict=True)]
    order = sorted(range(len(change)), key=lambda i: -change[i])
    return sorted(order[: max(p, keep)])


def select(x: Tensor, f: int, p: int, keep: int, protected: tuple[int, ...] = ()) -> Selection:
    method = make("evs", {})
    (cut,) = method.plan(geometry(f, p, x.shape[1] - f * p), keep)
    chosen = method.select(view(x, f, p, protected), cut)
    assert chosen is not None and chosen.kept.shape[1] == cut.keep
    return chosen


def kept(*args: Any, **options: Any) -> list[list[int]]:
    return select(*args, **options).kept.tolist()


@pytest.mark.parametrize("keep", [1, 36, 37, 90, 179, 180, 500])
def test_the_images_of_a_prompt_are_frames(keep):
    """On what a dense run gives the language model; one image alone is none."""
    model, inputs = B.llava(blocks=2, layers=1), B.prompts([[4, 1, 1, 1, 1, 3], [7, 2], [3, 1, 1, 5]])
    dense = B.embeddings(model, inputs)
    with pytest.warns(UserWarning, match="stay whole"), vtprune.attach(model, "evs", keep=keep) as handle:
        B.final(model, inputs)
        (stage,) = handle.report().stages
    for b, f in ((0, 5), (2, 3)):
        x = dense[b][B.visual_positions(inputs, b)]
        assert stage.kept[b].tolist() == evs(framed(x, f, B.N), keep)
    assert stage.kept[1].tolist() == list(range(B.N))
    assert stage.tokens_out == [min(max(keep, 36), 180), 36, min(max(keep, 36), 108)]


@pytest.mark.parametrize(
    ("family", "f", "p", "loose"), [("qwen2.5-vl", 2, 8, 0), ("qwen3-vl", 4, 4, 0), ("llava-onevision", 3, 4, 1)]
)
@pytest.mark.parametrize("keep", [2, 9, 11])
@pytest.mark.filterwarnings("ignore:evs prunes videos")
def test_videos_of_models(family, f, p, loose, keep, tiny):
    model, inputs = tiny(family, "video")
    B.randomise(model, 5)
    _, inputs = of_type(model, inputs, torch.float64)
    (x, _), n = B.embeddings(model, inputs), f * p + loose
    x = x[inputs["input_ids"][0][inputs["attention_mask"][0].bool()] == 4]
    assert len(x) == n
    with vtprune.attach(model, "evs", keep=keep) as handle, torch.no_grad():
        model(**inputs)
        (stage,) = handle.report().stages
    counts = (inputs["input_ids"] == B.IMAGE).sum(1).tolist()  # images behind the video, and in the other prompt
    want = evs(framed(x, f, p), keep - loose) + list(range(f * p, n + counts[0]))
    assert stage.kept[0].tolist() == want
    assert stage.kept[1].tolist() == list(range(counts[1]))


@pytest.mark.parametrize(("f", "p", "loose"), [(6, 5, 0), (5, 4, 3), (1, 4, 2), (9, 1, 0)])
def test_views(f, p, loose):
    x = random(3, f * p + loose, 6)
    for keep in range(1, f * p + loose + 1):
        tail = list(range(f * p, f * p + loose))
        assert kept(x, f, p, keep) == [evs(framed(v, f, p), keep - loose) + tail for v in x]


def test_the_first_frame_stays_and_others_may_lose_everything():
    x = random(1, 40, 6).unflatten(1, (5, 8))
    x[:, 2] = x[:, 1] * 1.5  # the same directions
    (row,) = kept(x.flatten(1, 2), 5, 8, 32)
    assert row == [*range(16), *range(24, 40)]
    assert kept(x.flatten(1, 2), 5, 8, 1) == [list(range(8))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [5, 6, 12, 19, 20])
def test_a_static_video_keeps_its_first_tokens(keep, dtype):
    """Equal tokens are exactly equal, whatever their lengths' rounding."""
    frames = random(2, 1, 5, 8).to(dtype).expand(2, 4, 5, 8)
    assert kept(frames.flatten(1, 2), 4, 5, keep) == [list(range(keep))] * 2


def test_what_stood_still_leaves_in_time_order():
    """One token changes in the third frame; of the rest the earliest stay."""
    x = random(1, 1, 4, 8).repeat(1, 4, 1, 1)
    x[:, 2:, 3] *= -1
    assert kept(x.flatten(1, 2), 4, 4, 7) == [[0, 1, 2, 3, 4, 5, 11]]


def test_tokens_that_must_stay_take_the_last_places():
    x = random(1, 21, 6)
    (least,) = set(range(20)) - set(evs(framed(x[0], 5, 4), 19))
    assert set(kept(x, 5, 4, 12, protected=(least,))[0]) == {least, *evs(framed(x[0], 5, 4), 10), 20}
    assert kept(x, 5, 4, 12, protected=(0, 20)) == kept(x, 5, 4, 12)


def test_the_change_is_the_score():
    x = random(2, 13, 6)
    score = select(x, 3, 4, 9).score
    for row, told in zip(x.tolist(), score.tolist(), strict=True):
        assert told[:4] == [255.0] * 4 and told[12] == 255.0
        assert told[4:12] == pytest.approx([1 - cosine(row[i], row[i - 4]) for i in range(4, 12)], abs=1e-12)


def test_lengths_do_not_matter():
    x = random(1, 24, 6)
    scaled = x * torch.linspace(0.1, 9, 24, dtype=torch.float64)[None, :, None]
    assert kept(x, 4, 6, 13) == kept(scaled, 4, 6, 13)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_odd_numbers_leave_exact_counts(value):
    x = torch.full((2, 12, 4), value)
    assert all(row == sorted(set(row)) and row[:4] == [0, 1, 2, 3] for row in kept(x, 3, 4, 7))
    x = random(1, 12, 4)
    x[0, 5] = value
    (row,) = kept(x, 3, 4, 10)
    assert len(row) == 10 and (value == 0 or not {5, 9} & set(row))


def test_the_plan_is_the_paper_s():
    """``max(P, keep)``, of images whatever is asked for."""
    plan = make("evs", {}).plan
    assert [plan(geometry(8, 196), keep)[0].keep for keep in (1, 196, 197, 784)] == [196, 196, 197, 784]
    assert plan(geometry(8, 196, 1), 100)[0].keep == 197
    assert vtprune.describe("evs").keep == 0.5
