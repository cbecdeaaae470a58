"""Slow transcriptions for methods that prune a text prompt: one prompt, one token and one head at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from vtprune.models.base import ADAPTERS


def llama(layers: int = 6, length: int = 40, samples: int = 1, seed: int = 5) -> tuple[Any, Tensor]:
    """A tiny Llama in float64, and prompts ``[samples, length]``."""
    model, _ = ADAPTERS.get("causal-lm").tiny["llama"]()
    return model.double(), torch.randint(8, 64, (samples, length), generator=torch.Generator().manual_seed(seed))


def inputs_of(model: Any, ids: Tensor, layer: int) -> Tensor:
    """What the stock model's ``layer`` reads of the prompt ``ids`` ``[T]``: ``[T, C]``."""
    with torch.no_grad():
        return model(input_ids=ids[None], output_hidden_states=True).hidden_states[layer][0]


def heads(model: Any, x: Tensor, places: list[int], layer: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Rotated queries and keys of the rows ``x`` ``[n, C]`` at these ``places``: ``[head][row]``, keys repeated."""
    block, config = model.model.layers[layer], model.config
    d = config.head_dim or config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    with torch.no_grad():
        h = block.input_layernorm(x)
        q, k = block.self_attn.q_proj(h), block.self_attn.k_proj(h)

    def turned(v: Tensor, place: int) -> Tensor:
        out = v.clone()
        for i in range(d // 2):
            angle = float(torch.tensor(place * theta ** (-2 * i / d), dtype=torch.float32))
            c, s = math.cos(angle), math.sin(angle)
            out[i], out[i + d // 2] = v[i] * c - v[i + d // 2] * s, v[i + d // 2] * c + v[i] * s
        return out

    group = config.num_attention_heads // config.num_key_value_heads
    queries = [
        [turned(row[a * d : (a + 1) * d], p) for row, p in zip(q, places, strict=True)]
        for a in range(config.num_attention_heads)
    ]
    keys = [
        [turned(row[(a // group) * d : (a // group + 1) * d], p) for row, p in zip(k, places, strict=True)]
        for a in range(config.num_attention_heads)
    ]
    return queries, keys


def smoothed(score: list[float], width: int) -> list[float]:
    """The mean over ``width`` neighbours; beyond the ends there are zeros, which count."""
    half = width // 2
    return [
        sum(score[j] for j in range(i - half, i + half + 1) if 0 <= j < len(score)) / width for i in range(len(score))
    ]


def best(score: list[float], allowed: list[int], count: int) -> list[int]:
    """The ``count`` places of ``allowed`` with the highest scores, the first of equal ones, ascending."""
    return sorted(sorted(allowed, key=lambda i: -score[i])[:count])
