"""PruneVid (arXiv 2412.16117) against a slow transcription: scenes, what is static in them, clusters; later the
question."""

from __future__ import annotations

import itertools
import math
from typing import Any

import builders as B
import films
import pytest
import torch
from films import (
    FAMILIES,
    Vector,
    alone,
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
from torch import Tensor, nn

import oracles as O
import vtprune
from vtprune.core.types import Geometry, Selection, Text, TokenView
from vtprune.methods.base import METHODS, Cut, make


def squared(a: Vector, b: Vector) -> float:
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / len(a)


def peaks(tokens: dict[int, Vector], count: int, neighbours: int) -> list[int]:
    """The ``count`` tokens of the highest density times distance, distances per root of the channels."""
    density = {}
    for i, a in tokens.items():
        near = sorted(squared(a, b) for b in tokens.values())[:neighbours]
        density[i] = math.exp(-sum(near) / len(near))
    peak = {}
    for i, a in tokens.items():
        denser = [j for j in tokens if density[j] > density[i] or (density[j] == density[i] and j < i)]
        far = [math.sqrt(squared(a, tokens[j])) for j in denser or tokens]
        peak[i] = density[i] * (min(far) if denser else max(far))
    return sorted(sorted(tokens, key=lambda i: (-peak[i], i))[:count])


def scenes(frames: list[list[Vector]], share: float, neighbours: int) -> list[list[int]]:
    """The frames of each scene: of all ways to give each centre neighbours on both sides, that of the least squares,
    of equal ones that of the earliest borders."""
    means = {t: mean(frame) for t, frame in enumerate(frames)}
    f = len(frames)
    centres = peaks(means, max(1, math.floor(share * f + 1e-9)), neighbours)
    best: tuple[float, list[list[int]]] | None = None
    between = [range(a + 1, b + 1) for a, b in zip(centres, centres[1:], strict=False)]  # the first of the second
    for borders in itertools.product(*between):
        cuts = [0, *borders, f]
        out = [list(range(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]
        cost = sum(squared(means[t], means[c]) for c, scene in zip(centres, out, strict=True) for t in scene)
        if best is None or cost < best[0] - 1e-12:
            best = cost, out
    assert best is not None
    return best[1]


def prunevid(
    frames: list[list[Vector]],
    share: float,
    scene_share: float = 0.25,
    threshold: float = 0.8,
    neighbours: int = 5,
) -> tuple[dict[int, Vector], list[list[int]], int]:
    """What stands behind the projector, by its index in the video; the scenes; how many places are static in one."""
    p, out, static_places = len(frames[0]), {}, 0

    def merge(tokens: dict[int, Vector], frame: int) -> None:
        if not tokens:
            return
        centres = peaks(tokens, max(1, round(round(share * len(tokens), 9))), neighbours)
        groups: dict[int, list[int]] = {c: [] for c in centres}
        for i, token in tokens.items():
            groups[i if i in groups else min(centres, key=lambda c: squared(token, tokens[c]))].append(i)  # noqa: B023
        for c, members in groups.items():
            out[frame * p + c] = mean([tokens[i] for i in members])

    found = scenes(frames, scene_share, neighbours)
    for scene in found:
        static = []
        for i in range(p):
            pairs = [cosine(frames[s][i], frames[t][i]) for s, t in itertools.combinations(scene, 2)]
            if pairs and sum(pairs) / len(pairs) > threshold:
                static.append(i)
        merge({i: mean([frames[t][i] for t in scene]) for i in static}, scene[0])
        for t in scene:
            merge({i: frames[t][i] for i in range(p) if i not in static}, t)
        static_places += len(static)
    return dict(sorted(out.items())), found, static_places


# --------------------------------------------------------------------------------------------------------------------
# views made by hand


def video(f: int, p: int, c: int = 6, seed: int = 0, moving: float = 0.3, cuts: tuple[int, ...] = ()) -> Tensor:
    return repeating(f, p, c, seed, moving, cuts, 0.2)


def view(features: Tensor, f: int, loose: int = 0, protected: list[int] | None = None, **sources: Any) -> TokenView:
    """A view of the videos ``features`` ``[B, N, C]``, of ``f`` frames each, with ``loose`` tokens behind."""
    return films.view(features, f, (features.shape[1] - loose) // f, protected or (), sources)


def select(made: TokenView, share: float, **options: Any) -> Selection | None:
    return make("prunevid", options).select(made, Cut(site="projector", keep=1, adaptive=True, data={"share": share}))


def slow(made: TokenView, share: float, b: int = 0, **options: Any) -> tuple[dict[int, Vector], list[list[int]], int]:
    f, p = len(made.frames[b]), made.frames[b][0]
    x = made.features[b, : f * p].double().unflatten(0, (f, p)).tolist()
    if "scenes" in options:
        options["scene_share"] = options.pop("scenes")
    out, found, static = prunevid(x, share, **options)
    return out | {i: made.features[b, i].tolist() for i in range(f * p, made.features.shape[1])}, found, static


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scenes": 0.5, "threshold": 0.65, "neighbours": 2},
        {"scenes": 0.3, "threshold": -1.0},
        {"scenes": 1.0},
        {"scenes": 0.7, "threshold": 0.4, "neighbours": 100},
        {"scenes": 0.01, "threshold": 0.3, "neighbours": 1},
        {"threshold": 1.0},
    ],
)
def test_views_equal_the_transcription(share: float, options: dict[str, Any]) -> None:
    f, p = 8, 12
    made = view(torch.stack([video(f, p, seed=1), video(f, p, seed=2, moving=0.1, cuts=(2, 5))]), f)
    rest = 0
    for b, got in enumerate(rows(made, select(made, share, **options))):
        want, _, static = slow(made, share, b, **options)
        rest += static
        same_rows(got, want)
    assert rest or options.get("scenes") == 1.0 or options.get("threshold") == 1.0


@pytest.mark.parametrize("f, p", [(1, 20), (2, 9), (3, 25), (12, 4), (5, 1)])
def test_other_shapes_equal_the_transcription(f: int, p: int) -> None:
    made = view(video(f, p, seed=f, cuts=(f // 2,))[None], f)
    for share in (0.1, 0.5, 0.8):
        for options in ({}, {"scenes": 0.5, "threshold": 0.5}):
            same_rows(rows(made, select(made, share, **options))[0], slow(made, share, **options)[0])


def test_scenes_are_found() -> None:
    """Three of them, of two, three and one frames, one centre in each: borders stand where pictures change."""
    f, p = 12, 6
    x = video(f, p, seed=4, moving=0.0, cuts=(3, 8))
    made = view(x[None], f)
    assert [len(s) for s in slow(made, 0.5, neighbours=2)[1]] == [3, 5, 4]
    (got,) = rows(made, select(made, 0.99, neighbours=2))
    assert {i // p for i in got} == {0, 3, 8} and len(got) == 3 * p  # all static: in the first frame of each
    same_rows(got, slow(made, 0.99, neighbours=2)[0])


def test_a_static_place_is_of_all_pairs_of_frames() -> None:
    """Three directions 60 degrees apart, in turn 0, 60 and 120: neighbours have 0.5, all pairs 0.5 / 3."""
    angle = torch.tensor([0.0, 60, 120], dtype=torch.float64).deg2rad()
    turning = torch.stack([angle.cos(), angle.sin()], 1)  # [3, 2]
    fixed = torch.tensor([[3.0, 1.0]]).double().expand(3, 2)
    made = view(torch.stack([turning, fixed], 1).flatten(0, 1)[None], 3)
    for threshold, kept in ((1 / 6 - 1e-6, [0, 1]), (1 / 6 + 1e-6, [0, 1, 2, 4]), (0.4, [0, 1, 2, 4])):
        (got,) = rows(made, select(made, 0.99, threshold=threshold))
        assert list(got) == kept
        same_rows(got, slow(made, 0.99, threshold=threshold)[0])


def test_a_video_without_rest_is_clustered_frame_by_frame() -> None:
    f, p = 5, 10
    x = video(f, p, moving=1.0)
    made = view(x[None], f)
    (got,) = rows(made, select(made, 0.5, threshold=0.999))
    assert [sum(i // p == t for i in got) for t in range(f)] == [5] * f
    for t in range(f):
        alone = view(x[None, t * p : (t + 1) * p], 1)
        (one,) = rows(alone, select(alone, 0.5))
        same_rows({i - t * p: v for i, v in got.items() if i // p == t}, {i: v.tolist() for i, v in one.items()})


@pytest.mark.parametrize("f", [2, 4, 8])
def test_equal_frames_are_one(f: int) -> None:
    """F times fewer tokens of a scene, then half of those."""
    p = 10
    still = torch.randn(p, 4, generator=torch.Generator().manual_seed(3)).double()
    made, alone = view(still.repeat(f, 1)[None], f), view(still[None], 1)
    for share in (0.5, 0.96):
        selection = select(made, share, scenes=0.01)
        (got,), (one,) = rows(made, selection), rows(alone, select(alone, share))
        assert len(got) == round(share * p) and max(got) < p
        same_rows(got, {i: v.tolist() for i, v in one.items()})
        again = select(made, share, scenes=0.01)
        assert selection is not None and again is not None and torch.equal(selection.kept, again.kept)
    kept = rows(made, select(made, 0.5))[0]  # ties between equal frames: scenes as the transcription has them
    same_rows(kept, slow(made, 0.5)[0])


@pytest.mark.parametrize("loose", [1, 3])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_what_belongs_to_no_frame_stays(loose: int, share: float) -> None:
    x = torch.cat([video(5, 8, seed=3), torch.randn(loose, 6, generator=torch.Generator().manual_seed(1)).double()])
    made = view(x[None], 5, loose=loose)
    (got,) = rows(made, select(made, share))
    assert set(range(40, 40 + loose)) <= set(got)
    same_rows(got, slow(made, share)[0])


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_protected_tokens_stay_as_they_are(share: float) -> None:
    """At rest or not, in the first frame of a scene or not; nothing merges into them."""
    held = [0, 11, 12, 13, 14, 41]
    made = view(video(6, 8, moving=0.1)[None], 6, protected=held)
    selection = select(made, share)
    (got,) = rows(made, selection)
    assert selection is not None and set(held) <= set(got) and selection.target is not None
    for i in held:
        torch.testing.assert_close(got[i], made.features[0, i], rtol=0, atol=0)
        slot = selection.kept[0].tolist().index(i)
        assert (selection.target[0] == slot).nonzero()[:, 0].tolist() == [i]


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan])
def test_equal_tokens_and_nan_do_not_break(value: float) -> None:
    made = view(torch.full((2, 32, 4), value, dtype=torch.float64), 4)
    for share in (0.01, 0.3, 0.9):
        for options in ({}, {"scenes": 1.0}, {"threshold": 1.0, "scenes": 0.5}):
            selection = select(made, share, **options)
            assert selection is not None and selection.target is not None
            assert bool((selection.target >= 0).all())
            for kept in selection.kept.tolist():
                kept = [i for i in kept if i >= 0]
                assert kept and kept == sorted(set(kept)) and kept[-1] < 32


def test_some_nan_stays_where_it_is() -> None:
    x = video(5, 8)[None]
    x[0, [0, 9, 17, 18]] = torch.nan
    for share in (0.01, 0.3, 0.9):
        made = view(x, 5)
        selection = select(made, share, scenes=0.5)
        assert selection is not None
        kept = selection.kept[0].tolist()
        assert kept == sorted(set(kept)) and kept[0] >= 0 and len(kept) <= share * 40 + 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_types_are_finite(dtype: torch.dtype) -> None:
    x = video(5, 30, c=16)[None]
    made = view((x * 30).to(dtype), 5)
    for share in (0.05, 0.5, 0.9):
        (got,) = rows(made, select(made, share))
        values = torch.stack(list(got.values()))
        assert values.dtype == dtype and torch.isfinite(values).all()
    made = view(x.float(), 5)
    (got,) = rows(made, select(made, 0.5))
    same_rows({i: v.double() for i, v in got.items()}, slow(made, 0.5)[0], 1e-5)


def geometry(frames: int = 0, tokens: int = 576, grid: tuple[int, int] = (24, 24), layers: int = 32) -> Geometry:
    sites = {"projector": frozenset(), "llm": frozenset({"query_attention", "text"})}
    return Geometry("llava", "clip", tokens, grid, 1, 23, 24, layers, sites, frames=frames)


def test_the_planned_bounds_hold() -> None:
    """On 200 random videos."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))  # noqa: E731
    for seed in range(200):
        f, p, loose = draw(1, 9), draw(1, 14), draw(0, 4)
        n = f * p + loose
        x = torch.cat([video(f, p, c=5, seed=seed, moving=draw(0, 10) / 10), torch.ones(loose, 5).double()])
        options = {"threshold": draw(-2, 9) / 10, "clusters": draw(1, 10) / 10, "scenes": draw(1, 10) / 10}
        method = make("prunevid", options)
        cut, _ = method.plan(geometry(f, n, (1, p)), draw(1, n))
        selection = method.select(view(x[None], f, loose=loose), cut)
        left = n if selection is None else int(selection.counts)
        assert cut.most is not None and 1 <= left <= cut.most


def test_the_plan() -> None:
    behind, inside = make("prunevid", {}).plan(geometry(), 86)
    assert (behind.site, behind.adaptive, behind.data["share"], behind.most) == ("projector", True, 0.5, 290)
    assert (inside.site, inside.keep, inside.observe) == ("llm.10", 86, (9,))
    behind, _ = make("prunevid", {}).plan(geometry(), 432)  # more than clusters would leave
    assert behind.data["share"] == 0.75
    assert make("prunevid", {}).plan(geometry(), 576)[0].most == 576
    assert vtprune.describe("prunevid").keep == 0.15 and METHODS.get("prunevid").video


# --------------------------------------------------------------------------------------------------------------------
# whole models

PROMPTS = [[3, 2, 1, 4], [2, 1, 1, 1, 5]]  # three images and four


@torch.no_grad()
def most_attention(
    lm: nn.Module, index: int, x: Tensor, places: list[int], question: list[int], at: list[int]
) -> list[float]:
    """The most that any row of the ``question`` pays to each of ``at`` in any head of layer ``index``."""
    block = lm.layers[index]
    z = block.input_layernorm(x)
    q, k = block.self_attn.q_proj(z), block.self_attn.k_proj(z)
    cos, sin = (table[0] for table in lm.rotary_emb(x[None], torch.tensor([places])))
    count = lm.config.num_attention_heads
    d, group = q.shape[1] // count, count // lm.config.num_key_value_heads
    most = [0.0] * len(at)
    for h in range(count):
        head = O._head(k, h // group, d)
        keys = torch.stack([O._rope(head[j], cos[j], sin[j]) for j in range(len(x))])
        for t in question:
            query = O._rope(O._head(q, h, d)[t], cos[t], sin[t])
            weight = O._softmax((keys[: t + 1] @ query / math.sqrt(d)).tolist())
            most = [max(m, weight[j] if j <= t else 0.0) for m, j in zip(most, at, strict=True)]
    return most


@pytest.mark.parametrize(
    "vision, text, keep, options, prompts",
    [
        ("clip", "llama", 0.15, {}, PROMPTS),
        ("siglip", "qwen2", 30, {"clusters": 0.3, "scenes": 0.5, "layer": 2}, PROMPTS),
        ("clip", "qwen2", 1, {}, [[3, 2, 4], [5, 1, 6]]),
        ("clip", "llama", 0.7, {"layer": 3}, [[3, 1, 2]]),
    ],
)
def test_llava_equals_the_transcription(
    vision: str, text: str, keep: float, options: dict[str, Any], prompts: list[list[int]]
) -> None:
    """The images of a prompt are its frames: what is kept at both cuts, and the hidden states at the end."""
    model, inputs = B.llava(vision, text, blocks=3, layers=4), moving(B.prompts(prompts))
    embeddings = B.embeddings(model, inputs)
    with vtprune.attach(model, "prunevid", keep=keep, **options) as handle:
        hidden, report = B.final(model, inputs), handle.report()
    behind, inside = report.stages
    layer, lm, rest = options.get("layer", 1), model.model.language_model, 0
    assert (behind.site, inside.site) == ("projector", f"llm.{layer}")
    for b, x in enumerate(embeddings):
        at = B.visual_positions(inputs, b).tolist()
        budget = keep if isinstance(keep, int) else math.floor(keep * len(at) + 1e-9)
        share = max(options.get("clusters", 0.5), budget / len(at))
        out, _, static = prunevid(x[at].unflatten(0, (-1, B.N)).tolist(), share, options.get("scenes", 0.25))
        rest += static
        assert behind.kept[b].tolist() == list(out)
        x = x.clone()
        for i, value in out.items():
            x[at[i]] = torch.tensor(value, dtype=torch.float64)
        order = [j for j in range(len(x)) if j not in at or at.index(j) in out]
        before, x, question = x, x[order], [r for r, j in enumerate(order) if j > at[-1]]
        with torch.no_grad():
            for i in range(len(lm.layers)):
                if i == layer:
                    mine = [r for r, j in enumerate(order) if j in at]
                    score = most_attention(lm, i - 1, before, order, question, mine)
                    left = [mine[k] for k in O._top(score, min(budget, len(mine)))]
                    assert inside.kept[b].tolist() == [at.index(order[r]) for r in sorted(left)]
                    stay = [r for r in range(len(order)) if r not in mine or r in left]
                    x, order = x[stay], [order[r] for r in stay]
                before = x
                x = O._run_lm_layer(lm, i, x, order)
            B.close(hidden[b][order], lm.norm(x))
    assert rest or prompts != PROMPTS


def test_the_most_attention_of_any_token_of_the_question() -> None:
    """Not the mean over them; words in front of the video, and padding, do not ask."""
    attention = torch.tensor([[9.0, 0, 0, 0], [0, 5, 1, 0], [0, 2, 3, 4], [0, 0, 3, 0], [0, 0, 0, 9]])
    place = torch.arange(5)[None]
    text = Text(
        hidden=torch.zeros(1, 5, 2),
        valid=place < 4,
        after=place > 0,
        place=place,
    )

    def source(layer: str, query: Tensor, heads: str) -> Tensor:
        assert (layer, heads) == ("previous", "most")
        return attention[query[0]].amax(0)[None] if bool(query.any()) else torch.zeros(1, 4)

    made = view(torch.ones(1, 4, 2), 1, text=lambda: text, query_attention=source)
    for keep, want in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3])):
        assert make("prunevid", {}).select(made, Cut(site="llm.1", keep=keep)).kept[0].tolist() == want
    made = view(torch.ones(1, 4, 2), 1, protected=[0], text=lambda: text, query_attention=source)
    assert make("prunevid", {}).select(made, Cut(site="llm.1", keep=2)).kept[0].tolist() == [0, 1]


def test_without_a_question_the_budget_holds() -> None:
    """Text in front alone, beside a prompt that asks; then alone. The last token of a prompt stays."""
    model, inputs = B.llava(blocks=3, layers=3), B.prompts([[6, 1, 0], [3, 2, 4]])
    for b in (slice(0, 2), slice(0, 1)):
        part = {k: v[b] for k, v in inputs.items()}
        part["pixel_values"] = inputs["pixel_values"][: 4 if b.stop == 2 else 2]
        for keep in (1, 9):
            with vtprune.attach(model, "prunevid", keep=keep) as handle:
                (hidden, *_), report = B.final(model, part), handle.report()
            behind, inside = report.stages
            assert inside.tokens_out == [keep] * b.stop and bool(torch.isfinite(hidden).all())
            assert inside.kept[0].tolist() == [*behind.kept[0].tolist()[: keep - 1], 71]


def test_a_batch_is_its_videos_alone() -> None:
    model, inputs = B.llava("clip", "llama", blocks=3, layers=3), moving(B.prompts(PROMPTS))
    with vtprune.attach(model, "prunevid", keep=0.15) as handle:
        together, both = B.final(model, inputs), handle.report().stages
        counts = [3, 4]
        for b in range(2):
            (solo,) = B.final(model, alone(inputs, b, counts))
            for one, two in zip(handle.report().stages, both, strict=True):
                assert one.kept[0].tolist() == two.kept[b].tolist()
            B.close(together[b], solo)


@pytest.mark.filterwarnings("ignore:prunevid prunes videos")
@pytest.mark.parametrize("family, variant", FAMILIES)
def test_families_equal_the_transcription(tiny, family: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the views that families make of their videos; with the whole budget the model is the dense one."""
    model, inputs = tiny(family, variant)
    model, inputs = of_type(model, inputs, torch.float64)
    seen = decisions("prunevid", monkeypatch)
    with torch.no_grad(), vtprune.attach(model, "prunevid", keep=0.2, threshold=0.2, clusters=0.4):
        model(**inputs)
    assert {cut.kind for _, cut, _ in seen} == {"projector", "llm"}
    for made, cut, selection in seen:
        for b, got in enumerate(rows(made, selection)):
            if cut.kind == "projector":
                same_rows(got, slow(made, cut.data["share"], b, threshold=0.2)[0])
                assert len(got) <= cut.most
            else:
                assert len(got) == min(cut.keep, int(made.valid[b].sum()))
    equals_dense(model, inputs, "prunevid", keep=1.0)


@pytest.mark.filterwarnings("ignore:prunevid prunes videos")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(tiny, dtype: torch.dtype) -> None:
    model, inputs = tiny("smolvlm", "smolvlm")
    model, inputs = of_type(model, inputs, dtype)
    finite(model, inputs, "prunevid", keep=0.2)
