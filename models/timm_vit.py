"""timm ``VisionTransformer`` (class, distillation and register tokens, LayerScale; token, average, maximum and
attention pooling) and ``Eva`` (EVA-02, DINOv3: rotary positions)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.ledger import UndoLedger
from ..core.types import UnsupportedError
from .base import ADAPTERS, AdapterInfo, PlannedCut, named
from .engine.description import Tower
from .engine.rotary import rotate
from .engine.shapes import Shapes
from .parts.hf_vit import randomise
from .parts.matrices import of_block
from .parts.vit import BareVit, mlp_shape

POOLS = ("", "token", "avg", "max", "map")
BIASED = (
    "its attention takes the fused projection's weight as it is and adds a bias of its own, so that no module reads"
)
MIXES = "global_pool={!r} mixes the tokens in a way that has no exact form with merged tokens"

# ---------------------------------------------------------------------------------------------------------------- the
# standard block


def _attend(block: Any, x: Tensor, mask: Tensor | None, caught: dict[str, Any]) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=mask)))


def _feed(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _capture(block: Any) -> dict[str, nn.Module]:
    return {"qkv": block.attn.qkv}


def _project(block: Any, caught: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    a = block.attn
    b, n, _ = caught["qkv"].shape
    q, k, v = caught["qkv"].reshape(b, n, 3, a.num_heads, a.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return a.q_norm(q), a.k_norm(k), v, a.scale


# --------------------------------------------------------------------------------------------------------------------
# EVA's block


def _eva_attend(block: Any, x: Tensor, mask: Tensor | None, caught: dict[str, Any]) -> Tensor:
    y = block.attn(block.norm1(x), rope=caught["rope"], attn_mask=mask)
    return x + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)


def _eva_feed(block: Any, x: Tensor) -> Tensor:
    y = block.mlp(block.norm2(x))
    return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)


def _called(a: Any) -> bool:
    """Whether the fused projection runs as a module; with a bias of its own (no bias for keys) EVA only takes its
    weight."""
    return a.qkv is not None and getattr(a, "q_bias", None) is None


def _eva_capture(block: Any) -> dict[str, nn.Module]:
    a = block.attn
    return {
        "q": a.q_norm,
        "k": a.k_norm,
        **({"qkv": a.qkv} if _called(a) else {"v": a.v_proj} if a.qkv is None else {}),
    }


def _eva_project(block: Any, caught: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    a = block.attn
    q, k = caught["q"], caught["k"]  # [B, H, n, d]; normed, not rotated
    if _called(a):
        v = caught["qkv"].chunk(3, dim=-1)[2]
    elif a.qkv is None:
        v = caught["v"]
    else:
        v = F.linear(block.norm1(caught["x"]), a.qkv.weight.chunk(3)[2], a.v_bias)
    v = v.unflatten(2, (k.shape[1], -1)).transpose(1, 2)
    if caught.get("rope") is not None:
        sin, cos = caught["rope"].chunk(2, dim=-1)
        q, k = (rotate(t, cos, sin, prefix=a.num_prefix_tokens, half=a.rotate_half) for t in (q, k))
    groups = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), a.scale


def _eva_sample(block: Any, n: int) -> Tensor:
    """A rotary table of ``n`` patches, ``[n, 2 d]``: sines, then cosines."""
    p = block.norm1.weight  # projections may be stored in integers
    angle = torch.arange(n * block.attn.head_dim, device=p.device, dtype=torch.float32).view(n, -1)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(p.dtype)


# --------------------------------------------------------------------------------------------------------------------
# both models


def is_eva(model: Any) -> bool:
    return named(model, "Eva") is not None


def takes(model: Any) -> bool:
    """Whether ``model`` is one of timm's two classes, or made of them."""
    return any(
        c.__name__ in ("VisionTransformer", "Eva") and c.__module__.startswith("timm.") for c in type(model).__mro__
    )


def describe(model: Any) -> Tower:
    """The :class:`Tower` of a timm model; raises :class:`UnsupportedError` for blocks and heads of another kind."""
    block, eva = model.blocks[0], is_eva(model)
    parts = ("norm1", "attn", "norm2", "mlp", *(("gamma_1", "gamma_2") if eva else ("ls1", "ls2")))
    kinds = ("EvaAttention", "AttentionRope") if eva else ("Attention",)
    if named(block, "EvaBlockPostNorm") or not all(hasattr(block, name) for name in parts):
        raise UnsupportedError(
            f"timm blocks of type {type(block).__name__} are not supported; there are the pre-norm Block and EvaBlock: "
            "attention, then MLP, each on a residual"
        )
    if named(block.attn, *kinds) is None:
        raise UnsupportedError(
            f"timm attention of type {type(block.attn).__name__} is not supported; there is {' and '.join(kinds)}"
        )
    if model.global_pool not in POOLS:
        raise UnsupportedError(MIXES.format(model.global_pool))

    def resize(pixels: Tensor, rows: int, columns: int) -> tuple[Tensor, dict[str, Any]]:
        patch = model.patch_embed.patch_size
        # torch has no kernel for 16 bits on every device
        wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        return F.interpolate(
            wide, size=(rows * patch[0], columns * patch[1]), mode="bicubic", antialias=True, align_corners=False
        ).to(pixels.dtype), {}

    def raster(pixels: Tensor) -> tuple[int, int]:
        rows, columns = model.patch_embed.dynamic_feat_size(pixels.shape[-2:])
        fixed = tuple(model.patch_embed.grid_size)
        if not model.dynamic_img_size and (rows, columns) != fixed:
            raise UnsupportedError(
                f"an image of {rows} x {columns} patches for a model of {fixed[0]} x {fixed[1]}; dynamic_img_size=True "
                "or set_input_size() make it take others"
            )
        return rows, columns

    # with a bias of its own EVA takes the fused projection's weight without calling it
    whole = not eva or all(b.attn.qkv is None or _called(b.attn) for b in model.blocks)

    return Tower(
        root=model,
        blocks=list(model.blocks),
        prefix=model.num_prefix_tokens,
        grid=tuple(model.patch_embed.grid_size),
        mask="attn_mask",
        attend=_eva_attend if eva else _attend,
        feed=_eva_feed if eva else _feed,
        capture=_eva_capture if eva else _capture,
        project=_eva_project if eva else _project,
        resize=resize if model.dynamic_img_size else None,
        pixels="x",
        width=model.embed_dim,
        rope="rope" if eva else None,
        sample=_eva_sample if eva else None,
        raster=raster,
        variable=model.dynamic_img_size,
        matrices=of_block if whole else None,
        unread="" if whole else BIASED,
        attention=lambda block: block.attn,
    )


class TimmVit(BareVit):
    """One bound timm model. Where its head averages, every original token counts once, so sizes weigh the mean.
    ``forward_features`` gives the tokens that are left, in a call of the model and alone, and ``forward_head`` takes
    them; ``forward_intermediates`` gives those behind each block, or feature maps. In ``Eva`` a merged token stands at
    the position of the token that absorbed the others."""

    def __init__(self, model: Any, family: str = "timm-vit"):
        self.model = model
        tower = describe(model)
        block = model.blocks[0]
        cost = Shapes(
            vd=model.embed_dim,
            vheads=block.attn.num_heads,
            vdepth=len(model.blocks),
            patch=model.patch_embed.proj.weight.numel(),
            prefix=tower.prefix,
            **mlp_shape(block.mlp, model.embed_dim),
        )
        super().__init__(
            tower,
            family=family,
            arch="eva" if is_eva(model) else "vit",
            class_token=model.cls_token is not None,
            cost=cost,
            class_readout=model.global_pool == "token",
            classifier=model.get_classifier(),
        )

    def install(
        self, cuts: list[PlannedCut], ledger: UndoLedger, recorder: Any, *, positions: str, per: str, seed: int
    ) -> None:
        super().install(cuts, ledger, recorder, positions=positions, per=per, seed=seed)
        ledger.replace(self.model, "forward_features", self.engine.alone(self.model.forward_features))
        if cuts and hasattr(self.model, "forward_intermediates"):
            self.intermediates(ledger, self.model)

    def head(self, ledger: UndoLedger) -> None:
        """What reads the tokens behind the last block. Which pooling that is is asked when it runs:
        ``reset_classifier`` may change it."""
        model: Any = self.model
        name = "pool" if hasattr(model, "pool") else "forward_head"
        original = getattr(model, name)

        def read(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            pool = (args[0] if args else kwargs.get("pool_type")) if name == "pool" else None
            attends = getattr(model, "attn_pool", None) is not None
            pool = "map" if attends else model.global_pool if pool is None else pool
            if pool in ("", "token"):
                return original(x, *args, **kwargs)
            if pool not in POOLS:
                raise UnsupportedError(MIXES.format(pool))
            with self.engine.reading(x) as run:
                if pool == "avg":
                    x = self.weighed(run, x, whole=getattr(model, "pool_include_prefix", False))
                elif pool == "max":
                    x = self.highest(run, x)
                return original(x, *args, **kwargs)

        ledger.replace(model, name, read)
        if getattr(model, "attn_pool", None) is not None:
            self.pooler(ledger, model.attn_pool)


# --------------------------------------------------------------------------------------------------------------------
# tiny models


def _tiny(kind: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A random model with 16 patches: ``kind`` "vit", "distilled" (DeiT's two tokens) or "eva"."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    build: Any = {"vit": VisionTransformer, "distilled": VisionTransformerDistilled, "eva": Eva}[kind]
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = build(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=10, **options).eval()
    torch.random.set_rng_state(state)
    randomise(model, 1)
    return model, {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


_VARIANTS: dict[str, dict[str, Any]] = {
    "class": {"kind": "vit"},
    "layerscale-registers": {
        "kind": "vit",
        "init_values": 0.5,
        "reg_tokens": 4,
        "no_embed_class": True,
        "dynamic_img_size": True,
    },
    "distilled": {"kind": "distilled"},
    "avg-pool": {"kind": "vit", "class_token": False, "global_pool": "avg", "qk_norm": True},
    "map-pool-pre-norm": {"kind": "vit", "class_token": False, "global_pool": "map", "pre_norm": True},
    "eva02": {
        "kind": "eva",
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "use_rot_pos_emb": True,
    },
    "dinov3": {
        "kind": "eva",
        "qkv_bias": False,
        "init_values": 0.5,
        "rope_type": "dinov3",
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "rope_rotate_half": True,
        "num_reg_tokens": 4,
        "dynamic_img_size": True,
        "global_pool": "token",
    },
    "rope-mixed": {"kind": "eva", "rope_type": "mixed", "use_rot_pos_emb": True, "global_pool": "max", "qk_norm": True},
}

ADAPTERS.register(
    "timm-vit",
    AdapterInfo(
        name="timm-vit",
        idea=(
            "timm VisionTransformer and Eva: class / distillation / register tokens, LayerScale, rotary positions; "
            "token, average, maximum, attention pooling"
        ),
        matches=takes,
        bind=TimmVit,
        tiny={k: partial(_tiny, **o) for k, o in _VARIANTS.items()},
    ),
)
