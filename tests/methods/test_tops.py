"""TOPS (arXiv 2606.27161) against its sums, one at a time, at every cut."""

from __future__ import annotations

import math
from dataclasses import replace

import builders as B
import pytest
import torch
from torch import Tensor

import oracles as O
import vtprune
from vtprune import testing
from vtprune.core.types import Geometry, Text, TokenView
from vtprune.methods.base import Cut, make


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return dot / length if length else 0.0


def scaled(values: dict[int, float], how: str) -> dict[int, float]:
    if how == "mean":
        mean = sum(values.values()) / len(values)
        return {i: v / mean if mean else 0.0 for i, v in values.items()}
    low, high = min(values.values()), max(values.values())
    return {i: (v - low) / (high - low) if high > low else 0.0 for i, v in values.items()}


def greedy(h: Tensor, relevance: list[float], keep: int, alpha=0.5, lam=0.5, how="mean") -> list[int]:
    """In the order of choice. Tokens without a relevance (NaN) are not chosen and need no cover, but take part in the
    means."""
    rows = h.tolist()
    n = len(rows)
    f = [[cosine(a, b) for b in rows] for a in rows]
    r = scaled({i: x for i, x in enumerate(relevance) if x == x}, how)
    chosen = [max(r, key=lambda i: r[i])]
    while len(chosen) < min(keep, n):
        rest = [i for i in range(n) if i not in chosen]
        near = {i: max(f[i][j] for j in chosen) for i in rest}
        div = scaled({i: 1 - near[i] for i in rest}, how)
        cov = scaled({i: sum(max(0.0, f[i][j] - near[j]) for j in rest if j in r) for i in rest}, how)
        score = {i: r[i] + alpha * div[i] + lam * cov[i] for i in rest if i in r}
        chosen.append(max(score, key=lambda i: score[i]))
    return chosen


def geometry(tokens: int, depth: int, seen: int = 23) -> Geometry:
    return Geometry(
        family="x",
        arch="x",
        tokens=tokens,
        grid=(1, tokens),
        prefix=1,
        vision_layers=0,
        vision_depth=seen,
        llm_layers=depth,
        provides={},
        seen_layers=seen,
    )


def test_the_published_schedules():
    """576 to 128 behind the projector, to 64 before layer 12 and to 16 before layer 24: a mean of 76."""
    cuts = make("tops", {}).plan(geometry(576, 32), 16)
    assert [(c.site, c.keep) for c in cuts[1:]] == [("projector", 128), ("llm.12", 64), ("llm.24", 16)]
    assert cuts[0].site == "vision.22"
    kept, mean = 128, 0.0
    for layer in range(32):
        kept = next((c.keep for c in cuts if c.site == f"llm.{layer}"), kept)
        mean += kept / 32
    assert mean == 76
    assert [c.site for c in make("tops", {}).plan(geometry(576, 40), 16)[2:]] == ["llm.15", "llm.30"]
    qwen = make("tops", {"layers": (12, 16)}).plan(geometry(1024, 28, seen=0), 64)
    assert [(c.site, c.keep) for c in qwen] == [("projector", 512), ("llm.12", 256), ("llm.16", 64)]
    short = make("tops", {}).plan(geometry(36, 2), 9)
    assert [(c.site, c.keep) for c in short[1:]] == [("projector", 36), ("llm.1", 9)]


OPTIONS = [
    {},
    {"scale": "range", "coverage_llm": 1.0},
    {"diversity": 0.0, "coverage": 2.0, "coverage_llm": 0.0},
    {"raters": "last", "relevance": "norm"},
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "text, keep, number", [("llama", 4, 0), ("qwen2", 1, 0), ("mistral", 2, 1), ("qwen2", 3, 2), ("llama", 36, 3)]
)
def test_llava_equals_the_transcription(text, keep, number):
    options = OPTIONS[number]
    model, inputs = B.llava("clip", text, blocks=4, layers=5), B.prompts([[4, 9], [7, 2, 5]])
    with vtprune.attach(model, "tops", keep=keep, layers=(2, 4), **options) as handle, torch.no_grad():
        B.final(model, inputs)
        report = handle.report()
    hidden, attentions = B.watched(model.model.vision_tower, inputs["pixel_values"])
    with torch.no_grad():
        projected = model.model.multi_modal_projector(hidden[3][:, 1:])
    relevance = attentions[2].mean(1)[:, 0, 1:]
    if options.get("relevance") == "norm":
        relevance = projected.norm(dim=-1)
    how = {"how": options.get("scale", "mean"), "alpha": options.get("diversity", 0.5)}
    lam, image = (options.get("coverage", 0.5), options.get("coverage_llm", 0.5)), 0
    lm = model.model.language_model
    for b, x in enumerate(B.embeddings(model, inputs)):
        visual = B.visual_positions(inputs, b).tolist()
        mine = [visual[i : i + B.N] for i in range(0, len(visual), B.N)]
        words = [i for i in range(len(x)) if i not in visual]
        for i, places in enumerate(mine):
            picks = greedy(projected[image], relevance[image].tolist(), 8 * keep, lam=lam[0], **how)
            mine[i] = sorted(places[p] for p in picks)
            image += 1
        kept = [mine]
        rows = sorted([*words, *sum(mine, [])])
        state = before = x[rows]
        for layer in range(5):
            if layer in (2, 4):
                asking = words if options.get("raters") != "last" else [len(x) - 1]
                score = dict.fromkeys(rows, 0.0)
                for t in asking:
                    row = O.lm_attention_row(lm, layer - 1, before, rows, rows.index(t))
                    for place, value in zip(rows, row, strict=False):
                        score[place] += value
                mine = [
                    sorted(
                        places[p]
                        for p in greedy(
                            torch.stack([state[rows.index(p)] for p in places]),
                            [score[p] for p in places],
                            4 * keep if layer == 2 else keep,
                            lam=lam[1],
                            **how,
                        )
                    )
                    for places in mine
                ]
                kept.append(mine)
                left = sorted([*words, *sum(mine, [])])
                state, rows = torch.stack([state[rows.index(r)] for r in left]), left
            before, state = state, B.layer(lm, layer, state, rows)
        stages = [s for s in report.stages if s.site in ("projector", "llm.2", "llm.4")]
        assert [[visual[i] for i in s.kept[b].tolist()] for s in stages] == [sum(k, []) for k in kept]


def view(features: Tensor, relevance: Tensor) -> TokenView:
    b, n = features.shape[:2]
    ones = torch.ones(b, n)
    true = torch.ones(b, 3, dtype=torch.bool)
    return TokenView(
        features=features,
        valid=ones.bool(),
        index=torch.arange(n).expand(b, n),
        size=ones,
        protected=~ones.bool(),
        grid=(1, n),
        sources={
            "note vision.2": lambda: relevance,
            "query_attention": lambda **how: relevance,
            "text": lambda: Text(torch.zeros(b, 3, 4), true, true, torch.arange(3).expand(b, 3)),
        },
    )


def chosen(seen: TokenView, keep: int, site: str = "projector", **options) -> list[list[int]]:
    data = {"noted": "vision.2"} if site == "projector" else {}
    kept = make("tops", options).select(seen, Cut(site=site, keep=keep, data=data)).kept
    return [row[row >= 0].tolist() for row in kept]


def test_invariants():
    """Without the other terms the most relevant stay; with equal relevance alone what covers most of the rest."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, 20, 6, generator=generator, dtype=torch.float64)
    r = torch.rand(1, 20, generator=generator, dtype=torch.float64)
    plain = {"diversity": 0.0, "coverage": 0.0, "coverage_llm": 0.0}
    for site in ("projector", "llm.4"):
        for scale in ("mean", "range"):
            assert chosen(view(h, r), 6, site, scale=scale, **plain) == [r[0].topk(6).indices.sort().values.tolist()]
    f = torch.nn.functional.normalize(h[0], dim=-1)
    f, left, near = f @ f.T, list(range(1, 20)), (f @ f.T)[0]
    for _ in range(3):  # the first choice is a tie
        gain = {i: float((f[i] - near).clamp_min(0)[left].sum()) for i in left}
        left.remove(pick := max(left, key=lambda i: gain[i]))
        near = torch.maximum(near, f[pick])
    assert chosen(view(h, torch.ones_like(r)), 4, diversity=0.0) == [sorted(set(range(20)) - set(left))]
    assert chosen(view(h, 9 * r), 5) == chosen(view(h, r), 5) == [sorted(greedy(h[0], r[0].tolist(), 5))]


@pytest.mark.parametrize("site", ["projector", "llm.4"])
@pytest.mark.parametrize("scale", ["mean", "range"])
@pytest.mark.parametrize("keep", [1, 3, 8, 12])
def test_exact_counts_whatever_the_data(keep, scale, site):
    same = torch.ones(2, 12, 12)
    for h in (same, same * 0, torch.eye(12)[None].repeat(2, 1, 1), torch.full_like(same, torch.nan)):
        for r in (torch.zeros(2, 12), torch.ones(2, 12), torch.full((2, 12), torch.nan)):
            rows = chosen(view(h, r), keep, site, scale=scale)
            assert all(len(set(row)) == len(row) == keep for row in rows)
    generator = torch.Generator().manual_seed(1)
    h, r = torch.randn(2, 12, 6, generator=generator), torch.rand(2, 12, generator=generator)
    ragged, protected = view(h, r), torch.zeros(2, 12, dtype=torch.bool)
    ragged.valid[1, 5:] = False
    protected[:, 4] = True
    rows = chosen(replace(ragged, protected=protected), keep, site, scale=scale)
    assert [len(set(row)) for row in rows] == [keep, min(keep, 5)] and all(4 in row for row in rows)
    alone = replace(view(h[1:, :5], r[1:, :5]), protected=protected[1:, :5])
    assert chosen(alone, keep, site, scale=scale)[0] == rows[1]


def test_tokens_that_the_tower_did_not_make_come_last_and_need_no_cover():
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        h = torch.randn(1, 8, 5, generator=generator, dtype=torch.float64)
        r = torch.rand(1, 8, generator=generator, dtype=torch.float64)
        r[0, [2, 5]] = torch.nan
        assert chosen(view(h, r), 6) == [[0, 1, 3, 4, 6, 7]]
        for keep in (2, 3, 4):
            for scale in ("mean", "range"):
                want = sorted(greedy(h[0], r[0].tolist(), keep, how=scale))
                assert chosen(view(h, r), keep, scale=scale) == [want]


def test_where_the_tower_is_not_shown_the_norm_ranks_behind_the_projector(monkeypatch):
    B.hide_the_tower(monkeypatch)
    model, inputs = testing.tiny("qwen2-vl")
    seen = []
    with vtprune.attach(model, "tops", keep=1, per="sample") as handle, torch.no_grad():
        hook = handle.adapter.projector[0].register_forward_hook(lambda m, a, o: seen.append(o))
        model(**inputs)
        hook.remove()
        report = handle.report()
    features = torch.cat(seen).double().split(report.visual_tokens)
    assert [s.tolist() for s in report.stages[0].kept] == [
        sorted(greedy(x, x.norm(dim=-1).tolist(), 8)) for x in features
    ]
    with pytest.raises(vtprune.UnsupportedError, match="use relevance='norm'"):
        vtprune.attach(model, "tops", relevance="attention")


@pytest.mark.parametrize(
    "options, says", [({"layers": (0, 2)}, "no attention in front"), ({"layers": (2, 1)}, "must ascend")]
)
def test_impossible_schedules_are_refused(options, says):
    with pytest.raises(vtprune.VtpruneError, match=says):
        make("tops", options).plan(geometry(16, 8), 1)
