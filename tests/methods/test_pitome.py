"""PiToMe (arXiv 2405.16148): timm models against the slow transcription, the official wrappers' variants written out on
a CLIP tower."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import builders as B
import pytest
import torch
from test_tome import check, read
from torch import Tensor, nn

import oracles as O
import vtprune

TIMM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deit": ({}, {"bsm_layers": range(3)}),
    "paper": ({"variant": "paper"}, {"margin_scale": 0.9, "proportional": True}),
    "mae": ({"variant": "mae"}, {"bsm_layers": range(3, 6)}),
    "deit-proportional": ({"variant": "deit", "proportional": True}, {"bsm_layers": range(3), "proportional": True}),
    "deit-all-pitome": ({"matching": "pitome"}, {}),
    "mae-all-bsm": ({"variant": "mae", "matching": "bsm"}, {"bsm_layers": range(6)}),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("kind", ["class", "layerscale-registers", "distilled", "avg-pool"])
def test_timm_equals_the_transcription(kind: str, name: str) -> None:
    model, pixels = B.vit(kind), B.images(2)
    options, oracle = TIMM[name]
    want = O.pitome_vit_oracle(model, pixels, 0.9, **oracle)
    got = read(model, pixels, "pitome", ratio=0.9, **options)
    check(model, pixels, want, got)
    assert [s.tokens_out[0] for s in got[2].stages] == O.pitome_counts(36, 6, 0.9)


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.95])
def test_timm_at_other_ratios(ratio: float) -> None:
    model, pixels = B.vit("class", depth=3), B.images(2)
    want = O.pitome_vit_oracle(model, pixels, ratio, bsm_layers=range(2))  # the first ceil(3 / 2)
    check(model, pixels, want, read(model, pixels, "pitome", ratio=ratio))


@pytest.mark.parametrize("ratio", [0.9, 0.925, 0.95, 0.975])
def test_published_counts(ratio: float) -> None:
    from vtprune.methods.pitome import falling

    assert falling(196, ratio, 12) == O.pitome_counts(196, 12, ratio)
    assert falling(196, 0.9, 12)[-1] == 59 and falling(576, 0.9, 23)[-1] == 54 and falling(576, 0.925, 23)[-1] == 101


def test_plain_tome_blocks_count_the_class_token() -> None:
    """LLaVA-1.5-7B's setting, block by block: 13 blocks of plain ToMe over n + 1 tokens, then PiToMe over the
    patches."""
    from vtprune.core.types import Geometry
    from vtprune.methods.base import make

    geometry = Geometry(
        "llava", "clip", 576, (24, 24), 1, 23, 24, 32, {"vision": frozenset({"projections", "class_token"})}
    )
    for ratio, last in ((0.9, 54), (0.925, 101)):
        n, want = 576, []
        for layer in range(23):
            n -= O.pitome_r(n + 1 if layer <= 12 else n, ratio)
            want.append(n)
        assert [c.keep for c in make("pitome", {"ratio": ratio}).plan(geometry, None)] == want and want[-1] == last


@pytest.mark.parametrize("keep", [36, 35, 20, 5, 1])
def test_keep_is_met_exactly(keep: int) -> None:
    _, _, report = read(B.vit("class"), B.images(2), "pitome", keep=keep)
    assert report.stages[-1].tokens_out == [keep, keep]
    counts = [36] + [s.tokens_out[0] for s in report.stages]
    assert all(b <= a <= 2 * b for a, b in zip(counts, counts[1:], strict=False))


# ------------------------------------------------------------------------------------------------------ the wrappers,
# on a CLIP tower

Merger = Callable[[int, int, Tensor], tuple[list[O.Merge], list[int]]]


@torch.no_grad()
def clip_slow(
    model: nn.Module,
    image: Tensor,
    used: int,
    *,
    metric: str,
    inside: bool,
    match: Merger,
    weighted: bool,
    proportional: bool,
) -> dict[str, Any]:
    """One image through ``used`` blocks of a CLIP tower, a merge in each: tokens (class first), original index of each
    patch, who holds it."""
    x = model.pre_layrnorm(model.embeddings(image[None]))[0]
    depth, n = len(model.encoder.layers), len(x) - 1
    size, slot, owner = [1.0] * len(x), list(range(-1, n)), list(range(n))
    for layer in range(used):
        block = model.encoder.layers[layer]
        z = block.layer_norm1(x)
        q, k, v = (
            m(z).view(len(z), 4, 8) for m in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        )
        mixed = torch.zeros(len(z), 32, dtype=torch.float64)
        for h in range(4):
            for i in range(len(z)):
                bias = [math.log(s) if proportional else 0.0 for s in size]
                w = O._softmax([float(d) / math.sqrt(8) + b for d, b in zip(k[:, h] @ q[i, h], bias, strict=True)])
                mixed[i, h * 8 : h * 8 + 8] = torch.tensor(w, dtype=torch.float64) @ v[:, h]
        x = x + block.self_attn.out_proj(mixed)
        if not inside:
            x = x + block.mlp(block.layer_norm2(x))
        values = (x if metric == "hidden" else k.mean(1))[1:]
        merges, kept = match(layer, depth, values)
        merges, kept = [(a + 1, b + 1) for a, b in merges], [0, *sorted(i + 1 for i in kept)]
        for source, target in merges:
            owner = [slot[target] if o == slot[source] else o for o in owner]
        total = O._weighted_merge(x, size, merges, kept)[1]
        x = O._weighted_merge(x, size if weighted else [1.0] * len(size), merges, kept)[0]
        size, slot = total, [slot[i] for i in kept]
        if inside:
            x = x + block.mlp(block.layer_norm2(x))
    return {"hidden": x, "kept": slot[1:], "owner": owner}


def matcher(ratio: float, margin: Callable[[int, int], float], kind: Callable[[int, int], str]) -> Merger:
    def match(layer: int, depth: int, values: Tensor) -> tuple[list[O.Merge], list[int]]:
        how = kind(layer, depth)
        # plain ToMe of the whole sequence: the class token in front takes part in parity and ratio and is protected
        if how == "tome":
            padded = torch.cat([torch.ones(1, values.shape[1], dtype=torch.float64), values])
            found = O.tome_match_oracle(padded[None], O.pitome_r(len(padded), ratio), True, False)
            return [(a - 1, b - 1) for a, b in found["merges"][0]], [i - 1 for i in found["kept"][0] if i]
        return O._pitome_match(values, O.pitome_r(len(values), ratio), margin(layer, depth), 1.0, how)

    return match


WRAPPERS: dict[str, dict[str, Any]] = {
    "clip": {
        "metric": "hidden",
        "inside": True,
        "margin": lambda i, n: 0.95 * (1 - i / n),
        "kind": lambda i, n: "pitome",
    },
    "hf-clip": {
        "metric": "hidden",
        "inside": False,
        "margin": lambda i, n: 0.9 * (1 - i / n),
        "kind": lambda i, n: "tome" if i <= n / 2 else "pitome",
        "weighted": False,
    },
    "blip": {
        "metric": "hidden",
        "inside": True,
        "margin": lambda i, n: 0.9 * (1 - i / n),
        "kind": lambda i, n: "pitome",
    },
    "blip2": {
        "metric": "keys",
        "inside": True,
        "margin": lambda i, n: 0.75 - 0.4 * i / n,
        "kind": lambda i, n: "pitome",
        "proportional": True,
    },
    "paper": {
        "metric": "keys",
        "inside": True,
        "margin": lambda i, n: 0.9 - 0.9 * i / n,
        "kind": lambda i, n: "pitome",
        "proportional": True,
    },
    "deit": {
        "metric": "keys",
        "inside": True,
        "margin": lambda i, n: 0.75 * (1 - i / n),
        "kind": lambda i, n: "bsm" if i < math.ceil(n / 2) else "pitome",
    },
}


def expected(name: str, model: nn.Module, image: Tensor, used: int, ratio: float) -> dict[str, Any]:
    w = WRAPPERS[name]
    return clip_slow(
        model,
        image,
        used,
        metric=w["metric"],
        inside=w["inside"],
        match=matcher(ratio, w["margin"], w["kind"]),
        weighted=w.get("weighted", True),
        proportional=w.get("proportional", False),
    )


@pytest.mark.parametrize("name", WRAPPERS)
def test_variants_on_a_clip_tower(name: str) -> None:
    model, pixels = B.tower("clip", 5), B.images(2)
    with vtprune.attach(model, "pitome", ratio=0.85, variant=name) as handle, torch.no_grad():
        hidden, last = model(pixels).last_hidden_state, handle.report().stages[-1]
    for b in range(2):
        want = expected(name, model, pixels[b], 5, 0.85)
        assert last.kept[b].tolist() == want["kept"]
        assert last.kept[b][last.assignment[b]].tolist() == want["owner"]
        B.close(hidden[b], want["hidden"])


def test_llava_runs_the_wrapper_of_its_tower() -> None:
    """'auto' in a LLaVA with CLIP is hf-clip; the projector and the language model see the merged tokens at their
    destinations' positions."""
    model, inputs = B.llava("clip", "qwen2", blocks=6, layers=3), B.prompts([[4, 9], [2, 3]])
    x = B.embeddings(model, inputs)
    with vtprune.attach(model, "pitome", ratio=0.8) as handle:
        hidden, report = B.final(model, inputs), handle.report()
    for b in range(2):
        at = B.visual_positions(inputs, b)
        want = expected("hf-clip", model.model.vision_tower, inputs["pixel_values"][b], 5, 0.8)
        last = report.stages[-1]
        assert last.kept[b].tolist() == want["kept"] and last.kept[b][last.assignment[b]].tolist() == want["owner"]
        with torch.no_grad():
            x[b][at[want["kept"]]] = model.model.multi_modal_projector(want["hidden"][1:])
        rows = sorted({*range(len(x[b]))} - {*at.tolist()} | {*at[want["kept"]].tolist()})
        B.close(hidden[b][rows], B.stack(model.model.language_model, x[b][rows], rows))


# --------------------------------------------------------------------------------------------------------------------
# options


@pytest.mark.parametrize(
    "options", [{"alpha": 0.1}, {"alpha": 3.0}, {"energy": "paper"}, {"energy": "paper", "alpha": 0.1}]
)
def test_energy_options(options: dict[str, Any]) -> None:
    """Equation 4 with its jump at the margin, and the scale of its negative branch, in one block."""
    model, pixels = B.vit("class", depth=1), B.images(3)
    alpha, seen = options.get("alpha", 1.0), []
    hook = model.blocks[0].attn.qkv.register_forward_hook(lambda m, a, y: seen.append(y))
    _, _, report = read(model, pixels, "pitome", ratio=0.7, variant="paper", **options)
    hook.remove()
    for b in range(3):
        unit = [k / k.norm() for k in seen[-1][b, 1:, 32:64].view(36, 2, 16).mean(1)]

        def f(x: float) -> float:
            if options.get("energy") == "paper":
                return x if x >= 0.9 else alpha * (math.exp(x - 0.9) - 1)
            return x - 0.9 if x > 0.9 else alpha * (math.exp(x - 0.9) - 1)

        energy = [sum(f(O._dot(unit[i], unit[j])) for j in range(36)) / 36 for i in range(36)]
        ranks = O._descending(energy)
        sources = ranks[0:20:2]  # r = floor(36 - 36 * 0.7) = 10
        assert report.stages[0].kept[b].tolist() == sorted(set(range(36)) - set(sources))


def test_options_change_the_result() -> None:
    model, pixels = B.vit("class"), B.images(3)
    found = set()
    for options in (
        {},
        {"alpha": 0.05},
        {"energy": "paper", "alpha": 0.05},
        {"variant": "mae"},
        {"variant": "paper"},
        {"matching": "bsm"},
        {"variant": "clip"},
    ):
        found.add(
            str([a.tolist() for a in read(model, pixels, "pitome", ratio=0.8, **options)[2].stages[-1].assignment])
        )
    assert len(found) == 7


@pytest.mark.parametrize("ratio", [0.4, 1.1])
def test_impossible_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(vtprune.VtpruneError, match="ratio"):
        vtprune.attach(B.vit("class"), "pitome", ratio=ratio)
