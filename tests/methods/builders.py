"""Random double-precision models, large enough that wrong choices show, and what the method tests read off them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from vtprune.models import qwen_vl

import oracles as O
from moulds import moulded

SIDE, N = 6, 36
IMAGE = 3  # id of the visual placeholder
VISION = {
    "clip": (CLIPVisionConfig, CLIPVisionModel),
    "siglip": (SiglipVisionConfig, SiglipVisionModel),
    "dinov2": (Dinov2Config, Dinov2Model),
}
TEXT = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def randomise(model: nn.Module, seed: int, scale: float = 0.2) -> nn.Module:
    """Double precision, eval, every parameter random (norm weights around 1)."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
            p.copy_(noise + 1 if p.ndim == 1 and bool((p == 1).all()) else noise)
    return model


def vision_config(kind: str, blocks: int) -> Any:
    extra: dict[str, Any] = {"mlp_ratio": 2} if kind == "dinov2" else {"intermediate_size": 64}
    if kind == "siglip":
        extra["vision_use_head"] = False
    return VISION[kind][0](
        hidden_size=32, num_attention_heads=4, num_hidden_layers=blocks, image_size=8 * SIDE, patch_size=8, **extra
    )


@moulded
def tower(kind: str, blocks: int, seed: int = 1) -> nn.Module:
    """A bare vision tower over 6 x 6 patches."""
    return randomise(VISION[kind][1](vision_config(kind, blocks)), seed)


@moulded
def llava(vision: str = "clip", text: str = "llama", blocks: int = 4, layers: int = 6, seed: int = 2) -> nn.Module:
    """A LLaVA with 36 visual tokens per image; Llama has one key head per query head, Mistral and Qwen2 share them,
    Qwen2 has biases."""
    words: dict[str, Any] = {"sliding_window": None} if text != "llama" else {}
    config = LlavaConfig(
        vision_config=vision_config(vision, blocks),
        text_config=TEXT[text](
            vocab_size=64,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4 if text == "llama" else 2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **words,
        ),
        image_token_index=IMAGE,
        image_seq_length=N,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if vision == "siglip" else "default",
    )
    model = randomise(LlavaForConditionalGeneration(config), seed)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def hide_the_tower(patch: pytest.MonkeyPatch) -> None:
    """From now on Qwen-VL's adapter shows nothing of the tower, as the generic one does."""
    stock = qwen_vl.folded
    patch.setattr(
        qwen_vl, "folded", lambda *args, **options: replace(stock(*args, **options), notes=frozenset(), seen_layers=0)
    )


def images(count: int, seed: int = 3) -> Tensor:
    """Images of very different contrast, so that their entropies differ."""
    noise = torch.randn(
        count, 3, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return noise * torch.tensor([0.05, 1.0, 4.0, 0.3])[torch.arange(count) % 4, None, None, None]


def prompts(shapes: list[list[int]], seed: int = 4, left: bool = True) -> dict[str, Tensor]:
    """Padded prompts; each is a list of text lengths with one image between any two, e.g. ``[3, 5]`` = 3 words, an
    image, 5 words."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for lengths in shapes:
        row: list[int] = []
        for i, length in enumerate(lengths):
            row += ([IMAGE] * N if i else []) + torch.randint(4, 64, (length,), generator=generator).tolist()
        rows.append(row)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in rows])
    mask = (ids != 0).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "pixel_values": images(sum(len(s) - 1 for s in shapes)),
    }


def embeddings(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What a dense run gives the language model, per sample, without padding: ``[n, D]``."""
    seen: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return [x[m.bool()] for x, m in zip(seen[0], inputs["attention_mask"], strict=True)]


def final(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Hidden states in front of the head, per sample, without padding (dropped positions are zero): ``[n, D]``."""
    seen: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return [x[m.bool()] for x, m in zip(seen[0], inputs["attention_mask"], strict=True)]


def visual_positions(inputs: dict[str, Tensor], sample: int) -> Tensor:
    """Positions of the visual tokens in the unpadded sample."""
    ids = inputs["input_ids"][sample]
    return (ids[inputs["attention_mask"][sample].bool()] == IMAGE).nonzero()[:, 0]


@torch.no_grad()
def layer(lm: nn.Module, index: int, x: Tensor, position_ids: list[int]) -> Tensor:
    """Decoder layer ``index`` on ``x`` ``[n, D]`` at these positions."""
    return O._run_lm_layer(lm, index, x, position_ids)


def stack(lm: nn.Module, x: Tensor, position_ids: list[int]) -> Tensor:
    """The dense decoder on ``x`` ``[n, D]`` at these positions, with the final norm."""
    for index in range(len(lm.layers)):
        x = O._run_lm_layer(lm, index, x, position_ids)
    return lm.norm(x)


def close(got: Tensor, want: Tensor, limit: float = 1e-9) -> None:
    """Equal shape, and equal to ``limit`` relative to the largest entry (at least 1)."""
    assert got.shape == want.shape
    error = float((got - want).detach().abs().max()) / max(1.0, float(want.detach().abs().max()))
    assert error <= limit, f"off by {error:.2e}"


@torch.no_grad()
def scores(
    lm: nn.Module, x: Tensor, cut: int, at: list[int], layer: str, queries: list[int], keys: str, rope: bool
) -> list[float]:
    """Attention from ``queries`` to the tokens ``at`` in front of layer ``cut``, one query, head and key at a time;
    mean over heads and queries."""
    ids = list(range(len(x)))
    index = cut if layer == "next" else cut - 1
    for i in range(index):
        x = O._run_lm_layer(lm, i, x, ids)
    block = lm.layers[index]
    z = block.input_layernorm(x)
    q, k = block.self_attn.q_proj(z), block.self_attn.k_proj(z)
    cos, sin = lm.rotary_emb(x[None], torch.tensor([ids]))
    heads, groups = lm.config.num_attention_heads, lm.config.num_attention_heads // lm.config.num_key_value_heads
    d = q.shape[1] // heads
    total = [0.0] * len(at)
    for t in queries:
        for h in range(heads):
            seen = [j for j in range(t + 1) if keys == "all" or j in at]
            turn = (lambda v, j: O._rope(v, cos[0, j], sin[0, j])) if rope else (lambda v, j: v)
            query = turn(q[t, h * d : (h + 1) * d], t)
            g = h // groups
            weight = (
                O._softmax([O._dot(query, turn(k[j, g * d : (g + 1) * d], j)) / d**0.5 for j in seen]) if seen else []
            )
            share = dict(zip(seen, weight, strict=True))
            for c, j in enumerate(at):
                total[c] += share.get(j, 0.0) / heads / len(queries)
    return total


VITS: dict[str, dict[str, Any]] = {
    "class": {},
    "layerscale-registers": {"init_values": 0.5, "reg_tokens": 4, "no_embed_class": True},
    "odd-registers": {"init_values": 0.5, "reg_tokens": 3},
    "distilled": {"distilled": True},
    "avg-pool": {"class_token": False, "global_pool": "avg", "qk_norm": True},
    "avg-pool-class": {"global_pool": "avg"},
}


@moulded
def vit(kind: str, depth: int = 6, seed: int = 7, **more: Any) -> nn.Module:
    """A timm ViT over 6 x 6 patches."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    options = {**VITS[kind], **more}
    cls = VisionTransformerDistilled if options.pop("distilled", False) else VisionTransformer
    return randomise(
        cls(img_size=8 * SIDE, patch_size=8, embed_dim=32, depth=depth, num_heads=2, num_classes=5, **options), seed
    )


@torch.no_grad()
def head(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of normed tokens ``[B, prefix + n, C]``, by hand."""
    p = model.num_prefix_tokens
    if hasattr(model, "head_dist"):
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    pooled = x[:, p:].mean(1) if model.global_pool == "avg" else x[:, 0]
    return model.head(model.fc_norm(pooled))


def watched(model: nn.Module, pixels: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What transformers itself says of a tower: hidden states (the embedding first, so that ``[i + 1]`` is the output
    of block i) and each block's attention ``[B, H, n, n]``, prefix tokens first."""
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(pixels, output_hidden_states=True, output_attentions=True)
    finally:
        model.set_attn_implementation(kept)
    return out.hidden_states, out.attentions
