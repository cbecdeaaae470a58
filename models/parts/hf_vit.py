"""Descriptions of the Hugging Face vision towers: CLIP, SigLIP, ViT, DeiT, DINOv2 and DINOv3 blocks, shared by the
bare-ViT adapter and the MLLM adapters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import named
from ..engine.description import Tower
from ..engine.rotary import rotate
from .matrices import of_block

CLASSES = {
    "CLIPVisionModel": "clip",
    "CLIPVisionModelWithProjection": "clip",
    "SiglipVisionModel": "siglip",
    "Dinov2Model": "dinov2",
}  # towers of MLLMs too
BARE = {
    **CLASSES,
    "ViTModel": "vit",
    "DeiTModel": "deit",
    "Dinov2WithRegistersModel": "dinov2-registers",
    "DINOv3ViTModel": "dinov3",
}
# Classifiers: where they hold their tower.
CLASSIFIERS = {
    "ViTForImageClassification": "vit",
    "DeiTForImageClassification": "deit",
    "DeiTForImageClassificationWithTeacher": "deit",
    "Dinov2ForImageClassification": "dinov2",
    "Dinov2WithRegistersForImageClassification": "dinov2_with_registers",
}


def arch(model: Any) -> str | None:
    """``"clip"``, ``"siglip"``, ``"dinov2"`` or ``None``: what a multimodal model can have."""
    return CLASSES.get(named(model, *CLASSES) or "")


def core(model: Any) -> Any:
    """The module that holds the embeddings and the blocks (some classes wrap it in ``vision_model``)."""
    inner = getattr(model, "vision_model", model)
    return inner if hasattr(inner, "encoder") else model


def layers(model: Any) -> list[nn.Module]:
    inner = core(model)
    encoder = (
        inner.encoder if hasattr(inner, "encoder") else inner.model if hasattr(inner, "rope_embeddings") else inner
    )  # DINOv3: model; ViT, DeiT: itself
    return list(encoder.layer if hasattr(encoder, "layer") else encoder.layers)


def _attention(block: Any) -> Any:
    return block.self_attn if hasattr(block, "self_attn") else block.attention


def _nested(block: Any) -> bool:
    """DINOv2 before its rewrite in transformers (5.17): projections one module deeper, and no block takes a mask."""
    return hasattr(_attention(block), "attention")


def mask_name(model: Any) -> str | None:
    """The blocks' keyword for an additive mask, ``None`` if they have none."""
    return None if _nested(layers(model)[0]) else "attention_mask"


def attend(block: Any, x: Tensor, mask: Tensor | None, caught: dict[str, Any]) -> Tensor:
    if hasattr(block, "self_attn"):  # CLIP, SigLIP
        return x + block.self_attn(hidden_states=block.layer_norm1(x), attention_mask=mask)[0]
    if hasattr(block, "layernorm_before"):  # ViT, DeiT
        return block.dropout(block.attention(block.layernorm_before(x), attention_mask=mask)[0]) + x
    z = block.norm1(x)
    if _nested(block):
        q, k, v, scale = project(block, {name: m(z) for name, m in capture(block).items()})
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).reshape(z.shape)
        y = block.attention.output(mixed, z)
    else:
        rotary = {"position_embeddings": caught["rope"]} if "rope" in caught else {}
        y = block.attention(z, attention_mask=mask, **rotary)[0]
    return block.drop_path(block.layer_scale1(y)) + x


def feed(block: Any, x: Tensor) -> Tensor:
    if hasattr(block, "self_attn"):
        return x + block.mlp(block.layer_norm2(x))
    if hasattr(block, "layernorm_before"):
        return block.dropout(block.mlp(block.layernorm_after(x))) + x
    return block.drop_path(block.layer_scale2(block.mlp(block.norm2(x)))) + x


def capture(block: Any) -> dict[str, nn.Module]:
    """The projections of the attention of a block with the usual names."""
    a = _attention(block)
    return (
        {"q": a.attention.query, "k": a.attention.key, "v": a.attention.value}
        if _nested(block)
        else {"q": a.q_proj, "k": a.k_proj, "v": a.v_proj}
    )


def project(block: Any, caught: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    a = _attention(block)
    width = a.attention.attention_head_size if _nested(block) else a.head_dim
    shape = (*caught["q"].shape[:2], -1, width)
    q, k, v = (caught[n].view(shape).transpose(1, 2) for n in "qkv")
    if "rope" in caught:
        cos, sin = caught["rope"]
        q, k = (rotate(t, cos, sin, prefix=t.shape[2] - cos.shape[-2], half=True) for t in (q, k))
    return q, k, v, width**-0.5


def _sample(block: Any, n: int) -> tuple[Tensor, Tensor]:
    """DINOv3's rotary table of ``n`` patches: cosines and sines ``[n, d]``."""
    weight, width = block.norm1.weight, block.attention.head_dim  # projections may be stored in integers
    angle = torch.arange(n * width // 2, device=weight.device, dtype=torch.float32).view(n, -1).tile(2)
    return angle.cos().to(weight.dtype), angle.sin().to(weight.dtype)


def prefix(model: Any) -> int:
    """Class, distillation and register tokens in front of the patches."""
    kind = BARE.get(named(model, *BARE) or "")
    if kind == "siglip":
        return 0
    return (
        2
        if kind == "deit"
        else 1 + (getattr(model.config, "num_register_tokens", 0) if kind in ("dinov2-registers", "dinov3") else 0)
    )


def grid(config: Any) -> tuple[int, int]:
    """Rows and columns of patches; sizes are numbers or (height, width)."""
    (h, w), (ph, pw) = ((s, s) if isinstance(s, int) else tuple(s) for s in (config.image_size, config.patch_size))
    return h // ph, w // pw


def describe(model: Any, used: int, root: nn.Module | None = None, *, bare: bool = False) -> Tower:
    """The :class:`Tower` of ``model`` with its first ``used`` blocks. ``bare``: no model behind it counts on one number
    of tokens, so that images may have any size that the tower itself takes."""
    config = model.config
    patch = (config.patch_size,) * 2 if isinstance(config.patch_size, int) else tuple(config.patch_size)
    rotary = hasattr(core(model), "rope_embeddings")
    fixed = not (rotary or named(model, "Dinov2Model", "Dinov2WithRegistersModel"))  # the others take any size

    def resize(pixels: Tensor, rows: int, columns: int) -> tuple[Tensor, dict[str, Any]]:
        size = (rows * patch[0], columns * patch[1])
        small = F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True, align_corners=False).to(
            pixels.dtype
        )
        return small, {"interpolate_pos_encoding": True} if fixed else {}

    return Tower(
        root=root or model,
        blocks=layers(model)[:used],
        prefix=prefix(model),
        grid=grid(config),
        mask=mask_name(model),
        attend=attend,
        feed=feed,
        capture=capture,
        project=project,
        resize=resize,
        width=config.hidden_size,
        rope="position_embeddings" if rotary else None,
        sample=_sample if rotary else None,
        raster=(lambda pixels: (pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])) if bare else None,
        variable=bare and not fixed,
        matrices=of_block,
        attention=None if _nested(layers(model)[0]) else _attention,
    )


def randomise(model: Any, seed: int) -> None:
    """Moves norms, biases, scales and position tables away from their initial ones and zeros, so that an identity test
    can see a part that was left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)
            p.add_(noise * (0.3 if p.ndim <= 1 else 0.08))
