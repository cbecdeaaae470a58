"""SCOPE (arXiv 2510.24214) against its sums, one at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import builders as B
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import testing
from vtprune.core.types import Projections, TokenView
from vtprune.methods.base import Cut, make


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return dot / length if length else 0.0


def greedy(features: Tensor, saliency: list[float], keep: int, alpha: float = 1.0) -> list[int]:
    """In the order of choice."""
    rows = features.tolist()
    n = len(rows)
    s = [[cosine(a, b) for b in rows] for a in rows]
    covered, chosen = [0.0] * n, []
    while len(chosen) < min(keep, n):
        worth = {
            v: sum(max(0.0, s[u][v] - covered[u]) for u in range(n)) * saliency[v] ** alpha
            for v in range(n)
            if v not in chosen
        }
        best = max(worth.values())
        chosen.append(next(v for v in worth if worth[v] >= best - 1e-12))
        covered = [max(c, s[u][chosen[-1]]) for u, c in enumerate(covered)]
    return chosen


def view(features: Tensor, attention: Tensor | None = None) -> TokenView:
    """A view in which the class token attends as ``attention`` says: keys are its logarithm."""
    b, n = features.shape[:2]
    ones = torch.ones(b, n)
    sources = {}
    if attention is not None:
        k = torch.cat([torch.full((b, 1), -30.0), attention.log()], 1)[:, None, :, None].to(features.dtype)
        sources = {"projections": lambda: Projections(torch.ones_like(k), k, k, 1.0, 1)}
    return TokenView(
        features=features,
        valid=ones.bool(),
        index=torch.arange(n).expand(b, n),
        size=ones,
        protected=~ones.bool(),
        grid=(1, n),
        prefix=int(attention is not None),
        sources=sources,
    )


def chosen(seen: TokenView, keep: int, saliency: str = "attention", **options):
    features = "encoder" if "projections" in seen.sources else "projected"
    site = "vision.2" if features == "encoder" else "projector"
    cut = Cut(site=site, keep=keep, data={"saliency": saliency, "features": features})
    return make("scope", options).select(seen, cut)


def kept(*args, **options) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in chosen(*args, **options).kept]


def test_the_example_of_the_specification():
    angle = torch.deg2rad(torch.tensor([0.0, 5, 90], dtype=torch.float64))
    features = torch.stack([angle.cos(), angle.sin()], -1)[None]
    attention = torch.tensor([[0.5, 0.4, 0.1]], dtype=torch.float64)
    assert kept(view(features, attention), 2) == [[0, 2]]  # attention alone: 0, 1
    assert kept(view(features, attention), 1, alpha=0.0) == [[1]]


def decided(model, inputs, **options) -> list[list[int]]:
    """What is kept of each image, in the order in which images come."""
    with vtprune.attach(model, "scope", **options) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    out = []
    for row in report.stages[-1].kept:
        for image in range(int(row.max()) // B.N + 1):
            out.append([i - image * B.N for i in row.tolist() if i // B.N == image])
    return out


# (with alpha=0 two tokens that cover nothing but each other gain the same, and rounding decides)
@pytest.mark.sampled(2)
@pytest.mark.parametrize("keep, alpha", [(1, 0.0), (36, 0.0), (2, 0.3), (16, 0.3), (1, 1.0), (7, 1.0), (35, 1.0)])
def test_llava_equals_the_transcription(keep, alpha):
    model, inputs = B.llava("clip", "llama", blocks=4, layers=2), B.prompts([[4, 9], [7, 2, 5]])
    hidden, attentions = B.watched(model.model.vision_tower, inputs["pixel_values"])
    states = hidden[3][:, 1:]  # the third of four blocks is the last that is used
    attention = attentions[2].mean(1)[:, 0, 1:].tolist()
    with torch.no_grad():
        projected = model.model.multi_modal_projector(states)
    want = {
        name: [sorted(greedy(f[i], a[i], keep, alpha)) for i in range(3)]
        for name, f, a in (
            ("encoder", states, attention),
            ("projected", projected, attention),
            ("encoder-norm", states, states.norm(dim=-1).tolist()),
            ("projected-norm", projected, projected.norm(dim=-1).tolist()),
        )
    }
    for site in ("tower", "projector"):
        assert decided(model, inputs, keep=keep, alpha=alpha, site=site) == want["encoder"]
        norm = decided(model, inputs, keep=keep, alpha=alpha, site=site, saliency="norm")
        assert norm == want["encoder-norm"]
    other = {"keep": keep, "alpha": alpha, "features": "projected"}
    assert decided(model, inputs, **other) == want["projected"]
    assert decided(model, inputs, **other, saliency="norm") == want["projected-norm"]


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_towers_without_a_class_token_go_by_the_norm(kind):
    model, pixels = B.tower(kind, 4), B.images(3)
    hidden, attentions = B.watched(model, pixels)
    prefix = int(kind == "dinov2")
    states = hidden[4][:, prefix:]
    received = attentions[3].mean(1).mean(1)[:, prefix:].tolist()
    looked = attentions[3].mean(1)[:, 0, prefix:].tolist()
    norm = states.norm(dim=-1).tolist()
    for saliency, values in (
        ("auto", looked if prefix else norm),
        ("norm", norm),
        ("attention", looked if prefix else received),
    ):
        with vtprune.attach(model, "scope", keep=9, saliency=saliency) as handle, torch.no_grad():
            model(pixels)
            report = handle.report()
        assert [k.tolist() for k in report.stages[-1].kept] == [
            sorted(greedy(states[i], values[i], 9)) for i in range(3)
        ]


def test_where_the_tower_is_not_shown_the_projected_features_decide(monkeypatch):
    B.hide_the_tower(monkeypatch)
    model, inputs = testing.tiny("qwen2-vl")
    seen = []
    with vtprune.attach(model, "scope", keep=4, per="sample") as handle, torch.no_grad():
        hook = handle.adapter.projector[0].register_forward_hook(lambda m, a, o: seen.append(o))
        model(**inputs)
        hook.remove()
        report = handle.report()
    features = torch.cat([s.flatten(0, -2) for s in seen]).double().split(report.visual_tokens)
    assert report.stages[-1].site == "projector" and len(report.visual_tokens) > 1
    assert [sample.tolist() for sample in report.stages[-1].kept] == [
        sorted(greedy(x, x.norm(dim=-1).tolist(), 4)) for x in features
    ]
    for wrong in ({"saliency": "attention"}, {"features": "encoder"}, {"site": "tower"}):
        with pytest.raises(vtprune.UnsupportedError, match="blocks of its vision tower are not shown"):
            vtprune.attach(model, "scope", keep=4, **wrong)


def test_options_that_cannot_be_met():
    model = B.llava("clip", "llama", blocks=4, layers=2)
    with pytest.raises(vtprune.VtpruneError, match="not there in the tower"):
        vtprune.attach(model, "scope", features="projected", site="tower")
    with pytest.raises(vtprune.UnsupportedError, match="use features='encoder'"):
        vtprune.attach(B.tower("clip", 3), "scope", features="projected")


@pytest.mark.parametrize("keep", [1, 3, 8, 12])
def test_exact_counts_whatever_the_data(keep):
    same = torch.ones(2, 12, 4)
    flat = torch.full((2, 12), 1 / 12)
    zero = flat.clone()
    zero[:, 3:] = 1e-45
    for features in (same, same * 0, torch.eye(12)[None].repeat(2, 1, 1), torch.full_like(same, torch.nan)):
        for attention in (flat, zero):
            rows = kept(view(features, attention), keep)
            assert all(len(set(row)) == len(row) == keep for row in rows)
    ragged = view(torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)), flat)
    ragged.valid[1, 5:] = False
    protected = torch.zeros(2, 12, dtype=torch.bool)
    protected[:, 4] = True
    rows = kept(replace(ragged, protected=protected), keep)
    assert [len(set(r)) for r in rows] == [keep, min(keep, 5)] and all(4 in r for r in rows)
    alone = replace(ragged, **{k: getattr(ragged, k)[1:, :5] for k in ("features", "valid", "index", "size")})
    alone = replace(alone, protected=protected[1:, :5], sources=view(alone.features, flat[1:, :5]).sources)
    assert kept(alone, keep)[0] == rows[1]


def test_tokens_that_the_tower_did_not_make_come_last_and_need_no_cover():
    cut = Cut(site="projector", keep=4, data={"saliency": "attention", "features": "projected", "blocks": (2,)})
    method, rest = make("scope", {}), [0, 2, 3, 5]
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        seen = view(torch.randn(1, 6, 4, generator=generator, dtype=torch.float64))
        known = torch.rand(1, 6, 1, generator=generator, dtype=torch.float64)
        known[0, [1, 4]] = torch.nan
        seen = replace(seen, sources={"note vision.2": lambda known=known: known})
        assert method.select(seen, cut).kept.tolist() == [rest]
        for keep in (1, 2, 3):
            order = greedy(seen.features[0, rest], known[0, rest, 0].tolist(), keep)
            assert method.select(seen, replace(cut, keep=keep)).kept.tolist() == [sorted(rest[i] for i in order)]


def test_invariants():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 20, 8, generator=generator, dtype=torch.float64)
    a = torch.rand(1, 20, generator=generator, dtype=torch.float64) / 20
    first = kept(view(x, a), 6)
    mixed = torch.randperm(20, generator=generator)
    assert sorted(mixed[kept(view(x[:, mixed], a[:, mixed]), 6)[0]].tolist()) == first[0]
    assert kept(view(x * 7, a), 6) == first
    assert kept(view(x, a), 20) == [list(range(20))]
    assert (chosen(view(x, a), 6).score[0] == -6).sum() == 14  # the others share the place behind
