"""FrameFusion (arXiv 2501.01986) against a slow transcription: who merges into whom layer by layer, what is pruned, and
what the language model makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import builders as B
import pytest
import torch
from films import Vector, alone, cosine, equals_dense, finite, mean, of_type
from torch import Tensor

import oracles as O
import vtprune
from vtprune.core.select import combine
from vtprune.core.types import Geometry, TokenView
from vtprune.methods.base import METHODS, make


@dataclass
class Slow:
    """One video in a language model of ``depth`` layers: ``keep`` tokens are left, or ``ratio`` of the ``total`` in the
    mean over the layers. ``last``: the layer in front of which it prunes whatever came before."""

    p: int
    total: int
    depth: int
    last: int
    loose: int = 0
    keep: int = 0
    ratio: float | None = None
    threshold: float = 0.6
    least: float = 0.1
    held: tuple[int, ...] = ()
    done: bool = False
    prunes: bool = False
    spent: int = 0
    how: str = ""

    def __call__(self, layer: int, x: dict[int, Vector], attention: Callable[[], dict[int, float]]) -> dict[int, list]:
        """From the tokens in front of ``layer``, by index, those left: what each is the mean of."""
        self.how = "done"
        if self.done:
            return {i: [i] for i in x}
        left, cost = self.keep, math.inf
        if self.ratio is not None:
            cost = self.ratio * self.total * self.depth
            left = max(1, round((cost - self.spent) / (self.depth - layer)))
        go = max(len(x) - left, 0)
        before, like = {}, {}
        for i in sorted(x):
            if i >= self.total - self.loose:
                continue
            earlier = [j for j in x if j < i and j % self.p == i % self.p]
            if earlier:
                before[i] = max(earlier)
                like[i] = cosine(x[i], x[before[i]])
        alike = [i for i in like if like[i] >= self.threshold and i not in self.held]
        if layer and len(alike) < go:  # one token has to be left for each layer behind
            self.prunes = self.prunes or self.spent + len(x) - len(alike) + self.depth - layer - 1 > cost
        if self.prunes or layer == self.last:
            self.done, self.how = True, "prune"
            ranked = attention()
            best = sorted(x, key=lambda i: (i not in self.held, -ranked[i], i))[: len(x) - go]
            return {i: [i] for i in sorted(best)}
        if len(alike) < go:
            self.prunes = len(alike) < self.least * len(x)
            self.how = "merge all"
        else:
            alike = sorted(alike, key=lambda i: (-like[i], i))[:go]
            self.done, self.how = True, "merge some"
        out: dict[int, list] = {i: [i] for i in sorted(x) if i not in alike}
        for i in sorted(alike):
            root = i
            while root in alike:
                root = before[root]
            out[root].append(i)
        self.spent += len(out)
        return out


# --------------------------------------------------------------------------------------------------------------------
# views made by hand: layers that turn every token a little


def video(f: int, p: int, c: int = 6, seed: int = 0, still: float = 0.5, noise: float = 0.3) -> Tensor:
    """``[f * p, c]``: about ``still`` of the tokens are like those of the frame before."""
    g = torch.Generator().manual_seed(seed)
    frame, out = torch.randn(p, c, generator=g, dtype=torch.float64), []
    for _ in range(f):
        new = torch.randn(p, c, generator=g, dtype=torch.float64)
        frame = torch.where(torch.rand(p, 1, generator=g) < still, frame + noise * new, new)
        out.append(frame)
    return torch.cat(out)


def turned(x: Tensor, layer: int, change: float) -> Tensor:
    """What a layer makes of its tokens ``[..., C]``."""
    g = torch.Generator().manual_seed(100 + layer)
    w = torch.randn(x.shape[-1], x.shape[-1], generator=g, dtype=torch.float64).to(x.dtype)
    return x + change * torch.tanh(x @ w)


def attends(layer: int, n: int) -> Tensor:
    """Of all tokens of a video, whatever is left of them."""
    return torch.rand(n, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)


def geometry(f: int, p: int, loose: int = 0, depth: int = 8) -> Geometry:
    sites = {"projector": frozenset(), "llm": frozenset({"query_attention"})}
    return Geometry("llava", "clip", f * p + loose, (1, p), 1, 3, 4, depth, sites, frames=f)


@dataclass
class Layer:
    """What is left in front of a layer, per video."""

    kept: list[list[int]]
    values: list[Tensor]
    counts: list[int]


def run(
    x: Tensor,
    f: int,
    keep: int | None,
    *,
    loose: int = 0,
    depth: int = 8,
    change: float = 0.2,
    protected: tuple[int, ...] = (),
    asked: list[dict[str, Any]] | None = None,
    attention: Callable[[int, int], Tensor] = attends,
    **options: Any,
) -> tuple[list[Layer], int]:
    """The method on the videos ``x`` ``[B, N, C]`` layer by layer, as an engine asks it; and its last layer."""
    b, n, _ = x.shape
    p = (n - loose) // f
    method = make("framefusion", options)
    cuts = method.plan(geometry(f, p, loose, depth), keep)
    assert [c.site for c in cuts] == [f"llm.{i}" for i in range(len(cuts))] and len(cuts) <= depth
    index, size, memory, out = torch.arange(n).expand(b, n), torch.ones(b, n, dtype=x.dtype), {}, []
    for layer, cut in enumerate(cuts):
        valid = index >= 0

        def query_attention(**kwargs: Any) -> Tensor:
            assert kwargs == {"layer": "previous", "query": "all"} and layer > 0  # noqa: B023
            if asked is not None:
                asked.append({"cut": layer})  # noqa: B023
            return attention(layer, n)[index.clamp_min(0)]  # noqa: B023

        view = TokenView(
            features=x, valid=valid, index=index, size=size, grid=(1, p), frames=((p,) * f,) * b, memory=memory,
            protected=torch.isin(index, torch.tensor(protected, dtype=torch.long)) & valid,
            sources={"query_attention": query_attention},
        )  # fmt: skip
        selection = method.select(view, cut)
        x, size = combine(x, selection, size)
        index = torch.where(selection.kept >= 0, index.gather(1, selection.kept.clamp_min(0)), -1)
        there = index >= 0
        out.append(
            Layer([r[r >= 0].tolist() for r in index], [v[t] for v, t in zip(x, there, strict=True)],
                  there.sum(1).tolist())
        )  # fmt: skip
        x = turned(x, layer, change) * there[..., None]
    return out, len(cuts) - 1


def check(
    x: Tensor,
    f: int,
    keep: int | None,
    *,
    loose: int = 0,
    depth: int = 8,
    change: float = 0.2,
    protected: tuple[int, ...] = (),
    **options: Any,
) -> list[list[str]]:
    """Against the transcription, video by video; what it did in front of each layer."""
    layers, last = run(x, f, keep, loose=loose, depth=depth, change=change, protected=protected, **options)
    n, ways = x.shape[1], []
    for b in range(len(x)):
        slow = Slow((n - loose) // f, n, depth, last, loose, keep or 0, held=protected, **options)
        now, way = {i: v.tolist() for i, v in enumerate(x[b])}, []
        for layer, got in enumerate(layers):
            ranked = attends(layer, n).tolist()
            groups = slow(layer, now, lambda: {i: ranked[i] for i in now})  # noqa: B023
            way.append(slow.how)
            assert got.kept[b] == list(groups)
            now = {i: mean([now[j] for j in group]) for i, group in groups.items()}
            B.close(got.values[b], torch.tensor(list(now.values()), dtype=torch.float64))
            after = turned(torch.tensor(list(now.values()), dtype=torch.float64), layer, change)
            now = dict(zip(now, after.tolist(), strict=True))
        ways.append(way)
        if options.get("ratio") is None:
            assert len(now) == keep
    return ways


@pytest.mark.parametrize("keep", [1, 20, 35, 50, 72])
@pytest.mark.parametrize(
    "options",
    [{}, {"threshold": 0.9}, {"threshold": 0.2, "least": 0.3}, {"threshold": -1.0}, {"threshold": 0.8, "least": 0.0}],
)
def test_views_equal_the_transcription(keep: int, options: dict[str, Any]) -> None:
    x = torch.stack([video(6, 12, seed=1), video(6, 12, seed=2, still=0.9), video(6, 12, seed=3, still=0.1)])
    check(x, 6, keep, **options)


def test_every_way_is_taken() -> None:
    """Those of one batch at once: merging over several layers, pruning behind them, and merging alone."""
    x = torch.stack(
        [
            video(6, 12, seed=1, still=0.5),
            video(6, 12, seed=4, still=0.97, noise=0.2),
            video(6, 12, c=6, seed=5, still=0.0),
        ]
    )
    some, most, none = check(x, 6, 20, change=0.6, threshold=0.7)
    assert some[0] == "merge all" and "prune" in some
    assert "merge some" in most and "prune" not in most
    assert none[0] == "merge all" and none[1] == "prune" and none[2] == "done"
    (several,) = check(x[:1], 6, 5, change=2.0, threshold=0.4, least=0.01)
    assert several[:3] == ["merge all"] * 3 and "prune" in several
    early = check(video(6, 12, seed=1, still=0.3)[None], 6, 5, least=0.9)[0]
    assert early[:3] == ["merge all", "prune", "done"]


def test_one_batch_of_three_is_three_of_one() -> None:
    x = torch.stack([video(6, 12, seed=s, still=0.2 + 0.3 * s) for s in range(3)])
    together, _ = run(x, 6, 20)
    for b in range(3):
        alone, _ = run(x[b : b + 1], 6, 20)
        for one, all_ in zip(alone, together, strict=True):
            assert one.kept[0] == all_.kept[b]
            torch.testing.assert_close(one.values[0], all_.values[b])


def test_a_run_becomes_its_plain_mean_in_its_first_token() -> None:
    """Place 0 changes in frame 2 of 5: a mean of two frames in the first and of three in the third. Place 1 never does
    change, place 2 always."""
    a, b, c, *d = torch.eye(8, dtype=torch.float64)
    small = 1e-3 * torch.arange(15).double()[:, None]
    x = torch.stack([a, c, d[0], a, c, d[1], b, c, d[2], b, c, d[3], b, c, d[4]]) + small
    layers, _ = run(x[None], 5, 8, change=0.0)  # 15 - 1 - 2 - 4
    assert layers[0].kept == [[0, 1, 2, 5, 6, 8, 11, 14]]
    want = [x[[0, 3]].mean(0), x[[1, 4, 7, 10, 13]].mean(0), x[2], x[5], x[[6, 9, 12]].mean(0), x[8], x[11], x[14]]
    torch.testing.assert_close(layers[0].values[0], torch.stack(want))
    assert all(layer.kept == layers[0].kept for layer in layers)


def test_equal_frames_merge() -> None:
    """All of them into the first, and where they need not all go those of the earliest frames and places."""
    frame = torch.randint(-3, 4, (4, 5), generator=torch.Generator().manual_seed(0)).double() + 0.5
    x = frame.repeat(6, 1)[None]
    for threshold in (0.6, 0.99):
        layers, _ = run(x, 6, 4, threshold=threshold)
        assert layers[0].kept == [[0, 1, 2, 3]] and layers[0].counts == [4]
        torch.testing.assert_close(layers[0].values[0], frame)
    one, _ = run(x, 6, 11)
    two, _ = run(x.repeat(2, 1, 1), 6, 11)
    assert one[0].counts == [11] and set(range(4)) <= set(one[0].kept[0])
    assert two[0].kept == one[0].kept * 2
    again, _ = run(x, 6, 11)
    assert again[0].kept == one[0].kept


def test_without_near_duplicates_it_prunes_by_attention() -> None:
    x, asked = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(3)).double(), []
    layers, _ = run(x, 5, 13, asked=asked)
    assert layers[0].kept == [list(range(40))] and torch.equal(layers[0].values[0], x[0])
    assert layers[1].kept == [sorted(O._top(attends(1, 40).tolist(), 13))]
    assert all(layer.kept == layers[1].kept for layer in layers[1:]) and asked == [{"cut": 1}]


def test_with_near_duplicates_alone_attention_is_never_asked_for() -> None:
    asked: list[dict[str, Any]] = []
    run(video(5, 8, still=1.0, noise=0.01)[None], 5, 10, asked=asked)
    assert asked == []


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_few_layers_prune_at_the_last(depth: int) -> None:
    """A video in which every layer finds more to merge."""
    x = torch.stack([video(6, 12, seed=s) for s in range(2)])
    ways = check(x, 6, 5, depth=depth, least=0.0, change=1.0, threshold=0.7)
    assert all(len(way) == depth and way[-1] == "prune" for way in ways)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("depth", [8, 14])
def test_the_mean_over_layers_is_the_ratio(ratio: float, depth: int) -> None:
    x = torch.stack([video(6, 12, seed=1), video(6, 12, seed=2, still=0.9), video(6, 12, seed=3, still=0.0)])
    check(x, 6, None, depth=depth, ratio=ratio)
    layers, _ = run(x, 6, None, depth=depth, ratio=ratio)
    for b in range(3):
        each = [layer.counts[b] for layer in layers]
        each += each[-1:] * (depth - len(each))
        least = sum(each[:2]) + depth - 2  # in front of layer 1 at the earliest something is pruned: one is left
        wanted = max(ratio * 72 * depth, least)
        assert abs(sum(each) - wanted) <= depth / 2 + 1


@pytest.mark.parametrize("ratio", [0.15, 0.2, 0.25, 0.3, 0.5])
@pytest.mark.parametrize("least", [0.0, 0.02, 0.1])
def test_merging_ends_while_the_ratio_can_still_be_met(ratio: float, least: float) -> None:
    """Also where every layer finds a little more to merge: one token is left for each of the layers behind."""
    x = torch.stack([video(6, 12, seed=s, still=0.15 * s) for s in range(6)])
    ways = check(x, 6, None, depth=8, ratio=ratio, least=least, change=1.0, threshold=0.7)
    layers, last = run(x, 6, None, depth=8, ratio=ratio, least=least, change=1.0, threshold=0.7)
    (mean,) = {c.mean for c in make("framefusion", {"ratio": ratio}).plan(geometry(6, 12), None)}
    for b in range(6):
        assert sum(layer.counts[b] for layer in layers) <= 8 * mean <= max(ratio * 72 * 8, 72 + 7) + 4
    if least == 0.0 and ratio < 0.4:
        assert any(2 <= way.index("prune") < last for way in ways if "prune" in way)


def test_a_budget_of_effective_tokens_is_its_own_ratio() -> None:
    model, inputs = B.llava("clip", "llama", blocks=3, layers=6), moving(B.prompts(PROMPTS))
    for share, threshold in ((0.4, 0.9), (0.4, 0.97), (0.8, 0.9)):
        recipe = vtprune.solve(model, "framefusion", effective_tokens=share, threshold=threshold)
        (stage,) = recipe.stages
        assert stage.keep is None and share - 0.1 < stage.options["ratio"] <= share
        with vtprune.attach(model, recipe) as handle:
            B.final(model, inputs)
            report = handle.report()
        for rows, n in zip(report.layer_tokens, report.visual_tokens, strict=True):
            assert share - 0.15 < sum(rows) / len(rows) / n <= share
    with pytest.raises(vtprune.VtpruneError, match="smallest schedule"):
        vtprune.solve(model, "framefusion", effective_tokens=0.1)
    for share in (0.7, 0.9):
        with vtprune.attach(model, "framefusion", flops=share, threshold=0.97) as handle:
            B.final(model, inputs)
            report = handle.report()
        assert share - 0.25 < report.flops / report.dense_flops <= share


def test_a_ratio_that_cannot_be_met_leaves_one() -> None:
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(3)).double()
    layers, _ = run(x, 5, None, depth=8, ratio=0.05)
    assert [layer.counts[0] for layer in layers][:2] == [40, 1]


@pytest.mark.parametrize("keep", [3, 10, 30, 55])
def test_protected_tokens_stay_what_they_are(keep: int) -> None:
    """They merge into nobody; another may go into them."""
    held = (13, 25, 26)
    for still in (0.3, 0.95):
        x = video(5, 12, seed=7, still=still, noise=0.1)[None]
        check(x, 5, keep, protected=held)
        layers, _ = run(x, 5, keep, protected=held)
        assert all(set(held) <= set(layer.kept[0]) for layer in layers) and layers[-1].counts == [keep]


@pytest.mark.parametrize("keep", [4, 15, 40])
def test_what_belongs_to_no_frame_has_no_predecessor(keep: int) -> None:
    """It neither merges nor is merged into; it may be pruned."""
    for still in (0.3, 0.95):
        x = torch.cat([video(5, 9, seed=7, still=still), video(5, 9, seed=7, still=still)[:3]])[None]  # as in frame 0
        check(x, 5, keep, loose=3)


def test_tokens_that_earlier_stages_took_are_skipped() -> None:
    """The predecessor is of the nearest frame before that is left: 0 and 8 at the same place of four."""
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).double()
    x[0, 3] = x[0, 0]
    method = make("framefusion", {})
    cut = method.plan(geometry(3, 4), 4)[0]
    view = TokenView(
        features=x,
        valid=torch.ones(1, 5, dtype=torch.bool),
        index=torch.tensor([[0, 2, 5, 8, 11]]),
        size=torch.tensor([[3.0, 1, 1, 1, 1]]).double(),
        protected=torch.zeros(1, 5, dtype=torch.bool),
        grid=(1, 4),
        frames=((4, 4, 4),),
    )
    selection = method.select(view, cut)
    assert selection.kept.tolist() == [[0, 1, 2, 4]] and selection.target.tolist() == [[0, 1, 2, 0, 3]]


@pytest.mark.parametrize("keep", [1, 7, 20, 31])
@pytest.mark.parametrize("kind", ["equal", "zero", "nan", "some nan", "nan attention"])
def test_hostile_views_leave_exact_counts(keep: int, kind: str) -> None:
    x = video(4, 8, seed=1)[None].repeat(2, 1, 1)
    if kind == "some nan":
        x[0, [0, 9, 17, 18]] = torch.nan
    elif kind != "nan attention":
        x = torch.full_like(x, {"equal": 1.0, "zero": 0.0, "nan": math.nan}[kind])
    attention = (lambda layer, n: torch.full((n,), math.nan).double()) if kind == "nan attention" else attends
    layers, _ = run(x, 4, keep, attention=attention)
    for row in layers[-1].kept:
        assert len(set(row)) == len(row) == keep and row == sorted(row) and row[0] >= 0 and row[-1] < 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_types_are_finite(dtype: torch.dtype) -> None:
    x = (30 * video(5, 12, c=16, still=0.8)[None]).to(dtype)
    for keep in (5, 20, 50):
        layers, _ = run(x, 5, keep)
        assert layers[-1].counts == [keep]
        assert all(v.dtype == dtype and torch.isfinite(v).all() for layer in layers for v in layer.values)


# --------------------------------------------------------------------------------------------------------------------
# whole models

PROMPTS = [[3, 2, 1, 4], [2, 1, 1, 1, 5]]  # three images and four


def moving(inputs: dict[str, Tensor], change: float = 0.3) -> dict[str, Tensor]:
    """``inputs`` with images of which a part differs from the one before."""
    noise = B.images(len(inputs["pixel_values"]), seed=8)
    pixels, out = inputs["pixel_values"][1], []
    for i, z in enumerate(noise):
        pixels = pixels.clone()
        pixels[:, :, : 8 * (1 + i % 4)] = z[:, :, : 8 * (1 + i % 4)] * 2
        out.append(pixels + change * 0.01 * z)
    return {**inputs, "pixel_values": torch.stack(out)}


@torch.no_grad()
def attention_of_all(lm: Any, layer: int, x: Tensor, positions: list[int]) -> list[float]:
    """Mean over heads and rows of what each row of ``x`` ``[n, D]`` is given in ``layer``."""
    block = lm.layers[layer]
    z = block.input_layernorm(x)
    q, k = block.self_attn.q_proj(z), block.self_attn.k_proj(z)
    cos, sin = (t[0] for t in lm.rotary_emb(x[None], torch.tensor([positions])))
    heads, groups = lm.config.num_attention_heads, lm.config.num_attention_heads // lm.config.num_key_value_heads
    d, future = q.shape[1] // heads, torch.ones(len(x), len(x)).triu(1).bool()
    total = torch.zeros(len(x), dtype=torch.float64)
    for h in range(heads):
        turn = lambda v: v * cos + torch.cat([-v[:, d // 2 :], v[:, : d // 2]], 1) * sin  # noqa: B023, E731
        query, key = turn(q[:, h * d : (h + 1) * d]), turn(k[:, h // groups * d : (h // groups + 1) * d])
        weights = (query @ key.T / math.sqrt(d)).masked_fill(future, -math.inf).softmax(1)
        total += weights.mean(0) / heads
    return total.tolist()


@pytest.mark.parametrize(
    "text, keep, options",
    [
        ("llama", 0.3, {"threshold": 0.97}),
        ("mistral", 0.6, {"threshold": 0.9}),
        ("llama", None, {"ratio": 0.5, "threshold": 0.97}),
    ],
)
def test_llava_equals_the_transcription(text: str, keep: Any, options: dict[str, Any]) -> None:
    """The images of a prompt are its frames. Text stays as it is, and what is left keeps its position."""
    model, inputs = B.llava("clip", text, blocks=3, layers=4), moving(B.prompts(PROMPTS))
    embeddings, lm = B.embeddings(model, inputs), model.model.language_model
    with vtprune.attach(model, "framefusion", **({} if keep is None else {"keep": keep}), **options) as handle:
        hidden, report = B.final(model, inputs), handle.report()
    sites, ways = [s.site for s in report.stages], set()
    last = max(int(s.partition(".")[2]) for s in sites)
    for b, x in enumerate(embeddings):
        at = B.visual_positions(inputs, b).tolist()
        budget = keep if isinstance(keep, int) else math.floor(keep * len(at) + 1e-9) if keep else 0
        slow = Slow(B.N, len(at), len(lm.layers), last, keep=budget, **options)
        rows, before, ran = list(range(len(x))), x, []
        for layer in range(len(lm.layers)):
            if f"llm.{layer}" in sites:
                line = {p: i for i, p in enumerate(rows)}
                now = {i: x[line[p]].tolist() for i, p in enumerate(at) if p in line}

                def attention() -> dict[int, float]:
                    given = attention_of_all(lm, layer - 1, before, rows)  # noqa: B023
                    return {i: given[line[at[i]]] for i in now}  # noqa: B023

                groups = slow(layer, now, attention)
                ways.add(slow.how)
                x = x.clone()
                for i, group in groups.items():
                    x[line[at[i]]] = torch.tensor(mean([now[j] for j in group]), dtype=torch.float64)
                gone = {at[i] for i in now if i not in groups}
                left = [p for p in rows if p not in gone]
                x, rows = x[[line[p] for p in left]], left
                assert report.stages[sites.index(f"llm.{layer}")].kept[b].tolist() == list(groups)
            ran.append(len([p for p in rows if p in at]))
            before = x
            with torch.no_grad():
                x = O._run_lm_layer(lm, layer, x, rows)
        assert [per[b] for per in zip(*report.layer_tokens, strict=True)] == ran or report.layer_tokens[b] == ran
        B.close(hidden[b][rows], lm.norm(x))
        if keep is not None:
            assert ran[-1] == budget
    assert "prune" in ways and {"merge all", "merge some"} & ways


def test_a_batch_is_its_videos_alone() -> None:
    model, inputs = B.llava("clip", "llama", blocks=3, layers=4), moving(B.prompts(PROMPTS))
    with vtprune.attach(model, "framefusion", keep=0.3, threshold=0.97) as handle:
        together, both = B.final(model, inputs), handle.report()
        counts = [3, 4]
        for b in range(2):
            (solo,) = B.final(model, alone(inputs, b, counts))
            for one, two in zip(handle.report().stages, both.stages, strict=True):
                assert one.kept[0].tolist() == two.kept[b].tolist()
            B.close(together[b], solo)


def test_equal_images_become_one() -> None:
    """Into the first: what the language model gets is one image at its positions."""
    model, inputs = B.llava("clip", "llama", blocks=3, layers=4), B.prompts([[3, 2, 1, 4]])
    inputs["pixel_values"] = inputs["pixel_values"][1:2].repeat(3, 1, 1, 1)
    (x,) = B.embeddings(model, inputs)
    with vtprune.attach(model, "framefusion", keep=B.N) as handle:
        (hidden,), report = B.final(model, inputs), handle.report()
    assert all(s.kept[0].tolist() == list(range(B.N)) for s in report.stages)
    gone = set(B.visual_positions(inputs, 0)[B.N :].tolist())
    left = [i for i in range(len(x)) if i not in gone]
    B.close(hidden[left], B.stack(model.model.language_model, x[left], left))


@pytest.mark.parametrize(
    "family, variant, options",
    [
        ("qwen2.5-vl", "video", {"threshold": 0.9, "least": 0.0}),
        ("qwen2.5-vl", "video", {"ratio": 0.6}),
        ("smolvlm", "smolvlm", {"threshold": 0.1}),
        ("llava-onevision", "video", {"threshold": 0.1, "least": 0.3}),
    ],
)
def test_families_equal_the_transcription(
    tiny, family: str, variant: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the views that families make of their videos, layer by layer."""
    model, inputs = tiny(family, variant)
    model, inputs = of_type(model, inputs, torch.float64)
    cls, seen = METHODS.get("framefusion").cls, []
    real = cls.select

    def select(self, made, cut):
        given = made.source("query_attention", layer="previous", query="all") if cut.layer else None
        seen.append((made, cut, real(self, made, cut), given))
        return seen[-1][2]

    monkeypatch.setattr(cls, "select", select)
    budget = {} if "ratio" in options else {"keep": 0.4}
    with torch.no_grad(), vtprune.attach(model, "framefusion", **budget, **options) as handle:
        model(**inputs)
        (*_, stage) = handle.report().stages
    assert seen and seen[0][0].frames
    slow: dict[int, Slow] = {}
    depth, total = model.config.text_config.num_hidden_layers, seen[0][0].features.shape[1]
    for made, cut, selection, given in seen:
        f, p = len(made.frames[0]), made.frames[0][0]
        values, _ = combine(made.features, selection, made.size)
        for b in range(len(made.valid)):
            keep = math.floor(0.4 * total)
            one = slow.setdefault(b, Slow(p, total, depth, -1, total - f * p, keep, **options))
            one.last = cut.layer if cut.data["last"] else -1
            there = made.valid[b]
            index = made.index[b, there].tolist()
            ranked = {}
            if cut.layer:
                ranked = dict(zip(index, given[b, there].tolist(), strict=True))
            now = dict(zip(index, made.features[b, there].tolist(), strict=True))
            groups = one(cut.layer, now, lambda: ranked)  # noqa: B023
            kept = selection.kept[b][selection.kept[b] >= 0]
            assert made.index[b][kept].tolist() == list(groups)
            want = [mean([now[j] for j in group]) for group in groups.values()]
            B.close(values[b, : len(kept)], torch.tensor(want, dtype=torch.float64))
    if budget:
        assert len(kept) == math.floor(0.4 * total) <= max(stage.tokens_out)
    for whole in ({"keep": 1.0}, {"ratio": 1.0}):
        equals_dense(model, inputs, "framefusion", **whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(tiny, dtype: torch.dtype) -> None:
    model, inputs = tiny("smolvlm", "smolvlm")
    model, inputs = of_type(model, inputs, dtype)
    for options in ({"keep": 0.3}, {"ratio": 0.4}):
        finite(model, inputs, "framefusion", **options)


@pytest.mark.parametrize("options", [{}, {"least": 0.5}, {"least": 1.0}, {"ratio": 0.3}])
def test_the_cuts_do_not_depend_on_the_video(options: dict[str, Any]) -> None:
    """A model's stages are installed once, for videos of all lengths: of a fixed budget and of a share."""
    method = make("framefusion", options)
    for budget in (lambda n: 40, lambda n: math.floor(0.2 * n)):
        plans = [method.plan(geometry(f, 36, depth=28), budget(36 * f)) for f in (2, 3, 17, 500)]
        assert len({tuple(c.site for c in plan) for plan in plans}) == 1


def test_what_cannot_be_planned_says_so() -> None:
    with pytest.raises(vtprune.UnsupportedError, match="one layer"):
        make("framefusion", {}).plan(geometry(4, 8, depth=1), 8)
    with pytest.raises(vtprune.VtpruneError, match="ratio"):
        make("framefusion", {"ratio": 0.0})
    assert METHODS.get("framefusion").video and vtprune.describe("framefusion").keep == 0.2
