"""Vision transformers against a slow reference: float64, one image, one query, one head at a time, nothing shared with the package; and their heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vtprune.models.base import PlannedCut

import oracles as O
import vtprune
from vtprune.attach import bind
from vtprune.ledger import UndoLedger
from vtprune.select import from_mask

# -------------------------------------------------------------------------------------------------------------- the slow reference


@dataclass
class Layer:
    """One block taken apart. ``qkv(z)`` gives three ``[n, H, d]``; ``rope`` None or ``(cos, sin)`` ``[H, N, d]`` per original patch."""

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
    """softmax(q k^T / sqrt(d) + log s) v, ``[n, H d]``, and the mean-head keys ``[n, d]`` as the attention uses them; ``slot`` original patch of every row,
    negative for prefix tokens."""
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
            logits = [float(q[i, h] @ k[j, h]) / math.sqrt(d) + (0.0 if size is None else math.log(size[j])) for j in range(n)]
            for j, weight in enumerate(O._softmax(logits)):
                mixed[i, h] += weight * v[j, h]
    return mixed.flatten(1), k.mean(1)


Cut = Callable[[int, Tensor, list[int]], tuple[list[O.Merge], list[int]] | None]  # (layer, mean keys, slots) -> merges and the rows that stay


def walk(layers: list[Layer], x: Tensor, prefix: int, cut: Cut, *, inside: bool, proportional: bool) -> tuple[Tensor, list[float], list[int]]:
    """One image ``[P + N, C]`` through all blocks: its last rows, their sizes and original patches (prefix negative)."""
    size, slot = [1.0] * len(x), list(range(-prefix, len(x) - prefix))
    for number, layer in enumerate(layers):
        y, keys = attention(layer, layer.norm1(x), slot, size if proportional else None)
        x = x + layer.out(y)
        if not inside:
            x = x + layer.mlp(layer.norm2(x))
        found = cut(number, keys, slot)
        if found is not None:
            merges, kept = found[0], sorted(found[1])
            x, size = O._weighted_merge(x, size, merges, kept)
            slot = [slot[i] for i in kept]
        if inside:
            x = x + layer.mlp(layer.norm2(x))
    return x, size, slot


def tome(layer: int, keys: Tensor, slot: list[int]) -> tuple[list[O.Merge], list[int]]:
    """r = 3 in every block."""
    prefix = sum(s < 0 for s in slot)
    merges, rest, other = O._bipartite(keys, O.tome_clip_r(len(keys), 3, prefix), set(range(prefix)))
    return merges, rest + other


def pitome(layer: int, keys: Tensor, slot: list[int]) -> tuple[list[O.Merge], list[int]]:
    """The DeiT placement on four blocks, three quarters kept in each."""
    prefix = sum(s < 0 for s in slot)
    patches = keys[prefix:]
    merges, kept = O._pitome_match(patches, O.pitome_r(len(patches), 0.75), 0.75 * (1 - layer / 4), 1.0, "bsm" if layer < 2 else "pitome")
    return [(a + prefix, b + prefix) for a, b in merges], [*range(prefix), *(i + prefix for i in kept)]


def pool(layer: int, keys: Tensor, slot: list[int]) -> tuple[list[O.Merge], list[int]] | None:
    """The quarters of a 4 x 4 raster behind block 1, each into its first token."""
    if layer != 1:
        return None
    prefix = sum(s < 0 for s in slot)
    first = {i: i // 8 * 8 + i % 4 // 2 * 2 for i in range(16)}
    return [(i + prefix, f + prefix) for i, f in first.items() if i != f], [*range(prefix), *(f + prefix for f in sorted(set(first.values())))]


METHODS: dict[str, tuple[Cut, dict[str, Any], bool, bool]] = {  # rule, options, inside, proportional
    "tome": (tome, {"r": 3}, True, True),
    "pitome": (pitome, {"ratio": 0.75, "variant": "deit"}, True, False),
    "pool": (pool, {"keep": 4, "site": "vision.1"}, False, False),
}


# ------------------------------------------------------------------------------------------------------------------ models taken apart


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
    blocks = base.model.layer if rotary else base.encoder.layer if hasattr(base.encoder, "layer") else base.encoder.layers
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
            q, k, v = (split(z @ w.T + c, a.num_heads) for w, c in zip(a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3), strict=True))
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
        weights = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight) if a.in_proj_weight is None else a.in_proj_weight.chunk(3)
        q, k, v = (split(z @ w.T + c, a.num_heads) for z, w, c in zip((q, k, k), weights, a.in_proj_bias.chunk(3), strict=True))
        rows = torch.zeros_like(q)
        for h in range(a.num_heads):
            for i in range(len(q)):
                logits = [float(q[i, h] @ k[j, h]) / math.sqrt(q.shape[-1]) + (math.log(size[j]) if proportional else 0.0) for j in range(len(k))]
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


def expected(model: Any, pixels: Tensor, method: str, apart: Callable, end: Callable) -> tuple[list[Tensor], list[list[int]]]:
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
    """Scores of two images against five texts: features of the reference, normalised, times the untouched text features."""
    model, inputs = double(tiny, "open-clip", variant)
    texts = torch.randint(1, 40, (5, 8), generator=torch.Generator().manual_seed(5))
    proportional = METHODS[method][3]
    want, slots = expected(model, inputs["image"], method, clip, lambda *a: clip_end(*a, proportional))
    scores = model.logit_scale.exp() * F.normalize(torch.stack(want), dim=-1) @ F.normalize(model.encode_text(texts), dim=-1).T
    with vtprune.attach(model, method, **METHODS[method][1]) as handle:
        got, _ = model.get_logits(inputs["image"], texts)
        image, text, scale = model(inputs["image"], texts)
        report = handle.report()
    assert [k.tolist() for k in report.stages[-1].kept] == slots
    same(got, scores)
    same(scale * image @ text.T, scores)


@torch.no_grad()
@pytest.mark.parametrize(("method", "options"), [("tome", {"r": 0}), ("pitome", {"keep": 1.0}), ("random", {"keep": 1.0}), ("flowcut", {"keep": 1.0})])
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
    """Random pruning of CLIP and of the timm tower inside open_clip: the class token of the masked dense tower, scored."""
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


# ----------------------------------------------------------------------------------------------------------------- projections, ragged heads


def install(model: Any, select: Callable, *, layer: int = 1, inside: bool = False) -> UndoLedger:
    """One cut with a rule of the test's own."""
    cut = PlannedCut(
        site=f"vision.{layer}",
        layer=layer,
        inside=inside,
        restore=False,
        stash=False,
        context=False,
        proportional=False,
        observe=(),
        stage=0,
        select=select,
        bring_back=lambda *_: None,
        memory_key=0,
    )
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
    """softmax(q k^T) v of the projections a method is shown is what the block's own attention hands on, in the first block and behind a cut."""
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


# ---------------------------------------------------------------------------------------------------------------------- rotary positions, calls


@torch.no_grad()
@pytest.mark.parametrize(("family", "variant", "apart", "end"), [CASES[1], CASES[3]], ids=["timm", "hf"])
def test_reduced_pixels_have_their_own_rotary_rows(tiny, family, variant, apart, end):
    """Down-sampling to 3 x 3 patches, then pruning: rows count in the small raster, not in the large one."""
    model, inputs = double(tiny, family, variant)
    ((key, pixels),) = inputs.items()
    stages = (vtprune.Stage(method="downsample", keep=9), vtprune.Stage(method="random", keep=4, options={"site": "vision.1"}))
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
    from vtprune.models import _hf_vit, timm_vit

    for module, name, family, variant in ((timm_vit, "_eva_attend", "timm-vit", "dinov3"), (_hf_vit, "_attend", "hf-vit", "dinov3")):
        model, _ = tiny(family, variant)
        right = getattr(module, name)

        def wrong(block: Any, x: Tensor, mask: Any, caught: dict, right: Callable = right) -> Tensor:
            table = caught["rope"]
            still = tuple(torch.ones_like(t) if i == 0 else torch.zeros_like(t) for i, t in enumerate(table)) if isinstance(table, tuple) else None
            return right(block, x, mask, {**caught, "rope": still})

        monkeypatch.setattr(module, name, wrong)
        with pytest.raises(vtprune.UnsupportedError, match="off"):
            vtprune.attach(model, "tome", r=2)


@torch.no_grad()
def test_a_mean_over_class_token_and_patches():
    """timm's ``pool_include_prefix``: the class token counts once, every merged token with its size."""
    from timm.models.vision_transformer import VisionTransformer

    model: Any = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, global_pool="avg", pool_include_prefix=True).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with vtprune.attach(model, "tome", r=3) as handle:
        logits, tokens, report = model(pixels), model.forward_features(pixels), handle.report()
    sizes = torch.stack([torch.cat([torch.ones(1), torch.bincount(a).float()]) for a in report.stages[-1].assignment])
    mean = (tokens * sizes[..., None]).sum(1) / 17
    assert torch.allclose(model.head(model.fc_norm(mean)), logits, atol=1e-5)


@torch.no_grad()
def test_forward_features_alone(tiny):
    """``forward_features`` called alone gives the tokens that are left, is reported, and leaves nothing open after an exception."""
    model, inputs = tiny("timm-vit", "avg-pool")
    dense = model.forward_features(inputs["x"])
    with vtprune.attach(model, "tome", r=3) as handle:
        logits = model(inputs["x"])
        tokens = model.forward_features(inputs["x"])
        report = handle.report()
        with pytest.raises(AssertionError):
            model.forward_features(inputs["x"][..., :24])
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


# ----------------------------------------------------------------------------------------------------------------------------- refusals


@torch.no_grad()
def test_images_of_another_size_are_refused(tiny):
    model, _ = tiny("hf-vit", "dinov2")
    with vtprune.attach(model, "random", keep=4), pytest.raises(vtprune.UnsupportedError, match="36 patches where 16"):
        model(torch.randn(1, 3, 48, 48))


def test_what_is_not_supported_says_why():
    from timm.models.eva import Eva
    from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    refused = [
        (VisionTransformer(**sizes, block_fn=ParallelScalingBlock), "ParallelScalingBlock"),
        (VisionTransformer(**sizes, block_fn=ParallelThingsBlock), "ParallelThingsBlock"),
        (VisionTransformer(**sizes, attn_layer="diff"), "DiffAttention"),
        (VisionTransformer(**sizes, global_pool="avgmax"), "avgmax"),
        (Eva(**sizes, use_post_norm=True), "EvaBlockPostNorm"),
        (Siglip2VisionModel(Siglip2VisionConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)), "raster"),
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


# --------------------------------------------------------------------------------------------------------------------------- subclasses


@torch.no_grad()
@pytest.mark.parametrize("name", ["hf-vit/clip", "hf-vit/dinov2-registers-classifier", "hf-vit/deit", "timm-vit/eva02", "open-clip/custom-avg"])
def test_subclasses_are_taken_like_their_base(tiny, name):
    """A user's subclass, and a class derived at run time as FSDP2 does: same tokens, same numbers."""
    outs = []
    for derive in (lambda c: c, lambda c: type("Mine", (c,), {}), lambda c: type(f"FSDP{c.__name__}", (type("FSDPModule", (), {}), c), {})):
        model, inputs = tiny(*name.split("/"))
        for part in {model, getattr(model, "visual", model), getattr(model, "dinov2_with_registers", model)}:
            part.__class__ = derive(type(part))
        with vtprune.attach(model, "tome", r=3) as handle:
            out = model(**inputs)
            report = handle.report()
        outs.append((out if isinstance(out, Tensor) else out[0], torch.stack(report.stages[-1].kept)))
    assert all(torch.equal(a, b) for other in outs[1:] for a, b in zip(other, outs[0], strict=True))
