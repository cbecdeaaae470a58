"""ToMe (arXiv 2210.09461) in timm models against the slow transcription, in CLIP and SigLIP towers against another
one, bare and inside LLaVA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor, nn

import oracles as O
import vtprune

KINDS = list(B.VITS)


def read(model: nn.Module, pixels: Tensor, name: str, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Tokens behind the last norm, logits, report."""
    with vtprune.attach(model, name, **options) as handle, torch.no_grad():
        return model.forward_features(pixels), model(pixels), handle.report()


def check(model: nn.Module, pixels: Tensor, want: dict, got: tuple[Tensor, Tensor, Any]) -> None:
    """Survivors, who absorbed whom, hidden states in raster order and logits."""
    hidden, logits, report = got
    last, p = report.stages[-1], model.num_prefix_tokens
    averaged = model.global_pool == "avg"
    for b in range(len(pixels)):
        assert last.kept[b].tolist() == want["slots"][b].tolist()
        assert last.kept[b][last.assignment[b]].tolist() == want["assignment"][b].tolist()
        target = want["hidden"][b]
        B.close(hidden[b], target)
        # a mean counts every original token
        rows = torch.cat([torch.arange(p), p + last.assignment[b]]) if averaged else torch.arange(len(target))
        B.close(logits[b], B.head(model, target[rows][None])[0])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("order", ["official", "position"])
def test_equals_the_transcription(kind: str, proportional: bool, order: str) -> None:
    model, pixels = B.vit(kind), B.images(2)
    want = O.tome_vit_oracle(model, pixels, 5, proportional, order)
    check(model, pixels, want, read(model, pixels, "tome", r=5, proportional=proportional, order=order))


@pytest.mark.parametrize("r, inflect", [(3, 0.0), (4, -1.0), (4, 1.0), (30, 0.0), ((9, 0, 4, 1, 0, 2), 0.0)])
@pytest.mark.parametrize("kind", ["class", "distilled", "avg-pool"])
def test_schedules(kind: str, r: Any, inflect: float) -> None:
    """Constant, falling, rising, capped at half of the tokens, and listed."""
    model, pixels = B.vit(kind), B.images(1)
    amounts = (r, inflect) if isinstance(r, int) and inflect else list(r) if isinstance(r, tuple) else r
    want = O.tome_vit_oracle(model, pixels, amounts, order="official")
    got = read(model, pixels, "tome", r=r, **({"inflect": inflect} if inflect else {}))
    check(model, pixels, want, got)
    n, p = B.N, model.num_prefix_tokens
    assert [s.tokens_out[0] + p for s in got[2].stages] == O.tome_counts(n + p, O.tome_r_schedule(6, amounts), p)


def test_the_published_schedules() -> None:
    from vtprune.methods.tome import schedule

    assert schedule(13, -1.0, 12) == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert schedule(8, 0.0, 3) == [8, 8, 8]
    for r, inflect, count in ((13, 1.0, 12), (7, -0.5, 24), (16, 0.25, 9)):
        assert schedule(r, inflect, count) == O.tome_r_schedule(count, (r, inflect))


@pytest.mark.parametrize("kind", ["class", "distilled", "avg-pool"])
@pytest.mark.parametrize("keep", [36, 30, 17, 3, 1])
def test_keep_is_met_exactly(kind: str, keep: int) -> None:
    _, _, report = read(B.vit(kind), B.images(2), "tome", keep=keep)
    assert report.stages[-1].tokens_out == [keep, keep]


def test_every_budget_that_halving_can_reach_has_a_schedule() -> None:
    """Six blocks of halving take 36 tokens to 1; merges are spread evenly where that is enough."""
    from vtprune.methods.tome import spread

    for tokens, count in ((36, 6), (49, 3), (576, 23)):
        for keep in range(-(-tokens // 2**count), tokens + 1):
            n, merges = tokens, spread(tokens - keep, count, tokens, 1)
            for r in merges:
                assert 0 <= r <= n // 2
                n -= r
            assert n == keep and len(merges) == count
    assert spread(24, 6, 36, 1) == [4] * 6
    with pytest.raises(vtprune.VtpruneError, match="keep >= 5"):
        spread(32, 3, 36, 1)


def test_options_change_the_result() -> None:
    """Proportional attention leads to other features, the order of the tokens to other matchings from the second block
    on."""
    model, pixels = B.vit("class"), B.images(2)
    (_, a, one), (_, b, _), (_, _, two) = (
        read(model, pixels, "tome", r=5, **o) for o in ({}, {"proportional": False}, {"order": "position"})
    )
    official, plain = one.stages, two.stages
    assert float((a - b).abs().max()) > 1e-3
    assert [k.tolist() for k in plain[0].kept] == [
        k.tolist() for k in official[0].kept
    ]  # the first matching is the same
    assert [a.tolist() for a in plain[-1].assignment] != [a.tolist() for a in official[-1].assignment]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name, options",
    [
        ("tome", {"r": 0}),
        ("tome", {"keep": 36}),
        ("pitome", {"ratio": 1.0}),
        ("pitome", {"keep": 36, "variant": "paper"}),
    ],
)
def test_zero_reduction_is_the_identity(kind: str, name: str, options: dict[str, Any]) -> None:
    """LayerScale, registers, distillation token, average pooling: nothing merged, nothing changed, and every block was
    asked."""
    model, pixels = B.vit(kind), B.images(2)
    with torch.no_grad():
        dense = model(pixels)
        tokens = model.forward_features(pixels)
    hidden, logits, report = read(model, pixels, name, **options)
    B.close(logits, dense, 1e-12)
    B.close(hidden, tokens, 1e-12)
    assert [s.site for s in report.stages] == [f"vision.{i}" for i in range(6)]
    assert all(s.tokens_out == [36, 36] and k.tolist() == list(range(36)) for s in report.stages for k in s.kept)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
    ],
)
@pytest.mark.parametrize("method, options", [("tome", {"r": 0}), ("pitome", {"ratio": 1.0})])
def test_zero_reduction_is_the_identity_on_timm_architectures(name: str, method: str, options: dict[str, Any]) -> None:
    """The published architectures, shortened to two blocks of random weights."""
    import timm

    model = B.randomise(
        timm.create_model(name, img_size=56 if "14" in name.split("patch")[1][:2] else 64, depth=2, num_classes=7),
        5,
        0.05,
    )
    pixels = torch.randn(
        2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    with torch.no_grad():
        dense = model(pixels)
    _, logits, report = read(model, pixels, method, **options)
    B.close(logits, dense, 1e-12)
    assert [s.site for s in report.stages] == ["vision.0", "vision.1"]


def test_a_block_of_another_order_is_refused() -> None:
    """Post-norm blocks have the same parts in another order: refused when attaching, not computed wrongly."""
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    model = B.randomise(
        VisionTransformer(
            img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, block_fn=ResPostBlock
        ),
        6,
    )
    with pytest.raises(vtprune.UnsupportedError):
        vtprune.attach(model, "tome", r=2)


def test_a_list_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(vtprune.VtpruneError, match="3 entries"):
        vtprune.attach(B.vit("class"), "tome", r=(1, 2, 3))


# --------------------------------------------------------------------------------------------------------------------
# towers of transformers

# (layer, mean-head keys [n, d], attention [n, n] mean over heads, prefix, sizes) -> merges and the rows that stay, in
# the order in which the next matching counts them; of a mix also the weights of what goes into each
Mixed = tuple[list[O.Merge], list[int], list[dict[int, float]]]
Rule = Callable[[int, Tensor, list[list[float]], int, list[float]], tuple[list[O.Merge], list[int]] | Mixed]


@torch.no_grad()
def merging(
    model: nn.Module,
    image: Tensor,
    used: int,
    rule: Rule,
    proportional: bool = True,
    stay: dict[int, list[int]] | None = None,
) -> list[dict[str, Any]]:
    """One image through ``used`` blocks of a CLIP or SigLIP tower, a merge between the halves of each; behind every
    block its rows (prefix first, patches in raster order), the patches they stand at, and who holds each patch.
    ``stay``: the patches that another method leaves behind a block."""
    x = model.embeddings(image[None])
    x = (model.pre_layrnorm(x) if hasattr(model, "pre_layrnorm") else x)[0]
    prefix = int(hasattr(model.embeddings, "class_embedding"))
    n = len(x) - prefix
    size, slot, owner, out = [1.0] * len(x), list(range(-prefix, n)), list(range(n)), []
    for layer in range(used):
        block = model.encoder.layers[layer]
        z = block.layer_norm1(x)
        q, k, v = (
            m(z).view(len(z), 4, 8) for m in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        )
        mixed, attention = torch.zeros(len(z), 32, dtype=torch.float64), [[0.0] * len(z) for _ in z]
        for h in range(4):
            for i in range(len(z)):
                bias = [math.log(s) if proportional else 0.0 for s in size]
                w = O._softmax([float(d) / math.sqrt(8) + b for d, b in zip(k[:, h] @ q[i, h], bias, strict=True)])
                mixed[i, h * 8 : h * 8 + 8] = torch.tensor(w, dtype=torch.float64) @ v[:, h]
                attention[i] = [a + b / 4 for a, b in zip(attention[i], w, strict=True)]
        x = x + block.self_attn.out_proj(mixed)
        merges, kept, *shares = rule(layer, k.mean(1), attention, prefix, size)
        for source, target in merges:
            owner = [slot[target] if o == slot[source] else o for o in owner]
        before = x
        x, size = O._weighted_merge(x, size, merges, kept)
        if shares:
            x = torch.stack([sum(w * before[i] for i, w in row.items()) for row in shares[0]])
        slot = [slot[i] for i in kept]
        x = x + block.mlp(block.layer_norm2(x))
        left = [i for i, s in enumerate(slot) if s < 0 or s in (stay or {}).get(layer, slot)]
        x, size, slot = x[left], [size[i] for i in left], [slot[i] for i in left]
        raster = sorted(range(len(slot)), key=slot.__getitem__)
        out.append({"rows": x[raster], "kept": sorted(s for s in slot if s >= 0), "owner": owner})
    return out


def pairs(r: int | list[int], order: str = "official") -> Rule:
    """ToMe's rule for ``r`` merges in every block, or so many in each."""

    def rule(
        layer: int, keys: Tensor, attention: list[list[float]], prefix: int, size: list[float]
    ) -> tuple[list[O.Merge], list[int]]:
        found = O.tome_match_oracle(keys[None], r if isinstance(r, int) else r[layer], prefix > 0, False)
        return found["merges"][0], found["kept_official" if order == "official" else "kept"][0]

    return rule


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_bare_tower_hands_over_raster_order(kind: str) -> None:
    """Whatever decides the matchings, a caller finds the tokens in raster order behind every block."""
    model, pixels = B.tower(kind, 5), B.images(2)
    with vtprune.attach(model, "tome", r=4) as handle, torch.no_grad():
        out = model(pixels, output_hidden_states=True)
        report = handle.report()
    ordered = []
    for b in range(2):
        want = merging(model, pixels[b], 5, pairs(4))
        for layer, (stage, state) in enumerate(zip(report.stages, want, strict=True)):
            assert stage.kept[b].tolist() == state["kept"]
            assert stage.kept[b][stage.assignment[b]].tolist() == state["owner"]
            B.close(out.hidden_states[layer + 1][b, : len(state["rows"])], state["rows"])
        rows = want[-1]["rows"]
        B.close(out.last_hidden_state[b], model.post_layernorm(rows).detach() if kind == "siglip" else rows)
        ordered.append(merging(model, pixels[b], 5, pairs(4, "position"))[-1]["owner"] != want[-1]["owner"])
    assert any(ordered)  # the order did decide


def test_a_language_model_reads_raster_order() -> None:
    """Merged tokens stand at the places of those that absorbed the others, in LLaVA with CLIP and SigLIP."""
    for vision in ("clip", "siglip"):
        model, inputs = B.llava(vision, "llama", blocks=5, layers=3), B.prompts([[4, 9], [2, 3]])
        x = B.embeddings(model, inputs)
        with vtprune.attach(model, "tome", r=5) as handle:
            hidden, report = B.final(model, inputs), handle.report()
        for b in range(2):
            at = B.visual_positions(inputs, b)
            want = merging(model.model.vision_tower, inputs["pixel_values"][b], 4, pairs(5))[-1]
            last = report.stages[-1]
            assert last.kept[b].tolist() == want["kept"] and last.kept[b][last.assignment[b]].tolist() == want["owner"]
            patches = want["rows"][int(vision == "clip") :]
            with torch.no_grad():
                x[b][at[want["kept"]]] = model.model.multi_modal_projector(patches)
            rows = sorted({*range(len(x[b]))} - {*at.tolist()} | {*at[want["kept"]].tolist()})
            B.close(hidden[b][rows], B.stack(model.model.language_model, x[b][rows], rows))


def test_the_order_outlives_another_stage() -> None:
    """Tokens that another stage drops in between are missing from the order, the others keep theirs."""
    model, pixels = B.tower("clip", 5), B.images(2)
    recipe = vtprune.Recipe(
        name="two",
        stages=(
            vtprune.Stage(method="tome", options={"r": 6}),
            vtprune.Stage(method="uniform", keep=22, options={"site": "vision.1"}),
        ),
    )
    with vtprune.attach(model, recipe) as handle, torch.no_grad():
        hidden, stages = model(pixels).last_hidden_state, handle.report().stages
    assert [s.method for s in stages] == ["tome", "tome", "uniform", "tome", "tome", "tome"]
    for b in range(2):
        want = merging(model, pixels[b], 5, pairs([6, 6, 4, 6, 6]), stay={1: stages[2].kept[b].tolist()})
        assert [s.kept[b].tolist() for s in stages[3:]] == [w["kept"] for w in want[2:]]
        B.close(hidden[b], want[-1]["rows"])
