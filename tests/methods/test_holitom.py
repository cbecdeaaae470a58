"""HoliTom (arXiv 2505.21334) against a slow transcription: scenes, what is static, clusters; later the prompt."""

from __future__ import annotations

import itertools
import math
from typing import Any

import builders as B
import films
import numpy as np
import pytest
import torch
from films import (
    FAMILIES,
    Vector,
    alone,
    attention_of,
    cosine,
    decisions,
    equals_dense,
    finite,
    mean,
    moving,
    of_type,
    repeating,
    rows,
    same_rows,
)
from torch import Tensor

import oracles as O
import vtprune
from vtprune.core.types import NOTE, Action, Geometry, Selection, TokenView
from vtprune.methods.base import METHODS, Cut, make
from vtprune.methods.holitom import best_scenes

SITE = "vision.2"


def blend(a: Vector, b: Vector, share: float) -> Vector:
    """``share`` of a, the rest of b."""
    return [share * p + (1 - share) * q for p, q in zip(a, b, strict=True)]


def half_even(x: float) -> int:
    """Rounded; what is a half up to rounding goes to the even number."""
    return round(round(x, 9))


def segmentations(frames: int) -> list[list[int]]:
    """All of them, as the frames that begin a scene."""
    rest = range(1, frames)
    return [[0, *cuts] for r in range(frames) for cuts in itertools.combinations(rest, r)]


def alike(same: list[list[bool]], start: int, end: int) -> list[int]:
    """Places that are static in the frames ``start`` to ``end`` - 1: none in a single one."""
    if end - start < 2 or not same:
        return []
    return [i for i in range(len(same[0])) if all(same[t][i] for t in range(start, end - 1))]


def saving(same: list[list[bool]], starts: list[int], frames: int) -> int:
    return sum((e - s - 1) * len(alike(same, s, e)) for s, e in zip(starts, [*starts[1:], frames], strict=True))


def scenes(same: list[list[bool]], frames: int, window: int = 1024) -> list[int]:
    """The segmentation that saves most, by trying them all; of equal ones the one of the longest last scene, then of
    the longest one in front of it."""
    allowed = [
        s for s in segmentations(frames) if all(b - a <= window for a, b in zip(s, [*s[1:], frames], strict=True))
    ]
    most = max(saving(same, s, frames) for s in allowed)
    return min((s for s in allowed if saving(same, s, frames) == most), key=lambda s: s[::-1])


def clusters(tokens: dict[int, Vector], count: int, neighbours: int) -> dict[int, list[int]]:
    """DPC-KNN: the members of each of ``count`` centres, itself first; distances per root of the channels."""
    d = {
        i: {j: math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / len(a)) for j, b in tokens.items()}
        for i, a in tokens.items()
    }
    density = {}
    for i in tokens:
        near = sorted(x**2 for x in d[i].values())[:neighbours]
        density[i] = math.exp(-sum(near) / len(near))
    peak = {}
    for i in tokens:
        denser = [d[i][j] for j in tokens if density[j] > density[i] or (density[j] == density[i] and j < i)]
        peak[i] = density[i] * (min(denser) if denser else max(d[i].values()))
    centres = sorted(sorted(tokens, key=lambda i: (-peak[i], i))[:count])
    groups = {c: [c] for c in centres}
    for i in tokens:
        if centres and i not in centres:
            groups[min(centres, key=lambda c: d[i][c])].append(i)
    return groups


def retained(rho: float, n: int, saved: int) -> float:
    """The retain ratio of what is left of ``n`` tokens when ``saved`` of them are."""
    return min(1.0, rho / ((n - saved) / n))


def holitom(
    frames: list[list[Vector]],
    attention: list[Vector],
    outer: int,
    threshold: float = 0.8,
    window: int = 1024,
    clustered: float = 0.0,
    neighbours: int = 7,
    beta: float = 0.6,
) -> tuple[dict[int, Vector], list[int], float]:
    """What stands behind the projector, by its index in the video; the scenes' first frames, the ratio."""
    f, p = len(frames), len(frames[0])
    same = [[cosine(frames[t][i], frames[t + 1][i]) > threshold for i in range(p)] for t in range(f - 1)]
    starts = scenes(same, f, window)
    rho = retained(outer / (f * p), f * p, saving(same, starts, f))
    out: dict[int, Vector] = {}

    def merge(tokens: dict[int, Vector], count: int, frame: int) -> None:
        for centre, members in clusters(tokens, count, neighbours).items():
            rest = [tokens[j] for j in members[1:]]
            out[frame * p + centre] = blend(tokens[centre], mean(rest), beta) if rest else tokens[centre]

    for s, e in zip(starts, [*starts[1:], f], strict=True):
        static = alike(same, s, e)
        if static:
            means = {i: mean([frames[t][i] for t in range(s, e)]) for i in static}
            merge(means, max(1, half_even(rho * len(static))), s)
        for t in range(s, e):
            moving = [i for i in range(p) if i not in static]
            total = math.ceil(rho * len(moving) - 1e-9)
            ranked = half_even(total * (1 - clustered))
            salient = sorted(moving, key=lambda i: -attention[t][i])[:ranked]
            for i in salient:
                out[t * p + i] = frames[t][i]
            merge({i: frames[t][i] for i in moving if i not in salient}, total - ranked, t)
    return dict(sorted(out.items())), starts, rho


def asked(x: list[Vector], score: list[float], keep: int) -> dict[int, Vector]:
    """The best ``keep``; every other token averaged into the most similar of them, one after the other."""
    kept = sorted(O._top(score, keep))
    h = {k: x[k] for k in kept}
    for i, token in enumerate(x):
        if i not in kept:
            best = max(kept, key=lambda k: cosine(token, x[k]))
            h[best] = [(a + b) / 2 for a, b in zip(h[best], token, strict=True)]
    return h


# --------------------------------------------------------------------------------------------------------------------
# views made by hand


def video(f: int, p: int, c: int = 6, seed: int = 0, moving: float = 0.4, cuts: tuple[int, ...] = ()) -> Tensor:
    return repeating(f, p, c, seed, moving, cuts, 0.1)


def view(
    features: Tensor, f: int, attention: Tensor | None = None, loose: int = 0, protected: list[int] | None = None
) -> TokenView:
    """A view of the videos ``features`` ``[B, N, C]``, of ``f`` frames each, with ``loose`` tokens behind."""
    told = attention_of(features, loose) if attention is None else attention
    p = (features.shape[1] - loose) // f
    return films.view(features, f, p, protected or (), {NOTE + SITE: lambda: told})


def select(made: TokenView, outer: int, **options: Any) -> Selection | None:
    cut = Cut(site="projector", keep=1, adaptive=True, data={"note": SITE, "outer": outer})
    return make("holitom", options).select(made, cut)


def slow(
    made: TokenView, outer: int, b: int = 0, site: str = SITE, **options: Any
) -> tuple[dict[int, Vector], list[int], float]:
    f, p = len(made.frames[b]), made.frames[b][0]
    x = made.features[b, : f * p].double().unflatten(0, (f, p)).tolist()
    a = made.noted(site)[b, : f * p].double().unflatten(0, (f, p)).tolist()
    out, starts, rho = holitom(x, a, outer - (made.features.shape[1] - f * p), **options)
    return out | {i: made.features[b, i].tolist() for i in range(f * p, made.features.shape[1])}, starts, rho


@pytest.mark.parametrize("outer", [1, 9, 37, 66, 71])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clustered": 0.5, "threshold": 0.65},
        {"clustered": 1.0, "beta": 0.0, "neighbours": 2},
        {"clustered": 0.7, "beta": 1.0, "window": 2},
        {"window": 1},
        {"threshold": -1.0, "neighbours": 100, "window": 3},
        {"threshold": 1.0, "clustered": 0.3},
    ],
)
def test_views_equal_the_transcription(outer: int, options: dict[str, Any]) -> None:
    f, p = 6, 12
    made = view(torch.stack([video(f, p, seed=1), video(f, p, seed=2, moving=0.1, cuts=(2, 5))]), f)
    for b, got in enumerate(rows(made, select(made, outer, **options))):
        want, _, rho = slow(made, outer, b, **options)
        assert rho >= outer / (f * p)
        same_rows(got, want)


@pytest.mark.parametrize("f, p", [(1, 20), (2, 9), (3, 25), (8, 4), (5, 1)])
def test_other_shapes_equal_the_transcription(f: int, p: int) -> None:
    made = view(video(f, p, seed=f, moving=0.2)[None], f)
    for outer in {1, f, f * p // 5 or 1, f * p // 2 or 1, f * p * 4 // 5 or 1}:
        for options in ({}, {"clustered": 0.6, "threshold": 0.5}):
            (got,) = rows(made, select(made, outer, **options))
            same_rows(
                got, dict(enumerate(made.features[0].tolist())) if outer >= f * p else slow(made, outer, **options)[0]
            )


@pytest.mark.parametrize("chance", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("window", [1, 2, 3, 1024])
def test_no_segmentation_saves_more(chance: float, window: int) -> None:
    """All segmentations of up to 7 frames."""
    random = np.random.default_rng(int(chance * 100) + window)
    for frames in range(1, 8):
        for places in (1, 2, 5):
            same = random.random((frames - 1, places)) < chance
            found = np.flatnonzero(best_scenes(same, window)).tolist()
            want = scenes(same.tolist(), frames, window)
            assert found == want, (frames, places)


def test_the_worked_scene() -> None:
    """Place 0 rests all along, place 1 in the first three frames, place 2 in the last three: one scene saves 5 x 1,
    two of three frames 2 x 2 + 2 x 2."""
    same = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 0, 1]], bool)
    assert best_scenes(same, 1024).tolist() == [True, False, False, True, False, False]
    assert saving(same.tolist(), [0, 3], 6) == 8 and saving(same.tolist(), [0], 6) == 5
    assert best_scenes(same[:, :1], 1024).tolist() == [True] + [False] * 5
    assert best_scenes(np.zeros((0, 4), bool), 1024).tolist() == [True]


def test_a_video_without_rest_is_pruned_frame_by_frame() -> None:
    f, p = 5, 10
    made = view(video(f, p, moving=1.0)[None], f)
    selection = select(made, 20, threshold=0.999)
    assert selection is not None
    attention = made.noted(SITE)[0].unflatten(0, (f, p)).tolist()
    want = [t * p + i for t in range(f) for i in sorted(O._top(attention[t], 4))]
    assert selection.kept[0].tolist() == want
    same_rows(rows(made, selection)[0], {i: made.features[0, i].tolist() for i in want})
    assert slow(made, 20, threshold=0.999)[2] == 0.4


@pytest.mark.parametrize("f", [2, 4, 8])
def test_equal_frames_are_one(f: int) -> None:
    """F times fewer tokens, all of them there: the share is that of what is left, so 1 / F of a video is a frame."""
    p = 9
    still = torch.randn(p, 4, generator=torch.Generator().manual_seed(3)).double()
    made = view(still.repeat(f, 1)[None], f)
    for outer in (p, 2 * p - 1):
        (got,) = rows(made, select(made, outer))
        same_rows(got, dict(enumerate(still.tolist())))
        assert slow(made, outer)[1:] == ([0], 1.0)
    (got,) = rows(made, select(made, 3))
    assert len(got) == 3 and max(got) < p
    same_rows(got, slow(made, 3)[0])
    assert slow(made, 3)[2] == pytest.approx(1 / 3)
    again = select(made, 3)
    assert again is not None and again.kept[0].tolist() == list(got)


def test_what_is_saved_raises_the_ratio() -> None:
    """Half of the places rest over four frames: of 80 tokens 30 are saved, 20 of 80 are 0.4 of the 50 left."""
    f = 4
    still = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).double()
    frames = [
        torch.cat([still, torch.randn(10, 6, generator=torch.Generator().manual_seed(t + 1)).double()])
        for t in range(f)
    ]
    made = view(torch.cat(frames)[None], f)
    got, starts, rho = slow(made, 20, threshold=0.999)
    assert starts == [0] and rho == pytest.approx(0.4) and len(got) == 4 + 4 * 4
    same_rows(rows(made, select(made, 20, threshold=0.999))[0], got)
    for saved in range(0, 80, 7):
        assert 20 / 80 <= retained(20 / 80, 80, saved) <= 1


@pytest.mark.parametrize("f, p", [(8, 100), (16, 196), (5, 30), (32, 10)])
def test_a_whole_share_is_not_rounded_up(f: int, p: int) -> None:
    """A tenth of 100 tokens is 10: in 32 bits it would be a little more, and 11 would stay."""
    made = view(torch.randn(1, f * p, 16, generator=torch.Generator().manual_seed(0)).double(), f)
    for tenths in (1, 2, 3, 6, 7):
        outer = f * (p * tenths // 10)
        selection = select(made, outer, threshold=1.0)
        assert selection is not None and selection.counts.tolist() == [outer]


@pytest.mark.parametrize("loose", [1, 3])
@pytest.mark.parametrize("outer", [1, 4, 12, 30, 41])
def test_what_belongs_to_no_frame_stays(loose: int, outer: int) -> None:
    x = torch.cat([video(5, 8, seed=3), torch.randn(loose, 6, generator=torch.Generator().manual_seed(1)).double()])
    made = view(x[None], 5, loose=loose)
    (got,) = rows(made, select(made, outer, clustered=0.5))
    assert set(range(40, 40 + loose)) <= set(got)
    if outer >= loose and outer < 40 + loose:
        same_rows(got, slow(made, outer, clustered=0.5)[0])


@pytest.mark.parametrize("clustered", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("outer", [1, 12, 30, 45])
def test_protected_tokens_stay_as_they_are(outer: int, clustered: float) -> None:
    """At rest or not, in the first frame of a scene or not; nothing merges into them."""
    held = [0, 11, 12, 13, 14, 41]
    made = view(video(6, 8, moving=0.1)[None], 6, protected=held)
    selection = select(made, outer, clustered=clustered)
    (got,) = rows(made, selection)
    assert selection is not None and set(held) <= set(got) and selection.target is not None
    for i in held:
        torch.testing.assert_close(got[i], made.features[0, i], rtol=0, atol=0)
        slot = selection.kept[0].tolist().index(i)
        assert (selection.target[0] == slot).nonzero()[:, 0].tolist() == [i]


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan])
def test_equal_tokens_and_nan_do_not_break(value: float) -> None:
    made = view(torch.full((2, 32, 4), value, dtype=torch.float64), 4, attention=torch.ones(2, 32).double())
    for outer in (1, 6, 14, 31):
        for options in ({}, {"clustered": 1.0}, {"threshold": 1.0, "clustered": 0.5}):
            selection = select(made, outer, **options)
            assert selection is not None
            for kept in selection.kept.tolist():
                kept = [i for i in kept if i >= 0]
                assert kept and kept == sorted(set(kept)) and kept[-1] < 32


@pytest.mark.parametrize("what", ["features", "attention"])
def test_some_nan_stays_where_it_is(what: str) -> None:
    x, a = video(5, 8)[None], torch.rand(1, 40, generator=torch.Generator().manual_seed(0)).double()
    (x if what == "features" else a)[0, [0, 9, 17, 18]] = torch.nan
    for outer in (1, 5, 13, 30):
        for clustered in (0.0, 0.5):
            selection = select(view(x, 5, attention=a), outer, clustered=clustered)
            assert selection is not None
            kept = selection.kept[0].tolist()
            assert kept == sorted(set(kept)) and kept[0] >= 0 and len(kept) <= outer + 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_types_are_finite(dtype: torch.dtype) -> None:
    made = view((video(5, 30, c=16)[None] * 30).to(dtype), 5)
    for outer in (10, 60, 130):
        (got,) = rows(made, select(made, outer, clustered=0.5))
        values = torch.stack(list(got.values()))
        assert values.dtype == dtype and torch.isfinite(values).all()
    made = view(video(5, 30, c=16)[None].float(), 5)
    (got,) = rows(made, select(made, 60, clustered=0.5))
    same_rows({i: v.double() for i, v in got.items()}, slow(made, 60, clustered=0.5)[0], 1e-5)


def test_the_planned_bounds_hold() -> None:
    """On 200 random videos; saved tokens never make the share of the others smaller."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))  # noqa: E731
    for seed in range(200):
        f, p, loose = draw(1, 9), draw(1, 14), draw(0, 4)
        n = f * p + loose
        x = torch.cat([video(f, p, c=5, seed=seed, moving=draw(0, 10) / 10), torch.ones(loose, 5).double()])
        options = {"threshold": draw(-2, 9) / 10, "clustered": draw(0, 4) / 4, "window": draw(1, 9)}
        sites = {"vision": frozenset({"projections"}), "projector": frozenset(), "llm": frozenset()}
        here = Geometry("x", "clip", n, (1, p), 1, 3, 4, 28, sites, seen_layers=3, frames=f)
        _, cut, _ = make("holitom", options).plan(here, draw(1, n))
        made = view(x[None], f, loose=loose)
        selection = make("holitom", options).select(
            made, Cut(site="projector", keep=1, data={**cut.data, "note": SITE})
        )
        left = n if selection is None else int(selection.counts)
        assert cut.most is not None and 1 <= left <= cut.most


# --------------------------------------------------------------------------------------------------------------------
# the prompt


def llm_view(x: Tensor, score: Tensor, queried: list[bool] | None = None, protected: list[int] | None = None) -> Any:
    held = torch.zeros(x.shape[:2], dtype=torch.bool)
    held[:, protected or []] = True
    return TokenView(
        features=x,
        valid=torch.ones(x.shape[:2], dtype=torch.bool),
        index=torch.arange(x.shape[1]).expand(x.shape[:2]),
        size=torch.ones(x.shape[:2], dtype=torch.float64),
        protected=held,
        grid=(1, x.shape[1]),
        frames=((x.shape[1],),) * len(x),
        sources={
            "query_attention": lambda layer: score,
            "queried": lambda: torch.tensor(queried or [True] * len(x)),
        },
    )


@pytest.mark.parametrize("keep", [1, 2, 5, 19, 20, 25])
def test_tokens_are_averaged_in_one_after_the_other(keep: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    x = torch.randn(2, 20, 5, generator=generator, dtype=torch.float64)
    score = torch.rand(2, 20, generator=generator, dtype=torch.float64)
    made = llm_view(x, score)
    selection = make("holitom", {}).select(made, Cut(site="llm.3", keep=keep))
    for b, got in enumerate(rows(made, selection)):
        same_rows(got, asked(x[b].tolist(), score[b].tolist(), min(keep, 20)))


def test_order_matters_in_the_language_model() -> None:
    """1, then 2, then 4 into 8: ``((8 + 1) / 2 + 2) / 2`` and so on; the last one has half of it."""
    x = torch.tensor([[[1.0], [8.0], [2.0], [4.0]]]).double()
    made = llm_view(x, torch.tensor([[0.0, 1, 0, 0]]).double())
    (got,) = rows(made, make("holitom", {}).select(made, Cut(site="llm.3", keep=1)))
    assert {i: float(v) for i, v in got.items()} == {1: ((8 + 1) / 2 + 2) / 4 + 2}


def test_many_tokens_go_into_one() -> None:
    x = torch.randn(1, 1500, 3, generator=torch.Generator().manual_seed(0)).double()
    made = llm_view(x, torch.arange(1500.0)[None].double())
    (got,) = rows(made, make("holitom", {}).select(made, Cut(site="llm.3", keep=1)))
    same_rows(got, asked(x[0].tolist(), list(range(1500)), 1))


def test_unanswered_and_protected_ones_in_the_language_model() -> None:
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).double()
    x[0, 3] = torch.nan
    made = llm_view(x, torch.arange(9.0).expand(2, 9).double(), queried=[True, False], protected=[0])
    selection = make("holitom", {}).select(made, Cut(site="llm.3", keep=3))
    assert selection.counts.tolist() == [3, 9] and selection.kept[0, :3].tolist() == [0, 7, 8]
    torch.testing.assert_close(torch.stack(list(rows(made, selection)[1].values())), x[1])


# --------------------------------------------------------------------------------------------------------------------
# whole models

PROMPTS = [[3, 2, 1, 4], [2, 1, 1, 1, 5]]  # three images and four


@pytest.mark.parametrize("vision, text", [("clip", "llama"), ("siglip", "qwen2")])
@pytest.mark.parametrize("keep, options", [(0.15, {}), (30, {"clustered": 0.5, "first": 1.5, "layer": 1}), (1, {})])
def test_llava_equals_the_transcription(vision: str, text: str, keep: float, options: dict[str, Any]) -> None:
    """The images of a prompt are its frames: what is kept at both cuts, and the hidden states at the end."""
    model, inputs = B.llava(vision, text, blocks=4, layers=4), moving(B.prompts(PROMPTS))
    embeddings = B.embeddings(model, inputs)
    _, weights = B.watched(model.model.vision_tower, inputs["pixel_values"])
    outer_options = {k: v for k, v in options.items() if k in ("clustered",)} | {"threshold": 0.9}
    with vtprune.attach(model, "holitom", keep=keep, threshold=0.9, **options) as handle:
        hidden, report = B.final(model, inputs), handle.report()
    behind, inside = report.stages
    layer, image, prefix, lm = options.get("layer", 2), 0, int(vision == "clip"), model.model.language_model
    assert (behind.site, inside.site) == ("projector", f"llm.{layer}")
    rested = []
    for b, x in enumerate(embeddings):
        at = B.visual_positions(inputs, b).tolist()
        f, attention = len(at) // B.N, []
        for _ in range(f):
            mean_ = weights[2][image].mean(0)
            attention.append((mean_[0] if prefix else mean_.mean(0))[prefix:].tolist())
            image += 1
        budget = keep if isinstance(keep, int) else math.floor(keep * len(at) + 1e-9)
        outer = int(options.get("first", 2.0) * budget)
        out, _, rho = holitom(x[at].unflatten(0, (f, B.N)).tolist(), attention, outer, **outer_options)
        rested.append(rho > outer / len(at))
        assert behind.kept[b].tolist() == list(out)
        x = x.clone()
        for i, value in out.items():
            x[at[i]] = torch.tensor(value, dtype=torch.float64)
        order = [j for j in range(len(x)) if j not in at or at.index(j) in out]
        before, places, x = x, order, x[order]
        with torch.no_grad():
            for i in range(len(lm.layers)):
                if i == layer:
                    mine = [r for r, j in enumerate(order) if j in at]
                    row = O.lm_attention_row(lm, i - 1, before, places, len(before) - 1)
                    left = asked(x[mine].tolist(), [row[r] for r in mine], min(budget, len(mine)))
                    assert inside.kept[b].tolist() == [at.index(order[mine[k]]) for k in left]
                    for k, value in left.items():
                        x[mine[k]] = torch.tensor(value, dtype=torch.float64)
                    stay = [r for r in range(len(order)) if r not in mine or mine.index(r) in left]
                    x, order = x[stay], [order[r] for r in stay]
                before, places = x, list(order)
                x = O._run_lm_layer(lm, i, x, order)
            B.close(hidden[b][order], lm.norm(x))
    assert all(rested) or vision != "clip"


def test_a_batch_is_its_videos_alone() -> None:
    model, inputs = B.llava("clip", "llama", blocks=3, layers=3), moving(B.prompts(PROMPTS))
    with vtprune.attach(model, "holitom", keep=0.15, clustered=0.5) as handle:
        together, both = B.final(model, inputs), handle.report().stages
        counts = [3, 4]
        for b in range(2):
            (solo,) = B.final(model, alone(inputs, b, counts))
            for one, two in zip(handle.report().stages, both, strict=True):
                assert one.kept[0].tolist() == two.kept[b].tolist()
            B.close(together[b], solo)


@pytest.mark.filterwarnings("ignore:holitom prunes videos")
@pytest.mark.parametrize("family, variant", FAMILIES)
def test_families_equal_the_transcription(tiny, family: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the views that families make of their videos; with the whole budget the model is the dense one."""
    model, inputs = tiny(family, variant)
    model, inputs = of_type(model, inputs, torch.float64)
    seen = decisions("holitom", monkeypatch)
    options: dict[str, Any] = {"threshold": 0.3, "clustered": 0.5}
    with torch.no_grad(), vtprune.attach(model, "holitom", keep=0.3, **options):
        model(**inputs)
    assert {cut.kind for _, cut, _ in seen} == {"projector", "llm"}
    for made, cut, selection in seen:
        for b, got in enumerate(rows(made, selection)):
            if cut.kind == "projector":
                same_rows(got, slow(made, cut.data["outer"], b, cut.data["note"], **options)[0])
                assert len(got) <= cut.most
            elif selection is not None:
                n = int(made.valid[b].sum())
                score = made.source("query_attention", layer="previous")[b, :n].tolist()
                same_rows(got, asked(made.features[b, :n].tolist(), score, min(cut.keep, n)))
    equals_dense(model, inputs, "holitom", keep=1.0)


@pytest.mark.filterwarnings("ignore:holitom prunes videos")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(tiny, dtype: torch.dtype) -> None:
    model, inputs = tiny("smolvlm", "smolvlm")
    model, inputs = of_type(model, inputs, dtype)
    finite(model, inputs, "holitom", keep=0.2, clustered=0.5)


def geometry(**changes: Any) -> Geometry:
    sites = {"vision": frozenset({"projections"}), "projector": frozenset(), "llm": frozenset({"query_attention"})}
    return Geometry("llava", "clip", 576, (24, 24), 1, 23, 24, 28, sites, **{"seen_layers": 23, **changes})


def test_the_plan() -> None:
    """15 % behind the projector, half of that from layer 18 of 28."""
    note, behind, inside = make("holitom", {}).plan(geometry(), 43)
    assert (note.site, note.action) == ("vision.22", Action.NOTE)
    assert (behind.site, behind.adaptive, behind.data["outer"], behind.most) == ("projector", True, 86, 88)
    assert (inside.site, inside.keep, inside.observe) == ("llm.18", 43, (17,))
    with pytest.raises(vtprune.UnsupportedError, match="does not show"):
        make("holitom", {}).plan(geometry(seen_layers=0), 43)
    assert vtprune.describe("holitom").keep == 0.075 and METHODS.get("holitom").video
