"""Descriptions of the Hugging Face vision towers: CLIP, SigLIP and DINOv2 blocks, shared by the bare-ViT adapter and the MLLM adapters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._tower import Tower

CLASSES = {"CLIPVisionModel": "clip", "CLIPVisionModelWithProjection": "clip", "SiglipVisionModel": "siglip", "Dinov2Model": "dinov2"}


def arch(model: Any) -> str | None:
    """``"clip"``, ``"siglip"``, ``"dinov2"`` or ``None``."""
    return CLASSES.get(type(model).__name__)


def core(model: Any) -> Any:
    """The module that holds ``embeddings`` and ``encoder`` (older releases wrap it in ``vision_model``)."""
    inner = getattr(model, "vision_model", model)
    return inner if hasattr(inner, "encoder") else model


def layers(model: Any) -> list[nn.Module]:
    encoder = core(model).encoder
    return list(encoder.layer if hasattr(encoder, "layer") else encoder.layers)


def _attention(block: Any) -> Any:
    return block.self_attn if hasattr(block, "self_attn") else block.attention


def _nested(block: Any) -> bool:
    """DINOv2 before its rewrite in transformers (5.17): projections one module deeper, and no block takes a mask."""
    return hasattr(_attention(block), "attention")


def mask_name(model: Any) -> str | None:
    """The blocks' keyword for an additive mask, ``None`` if they have none."""
    return None if _nested(layers(model)[0]) else "attention_mask"


def _attend(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    if hasattr(block, "self_attn"):  # CLIP, SigLIP
        return x + block.self_attn(hidden_states=block.layer_norm1(x), attention_mask=mask)[0]
    z = block.norm1(x)
    if _nested(block):
        q, k, v, scale = _project(block, {name: m(z) for name, m in _capture(block).items()})
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).reshape(z.shape)
        y = block.attention.output(mixed, z)
    else:
        y = block.attention(z, attention_mask=mask)[0]
    return block.drop_path(block.layer_scale1(y)) + x


def _feed(block: Any, x: Tensor) -> Tensor:
    if hasattr(block, "self_attn"):
        return x + block.mlp(block.layer_norm2(x))
    return block.drop_path(block.layer_scale2(block.mlp(block.norm2(x)))) + x


def _capture(block: Any) -> dict[str, nn.Module]:
    a = _attention(block)
    return {"q": a.attention.query, "k": a.attention.key, "v": a.attention.value} if _nested(block) else {"q": a.q_proj, "k": a.k_proj, "v": a.v_proj}


def _project(block: Any, caught: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, float]:
    a = _attention(block)
    width = a.attention.attention_head_size if _nested(block) else a.head_dim
    shape = (*caught["q"].shape[:2], -1, width)
    q, k, v = (caught[n].view(shape).transpose(1, 2) for n in "qkv")
    return q, k, v, width**-0.5


def prefix(model: Any) -> int:
    return 0 if arch(model) == "siglip" else 1


def describe(model: Any, used: int, root: nn.Module | None = None) -> Tower:
    """The :class:`Tower` of ``model`` with its first ``used`` blocks."""
    config = model.config
    side = config.image_size // config.patch_size

    def resize(pixels: Tensor, rows: int, columns: int) -> tuple[Tensor, dict[str, Any]]:
        size = (rows * config.patch_size, columns * config.patch_size)
        small = F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True, align_corners=False).to(pixels.dtype)
        return small, {} if arch(model) == "dinov2" else {"interpolate_pos_encoding": True}

    return Tower(
        root=root or model,
        blocks=layers(model)[:used],
        prefix=prefix(model),
        grid=(side, side),
        mask=mask_name(model),
        attend=_attend,
        feed=_feed,
        capture=_capture,
        project=_project,
        resize=resize,
    )


def randomise(model: Any, seed: int) -> None:
    """Moves norms, biases, scales and position tables away from their initial ones and zeros, so that an identity test can see a part that was left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)
            p.add_(noise * (0.3 if p.ndim <= 1 else 0.08))
