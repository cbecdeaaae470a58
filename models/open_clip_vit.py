"""open_clip image-text models: ``CLIP`` and ``CustomTextCLIP`` with open_clip's ``VisionTransformer`` or a timm tower.
The text side is left alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.ledger import UndoLedger
from ..core.types import UnsupportedError
from . import timm_vit
from .base import ADAPTERS, AdapterInfo, named
from .engine.description import Tower
from .engine.shapes import Shapes
from .parts.hf_vit import randomise
from .parts.vit import BareVit, mlp_shape, per_head

FAMILY = "open-clip"


def _split(projected: Tensor, heads: int) -> Tensor:
    """``[B, n, C]`` to ``[B, H, n, C / H]``."""
    return projected.unflatten(2, (heads, -1)).transpose(1, 2)


def _plain(block: Any) -> nn.MultiheadAttention:
    """The attention whose matrices are read here; a wrapper around it (an adapter) computes something else with
    them."""
    if not isinstance(block.attn, nn.MultiheadAttention):
        kind = f"{type(block.attn).__module__}.{type(block.attn).__name__}"
        raise UnsupportedError(
            f"open_clip attention of type {kind} is not supported; merge adapters into the model before attach()"
        )
    return block.attn


def _attend(block: Any, x: Tensor, mask: Tensor | None, caught: dict[str, Any]) -> Tensor:
    """The block around ``nn.MultiheadAttention``: that takes masks of ``[B * H, n, n]`` only and shows no projections,
    so it is written out here."""
    a = _plain(block)
    caught["qkv"] = F.linear(block.ln_1(x), a.in_proj_weight, a.in_proj_bias)
    q, k, v = (_split(t, a.num_heads) for t in caught["qkv"].chunk(3, dim=-1))
    bias = None if mask is None else mask.to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=a.dropout if a.training else 0.0)
    # as torch does: never called as a module
    return x + block.ls_1(F.linear(y.transpose(1, 2).flatten(2), a.out_proj.weight, a.out_proj.bias))


def _project(block: Any, caught: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    q, k, v = (_split(t, block.attn.num_heads) for t in caught["qkv"].chunk(3, dim=-1))
    return q, k, v, q.shape[-1] ** -0.5


def _custom_attend(block: Any, x: Tensor, mask: Tensor | None, caught: dict[str, Any]) -> Tensor:
    return x + block.ls_1(block.ln_attn(block.attn(block.ln_1(x), attn_mask=mask)))


def _capture(block: Any) -> dict[str, nn.Module]:
    # nn.MultiheadAttention: left by _attend
    return {"q": block.attn.ln_q, "k": block.attn.ln_k} if hasattr(block.attn, "ln_q") else {}


def _custom_project(block: Any, caught: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    a = block.attn
    bias = None if a.in_proj_bias is None else a.in_proj_bias.chunk(3)[2]
    v = F.linear(block.ln_1(caught["x"]), a.in_proj_weight.chunk(3)[2], bias)
    return caught["q"], caught["k"], _split(v, a.num_heads), a.scale


def _feed(block: Any, x: Tensor) -> Tensor:
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _describe(visual: Any) -> Tower:
    blocks = list(visual.transformer.resblocks)
    kinds = {named(b, "ResidualAttentionBlock", "CustomResidualAttentionBlock") or type(b).__name__ for b in blocks}
    if (
        len(kinds) > 1
        or not kinds <= {"ResidualAttentionBlock", "CustomResidualAttentionBlock"}
        or not visual.transformer.batch_first
    ):
        raise UnsupportedError(
            f"open_clip blocks {', '.join(sorted(kinds))} are not supported; there are ResidualAttentionBlock and "
            "CustomResidualAttentionBlock, batch first"
        )
    custom = "CustomResidualAttentionBlock" in kinds
    if custom and blocks[0].attn.scaled_cosine:
        raise UnsupportedError(
            "scaled cosine attention is not supported: it has no query and key whose product gives its logits"
        )

    def raster(pixels: Tensor) -> tuple[int, int]:
        (rows, columns), fixed = (
            (s // p for s, p in zip(pixels.shape[-2:], visual.patch_size, strict=True)),
            tuple(visual.grid_size),
        )
        if (rows, columns) != fixed:
            raise UnsupportedError(
                f"an image of {rows} x {columns} patches for a model of {fixed[0]} x {fixed[1]}: open_clip's towers "
                "take images of one size"
            )
        return rows, columns

    return Tower(
        root=visual,
        blocks=blocks,
        prefix=1,
        grid=tuple(visual.grid_size),
        mask="attn_mask" if custom else None,
        attend=_custom_attend if custom else _attend,
        feed=_feed,
        capture=_capture,
        project=_custom_project if custom else _project,
        pixels="x",
        width=visual.transformer.width,
        raster=raster,
        unread="its attention takes the weights of its projections as they are, so that no module reads the tokens",
    )


class OpenClip(BareVit):
    """One bound image-text model: ``encode_image``, ``forward(image, text)`` and zero-shot scores see the tokens that
    are left."""

    def __init__(self, model: Any):
        self.model = model
        visual = self.visual = model.visual
        tower = _describe(visual)
        pooled = visual.attn_pool is None and visual.pool_type == "tok"
        cost = Shapes(
            vd=visual.transformer.width,
            vheads=visual.transformer.resblocks[0].attn.num_heads,
            vdepth=len(tower.blocks),
            patch=visual.conv1.weight.numel(),
            prefix=1,
            **mlp_shape(visual.transformer.resblocks[0].mlp, visual.transformer.width),
        )
        super().__init__(tower, family=FAMILY, arch="open-clip", class_token=True, cost=cost, class_readout=pooled)
        self.tower_mask = "attn_mask"

    def mask_form(self, mask: Tensor) -> Tensor:
        """The blocks' own form of a mask ``[G, 1, 1, n]``."""
        return mask if self.tower.mask else per_head(mask, self.cost.vheads, mask.shape[-1])

    def head(self, ledger: UndoLedger) -> None:
        visual = self.visual
        if visual.attn_pool is not None:
            # the second pooling reads the first one's queries
            cascade = getattr(visual, "attn_pool_type", "") == "cascade"
            for pool in (visual.attn_pool, None if cascade else visual.attn_pool_contrastive):
                if pool is not None:
                    self.pooler(ledger, pool.attn, heads=pool.attn.num_heads, tokens=1)
        pool = visual._global_pool

        def read(x: Tensor) -> tuple[Tensor, Tensor]:
            if visual.pool_type != "avg" or visual.attn_pool is not None:
                return pool(x)
            with self.engine.reading(x) as run:
                return pool(self.weighed(run, x))[0], pool(x)[1]  # the tokens are handed out as they are

        ledger.replace(visual, "_global_pool", read)
        self.intermediates(ledger, visual)


def bind(model: Any) -> BareVit:
    """open_clip's own tower, or the timm model inside ``TimmModel``."""
    visual = model.visual
    kind = named(visual, "TimmModel", "VisionTransformer") or type(visual).__name__
    if kind == "TimmModel" and timm_vit.takes(visual.trunk):
        return timm_vit.TimmVit(visual.trunk, FAMILY)
    if kind == "VisionTransformer":
        return OpenClip(model)
    name = f"{kind} around timm's {type(visual.trunk).__name__}" if kind == "TimmModel" else kind
    raise UnsupportedError(
        f"open_clip with a {name} has no stack of ViT blocks; there are VisionTransformer, and timm's "
        "VisionTransformer and Eva"
    )


# ----------------------------------------------------------------------------------------------------------- tiny
# models


def _tiny(kind: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A random model of a few thousand parameters with 16 patches, and two images."""
    from open_clip import model as oc

    text: dict[str, Any] = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
    own = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16}
    vision = {**({} if "timm_model_name" in options else own), **options}
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = {"clip": oc.CLIP, "custom-text": oc.CustomTextCLIP}[kind](
        embed_dim=24, vision_cfg=vision, text_cfg=text
    ).eval()
    torch.random.set_rng_state(state)
    side = 32
    if "timm_model_name" in options:
        side = 64
        model.visual.set_input_size(side)
    randomise(model, 1)
    return model, {"image": torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))}


_VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {"kind": "clip"},
    "custom-avg": {
        "kind": "custom-text",
        "qk_norm": True,
        "scale_heads": True,
        "scale_attn_inner": True,
        "scale_attn": True,
        "scale_fc": True,
        "ls_init_value": 0.5,
        "pool_type": "avg",
    },
    "attention-pool": {"kind": "clip", "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "timm": {"kind": "custom-text", "timm_model_name": "test_vit", "timm_pool": "token"},
}

ADAPTERS.register(
    FAMILY,
    AdapterInfo(
        name=FAMILY,
        idea=(
            "open_clip CLIP and CustomTextCLIP with a VisionTransformer (token, average, attention pooling) or timm "
            "tower"
        ),
        matches=lambda m: any(
            c.__name__ in ("CLIP", "CustomTextCLIP") and c.__module__.startswith("open_clip.") for c in type(m).__mro__
        ),
        bind=bind,
        tiny={k: partial(_tiny, **o) for k, o in _VARIANTS.items()},
        package="open_clip",
    ),
)
