"""The bundled VLM's projector and language model in training: short arithmetic, fused projections, and heads that only
training has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import scenes
from .demo_model import PREFIX

HEAD = 32  # channels per head


def weights_of(layer: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Those of a ``LlamaDecoderLayer`` in the order of :func:`decoder_layer`, as ``dtype``."""
    a, m = layer.self_attn, layer.mlp
    parts = (
        layer.input_layernorm,
        *(a.q_proj, a.k_proj, a.v_proj, a.o_proj),
        layer.post_attention_layernorm,
        *(m.gate_proj, m.up_proj, m.down_proj),
    )
    return tuple(part.weight.to(dtype) for part in parts)


def decoder_layer(x: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """One Llama decoder layer, x ``[B, T, C]`` bfloat16: the arithmetic of ``LlamaDecoderLayer`` with the projections
    fused (a test compares the two)."""
    norm1, q, k, v, o, norm2, gate, up, down = weights
    b, t, c = x.shape
    heads, kv = q.shape[0] // HEAD, k.shape[0] // HEAD
    h = F.rms_norm(x, (c,), norm1, 1e-6)
    qkv = F.linear(h, torch.cat([q, k, v])).view(b, t, -1, HEAD).transpose(1, 2)
    query, key, value = qkv.split([heads, kv, kv], dim=1)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    key, value = key.repeat_interleave(heads // kv, 1), value.repeat_interleave(heads // kv, 1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    x = x + F.linear(mixed.transpose(1, 2).reshape(b, t, heads * HEAD), o)
    h = F.rms_norm(x, (c,), norm2, 1e-6)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Trainee(nn.Module):
    """Projector, language model and (training only) heads that say what lies in each patch, after one of the lower
    layers, and where each mentioned object stands and how two of them compare,
    at their nouns, after middle ones; float32 weights, ``dtype`` arithmetic."""

    def __init__(self, llava, compile: bool = False, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.projector, self.lm, self.head = (
            llava.model.multi_modal_projector,
            llava.model.language_model,
            llava.lm_head,
        )
        width = llava.config.text_config.hidden_size
        self.kind = nn.Linear(width, 1 + len(scenes.SHAPES) + len(scenes.ALPHABET))
        self.color = nn.Linear(width, 1 + len(scenes.COLORS))
        self.place = nn.Linear(width, scenes.CELLS**2)
        self.compare = nn.Linear(width, 6)
        self.block = torch.compile(decoder_layer) if compile else decoder_layer
        self.dtype = dtype

    def forward(
        self, features: Tensor, ids: Tensor, position: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        cast = self.dtype
        p = self.projector
        h = F.gelu(F.linear(features.to(cast), p.linear_1.weight.to(cast), p.linear_1.bias.to(cast)))
        image = F.linear(h, p.linear_2.weight.to(cast), p.linear_2.bias.to(cast))
        x = self.lm.embed_tokens(ids).to(cast)
        x = torch.cat([x[:, :3], image, x[:, PREFIX:]], dim=1)
        cos, sin = (t[:, None].to(cast) for t in self.lm.rotary_emb(x.float(), position))
        mask = mask.to(cast)
        for i, layer in enumerate(self.lm.layers):
            x = self.block(x, weights_of(layer, cast), cos, sin, mask)
            if i == len(self.lm.layers) // 3:
                image = x[:, 3:PREFIX]
            if i == len(self.lm.layers) // 2:
                named = x[:, PREFIX:]
            if i == len(self.lm.layers) * 2 // 3:
                compared = x[:, PREFIX:]
        out = F.rms_norm(x[:, PREFIX - 1 :], (x.shape[-1],), self.lm.norm.weight.to(cast), 1e-6)
        dense = [F.linear(image, d.weight.to(cast), d.bias.to(cast)) for d in (self.kind, self.color)]
        place = F.linear(named, self.place.weight.to(cast), self.place.bias.to(cast))
        compare = F.linear(compared, self.compare.weight.to(cast), self.compare.bias.to(cast))
        return F.linear(out, self.head.weight.to(cast)), dense[0], dense[1], place, compare
