"""FastVID (arXiv 2503.11187) against a slow transcription: scenes, salient tokens, anchors and what goes into them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import builders as B
import films
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
    of_type,
    rows,
    same_rows,
)
from torch import Tensor

import oracles as O
import vtprune
from vtprune.core.select import combine
from vtprune.core.types import NOTE, Action, Geometry, Selection, TokenView
from vtprune.methods.base import METHODS, Cut, make

SITE = "vision.2"


def scenes(frames: list[list[Vector]], segments: int, threshold: float) -> list[list[int]]:
    """The frames of each scene."""
    globals_ = [mean(frame) for frame in frames]
    near = [cosine(a, b) for a, b in zip(globals_, globals_[1:], strict=False)]  # [i]: of frames i and i + 1
    lowest = sorted(range(len(near)), key=lambda i: (near[i], i))[: segments - 1]
    out = [[0]]
    for i, value in enumerate(near):
        if value < threshold or i in lowest:
            out.append([])
        out[-1].append(i + 1)
    return out


def dense_peaks(tokens: dict[int, Vector], count: int, neighbours: int) -> list[int]:
    """The ``count`` positions of the highest density times distance, distances per root of the channels."""
    d = {
        i: {j: math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / len(a)) for j, b in tokens.items()}
        for i, a in tokens.items()
    }
    rho = {}
    for i in tokens:
        near = sorted(x**2 for x in d[i].values())[:neighbours]
        rho[i] = math.exp(-sum(near) / len(near))
    gamma = {}
    for i in tokens:
        denser = [d[i][j] for j in tokens if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        gamma[i] = rho[i] * (min(denser) if denser else max(d[i].values()))
    return sorted(tokens, key=lambda i: (-gamma[i], i))[:count]


def fastvid(
    frames: list[list[Vector]],
    attention: list[Vector],
    keep: int,
    segments: int = 8,
    threshold: float = 0.9,
    context: float = 0.4,
    step: int = 4,
    neighbours: int = 4,
    beta: float = 0.6,
) -> tuple[dict[int, Vector], dict[int, list[int]]]:
    """What is left, by its index in the video, and the members of each anchor."""
    f, p = len(frames), len(frames[0])
    r, over = keep // f, keep % f
    share = math.floor(context * r)
    salient = [
        O._top(attention[i], r - share + (i < over))  # frames in front take what does not divide
        for i in range(f)
    ]
    while share and step > 1 and step * share > p - max(map(len, salient)):
        step -= 1  # anchor frames stand closer
    out: dict[int, Vector] = {i * p + j: frames[i][j] for i in range(f) for j in salient[i]}
    members: dict[int, list[int]] = {}
    for scene in scenes(frames, segments, threshold):
        at = sorted(i for i in scene if (scene[-1] - i) % step == 0)
        total = len(scene) * share
        for number, i in enumerate(at):
            count = total // len(at) + (number < total % len(at))
            rest = {j: frames[i][j] for j in range(p) if j not in salient[i]}
            anchors = sorted(dense_peaks(rest, count, neighbours))
            groups: dict[int, list[int]] = {j: [] for j in anchors}
            for other in scene:
                for j in range(p):
                    if anchors and j not in salient[other] and not (other == i and j in anchors):
                        best = max(anchors, key=lambda a: cosine(frames[other][j], frames[i][a]))  # noqa: B023
                        groups[best].append(other * p + j)
            for a, mine in groups.items():
                w = max(1 / (len(mine) + 1), beta)
                into = mean([frames[m // p][m % p] for m in mine]) if mine else frames[i][a]
                out[i * p + a] = [w * x + (1 - w) * y for x, y in zip(frames[i][a], into, strict=True)]
                members[i * p + a] = mine
    return dict(sorted(out.items())), members


# --------------------------------------------------------------------------------------------------------------------
# views made by hand


def video(f: int, p: int, c: int = 6, seed: int = 0, change: float = 0.5, cuts: tuple[int, ...] = ()) -> Tensor:
    """``[f * p, c]``: frames that drift, and are others at ``cuts``."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(p, c, generator=generator, dtype=torch.float64)
    out = []
    for i in range(f):
        if i in cuts:
            still = torch.randn(p, c, generator=generator, dtype=torch.float64)
        still = still + change * torch.randn(p, c, generator=generator, dtype=torch.float64)
        out.append(still)
    return torch.cat(out)


def view(
    features: Tensor, f: int, attention: Tensor | None = None, loose: int = 0, protected: list[int] | None = None
) -> TokenView:
    """A view of the videos ``features`` ``[B, N, C]``, of ``f`` frames each, with ``loose`` tokens behind."""
    told = attention_of(features, loose) if attention is None else attention
    p = (features.shape[1] - loose) // f
    return films.view(features, f, p, protected or (), {NOTE + SITE: lambda: told})


def select(made: TokenView, keep: int, **options: Any) -> Selection:
    return make("fastvid", options).select(made, Cut(site="projector", keep=keep, data={"note": SITE}))


def slow(
    made: TokenView, keep: int, b: int = 0, site: str = SITE, **options: Any
) -> tuple[dict[int, Vector], dict[int, list[int]]]:
    f, p = len(made.frames[b]), made.frames[b][0]
    x = made.features[b, : f * p].double().unflatten(0, (f, p)).tolist()
    a = made.noted(site)[b, : f * p].double().unflatten(0, (f, p)).tolist()
    out, members = fastvid(x, a, keep - (made.features.shape[1] - f * p), **options)
    return out | {i: made.features[b, i].tolist() for i in range(f * p, made.features.shape[1])}, members


@pytest.mark.parametrize("keep", [1, 7, 11, 29, 50, 73, 83])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"segments": 1, "threshold": -1.0},
        {"segments": 3, "threshold": 0.5, "context": 1.0},
        {"segments": 2, "threshold": 0.0, "context": 0.7, "step": 3, "neighbours": 2, "beta": 0.0},
        {"segments": 2, "threshold": 0.2, "context": 0.5, "step": 1, "beta": 1.0},
        {"segments": 1, "threshold": -1.0, "context": 0.9, "step": 50, "neighbours": 100},
        {"context": 0.0},
    ],
)
def test_views_equal_the_transcription(keep: int, options: dict[str, Any]) -> None:
    f, p = 7, 12
    x = torch.stack([video(f, p, seed=1), video(f, p, seed=2, change=0.2, cuts=(2, 5))])
    made = view(x, f)
    selection = select(made, keep, **options)
    for b, got in enumerate(rows(made, selection)):
        want, _ = slow(made, keep, b, **options)
        assert len(want) == keep
        same_rows(got, want)


@pytest.mark.parametrize("f, p", [(1, 20), (2, 9), (3, 30), (13, 4), (5, 1)])
def test_other_shapes_equal_the_transcription(f: int, p: int) -> None:
    made = view(video(f, p, seed=f)[None], f)
    for keep in {1, f, f * p // 5 or 1, f * p // 2 or 1, f * p * 4 // 5 or 1, f * p - 1 or 1}:
        for options in ({}, {"segments": 2, "threshold": 0.1, "context": 0.6}):
            (got,) = rows(made, select(made, keep, **options))
            same_rows(got, slow(made, keep, **options)[0])


def test_the_worked_example() -> None:
    """196 tokens a frame, a segment of 8 frames, 10 %: of 19 a frame 7 for context and 12 salient, 152 in all."""
    f, p = 8, 196
    x = video(f, p, c=3, change=0.01)
    made = view(x[None], f)
    selection = select(made, 8 * 19, segments=1)
    kept = selection.kept[0].tolist()
    attention = made.noted(SITE)[0].tolist()
    each = [[i - p * j for i in kept if i // p == j] for j in range(f)]
    assert len(kept) == 152 and [len(e) for e in each] == [12, 12, 12, 40, 12, 12, 12, 40]  # frames 3 and 7 anchor
    for j, mine in enumerate(each):
        assert set(O._top(attention[j * p : (j + 1) * p], 12)) <= set(mine)
    same_rows(rows(made, selection)[0], slow(made, 152, segments=1)[0])


def test_scenes_begin_where_neighbours_differ() -> None:
    """Frames 0-1, 2-4 and 5 are alike: without a least number of scenes only what is below the threshold cuts; 4 scenes
    cut at the next lowest too, equal ones at the earliest."""
    one, two, three = torch.eye(3, 4, dtype=torch.float64)
    frames = torch.stack([one, one, two, two, two, three])
    x = (frames[:, None] + 1e-3 * torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0)).double()).flatten(
        0, 1
    )
    made = view(x[None], 6)
    for options, starts in (
        ({"segments": 1}, [0, 2, 5]),
        ({"segments": 1, "threshold": -1.0}, [0]),
        ({"segments": 2, "threshold": -1.0}, None),
        ({"segments": 99, "threshold": -1.0}, [0, 1, 2, 3, 4, 5]),
    ):
        got = scenes(x.unflatten(0, (6, 5)).tolist(), options["segments"], options.get("threshold", 0.9))
        assert starts is None or [s[0] for s in got] == starts
        selection = select(made, 12, context=1.0, step=99, **options)  # 2 a frame, the last of a scene anchors
        kept = selection.kept[0].tolist()
        last = {s[-1] for s in got}
        if 2 * max(map(len, got)) <= 5:
            assert {i // 5 for i in kept} == last
        same_rows(rows(made, selection)[0], slow(made, 12, context=1.0, step=99, **options)[0])


@pytest.mark.parametrize(
    "threshold, anchors", [(None, [4, 4]), (0.96, [2, 2, 4]), (0.7, [8]), (0.84, [8]), (0.86, [4, 4])]
)
def test_the_threshold_is_of_the_cosine(threshold: float | None, anchors: list[int]) -> None:
    """Frames at cosines 0.95, 0.85 and 1 from one to the next; 2 tokens of each are for context."""
    turn = [0.0, math.acos(0.95), math.acos(0.95) + math.acos(0.85)]
    frames = torch.tensor([[math.cos(a), math.sin(a)] for a in (*turn, turn[-1])]).double()
    size = torch.linspace(0.5, 1.5, 9).double()[:, None]
    made = view((frames[:, None] * size).flatten(0, 1)[None], 4)
    options = {} if threshold is None else {"threshold": threshold}
    kept = select(made, 8, segments=1, context=1.0, step=9, **options).kept[0].tolist()
    each = [sum(i // 9 == j for i in kept) for j in range(4)]
    assert [e for e in each if e] == anchors and each[3] == anchors[-1]


def test_equal_frames_are_cut_at_the_earliest() -> None:
    still = torch.randint(-4, 5, (9, 4), generator=torch.Generator().manual_seed(5)).double()
    made = view(still.repeat(6, 1)[None], 6)
    selection = select(made, 12, segments=3, context=1.0, step=99)
    # scenes 0, 1 and 2-5: 2, 2 and 8 anchors in the last frame of each
    assert [sum(int(i) // 9 == j for i in selection.kept[0]) for j in range(6)] == [2, 2, 0, 0, 0, 8]
    again = select(made, 12, segments=3, context=1.0, step=99)
    assert torch.equal(selection.kept, again.kept)
    both = replace(made, **{n: getattr(made, n).repeat(2, *[1] * (getattr(made, n).ndim - 1)) for n in
                            ("features", "valid", "index", "size", "protected")}, frames=made.frames * 2,
                   sources={NOTE + SITE: lambda: made.noted(SITE).repeat(2, 1)})  # fmt: skip
    two = select(both, 12, segments=3, context=1.0, step=99)
    assert two.kept.tolist() == selection.kept.tolist() * 2


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan])
@pytest.mark.parametrize("keep", [1, 6, 14, 25, 31])
def test_equal_tokens_leave_exact_counts(keep: int, value: float) -> None:
    made = view(torch.full((2, 32, 4), value, dtype=torch.float64), 4, attention=torch.ones(2, 32).double())
    for options in ({}, {"context": 1.0}, {"segments": 1}):
        selection = select(made, keep, **options)
        for kept in selection.kept.tolist():
            assert len(set(kept)) == len(kept) == keep and kept == sorted(kept) and 0 <= kept[0] <= kept[-1] < 32


@pytest.mark.parametrize("what", ["features", "attention"])
def test_some_nan_leaves_exact_counts(what: str) -> None:
    x, a = video(5, 8)[None], torch.rand(1, 40, generator=torch.Generator().manual_seed(0)).double()
    (x if what == "features" else a)[0, [0, 9, 17, 18]] = torch.nan
    for keep in (1, 5, 13, 22, 30, 39):
        kept = select(view(x, 5, attention=a), keep).kept[0].tolist()
        assert len(set(kept)) == len(kept) == keep and kept == sorted(kept) and kept[0] >= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_types_are_finite_and_keep_as_many(dtype: torch.dtype) -> None:
    made = view((video(5, 30, c=16)[None] * 30).to(dtype), 5)
    for keep in (10, 60, 130):
        selection = select(made, keep)
        values, _ = combine(made.features, selection, made.size)
        assert selection.counts.tolist() == [keep] and values.dtype == dtype and torch.isfinite(values).all()
    made = view(made.features.float(), 5)
    (got,) = rows(made, select(made, 60))
    same_rows({i: v.double() for i, v in got.items()}, slow(made, 60)[0], 1e-5)


@pytest.mark.parametrize("context", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("keep", [8, 15, 30, 45])
def test_protected_tokens_stay_and_count(keep: int, context: float) -> None:
    """In one frame as many as a frame's share, and one in another."""
    held = [0, 3, 41]
    made = view(video(6, 8)[None], 6, protected=held)
    selection = select(made, keep, context=context)
    kept = selection.kept[0].tolist()
    assert set(held) <= set(kept) and len(kept) == len(set(kept)) == keep
    if context < 1 and keep > 8:  # they are salient ones, and there is room: the transcription with infinite attention
        attention = made.noted(SITE).clone()
        attention[0, held] = torch.inf
        same_rows(rows(made, selection)[0], slow(view(made.features, 6, attention), keep, context=context)[0])


def test_more_protected_tokens_than_a_frame_may_have() -> None:
    held = [8, 9, 10, 11, 12]
    made = view(video(6, 8)[None], 6, protected=held)
    for keep in (5, 6, 9, 20):
        kept = select(made, keep).kept[0].tolist()
        assert set(held) <= set(kept) and len(kept) == len(set(kept)) == keep


@pytest.mark.parametrize("loose", [1, 3])
@pytest.mark.parametrize("keep", [4, 9, 20, 38])
def test_what_belongs_to_no_frame_stays(loose: int, keep: int) -> None:
    """New lines and the like behind the frames: kept as they are, and counted."""
    x = torch.cat([video(5, 8, seed=3), torch.randn(loose, 6, generator=torch.Generator().manual_seed(1)).double()])
    made = view(x[None], 5, loose=loose)
    (got,) = rows(made, select(made, keep))
    assert len(got) == keep and set(range(40, 40 + loose)) <= set(got)
    same_rows(got, slow(made, keep)[0])


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_a_budget_for_less_than_what_belongs_to_no_frame(keep: int) -> None:
    made = view(torch.randn(2, 43, 6, generator=torch.Generator().manual_seed(1)).double(), 5, loose=3)
    selection = select(made, keep)
    for got in rows(made, selection):
        assert len(got) == keep and set(list(got)[-min(keep, 3) :]) <= {40, 41, 42}


def test_the_weight_of_an_anchor() -> None:
    """``max(1 / (members + 1), beta)`` of itself, the rest its members' mean: each against the sum over all members,
    which an anchor frame has of the whole scene."""
    made = view(video(6, 10, change=0.1)[None], 6)
    for beta in (0.0, 0.3, 0.6, 1.0):
        got = rows(made, select(made, 18, segments=2, threshold=-1.0, beta=beta))[0]
        want, members = slow(made, 18, segments=2, threshold=-1.0, beta=beta)
        same_rows(got, want)
        assert members and max(map(len, members.values())) > 1
        for i, mine in members.items():
            if beta == 1.0 or not mine:
                torch.testing.assert_close(got[i], made.features[0, i], rtol=1e-12, atol=1e-12)
            elif beta == 0.0:  # a plain mean
                torch.testing.assert_close(got[i], made.features[0, [i, *mine]].mean(0))


@pytest.mark.parametrize("keep", [63, 76, 81])
def test_anchor_frames_stand_closer_where_tokens_are_few(keep: int) -> None:
    """Three quarters and more of 84: four frames' tokens for context do not fit into one."""
    made = view(video(7, 12)[None], 7)
    for options in ({}, {"context": 0.8}, {"context": 1.0, "segments": 1, "threshold": -1.0}, {"step": 7}):
        (got,) = rows(made, select(made, keep, **options))
        assert len(got) == keep
        same_rows(got, slow(made, keep, **options)[0])


def test_the_whole_budget_leaves_everything() -> None:
    made = view(video(7, 12)[None], 7)
    for keep in (84, 100):
        selection = select(made, keep)
        if selection is not None:
            values, _ = combine(made.features, selection, made.size)
            assert selection.kept.tolist() == [list(range(84))] and torch.equal(values, made.features)


# --------------------------------------------------------------------------------------------------------------------
# whole models

PROMPTS = [[3, 2, 1, 4], [2, 1, 1, 1, 1, 5]]  # three images and five


def moving(inputs: dict[str, Tensor], change: float = 0.3) -> dict[str, Tensor]:
    """``inputs`` with images that are alike, prompt by prompt."""
    noise = B.images(len(inputs["pixel_values"]), seed=8) / 4
    first = inputs["pixel_values"][1:2]
    return {
        **inputs,
        "pixel_values": first + change * noise + (torch.arange(len(noise)) // 4 * 1.5)[:, None, None, None],
    }


@pytest.mark.parametrize(
    "vision, keep, options",
    [
        ("clip", 0.1, {}),
        ("siglip", 21, {"segments": 2, "threshold": 0.0}),
        ("clip", 0.5, {"segments": 1, "context": 0.7, "step": 2}),
        ("siglip", 0.9, {}),
    ],
)
def test_llava_equals_the_transcription(vision: str, keep: float, options: dict[str, Any]) -> None:
    """The images of a prompt are its frames: what is kept, and what the language model makes of the merged rows."""
    model, inputs = B.llava(vision, "llama", blocks=4, layers=2), moving(B.prompts(PROMPTS))
    embeddings = B.embeddings(model, inputs)
    _, weights = B.watched(model.model.vision_tower, inputs["pixel_values"])
    with vtprune.attach(model, "fastvid", keep=keep, **options) as handle:
        hidden, report = B.final(model, inputs), handle.report()
    stage, image, prefix = report.stages[-1], 0, int(vision == "clip")
    assert stage.site == "projector"
    for b, x in enumerate(embeddings):
        at = B.visual_positions(inputs, b)
        f, attention = len(at) // B.N, []
        for _ in range(f):
            mean_ = weights[2][image].mean(0)
            attention.append((mean_[0] if prefix else mean_.mean(0))[prefix:].tolist())
            image += 1
        budget = keep if isinstance(keep, int) else math.floor(keep * len(at) + 1e-9)
        out, _ = fastvid(x[at].unflatten(0, (f, B.N)).tolist(), attention, budget, **options)
        assert stage.kept[b].tolist() == list(out)
        sequence, stay = x.clone(), set(range(len(x))) - set(at.tolist())
        for i, value in out.items():
            sequence[at[i]] = torch.tensor(value, dtype=torch.float64)
            stay.add(int(at[i]))
        order = sorted(stay)
        B.close(hidden[b][order], B.stack(model.model.language_model, sequence[order], order))


def test_a_batch_is_its_videos_alone() -> None:
    model, inputs = B.llava("clip", "llama", blocks=3, layers=2), moving(B.prompts(PROMPTS))
    with vtprune.attach(model, "fastvid", keep=0.3, segments=2) as handle:
        together, both = B.final(model, inputs), handle.report().stages[-1]
        counts = [3, 5]
        for b in range(2):
            (solo,) = B.final(model, alone(inputs, b, counts))
            one = handle.report().stages[-1]
            assert one.kept[0].tolist() == both.kept[b].tolist()
            assert one.assignment[0].tolist() == both.assignment[b].tolist()
            B.close(together[b], solo)


@pytest.mark.parametrize("family, variant", FAMILIES)
def test_families_equal_the_transcription(tiny, family: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the views that families make of their videos; what is reported is what was selected."""
    model, inputs = tiny(family, variant)
    model, inputs = of_type(model, inputs, torch.float64)
    seen = decisions("fastvid", monkeypatch)
    with torch.no_grad(), vtprune.attach(model, "fastvid", keep=0.4, segments=2, context=0.6) as handle:
        model(**inputs)
        stage = handle.report().stages[-1]
    assert seen
    kept = []
    for made, cut, selection in seen:
        for b, got in enumerate(rows(made, selection)):
            same_rows(got, slow(made, cut.keep, b, cut.data["note"], segments=2, context=0.6)[0])
            assert len(got) == cut.keep == math.floor(0.4 * made.features.shape[1])
            kept.append(len(got))
    assert sum(kept) <= sum(stage.tokens_out)
    equals_dense(model, inputs, "fastvid", keep=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(tiny, dtype: torch.dtype) -> None:
    model, inputs = tiny("smolvlm", "smolvlm")
    model, inputs = of_type(model, inputs, dtype)
    finite(model, inputs, "fastvid", keep=0.3)


def geometry(**changes: Any) -> Geometry:
    sites = {"vision": frozenset({"projections"}), "projector": frozenset(), "llm": frozenset({"query_attention"})}
    return Geometry("llava", "clip", 576, (24, 24), 1, 23, 24, 32, sites, **{"seen_layers": 23, **changes})


def test_the_plan() -> None:
    note, cut = make("fastvid", {}).plan(geometry(), 58)
    assert (note.site, note.action, cut.site, cut.keep) == ("vision.22", Action.NOTE, "projector", 58)
    with pytest.raises(vtprune.UnsupportedError, match="does not show"):
        make("fastvid", {}).plan(geometry(seen_layers=0), 58)
    assert vtprune.describe("fastvid").keep == 0.1 and METHODS.get("fastvid").video
