"""Scores from a few query rows and the keys of one decoder layer, recomputed from the layer's own projections: any attention backend will do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._level import Level, allowed, backend


def heads(attention: Any, name: str, x: Tensor) -> Tensor:
    """Projection ``name`` (q, k, v) of ``x`` ``[B, M, C]`` with the norm per head that Qwen3 and Gemma 3 have: ``[B, H, M, d]``."""
    out = getattr(attention, f"{name}_proj")(x).view(*x.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{name}_norm", None)
    return (out if norm is None else norm(out)).transpose(1, 2)


def take(table: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[B, M]`` of a rotary table ``[B or 1, T, d]``."""
    table = table.to(rows.device).expand(rows.shape[0], -1, -1)
    return table.gather(1, rows[..., None].expand(-1, -1, table.shape[-1]))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout of Llama, Mistral, Qwen and Gemma: x ``[B, H, R, d]``, tables ``[B, R, d]``."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def attention_rows(block: Any, x: Tensor, rows: Tensor, level: Level, rotary: tuple[Tensor, Tensor] | None, own: Any, keys: str) -> Tensor:
    """Post-softmax attention of ``rows`` ``[B, R]`` over the level's M tokens under the model's ``own`` mask, per head, at least float32: ``[B, H, R, M]``.
    ``keys="visual"``: softmax over the visual ones alone."""
    attention = block.self_attn
    h = block.input_layernorm(x)
    q = heads(attention, "q", h.gather(1, rows[..., None].expand(-1, -1, h.shape[-1])))
    k = heads(attention, "k", h)
    if rotary is not None:
        cos, sin = (t.expand(x.shape[0], -1, -1) for t in rotary)
        q = rotate(q, take(cos, rows), take(sin, rows))
        k = rotate(k, cos, sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q @ k.transpose(-1, -2)) * attention.scaling  # [B, H, R, M]
    cap = getattr(attention, "attn_logit_softcapping", None)  # Gemma 2
    if cap is not None and backend(attention.config) != "sdpa":  # sdpa leaves it out
        logits = torch.tanh(logits / cap) * cap
    seen = allowed(own, level.rows.gather(1, rows), level.rows)
    if seen is None:
        seen = torch.arange(x.shape[1], device=x.device) <= rows[..., None]  # [B, R, M]
    seen = seen & level.valid[:, None]
    if keys == "visual":
        seen = seen & level.visual[:, None]
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return torch.nan_to_num(wide.softmax(-1))


def answer_starts(labels: Tensor) -> Tensor:
    """The positions in front of each answer: labels ``[..., T]`` to bool ``[..., T - 1]``."""
    return (labels[..., 1:] != -100) & (labels[..., :-1] == -100)


def query_rows(labels: Tensor | None, level: Level, query: str) -> tuple[Tensor, Tensor]:
    """Columns of the query rows ``[B, R]`` and their weights: the last prompt token (with labels every token in front of an answer), or ``"all"``."""
    column = torch.arange(level.width, device=level.rows.device)
    last = torch.where(level.valid, column, -1).argmax(1)
    wanted: list[Tensor] = []
    for b in range(level.rows.shape[0]):
        found = last[b : b + 1]
        if query == "all":
            found = level.valid[b].nonzero()[:, 0]
        elif labels is not None:
            starts = answer_starts(labels[b]).nonzero()[:, 0].to(level.rows.device)
            if len(starts):
                hit = (level.rows[b][None] == starts[:, None]) & level.valid[b][None]
                found = hit.int().argmax(1)[hit.any(1)]
        wanted.append(found)
    rows = nn.utils.rnn.pad_sequence(wanted, batch_first=True, padding_value=-1)
    weight = (rows >= 0).double()
    return rows.clamp_min(0), weight / weight.sum(1, keepdim=True).clamp_min(1)
