"""Vision transformers against a slow reference: float64, one image, one query, one head at a time, nothing shared with
the package; and their heads."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from vtprune.models.base import PlannedCut

import oracles as O
import vtprune
from vtprune.core.ledger import UndoLedger
from vtprune.core.planning import bind
from vtprune.core.select import from_mask
from vtprune.core.types import Cut as MethodCut

# -------------------------------------------------------------------------------------------------------------- the
# slow reference


@dataclass
class Layer:
    """One block taken apart. ``qkv(z)`` gives three ``[n, H, d]``; ``rope`` None or ``(cos, sin)`` ``[H, N, d]`` per
    original patch."""

    norm1: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    out: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    rope: tuple[Tensor, Tensor] | None = None
    half: bool = False


def turned(row: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """One token's query or key ``[d]``, every pair of coordinates turned in its plane."""
    out, d = row.clone(), len(row)
    for i in range(d // 2):
        a, b = (i, i + d // 2) if half else (2 * i, 2 * i + 1)
        out[a] = row[a] * cos[a] - row[b] * sin[a]
        out[b] = row[b] * cos[b] + row[a] * sin[b]
    return out


def attention(layer: Layer, z: Tensor, slot: list[int], size: list[float] | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d) + log s) v, ``[n, H d]``, and the mean-head keys ``[n, d]`` as the attention uses them;
    ``slot`` original patch of every row, negative for prefix tokens."""
    q, k, v = (t.clone() for t in layer.qkv(z))
    n, heads, d = q.shape
    if layer.rope is not None:
        for i in range(n):
            for h in range(heads):
                if slot[i] >= 0:
                    cos, sin = (t[h % len(t), slot[i]] for t in layer.rope)
                    q[i, h], k[i, h] = turned(q[i, h], cos, sin, layer.half), turned(k[i, h], cos, sin, layer.half)
    mixed = torch.zeros(n, heads, d, dtype=torch.float64)
    for h in range(heads):
        for i in range(n):
            logits = [
                float(q[i, h] @ k[j, h]) / math.sqrt(d) + (0.0 if size is None else math.log(size[j])) for j in range(n)
            ]
            for j, weight in enumerate(O._softmax(logits)):
                mixed[i, h] += weight * v[j, h]
    return mixed.flatten(1), k.mean(1)


Cut = Callable[
    [int, Tensor, list[int]], tuple[list[O.Merge], list[int]] | None
]  # (layer, mean keys, slots) -> merges and the rows that stay


def walk(
    layers: list[Layer], x: Tensor, prefix: int, cut: Cut, *, inside: bool, proportional: bool
) -> tuple[Tensor, list[float], list[int]]:
    """One image ``[P + N, C]`` through all blocks, rows in the order that ``cut`` gives: its last rows, their sizes and
    original patches (prefix negative), in raster order."""
    size, slot = [1.0] * len(x), list(range(-prefix, len(x) - prefix))
    for number, layer in enumerate(layers):
        y, keys = attention(layer, layer.norm1(x), slot, size if proportional else None)
        x = x + layer.out(y)
        if not inside:
            x = x + layer.mlp(layer.norm2(x))
        found = cut(number, keys, slot)
        if found is not None:
            merges, kept = found
            x, size = O._weighted_merge(x, size, merges, kept)
            slot = [slot[i] for i in kept]
        if inside:
            x = x + layer.mlp(layer.norm2(x))
    raster = sorted(range(len(slot)), key=slot.__getitem__)
    return x[raster], [size[i] for i in raster], [slot[i] for i in raster]


def tome(layer: int, keys: Tensor, slot: list[int]) -> tuple[list[O.Merge], list[int]]:
    """r = 3 in every block; behind it the prefix, the unmerged A in their order, then B."""
    prefix = sum(s < 0 for s in slot)
    merges, rest, other = O._bipartite(keys, O.tome_clip_r(len(keys), 3, prefix), set(range(prefix)))
    return merges, [*range(prefix), *(i for i in [*(sorted(rest) if prefix else rest), *other] if i >= prefix)]


def pitome(layer: int, keys: Tensor, slot: list[int]) -> tuple[list[O.Merge], list[int]]:
    """The DeiT placement on four blocks, three quarters kept in each."""
    prefix = sum(s < 0 for s in slot)
    patches = keys[prefix:]
    merges, kept = O._pitome_match(
        patches, O.pitome_r(len(patches), 0.75), 0.75 * (1 - layer / 4), 1.0, "bsm" if layer < 2 else "pitome"
    )
    return [(a + prefix, b + prefix) for a, b in merges], [*range(prefix), *(i + prefix for i in sorted(kept))]


def pool(layer: int, keys: Tensor, slot: list[int]) -> tuple[list[O.Merge], list[int]] | None:
    """The quarters of a 4 x 4 raster behind block 1, each into its first token."""
    if layer != 1:
        return None
    prefix = sum(s < 0 for s in slot)
    first = {i: i // 8 * 8 + i % 4 // 2 * 2 for i in range(16)}
    return [(i + prefix, f + prefix) for i, f in first.items() if i != f], [
        *range(prefix),
        *(f + prefix for f in sorted(set(first.values()))),
    ]


METHODS: dict[str, tuple[Cut, dict[str, Any], bool, bool]] = {  # rule, options, inside, proportional
    "tome": (tome, {"r": 3}, True, True),
    "pitome": (pitome, {"ratio": 0.75, "variant": "deit"}, True, False),
    "pool": (pool, {"keep": 4, "site": "vision.1"}, False, False),
}


# ------------------------------------------------------------------------------------------------------------------
# models taken apart


def split(t: Tensor, heads: int) -> Tensor:
    return t.reshape(len(t), heads, -1)


def eva(model: Any, pixels: Tensor) -> tuple[Tensor, list[Layer]]:
    x, table = model._pos_embed(model.patch_embed(pixels))
    layers = []
    for i, b in enumerate(model.blocks):
        a = b.attn
        rows = table[i] if model.rope_mixed else table[None]  # [H or 1, N, 2 d]
        sin, cos = rows[..., : a.head_dim], rows[..., a.head_dim :]

        def qkv(z: Tensor, a: Any = a) -> tuple[Tensor, Tensor, Tensor]:
            if a.qkv is None:
                q, k, v = a.q_proj(z), a.k_proj(z), a.v_proj(z)
            else:
                q, k, v = (z @ w.T for w in a.qkv.weight.chunk(3))
                if a.q_bias is not None:
                    q, v = q + a.q_bias, v + a.v_bias
            q, k, v = (split(t, a.num_heads) for t in (q, k, v))
            return a.q_norm(q), a.k_norm(k), v

        g1, g2 = (1.0 if g is None else g for g in (b.gamma_1, b.gamma_2))
        layers.append(
            Layer(
                b.norm1,
                qkv,
                lambda y, a=a, g=g1: g * a.proj(a.norm(y)),
                b.norm2,
                lambda z, b=b, g=g2: g * b.mlp(z),
                (cos, sin),
                a.rotate_half,
            )
        )
    return model.norm_pre(x), layers


def eva_end(model: Any, x: Tensor, size: list[float], slot: list[int]) -> Tensor:
    x, p = model.norm(x), model.num_prefix_tokens
    if model.global_pool == "token":
        return model.head(model.fc_norm(x[0]))
    if model.global_pool == "max":
        return model.head(model.fc_norm(torch.stack([x[p:, c].max() for c in range(x.shape[1])])))
    total = sum(s * row for s, row in zip(size[p:], x[p:], strict=True))
    return model.head(model.fc_norm(total / sum(size[p:])))


def hf(model: Any, pixels: Tensor) -> tuple[Tensor, list[Layer]]:
    """DINOv3, and DINOv2 with registers (its classifier)."""
    base = getattr(model, "dinov2_with_registers", model)
    rotary = hasattr(base, "rope_embeddings")
    table = tuple(t[None] for t in base.rope_embeddings(pixels)) if rotary else None
    blocks = (
        base.model.layer if rotary else base.encoder.layer if hasattr(base.encoder, "layer") else base.encoder.layers
    )
    layers = []
    for b in blocks:
        a = b.attention
        if hasattr(a, "attention"):  # transformers 5.17
            parts, last = (a.attention.query, a.attention.key, a.attention.value), a.output.dense
        else:
            parts, last = (a.q_proj, a.k_proj, a.v_proj), a.o_proj
        layers.append(
            Layer(
                b.norm1,
                lambda z, parts=parts: tuple(split(m(z), 2) for m in parts),
                lambda y, b=b, last=last: b.layer_scale1(last(y)),
                b.norm2,
                lambda z, b=b: b.layer_scale2(b.mlp(z)),
                table,
                True,
            )
        )
    return base.embeddings(pixels), layers


def hf_end(model: Any, x: Tensor, size: list[float], slot: list[int]) -> Tensor:
    if hasattr(model, "rope_embeddings"):
        return model.norm(x)
    x = model.dinov2_with_registers.layernorm(x)
    total = sum(s * row for s, row in zip(size[4:], x[4:], strict=True))
    return model.classifier(torch.cat([x[0], total / sum(size[4:])]))


def clip(model: Any, pixels: Tensor) -> tuple[Tensor, list[Layer]]:
    layers = []
    for b in model.visual.transformer.resblocks:
        a, custom = b.attn, hasattr(b.attn, "ln_q")

        def qkv(z: Tensor, a: Any = a, custom: bool = custom) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (
                split(z @ w.T + c, a.num_heads)
                for w, c in zip(a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3), strict=True)
            )
            return (a.ln_q(q), a.ln_k(k), v) if custom else (q, k, v)

        def out(y: Tensor, b: Any = b, a: Any = a, custom: bool = custom) -> Tensor:
            if not custom:
                return b.ls_1(y @ a.out_proj.weight.T + a.out_proj.bias)
            y = (split(y, a.num_heads) * a.head_scale[:, 0]).flatten(1)
            return b.ls_1(b.ln_attn(a.out_proj(a.ln_inner(y))))

        layers.append(Layer(b.ln_1, qkv, out, b.ln_2, lambda z, b=b: b.ls_2(b.mlp(z))))
    return model.visual._embeds(pixels), layers


def clip_end(model: Any, x: Tensor, size: list[float], slot: list[int], proportional: bool) -> Tensor:
    visual = model.visual
    if visual.attn_pool is not None:
        pooling = visual.attn_pool
        a, k, q = pooling.attn, pooling.ln_k(x), pooling.ln_q(pooling.query)
        weights = (
            (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
            if a.in_proj_weight is None
            else a.in_proj_weight.chunk(3)
        )
        q, k, v = (
            split(z @ w.T + c, a.num_heads) for z, w, c in zip((q, k, k), weights, a.in_proj_bias.chunk(3), strict=True)
        )
        rows = torch.zeros_like(q)
        for h in range(a.num_heads):
            for i in range(len(q)):
                logits = [
                    float(q[i, h] @ k[j, h]) / math.sqrt(q.shape[-1]) + (math.log(size[j]) if proportional else 0.0)
                    for j in range(len(k))
                ]
                for j, weight in enumerate(O._softmax(logits)):
                    rows[i, h] += weight * v[j, h]
        pooled = visual.ln_post(rows.flatten(1) @ a.out_proj.weight.T + a.out_proj.bias)[0]
    elif visual.pool_type == "avg":
        x = visual.ln_post(x)
        pooled = sum(s * row for s, row in zip(size[1:], x[1:], strict=True)) / sum(size[1:])
    else:
        pooled = visual.ln_post(x)[0]
    return pooled @ visual.proj


def double(tiny: Any, family: str, variant: str) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = tiny(family, variant)
    return model.double(), {k: v.double() for k, v in inputs.items()}


def expected(
    model: Any, pixels: Tensor, method: str, apart: Callable, end: Callable
) -> tuple[list[Tensor], list[list[int]]]:
    rule, _, inside, proportional = METHODS[method]
    x, layers = apart(model, pixels)
    prefix = x.shape[1] - 16
    outs, slots = [], []
    for image in x:
        rows, size, slot = walk(layers, image, prefix, rule, inside=inside, proportional=proportional)
        outs.append(end(model, rows, size, slot))
        slots.append([s for s in slot if s >= 0])
    return outs, slots


def same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-9 * float(want.abs().max().clamp_min(1))


CASES = [
    ("timm-vit", "eva02", eva, eva_end),
    ("timm-vit", "dinov3", eva, eva_end),
    ("timm-vit", "rope-mixed", eva, eva_end),
    ("hf-vit", "dinov3", hf, hf_end),
    ("hf-vit", "dinov2-registers-classifier", hf, hf_end),
]


@pytest.mark.sampled(2)
@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "variant", "apart", "end"), CASES, ids=[f"{f}-{v}" for f, v, *_ in CASES])
def test_merging_equals_the_slow_reference(tiny, family, variant, apart, end, method):
    model, inputs = double(tiny, family, variant)
    want, slots = expected(model, next(iter(inputs.values())), method, apart, end)
    with vtprune.attach(model, method, **METHODS[method][1]) as handle:
        out = model(**inputs)
        report = handle.report()
    got = out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out.last_hidden_state
    assert [k.tolist() for k in report.stages[-1].kept] == slots
    assert len(slots[0]) < 9
    same(got, torch.stack(want))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["clip", "custom-avg", "attention-pool"])
def test_zero_shot_scores_equal_the_slow_reference(tiny, variant, method):
    """Scores of two images against five texts: features of the reference, normalised, times the untouched text
    features."""
    model, inputs = double(tiny, "open-clip", variant)
    texts = torch.randint(1, 40, (5, 8), generator=torch.Generator().manual_seed(5))
    proportional = METHODS[method][3]
    want, slots = expected(model, inputs["image"], method, clip, lambda *a: clip_end(*a, proportional))
    scores = (
        model.logit_scale.exp()
        * F.normalize(torch.stack(want), dim=-1)
        @ F.normalize(model.encode_text(texts), dim=-1).T
    )
    with vtprune.attach(model, method, **METHODS[method][1]) as handle:
        got, _ = model.get_logits(inputs["image"], texts)
        image, text, scale = model(inputs["image"], texts)
        report = handle.report()
    assert [k.tolist() for k in report.stages[-1].kept] == slots
    same(got, scores)
    same(scale * image @ text.T, scores)


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "options"),
    [("tome", {"r": 0}), ("pitome", {"keep": 1.0}), ("random", {"keep": 1.0}), ("flowcut", {"keep": 1.0})],
)
@pytest.mark.parametrize("variant", ["clip", "custom-avg", "attention-pool", "timm"])
def test_zero_shot_scores_at_full_budget(tiny, variant, method, options):
    model, inputs = tiny("open-clip", variant)
    texts = torch.randint(1, 40, (5, 8), generator=torch.Generator().manual_seed(5))
    want = model.get_logits(inputs["image"], texts)[0]
    with vtprune.attach(model, method, **options) as handle:
        got = model.get_logits(inputs["image"], texts)[0]
        assert handle.report().stages
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-6
    assert torch.equal(model.get_logits(inputs["image"], texts)[0], want)


@torch.no_grad()
def test_pruned_zero_shot_scores(tiny):
    """Random pruning of CLIP and of the timm tower inside open_clip: the class token of the masked dense tower,
    scored."""
    for variant in ("clip", "timm"):
        model, inputs = tiny("open-clip", variant)
        texts = torch.randint(1, 40, (5, 8), generator=torch.Generator().manual_seed(5))
        with vtprune.attach(model, "random", keep=5) as handle:
            got = model.get_logits(inputs["image"], texts)[0]
            report = handle.report()
        kept, site = report.stages[0].kept[0], int(report.stages[0].site.partition(".")[2])
        adapter, ledger = bind(model), UndoLedger()
        hidden = torch.ones(17, dtype=torch.bool)
        hidden[torch.cat([torch.tensor([0]), kept + 1])] = False
        square = torch.zeros(17, 17).masked_fill(hidden, -torch.inf)  # the same for every image and head
        for block in adapter.tower_blocks()[site + 1 :]:
            ledger.before(block, lambda module, args, kwargs, square=square: (args, {**kwargs, "attn_mask": square}))
        want = model.get_logits(inputs["image"], texts)[0]
        ledger.undo()
        assert float((got - want).abs().max() / want.abs().max()) <= 1e-5


# -----------------------------------------------------------------------------------------------------------------
# projections, ragged heads


def install(model: Any, select: Callable, *, layer: int = 1, inside: bool = False) -> UndoLedger:
    """One cut with a rule of the test's own."""
    cut = PlannedCut(cut=MethodCut(site=f"vision.{layer}", inside=inside), stage=0, select=select)
    ledger = UndoLedger()

    class Recorder:
        def vision(self, run: Any) -> None: ...

    bind(model).install([cut], ledger, Recorder(), positions="original", per="image", seed=0)
    return ledger


ATTENTIONS = {  # what the attention's mixed values [B, n, H d] enter
    "timm-vit/class": lambda b: b.attn.proj,
    "timm-vit/avg-pool": lambda b: b.attn.proj,
    "timm-vit/eva02": lambda b: b.attn.norm,
    "timm-vit/dinov3": lambda b: b.attn.norm,
    "timm-vit/rope-mixed": lambda b: b.attn.norm,
    "hf-vit/dinov3": lambda b: b.attention.o_proj,
    "hf-vit/deit": lambda b: b.attention.o_proj,
    "hf-vit/siglip": lambda b: b.self_attn.out_proj,
    "open-clip/custom-avg": lambda b: b.attn.ln_inner,
    "open-clip/clip": lambda b: b.ls_1,  # its projection never runs as a module
}


@torch.no_grad()
@pytest.mark.parametrize("name", ATTENTIONS)
def test_projections_are_what_the_attention_mixes(tiny, name):
    """softmax(q k^T) v of the projections a method is shown is what the block's own attention hands on, in the first
    block and behind a cut."""
    model, inputs = double(tiny, *name.split("/"))
    blocks = bind(model).tower_blocks()
    seen: dict[str, Any] = {}

    def look(view: Any) -> None:
        t = view.source("projections")
        mixed = (t.q @ t.k.transpose(-1, -2) * t.scale).softmax(-1) @ t.v
        seen["projections"] = mixed.transpose(1, 2).flatten(2)

    ledger = install(model, look)
    ledger.before(ATTENTIONS[name](blocks[1]), lambda module, args, kwargs: seen.update(block=args[0]))
    model(**inputs)
    ledger.undo()
    got = seen["projections"]
    if "custom" in name:
        got = (got.unflatten(2, (2, -1)) * blocks[1].attn.head_scale[:, 0]).flatten(2)
    if name == "open-clip/clip":
        got = F.linear(got, blocks[1].attn.out_proj.weight, blocks[1].attn.out_proj.bias)
    same(got, seen["block"])


HEADS = {
    "timm-vit/avg-pool": lambda out: out,
    "timm-vit/map-pool-pre-norm": lambda out: out,
    "timm-vit/rope-mixed": lambda out: out,
    "timm-vit/eva02": lambda out: out,
    "hf-vit/siglip": lambda out: out.pooler_output,
    "hf-vit/dinov2-registers-classifier": lambda out: out.logits,
    "hf-vit/vit-classifier": lambda out: out.logits,
    "open-clip/custom-avg": lambda out: out[0],
    "open-clip/attention-pool": lambda out: out[0],
}


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("layer", [1, 3])
def test_heads_do_not_see_padding(tiny, name, layer):
    """Images that keep 3 and 9 tokens: each gets in the batch what it gets alone, from heads of every kind."""
    model, inputs = double(tiny, *name.split("/"))
    ((key, pixels),) = inputs.items()

    def ragged(view: Any) -> Any:
        count = torch.where(pictures.flatten(1)[:, 0] == first, 3, 9)
        return from_mask((view.index * 7 % 16) < count[:, None])

    ledger = install(model, ragged, layer=layer)
    first = pixels[0].flatten()[0]
    outs = []
    for pictures in (pixels, pixels[:1], pixels[1:]):
        outs.append(HEADS[name](model(**{key: pictures})))
    ledger.undo()
    same(outs[0], torch.cat(outs[1:]))
    if layer == 1 or not bind(model).class_readout:  # behind the last block the class token has seen everything
        assert float((HEADS[name](model(**inputs)) - outs[0]).abs().max()) > 1e-6


# --------------------------------------------------------------------------------------------------------------------
# rotary positions, calls


@torch.no_grad()
@pytest.mark.parametrize(("family", "variant", "apart", "end"), [CASES[1], CASES[3]], ids=["timm", "hf"])
def test_reduced_pixels_have_their_own_rotary_rows(tiny, family, variant, apart, end):
    """Down-sampling to 3 x 3 patches, then pruning: rows count in the small raster, not in the large one."""
    model, inputs = double(tiny, family, variant)
    ((key, pixels),) = inputs.items()
    stages = (
        vtprune.Stage(method="downsample", keep=9),
        vtprune.Stage(method="random", keep=4, options={"site": "vision.1"}),
    )
    with vtprune.attach(model, vtprune.Recipe(name="small", stages=stages)) as handle:
        out = model(**inputs)
        report = handle.report()
    got = out if isinstance(out, Tensor) else out.last_hidden_state
    small = F.interpolate(pixels.float(), size=(24, 24), mode="bicubic", antialias=True, align_corners=False).double()
    if family == "timm-vit":
        small = F.interpolate(pixels, size=(24, 24), mode="bicubic", antialias=True, align_corners=False)
    centres = report.stages[0].kept[0].tolist()
    x, layers = apart(model, small)
    for b, image in enumerate(x):
        rows = [centres.index(i) for i in report.stages[1].kept[b].tolist()]
        assert len(rows) == 4

        def cut(layer: int, keys: Tensor, slot: list[int], rows: list[int] = rows) -> Any:
            return ([], [i for i, s in enumerate(slot) if s < 0 or s in rows]) if layer == 1 else None

        last, size, slot = walk(layers, image, 5, cut, inside=False, proportional=False)
        same(got[b], end(model, last, size, slot))


@torch.no_grad()
def test_a_block_that_mistreats_its_rotary_table_is_refused(tiny, monkeypatch):
    """The probe runs rotary blocks with a rotary table: parts that leave it out are seen when attaching."""
    from vtprune.models import timm_vit
    from vtprune.models.parts import hf_vit

    for module, name, family, variant in (
        (timm_vit, "_eva_attend", "timm-vit", "dinov3"),
        (hf_vit, "attend", "hf-vit", "dinov3"),
    ):
        model, _ = tiny(family, variant)
        right = getattr(module, name)

        def wrong(block: Any, x: Tensor, mask: Any, caught: dict, right: Callable = right) -> Tensor:
            table = caught["rope"]
            still = (
                tuple(torch.ones_like(t) if i == 0 else torch.zeros_like(t) for i, t in enumerate(table))
                if isinstance(table, tuple)
                else None
            )
            return right(block, x, mask, {**caught, "rope": still})

        monkeypatch.setattr(module, name, wrong)
        with pytest.raises(vtprune.UnsupportedError, match="off"):
            vtprune.attach(model, "tome", r=2)


@torch.no_grad()
def test_a_mean_over_class_token_and_patches():
    """timm's ``pool_include_prefix``: the class token counts once, every merged token with its size."""
    from timm.models.vision_transformer import VisionTransformer

    model: Any = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, global_pool="avg", pool_include_prefix=True
    ).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with vtprune.attach(model, "tome", r=3) as handle:
        logits, tokens, report = model(pixels), model.forward_features(pixels), handle.report()
    sizes = torch.stack([torch.cat([torch.ones(1), torch.bincount(a).float()]) for a in report.stages[-1].assignment])
    mean = (tokens * sizes[..., None]).sum(1) / 17
    assert torch.allclose(model.head(model.fc_norm(mean)), logits, atol=1e-5)


@torch.no_grad()
def test_forward_features_alone(tiny):
    """``forward_features`` called alone gives the tokens that are left, is reported, and leaves nothing open after an
    exception."""
    model, inputs = tiny("timm-vit", "avg-pool")
    dense = model.forward_features(inputs["x"])
    with vtprune.attach(model, "tome", r=3) as handle:
        logits = model(inputs["x"])
        tokens = model.forward_features(inputs["x"])
        report = handle.report()
        with pytest.raises(RuntimeError, match="channels"):
            model.forward_features(inputs["x"][:, :2])
        assert handle.adapter.engine.run is None
        assert torch.equal(model(inputs["x"]), logits)
    assert tokens.shape == (2, report.stages[-1].tokens_out[0], 32)
    sizes = torch.stack([torch.bincount(a).float() for a in report.stages[-1].assignment])
    mean = (tokens * sizes[..., None]).sum(1) / 16
    assert torch.allclose(model.head(model.fc_norm(mean)), logits, atol=1e-5)
    assert torch.equal(model.forward_features(inputs["x"]), dense)


NAMES = [
    "vit_base_patch32_clip_224",
    "vit_base_patch32_siglip_256",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "vit_pe_core_tiny_patch16_384",
]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_published_timm_architectures_at_full_budget(name):
    """Two blocks of each, random weights: the same logits bitwise, and half the tokens."""
    import timm

    model: Any = timm.create_model(name, depth=2).eval()
    pixels = torch.randn(1, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    want = model(pixels)
    with vtprune.attach(model, "tome", r=0):
        assert torch.equal(model(pixels), want)
    with vtprune.attach(model, "tome", keep=0.5) as handle:
        assert torch.isfinite(model(pixels)).all()
        assert handle.report().stages[-1].tokens_out == [round(handle.geometry.tokens * 0.5)]


# --------------------------------------------------------------------------------------------------------------------
# refusals


@torch.no_grad()
def test_images_of_another_size_are_refused_where_the_model_takes_one(tiny):
    for family, variant in (("timm-vit", "class"), ("timm-vit", "eva02"), ("open-clip", "clip")):
        model, inputs = tiny(family, variant)
        run = model.encode_image if family == "open-clip" else model
        with (
            vtprune.attach(model, "random", keep=4),
            pytest.raises(vtprune.UnsupportedError, match="6 x 6 patches for a model of 4 x 4"),
        ):
            run(torch.randn(1, 3, 48, 48))


def test_what_is_not_supported_says_why():
    from timm.models.eva import Eva
    from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
    from transformers import Dinov2Backbone, Dinov2Config, Siglip2VisionConfig, Siglip2VisionModel

    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
    }
    refused = [
        (VisionTransformer(**sizes, block_fn=ParallelScalingBlock), "ParallelScalingBlock"),
        (VisionTransformer(**sizes, block_fn=ParallelThingsBlock), "ParallelThingsBlock"),
        (VisionTransformer(**sizes, attn_layer="diff"), "DiffAttention"),
        (VisionTransformer(**sizes, global_pool="avgmax"), "avgmax"),
        (Eva(**sizes, use_post_norm=True), "EvaBlockPostNorm"),
        (
            Siglip2VisionModel(
                Siglip2VisionConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
            ),
            "raster",
        ),
        (
            Dinov2Backbone(
                Dinov2Config(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, image_size=32, patch_size=8)
            ),
            "load the checkpoint as Dinov2Model",
        ),
    ]
    for model, reason in refused:
        with pytest.raises(vtprune.UnsupportedError, match=reason):
            vtprune.attach(model.eval(), "tome", r=2)


def test_open_clip_with_another_tower_says_why():
    oc = pytest.importorskip("open_clip.model")
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
    vision: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    for options, reason in (({"layers": (1, 1, 1, 1)}, "ModifiedResNet"), ({"scaled_cosine_attn": True}, "cosine")):
        model = oc.CLIP(embed_dim=24, vision_cfg={**vision, **options}, text_cfg=text).eval()
        with pytest.raises(vtprune.UnsupportedError, match=reason):
            vtprune.attach(model, "tome", r=2)


# --------------------------------------------------------------------------------------------------------------------
# subclasses


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["hf-vit/clip", "hf-vit/dinov2-registers-classifier", "hf-vit/deit", "timm-vit/eva02", "open-clip/custom-avg"],
)
def test_subclasses_are_taken_like_their_base(tiny, name):
    """A user's subclass, and a class derived at run time as FSDP2 does: same tokens, same numbers."""
    outs = []
    for derive in (
        lambda c: c,
        lambda c: type("Mine", (c,), {}),
        lambda c: type(f"FSDP{c.__name__}", (type("FSDPModule", (), {}), c), {}),
    ):
        model, inputs = tiny(*name.split("/"))
        for part in {model, getattr(model, "visual", model), getattr(model, "dinov2_with_registers", model)}:
            part.__class__ = derive(type(part))
        with vtprune.attach(model, "tome", r=3) as handle:
            out = model(**inputs)
            report = handle.report()
        outs.append((out if isinstance(out, Tensor) else out[0], torch.stack(report.stages[-1].kept)))
    assert all(torch.equal(a, b) for other in outs[1:] for a, b in zip(other, outs[0], strict=True))


# ---------------------------------------------------------------------------------------------------------- every way
# to reach a tower

WAYS: dict[str, dict[str, Any]] = {
    "tome": {"r": 3},
    "pitome": {"ratio": 0.75},
    "random": {"keep": 5},
    "flowcut": {"keep": 5},
    "pool": {"keep": 4, "site": "vision.1"},
}
TIMM = ["class", "layerscale-registers", "distilled", "avg-pool", "map-pool-pre-norm", "eva02", "dinov3", "rope-mixed"]


def close(got: Tensor, want: Tensor, limit: float = 1e-5) -> None:
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape and float((got - want).abs().max() / want.abs().max()) <= limit


def watched(blocks: Any, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What ``call`` returns, and what every block handed on meanwhile."""
    seen: list[Tensor] = []
    hooks = [
        b.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for b in blocks
    ]
    result = call()
    for hook in hooks:
        hook.remove()
    return result, seen


def expected_map(report: Any, block: int, rows: Tensor, image: int) -> Tensor:
    """The 4 x 4 feature map behind ``block``, from what the report says about every original patch; ``rows`` are the
    patches in their running order."""
    out = torch.zeros(16, rows.shape[-1], dtype=rows.dtype)
    stages = [s for s in report.stages if int(s.site.split(".")[1]) <= block]
    for i in range(16):
        if not stages:
            out[i] = rows[i]
        elif stages[-1].assignment is not None:
            slot = int(stages[-1].assignment[image][i])
            if slot >= 0:
                out[i] = rows[slot]
        elif i in (kept := stages[-1].kept[image].tolist()):
            out[i] = rows[kept.index(i)]
    return out.T.reshape(-1, 4, 4)


@pytest.mark.sampled(3)
@torch.no_grad()
@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("variant", TIMM)
def test_timm_intermediates(tiny, variant, method):
    """Tokens are those that the blocks of the attached model hand on, maps place each where its patches were; the
    features go through the head as in a call."""
    model, inputs = tiny("timm-vit", variant)
    x, p = inputs["x"], model.num_prefix_tokens
    with vtprune.attach(model, method, **WAYS[method]) as handle:
        logits, outs = watched(model.blocks, lambda: model(x))
        report = handle.report()
        close(model.forward_head(model.forward_features(x)), logits)
        final, found = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=p > 0)
        close(model.forward_head(final), logits)
        assert handle.report().to_dict() == report.to_dict()
        for block, item in enumerate(found):
            tokens, prefix = item if p else (item, outs[block][:, :0])
            assert torch.equal(tokens, outs[block][:, p:]) and torch.equal(prefix, outs[block][:, :p])
        final, maps = model.forward_intermediates(x, [1, -1], norm=True)
        close(model.forward_head(final), logits)
        for block, item in zip((1, 3), maps, strict=True):
            rows = model.norm(outs[block])[:, p:]
            close(item, torch.stack([expected_map(report, block, rows[g], g) for g in range(2)]))
        early = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True, output_fmt="NLC")
        assert torch.equal(early[0], outs[0][:, p:])
        if hasattr(model, "get_intermediate_layers"):
            assert torch.equal(model.get_intermediate_layers(x, n=1)[0], outs[3][:, p:])
    assert outs[3].shape[1] < p + 16


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "flowcut"])
@pytest.mark.parametrize("variant", ["clip", "custom-avg", "attention-pool", "timm"])
def test_open_clip_intermediates(tiny, variant, method):
    model, inputs = tiny("open-clip", variant)
    image, text = inputs["image"], torch.randint(1, 40, (2, 8), generator=torch.Generator().manual_seed(5))
    dense = model.encode_image(image, normalize=True)
    texts = model.encode_text(text, normalize=True)
    with vtprune.attach(model, method, keep=5):
        want = model.encode_image(image, normalize=True)
        for form in ("NLC", "NCHW"):
            out = model.forward_intermediates(
                image=image, text=text, image_output_fmt=form, image_output_extra_tokens=True
            )
            close(out["image_features"], want)
            close(out["text_features"], texts)
            last = out["image_intermediates"][-1]
            assert last.shape[1] == 5 if form == "NLC" else last.shape[-2:] == (4, 4)
        close(model(image, text)[0], want)
    assert float((want - dense).abs().max()) > 1e-3


@torch.no_grad()
def test_open_clip_hands_out_its_tokens_as_they_are(tiny):
    """With ``output_tokens`` the average counts sizes, and the tokens beside it are not scaled by them."""
    model, inputs = tiny("open-clip", "custom-avg")
    model.visual.output_tokens = True
    with vtprune.attach(model, "tome", r=3) as handle:
        pooled, tokens = model.visual(inputs["image"])
        sizes = torch.stack([torch.bincount(a).float() for a in handle.report().stages[-1].assignment])
    close((tokens * sizes[..., None]).sum(1) / 16 @ model.visual.proj, pooled)


@torch.no_grad()
def test_a_classifiers_tower_called_by_itself_gives_plain_tokens(tiny):
    model, inputs = tiny("hf-vit", "dinov2-registers-classifier")
    with vtprune.attach(model, "tome", r=3) as handle:
        logits = model(**inputs).logits
        x = model.dinov2_with_registers(**inputs).last_hidden_state
        sizes = torch.stack([torch.bincount(a).float() for a in handle.report().stages[-1].assignment])
    mean = (x[:, 4:] * sizes[..., None]).sum(1) / 16
    close(model.classifier(torch.cat([x[:, 0], mean], dim=1)), logits)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["avg", "max", "token", "avgmax", ""])
def test_a_pooling_chosen_after_attaching(tiny, pool):
    """``reset_classifier`` while attached gives what the model gives that had this head before, or the same refusal."""
    outs = []
    for before in (True, False):
        model, inputs = tiny("timm-vit", "class")
        with contextlib.ExitStack() as stack:
            if before:
                model.reset_classifier(3, pool)
                if pool == "avgmax":
                    with pytest.raises(vtprune.UnsupportedError, match="avgmax"):
                        vtprune.attach(model, "tome", r=3)
                    continue
            stack.enter_context(vtprune.attach(model, "tome", r=3))
            model.reset_classifier(3, pool)
            torch.nn.init.ones_(model.head.weight)
            torch.nn.init.zeros_(model.head.bias)
            if pool == "avgmax":
                with pytest.raises(vtprune.UnsupportedError, match="avgmax"):
                    model(**inputs)
            else:
                outs.append(model(**inputs))
    assert not outs or torch.equal(*outs)


@torch.no_grad()
def test_what_would_run_dense_is_refused(tiny):
    """Blocks and encoders called by themselves, blocks taken out, copies, masks, features of somebody else."""
    model, inputs = tiny("timm-vit", "avg-pool")
    x = inputs["x"]
    with vtprune.attach(model, "tome", r=3):
        with pytest.raises(vtprune.UnsupportedError, match="by itself"):
            model.blocks(torch.randn(1, 16, 32))
        with pytest.raises(vtprune.UnsupportedError, match="mask"):
            model(x, attn_mask=torch.zeros(16, 16))
        if "is_causal" in inspect.signature(model.forward).parameters:
            with pytest.raises(vtprune.UnsupportedError, match="mask"):
                model(x, is_causal=True)
        with pytest.raises(vtprune.UnsupportedError, match="forward_features"):
            model.forward_head(model.forward_features(x).clone())
        with pytest.raises(vtprune.UnsupportedError, match="copy"):
            model._replicate_for_data_parallel()(x)
        model.prune_intermediate_layers([1], prune_head=False)
        for call in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(vtprune.UnsupportedError, match="2 of the 4 blocks"):
                call(x)
    for variant, inner in (("clip", "encoder"), ("dinov3", "model")):
        model, inputs = tiny("hf-vit", variant)
        with vtprune.attach(model, "random", keep=5), pytest.raises(vtprune.UnsupportedError, match="by itself"):
            getattr(model, inner)(torch.randn(1, 21, 32))


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "random"])
def test_hugging_face_outputs(tiny, method):
    """Tuples, hidden states, attention maps and interpolated positions are those of the attached tower."""
    for variant in ("clip", "siglip", "dinov2", "dinov3", "deit"):
        model, inputs = tiny("hf-vit", variant)
        model.set_attn_implementation("eager")
        with vtprune.attach(model, method, keep=7) as handle:
            want = model(**inputs)
            lengths = [row[0] + handle.geometry.prefix for row in zip(*handle.report().layer_tokens, strict=True)]
            assert torch.equal(model(inputs["pixel_values"], return_dict=False)[0], want[0])
            assert [h.shape[1] for h in model(**inputs, output_hidden_states=True).hidden_states[:4]] == lengths
            if handle.adapter.tower.mask is None:
                with pytest.raises(vtprune.UnsupportedError, match="attention maps"):
                    model(**inputs, output_attentions=True)
            else:
                assert [a.shape[-1] for a in model(**inputs, output_attentions=True).attentions] == lengths
            if variant not in ("dinov2", "dinov3"):
                model(torch.randn(2, 3, 48, 40), interpolate_pos_encoding=True)
                assert handle.report().grids == [[(6, 5)]] * 2


# --------------------------------------------------------------------------------------------------------------------
# other sizes

SIZES: list[tuple[str, dict[str, Any]]] = [
    ("tome", {}),
    ("tome", {"r": 5}),
    ("tome", {"keep": 20}),
    ("pitome", {"keep": 0.4}),
    ("flowcut", {"keep": 11}),
    ("random", {"keep": 9}),
    ("random", {"keep": 100}),  # more than there are: all stay
    ("uniform", {"keep": 9}),
    ("pool", {"keep": 9}),
    ("downsample", {"keep": 9}),
]


@torch.no_grad()
@pytest.mark.parametrize(("method", "options"), SIZES, ids=[f"{m}-{o}" for m, o in SIZES])
def test_a_size_other_than_the_configured_one(method, options):
    """DINOv3 made for 16 x 16 patches gives for 6 x 4 what the one made for 6 x 4 gives, report included."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "patch_size": 8,
    }
    pixels = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(3))
    outs, weights = [], None
    for size in (128, (48, 32)):
        try:
            model: Any = DINOv3ViTModel(DINOv3ViTConfig(**shape, image_size=size, num_register_tokens=4)).eval()
        except TypeError:
            pytest.skip("this transformers configures DINOv3 for square images alone: there is nothing to compare with")
        weights = weights or {
            k: torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) * 0.2
            for k, v in model.state_dict().items()
        }
        model.load_state_dict(weights)
        with vtprune.attach(model, method, **options) as handle:
            outs.append((model(pixels).last_hidden_state, handle.report()))
    (got, report), (want, meant) = outs
    assert torch.equal(got, want) and report.visual_tokens == [24, 24] and report.grids == [[(6, 4)]] * 2
    assert report.to_dict(scores=True) == meant.to_dict(scores=True)


@torch.no_grad()
def test_models_of_any_size_and_sizes_set_later(tiny):
    """DINOv2 configured for more pixels than its processor makes; timm's dynamic and set sizes."""
    from transformers import Dinov2Config, Dinov2Model

    model: Any = Dinov2Model(
        Dinov2Config(hidden_size=32, num_attention_heads=2, num_hidden_layers=3, image_size=70, patch_size=14)
    ).eval()
    with vtprune.attach(model, "tome") as handle:
        for side, tokens in ((28, 4), (70, 25), (84, 36)):
            model(torch.randn(1, 3, side, side))
            assert handle.report().visual_tokens == [tokens] and handle.report().stages[-1].tokens_out == [tokens // 2]
    fixed, _ = tiny("timm-vit", "class")
    dynamic, _ = tiny("timm-vit", "dinov3")
    with vtprune.attach(fixed, "random", keep=5) as a, vtprune.attach(dynamic, "random", keep=5) as b:
        fixed.set_input_size((64, 40))
        for model, handle in ((fixed, a), (dynamic, b)):
            model(torch.randn(1, 3, 64, 40))
            assert handle.report().visual_tokens == [40] and handle.report().grids == [[(8, 5)]]


# ------------------------------------------------------------------------------------------------------- training,
# adapters, number formats

CHECKPOINTS = [
    ("hf-vit", "clip"),
    ("hf-vit", "dinov2-registers-classifier"),
    ("timm-vit", "avg-pool"),
    ("timm-vit", "rope-mixed"),
    ("open-clip", "clip"),
    ("open-clip", "timm"),
]


def features(model: Any, family: str, x: Tensor) -> Tensor:
    out = model.encode_image(x) if family == "open-clip" else model(x)
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["tome", "random", "flowcut"])
@pytest.mark.parametrize(("family", "variant"), CHECKPOINTS, ids=[f"{f}-{v}" for f, v in CHECKPOINTS])
def test_checkpointed_gradients(tiny, family, variant, method):
    """Two passes before one backward: the blocks run again with what each pass decided."""
    model, inputs = tiny(family, variant)
    (x,) = inputs.values()
    pictures = [x.clone().requires_grad_(), (0.5 * x).requires_grad_()]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        sum(features(model, family, p).square().sum() for p in pictures).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with vtprune.attach(model, method, keep=5):
        model.train()
        want = gradients()
        for reentrant in (False, True) if family == "hf-vit" else (False,):
            if family == "hf-vit":
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            else:
                model.set_grad_checkpointing()
            got = gradients()
            assert got.keys() == want.keys() and len(want) > 10
            for name, gradient in want.items():
                torch.testing.assert_close(got[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


def test_functional_gradients_and_checkpoints_around_the_model(tiny):
    """torch.func's gradients, the whole model in one checkpoint, and several blocks in one: the gradients of a plain
    backward pass."""
    model, inputs = tiny("timm-vit", "avg-pool")
    x = inputs["x"]
    with vtprune.attach(model, "tome", r=3):
        model(x).square().sum().backward()
        want = {n: p.grad.clone() for n, p in model.named_parameters()}
        functional = torch.func.grad(lambda weights: torch.func.functional_call(model, weights, (x,)).square().sum())(
            dict(model.named_parameters())
        )
        for name, gradient in want.items():
            close(functional[name], gradient)
        for reentrant in (True, False):
            model.zero_grad()
            checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
            for name, p in model.named_parameters():
                close(p.grad, want[name])
        model.zero_grad()
        blocks, model.blocks.forward = (
            model.blocks.forward,
            lambda y: checkpoint_sequential(list(model.blocks), 2, y, use_reentrant=False),
        )
        model(x).square().sum().backward()
        model.blocks.forward = blocks
        for name, p in model.named_parameters():
            close(p.grad, want[name])


def test_a_checkpoint_of_a_forgotten_pass_is_refused(tiny, monkeypatch):
    from vtprune.models.engine import tower_replays

    monkeypatch.setattr(tower_replays, "REPLAYS", 1)
    model, inputs = tiny("timm-vit", "class")
    model.set_grad_checkpointing()
    with vtprune.attach(model, "random", keep=5):
        first = model(**inputs).sum()
        _ = model(**inputs).sum()
        with pytest.raises(vtprune.UnsupportedError, match="not known any more"):
            first.backward()


class Adapter(torch.nn.Module):
    """What adapter libraries put in the place of a linear layer."""

    def __init__(self, base: Any):
        super().__init__()
        self.base_layer, self.lora = base, torch.nn.Linear(base.in_features, 4)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.delta = torch.nn.Parameter(
            torch.randn(base.weight.shape, generator=torch.Generator().manual_seed(7)) * 0.3
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.delta.T


ADAPTED = {
    "hf-vit/clip": ["self_attn.q_proj", "self_attn.k_proj"],
    "hf-vit/dinov3": ["attention.k_proj"],
    "timm-vit/class": ["attn.qkv"],
    "timm-vit/eva02": ["attn.k_proj"],
}


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "pitome", "flowcut"])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_put_in_while_attached(tiny, name, method):
    """Scores see the layer that is there when a block runs: adapters put in before or after attaching, then taken out
    again; ``remove`` unhooks all."""

    def change(model: Any, step: Callable[[Any], Any]) -> None:
        for block in bind(model).tower_blocks():
            for path in ADAPTED[name]:
                parent, _, child = path.partition(".")
                setattr(getattr(block, parent), child, step(getattr(getattr(block, parent), child)))

    (before, inputs), (after, _) = tiny(*name.split("/")), tiny(*name.split("/"))
    change(before, Adapter)
    with vtprune.attach(before, method, keep=6):
        want = features(before, "", *inputs.values())
    with vtprune.attach(after, method, keep=6):
        plain = features(after, "", *inputs.values())
        change(after, Adapter)
        assert torch.equal(features(after, "", *inputs.values()), want)
        change(after, lambda adapter: adapter.base_layer)
        assert torch.equal(features(after, "", *inputs.values()), plain)
        change(after, Adapter)
        features(after, "", *inputs.values())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in after.modules() if isinstance(m, Adapter | torch.nn.Linear)
    )
    assert float((want - plain).abs().max()) > 1e-3


def test_adapters_do_not_change_the_cost(tiny):
    for name in ("hf-vit/clip", "timm-vit/eva02", "open-clip/clip"):
        model, _ = tiny(*name.split("/"))
        want = bind(model).cost
        for block in bind(model).tower_blocks():
            for child, linear in [(n, m) for n, m in block.mlp.named_children() if isinstance(m, torch.nn.Linear)]:
                setattr(block.mlp, child, Adapter(linear))
        assert bind(model).cost == want and want.vf >= 64


def test_an_adapter_around_open_clips_attention_is_refused(tiny):
    model, inputs = tiny("open-clip", "clip")
    with vtprune.attach(model, "tome", r=3):
        for block in model.visual.transformer.resblocks:
            block.attn = torch.nn.Sequential(block.attn)
        with pytest.raises(vtprune.UnsupportedError, match="torch.nn.modules.container.Sequential is not supported"):
            model.encode_image(inputs["image"])


def test_weights_stored_in_integers(tiny, monkeypatch):
    """Quantised layers hold whole numbers: the probe speaks the norms' number format, and a probe that fails leaves the
    modes as they were."""

    class Quantised(torch.nn.Module):
        def __init__(self, base: Any):
            super().__init__()
            self.weight = torch.nn.Parameter(
                (base.weight / base.weight.abs().max() * 127).round().to(torch.int8), requires_grad=False
            )
            self.scale, self.bias = float(base.weight.detach().abs().max() / 127), base.bias
            self.in_features, self.out_features = base.in_features, base.out_features

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

    for variant, dtype in (("clip", torch.float32), ("dinov3", torch.bfloat16)):
        model, inputs = tiny("hf-vit", variant)
        model.to(dtype)
        for module in [m for m in model.modules() if any(isinstance(c, torch.nn.Linear) for c in m.children())]:
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, Quantised(child))
        model.train()
        with vtprune.attach(model, "tome", r=3) as handle, torch.no_grad():
            assert torch.isfinite(model(inputs["pixel_values"].to(dtype))[0]).all() and handle.report().stages[
                -1
            ].tokens_out == [4, 4]
        assert all(m.training for m in model.modules())
    from vtprune.models.parts import hf_vit

    model, _ = tiny("hf-vit", "clip")
    monkeypatch.setattr(hf_vit, "feed", lambda block, x: x)
    with pytest.raises(vtprune.UnsupportedError, match="off"):
        vtprune.attach(model.train(), "tome", r=3)
    assert all(m.training for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_formats(tiny, dtype):
    """Down-sampling and merging in other formats, chosen before and after attaching."""
    for family, variant, options in (
        ("timm-vit", "layerscale-registers", {"keep": 4}),
        ("hf-vit", "dinov2", {"keep": 4}),
    ):
        for method in ("downsample", "tome"):
            model, inputs = tiny(family, variant)
            outs = []
            with vtprune.attach(model, method, **({} if method == "tome" else options)) as handle:
                model.to(dtype)
                outs.append(features(model, family, next(iter(inputs.values())).to(dtype)))
                kept = handle.report().stages[-1].tokens_out
            assert (
                outs[0].dtype == dtype
                and torch.isfinite(outs[0]).all()
                and kept == ([4, 4] if method == "downsample" else [8, 8])
            )


@torch.no_grad()
def test_open_clip_in_low_precision_keeps_wide_norms(tiny):
    """open_clip's own conversion leaves the norms in 32 bits."""
    from open_clip.model import convert_weights_to_lp

    model, inputs = tiny("open-clip", "clip")
    convert_weights_to_lp(model, dtype=torch.bfloat16)
    with vtprune.attach(model, "tome", keep=8) as handle:
        assert torch.isfinite(model.encode_image(inputs["image"].bfloat16())).all() and handle.report().stages[
            -1
        ].tokens_out == [8, 8]


# --------------------------------------------------------------------------------------------------------------------
# host reads

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class Reads(TorchDispatchMode):
    """Counts operators whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name in READS
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "pitome", "flowcut", "random"])
def test_a_block_costs_no_host_reads(method, monkeypatch):
    """Counts that follow from the plan are not asked of the device. FlowCut's follow from the images: one question for
    every second block."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from vtprune.models.engine import run

    from vtprune.core import select
    from vtprune.core import types as types_module

    asked = []
    for module in (select, types_module, run):
        monkeypatch.setattr(module, "extent", lambda mask, extent=types_module.extent: asked.append(1) or extent(mask))
    found = []
    for depth in (4, 12):
        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=depth,
            image_size=32,
            patch_size=4,
        )
        model: Any = CLIPVisionModel(config).eval()
        with vtprune.attach(model, method, keep=20):
            model(torch.randn(2, 3, 32, 32))
            asked.clear()
            with Reads() as reads:
                model(torch.randn(2, 3, 32, 32))
            found.append((reads.count, len(asked)))
    assert found[1][0] == found[0][0] == 0
    assert found[1][1] - found[0][1] <= (4 if method == "flowcut" else 0)


@torch.no_grad()
def test_finished_passes_hold_no_activations(tiny):
    """The books of a pass are what a report needs: no hidden states, no tables, no running averages."""
    model, inputs = tiny("hf-vit", "dinov3")
    with vtprune.attach(model, "flowcut", keep=5) as handle:
        model(**inputs)
        ((run, _), *_) = handle.passes
        assert not run.captured and not run.memory and run.rotary is None
        assert all(t.numel() <= 2 * 16 for t in (run.index, run.size, run.slot, *run.counts, *run.slots))
