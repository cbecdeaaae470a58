"""Turbo (arXiv 2312.07408, 2407.11717) in CLIP, SigLIP and timm towers against the equations, one edge at a time."""

from __future__ import annotations

import math
from typing import Any

import builders as B
import pytest
import torch
from test_tome import Rule, merging, read
from torch import Tensor

import oracles as O
import vtprune
from vtprune.core.types import Geometry
from vtprune.methods.base import make


def edges(
    r: int,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.0,
    factor: float = 30.0,
    threshold: int = 0,
    received: bool = False,
    official: bool = True,
) -> Rule:
    """cos(k_i, k_j) - beta^|gamma - t| alpha factor c_i; what stands in front of the patches neither merges nor
    absorbs."""
    merged = 0

    def rule(
        layer: int, keys: Tensor, attention: list[list[float]], prefix: int, size: list[float]
    ) -> tuple[list[O.Merge], list[int]]:
        nonlocal merged
        merged = merged if layer else 0
        n = len(keys)
        amount = min(r, (n - prefix) // 2)
        if amount <= 0 or n < threshold:
            return [], list(range(n))
        unit = [k / k.norm() for k in keys]
        weight = beta ** abs(gamma - merged) * alpha * factor
        found = []
        for a in range(0, n, 2):
            informative = sum(row[a] for row in attention) / n if received else attention[0][a]
            best, partner = max((O._dot(unit[a], unit[b]), -b) for b in range(1, n, 2) if b >= prefix)
            if a >= prefix:
                found.append((best - weight * informative, a, -partner))
        found.sort(key=lambda edge: -edge[0])
        rest = [a for _, a, _ in found[amount:]]
        kept = [*range(prefix), *(sorted(rest) if prefix else rest), *(b for b in range(1, n, 2) if b >= prefix)]
        merged += 1
        return [(a, b) for _, a, b in found[:amount]], kept if official else sorted(kept)

    return rule


def compare(kind: str, rule: Rule, r: int = 4, **options: Any) -> list[list[int]]:
    """The tower's survivors, who absorbed whom and last rows equal the transcription's; returns who absorbed whom."""
    model, pixels = B.tower(kind, 5), B.images(3)
    with vtprune.attach(model, "turbo", r=r, **options) as handle, torch.no_grad():
        out = model(pixels).last_hidden_state
        stages = handle.report().stages
    owners = []
    for b in range(3):
        want = merging(model, pixels[b], 5, rule, options.get("proportional", True))
        for stage, state in zip(stages, want, strict=True):
            assert stage.kept[b].tolist() == state["kept"]
            assert stage.kept[b][stage.assignment[b]].tolist() == state["owner"]
        rows = want[-1]["rows"]
        B.close(out[b], model.post_layernorm(rows).detach() if kind == "siglip" else rows)
        owners.append(want[-1]["owner"])
    return owners


OPTIONS: list[dict[str, Any]] = [
    {},
    {"alpha": 5.0},
    {"alpha": 2.0, "beta": 0.5, "gamma": 2.0},
    {"factor": 1.0},
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_equals_the_equations(kind: str, options: dict[str, Any]) -> None:
    """With a class token its attention, without what each token receives."""
    compare(kind, edges(4, received=kind == "siglip", **options), threshold=0, **options)


def test_other_options_equal_the_equations() -> None:
    compare("clip", edges(4, alpha=5.0, received=True), alpha=5.0, attention="received", threshold=0)
    compare("clip", edges(4, official=False), order="position", threshold=0)
    compare("clip", edges(4), proportional=False, threshold=0)
    compare("clip", edges(6, threshold=27), r=6, threshold=27)  # 37, 31, 25 and no more
    compare("clip", edges(3, beta=0.1, gamma=3.0), r=3, beta=0.1, gamma=3.0, threshold=0)


def test_alpha_zero_is_tome() -> None:
    """And any weight changes only which tokens merge."""
    model, pixels = B.tower("clip", 5), B.images(3)

    def run(name: str, **options: Any) -> Any:
        with vtprune.attach(model, name, r=4, **options) as handle, torch.no_grad():
            return model(pixels).last_hidden_state, handle.report().stages

    (tome, _), (zero, _), (one, stages) = run("tome"), run("turbo", alpha=0.0, threshold=0), run("turbo", threshold=0)
    assert torch.equal(tome, zero) and not torch.equal(tome, one)
    keys: list[Tensor] = []
    hook = model.encoder.layers[0].self_attn.k_proj.register_forward_hook(lambda m, a, y: keys.append(y))
    with torch.no_grad():
        model(pixels)
    hook.remove()
    for b in range(3):
        unit = [k / k.norm() for k in keys[0][b, 1:].view(36, 4, 8).mean(1)]
        kept, slots = stages[0].kept[b], stages[0].assignment[b]
        for i in sorted(set(range(36)) - set(kept.tolist())):
            assert i % 2 == 1  # behind a class token the odd patches are A
            nearest = max(range(0, 36, 2), key=lambda j: O._dot(unit[i], unit[j]))
            assert int(kept[slots[i]]) == nearest


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "distilled", "avg-pool"])
def test_timm(kind: str) -> None:
    """Whatever stands in front, a matching equals the equations."""
    model, pixels = B.vit(kind, depth=1), B.images(2)
    seen: list[Tensor] = []
    hook = model.blocks[0].attn.qkv.register_forward_hook(lambda m, a, y: seen.append(y))
    _, _, report = read(model, pixels, "turbo", r=7, alpha=2.0, threshold=0)
    hook.remove()
    a, p = model.blocks[0].attn, model.num_prefix_tokens
    for b in range(2):
        q, k, _ = seen[-1][b].view(-1, 3, 2, 16).unbind(1)
        q, k = a.q_norm(q), a.k_norm(k)
        n = len(q)
        rows = [[0.0] * n for _ in range(n)]
        for h in range(2):
            for i in range(n):
                weights = O._softmax([O._dot(q[i, h], k[j, h]) / 4 for j in range(n)])
                rows[i] = [x + w / 2 for x, w in zip(rows[i], weights, strict=True)]
        merges, _ = edges(7, alpha=2.0, received=not p)(0, k.mean(1), rows, p, [1.0] * n)
        assert len(merges) == 7 and {*range(36)} - {*report.stages[0].kept[b].tolist()} == {i - p for i, _ in merges}


def geometry(tokens: int, layers: int, prefix: int = 1) -> Geometry:
    side = math.isqrt(tokens)
    traits = frozenset({"class_token"} if prefix else ())
    return Geometry("x", "vit", tokens, (side, side), prefix, layers, layers, 0, {"vision": frozenset()}, traits=traits)


@pytest.mark.parametrize("tokens, r, left", [(900, 40, 420), (576, 30, 216)])
def test_published_counts(tokens: int, r: int, left: int) -> None:
    """901 to 421 tokens and 577 to 217, class token included, after twelve blocks."""
    cuts = make("turbo", {"r": r}).plan(geometry(tokens, 12), None)
    assert [c.keep for c in cuts] == [tokens - r * (i + 1) for i in range(12)] and cuts[-1].keep == left
    assert all(c.inside and c.proportional for c in cuts)


def test_small_sequences_are_left_alone() -> None:
    """Blocks that find fewer than 40 tokens merge none; a budget is met all the same."""
    cuts = make("turbo", {"r": 10}).plan(geometry(64, 6), None)
    assert [c.keep for c in cuts] == [54, 44, 34, 34, 34, 34]
    assert [c.keep for c in make("turbo", {"r": 10, "threshold": 0}).plan(geometry(64, 4), None)] == [54, 44, 34, 24]
    assert [c.keep for c in make("turbo", {"r": 1}).plan(geometry(39, 3), None)] == [38, 38, 38]
    assert make("turbo", {}).plan(geometry(36, 6), 4)[-1].keep == 4


def test_the_weight_follows_the_merging_blocks() -> None:
    """Blocks that merge nothing do not count."""
    cuts = make("turbo", {"r": (2, 0, 2, 2), "alpha": 2.0, "beta": 0.5, "gamma": 1.0, "threshold": 0}).plan(
        geometry(36, 4), None
    )
    assert [c.data["weight"] for c in cuts] == [30.0, 60.0, 60.0, 30.0]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("keep", [36, 35, 17, 3, 2])
def test_keep_is_met_exactly(kind: str, keep: int) -> None:
    """Random images, and one whose patches are all the same."""
    model, pixels = B.tower(kind, 5), B.images(2)
    pixels[1] = 0.3
    with vtprune.attach(model, "turbo", keep=keep) as handle, torch.no_grad():
        out = model(pixels).last_hidden_state
        last = handle.report().stages[-1]
    assert last.tokens_out == [keep, keep] and bool(out.isfinite().all())
    assert all(len(set(k.tolist())) == keep for k in last.kept)


def test_refusals() -> None:
    with pytest.raises(vtprune.UnsupportedError, match="attention='received'"):
        vtprune.attach(B.tower("siglip", 4), "turbo", attention="class")
    with pytest.raises(vtprune.VtpruneError, match="turbo: r has 2 entries"):
        vtprune.attach(B.tower("clip", 4), "turbo", r=(1, 2))
    with pytest.raises(vtprune.VtpruneError, match="turbo: inflect"):
        vtprune.attach(B.tower("clip", 4), "turbo", inflect=1.0)
    with pytest.raises(vtprune.VtpruneError, match="turbo: 4 blocks"):
        vtprune.attach(B.tower("clip", 4), "turbo", keep=1)
