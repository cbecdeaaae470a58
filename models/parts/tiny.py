"""Tiny random models of a family, without files or a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .hf_vit import randomise

TEXT = {
    "LlamaModel": "Llama",
    "MistralModel": "Mistral",
    "Qwen2Model": "Qwen2",
    "Qwen3Model": "Qwen3",
    "GemmaModel": "Gemma",
    "Gemma2Model": "Gemma 2",
    "Gemma3TextModel": "Gemma 3",
    "Qwen2VLTextModel": "Qwen2-VL",
    "Qwen2_5_VLTextModel": "Qwen2.5-VL",
    "Qwen3VLTextModel": "Qwen3-VL",
    "Qwen3VLMoeTextModel": "Qwen3-VL-MoE",
    "Glm4vTextModel": "GLM-4V",
    "Glm4vMoeTextModel": "GLM-4.5V",
}


def tiny_text(layers: int = 6, **more: Any) -> dict[str, Any]:
    """Keywords of a Llama-like configuration of a few thousand parameters; grouped keys, 64 words, no sliding
    window."""
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return {
        "vocab_size": 64,
        **sizes,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def tiny_build(kind: Any, config: Any) -> Any:
    """A random model of class ``kind``, the same each time."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = kind(config).eval()
    torch.random.set_rng_state(state)
    randomise(model, 1)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def tiny_prompts(
    samples: list[list[tuple[int, int]]], between: int = 1, opening: int | None = None
) -> dict[str, Tensor]:
    """Left-padded prompts of unequal length. Each sample lists its images as ``(token, count)``; three words ahead,
    ``between`` words between images, the last word before each being ``opening``."""
    generator = torch.Generator().manual_seed(2)
    lengths = [
        14 - 5 * b % 13 + sum(n for _, n in images) + between * max(len(images) - 1, 0)
        for b, images in enumerate(samples)
    ]
    ids = torch.zeros(len(samples), max(lengths), dtype=torch.long)
    for b, (length, images) in enumerate(zip(lengths, samples, strict=True)):
        start = max(lengths) - length
        ids[b, start:] = torch.randint(8, 64, (length,), generator=generator)
        at = start + 3
        for token, n in images:
            ids[b, at : at + n] = token
            ids[b, at - 1] = ids[b, at - 1] if opening is None else opening
            at += n + between
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def tiny_model(
    kind: Any, config: Any, *, image_token: int, tokens: int, images: tuple[int, ...] = (1, 1), **prompts: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A random model of class ``kind`` and inputs: ``images`` images of ``tokens`` visual tokens in each prompt, pixels
    ``[n, 3, 32, 32]``; ``prompts`` as in :func:`tiny_prompts`."""
    inputs = tiny_prompts([[(image_token, tokens)] * n for n in images], **prompts)
    pixels = torch.randn(sum(images), 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return tiny_build(kind, config), {**inputs, "pixel_values": pixels}
