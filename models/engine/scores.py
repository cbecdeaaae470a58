"""Scores from a few query rows and the keys of one decoder layer, recomputed from the layer's own projections: any
attention backend will do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import kernels
from ...kernels.base import CHUNK, rotate, wide
from .level import SequenceLength, allowed, backend
from .rows import take

ROWS = 64  # query rows whose masks are made at once


def heads(attention: Any, name: str, x: Tensor, made: Tensor | None = None) -> Tensor:
    """Projection ``name`` (q, k, v) of ``x`` ``[B, M, C]`` with the norm per head that Qwen3 and Gemma 3 have: ``[B, H,
    M, d]``; Phi-3 makes all three at once. ``made``: what another projection made of ``x``."""
    if made is not None:
        out = made
    elif hasattr(attention, "qkv_proj"):
        counts = (getattr(attention.config, f"num_{kind}_heads") for kind in ("attention", *2 * ("key_value",)))
        out = attention.qkv_proj(x).split([n * attention.head_dim for n in counts], -1)["qkv".index(name)]
    else:
        out = getattr(attention, f"{name}_proj")(x)
    out = out.view(*x.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{name}_norm", None)
    return (out if norm is None else norm(out)).transpose(1, 2)


def turn(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """``x`` ``[B, H, M, d]`` rotated as its model does it: the first channels that the tables ``[B or 1, M, r]`` have,
    half against half, or, ``pairs``, each with its neighbour (GLM-4V)."""
    r = cos.shape[-1]
    if not pairs:
        return torch.cat([rotate(x[..., :r], cos, sin), x[..., r:]], -1) if r < x.shape[-1] else rotate(x, cos, sin)
    even, odd = x[..., :r:2], x[..., 1:r:2]
    c, s = (t[:, None].to(x.dtype) for t in (cos, sin))
    return torch.cat([x[..., :r] * c + torch.stack((-odd, even), -1).flatten(-2) * s, x[..., r:]], -1)


def fold(x: Tensor, r: int, pairs: bool) -> Tensor:
    """Channels ``[..., d]`` in another order, in which :func:`turn` is a rotation of half against half: products of
    queries and keys are the same."""
    a, b = (x[..., :r:2], x[..., 1:r:2]) if pairs else x[..., :r].chunk(2, -1)
    c, d = x[..., r:].chunk(2, -1)
    return torch.cat([a, c, b, d], -1)


def folded(cos: Tensor, sin: Tensor, d: int, pairs: bool) -> tuple[Tensor, Tensor]:
    """The tables ``[B or 1, M, r]`` for channels in that order, ``[B or 1, M, d]``."""
    r = cos.shape[-1]
    halves = [t[..., ::2] if pairs else t[..., : r // 2] for t in (cos, sin)]
    c, s = (nn.functional.pad(t, (0, (d - r) // 2), value=still) for t, still in zip(halves, (1.0, 0.0), strict=True))
    return torch.cat([c, c], -1), torch.cat([s, s], -1)


def question(
    block: Any, x: Tensor, rows: Tensor, rotary: tuple[Tensor, Tensor] | None, pairs: bool = False
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What :func:`vtprune.kernels.query_scores` needs to know of a layer that reads ``x`` ``[B, M, C]``: the rotated
    queries of ``rows`` ``[B, R]``, all keys, and how its logits are made; ``rotary`` tables ``[B or 1, M, r]`` of x,
    ``pairs`` as for :func:`turn`."""
    attention = block.self_attn
    h = block.input_layernorm(x)
    q, k = heads(attention, "q", take(h, rows)), heads(attention, "k", h)
    if rotary is not None and (pairs or rotary[0].shape[-1] < q.shape[-1]):
        r, d = rotary[0].shape[-1], q.shape[-1]
        q, k, rotary = fold(q, r, pairs), fold(k, r, pairs), folded(*rotary, d, pairs)
    if rotary is not None:
        q = rotate(q, *(take(t, rows) for t in rotary))
    cap = getattr(attention, "attn_logit_softcapping", None)  # Gemma 2
    return (
        q,
        k,
        {"scale": attention.scaling, "rotary": rotary, "cap": None if backend(attention.config) == "sdpa" else cap},
    )  # sdpa leaves the cap out


def visible(level: SequenceLength, rows: Tensor, own: Any, keys: str, segments: Tensor | None = None) -> Tensor:
    """``[B, R, M]`` bool: what ``rows`` ``[B, R]`` see of the level's M tokens under the model's ``own`` mask, and of
    their own prompt among several packed into a row (``segments`` ``[B, M]``); ``keys="visual"``: of the visual
    ones."""
    seen = allowed(own, level.rows.gather(1, rows), level.rows)
    if seen is None:
        seen = torch.arange(level.width, device=rows.device) <= rows[..., None]
    if segments is not None:
        seen = seen & (segments.gather(1, rows)[..., None] == segments[:, None])
    seen = seen & level.valid[:, None]
    return seen & level.visual[:, None] if keys == "visual" else seen


def keys_of(block: Any, x: Tensor, rotary: tuple[Tensor, Tensor], pairs: bool) -> Tensor:
    """The keys ``[B, G, M, d]`` of a layer that reads ``x`` ``[B, M, C]``, rotated by its tables."""
    return turn(heads(block.self_attn, "k", block.input_layernorm(x)), *rotary, pairs)


def _each(q: Tensor, k: Tensor, weight: Tensor, seen: Tensor, how: dict[str, Any]) -> list[Tensor]:
    """:func:`vtprune.kernels.query_scores` of every head alone."""
    group = q.shape[1] // k.shape[1]
    return [
        kernels.query_scores(q[:, i : i + 1], k[:, i // group : i // group + 1], weight=weight, seen=seen, **how)
        for i in range(q.shape[1])
    ]


def _corrected(
    q: Tensor, k: Tensor, rows: Tensor, weight: Tensor, seen: Tensor, each_head: str, how: dict[str, Any]
) -> Tensor:
    """As :func:`attention_to` of a few ``rows`` ``[B, R]``, every probability divided by what rotary positions alone
    would give: the scaled product of the query and the key, rotated, if both were all ones."""
    (cos, sin), scale, cap = how["rotary"], how["scale"], how["cap"]
    q, k = wide(q), rotate(wide(k), cos, sin)
    b, h, r, d = q.shape
    ones = rotate(q.new_ones(len(cos), 1, k.shape[2], d), cos, sin)[:, 0]  # [B or 1, M, d]
    bias = take(ones, rows) @ ones.transpose(1, 2) * scale  # [B, R, M]
    logits = ((q * scale).reshape(b, k.shape[1], -1, d) @ k.transpose(2, 3)).view(b, h, r, -1)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    p = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    p = torch.where(seen[:, None], p / bias[:, None], 0)
    if each_head == "each":
        return torch.einsum("bhrm,br->bmh", p, weight.to(p.dtype))
    return torch.einsum("brm,br->bm", p.mean(1) if each_head == "mean" else p.amax(1), weight.to(p.dtype))


@torch.no_grad()
def _largest(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    seen: Tensor,
    *,
    scale: float,
    rotary: tuple[Tensor, Tensor] | None,
    cap: float | None,
    each_row: bool,
) -> Tensor:
    """As :func:`vtprune.kernels.query_scores`, but of each row the largest head's attention: ``[B, M]``; without
    ``each_row`` the largest of any row that has a weight."""
    with torch.autocast(q.device.type, enabled=False):  # it would multiply in 16 bits
        q, k = wide(q), wide(k)
        k = k if rotary is None else rotate(k, *rotary)
        (b, h, rows, _), (g, m) = q.shape, k.shape[1:3]
        score = k.new_zeros(b, m)
        for i in range(0, rows, step := max(1, CHUNK // max(b * h * m, 1))):
            part = (q[:, :, i : i + step] * scale).reshape(b, g, -1, q.shape[3])
            logits = (part @ k.transpose(2, 3)).view(b, h, -1, m)
            logits = logits if cap is None else torch.tanh(logits / cap) * cap
            found = logits.masked_fill(~seen[:, None, i : i + step], -torch.inf).softmax(-1).nan_to_num().amax(1)
            share = weight[:, i : i + step, None].to(found.dtype)
            if each_row:
                score += (found * share).sum(1)
            else:
                score = torch.maximum(score, (found * (share > 0)).amax(1))
    return score


def attention_to(
    block: Any,
    x: Tensor,
    rows: Tensor,
    weight: Tensor,
    level: SequenceLength,
    rotary: tuple[Tensor, Tensor] | None,
    own: Any,
    keys: str,
    segments: Tensor | None = None,
    pairs: bool = False,
    each_head: str = "mean",
    corrected: bool = False,
) -> Tensor:
    """Attention of ``rows`` ``[B, R]``, weighted by ``weight`` ``[B, R]`` and averaged over heads, to each of the
    level's M tokens: ``[B, M]``; ``each_head="max"``: the largest head's in each row, ``"most"``: of any row,
    ``"each"``: ``[B, M, H]``. ``corrected``: divided by what rotary positions alone would give. A few rows at a time
    meet the keys, never a full map."""
    q, k, how = question(block, x, rows, rotary, pairs)
    parts = []
    for i in range(0, rows.shape[1], ROWS):
        some = rows[:, i : i + ROWS]
        seen = visible(level, some, own, keys, segments)
        part, share = q[:, :, i : i + ROWS], weight[:, i : i + ROWS]
        if corrected:
            parts.append(_corrected(part, k, some, share, seen, each_head, how))
        elif each_head == "mean":
            parts.append(kernels.query_scores(part, k, weight=share, seen=seen, **how))
        elif each_head == "each":
            parts.append(torch.stack(_each(part, k, share, seen, how), -1))
        else:
            parts.append(_largest(part, k, share, seen, **how, each_row=each_head == "max"))
    made = torch.stack(parts)
    return made.amax(0) if each_head == "most" else made.sum(0)


def answer_starts(labels: Tensor, level: SequenceLength) -> Tensor:
    """The rows in front of each answer, ``[B, T]`` bool. ``labels`` ``[B, T]``; ``level`` the whole sequence. A
    placeholder is no part of an answer, whatever its label says: where everything is supervised, the answer is what
    follows the image."""
    answer = (labels != -100) & ~level.visual
    return nn.functional.pad(~answer[:, :-1] & answer[:, 1:], (0, 1)) & level.valid


def query_rows(asking: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The columns that ``asking`` ``[B, M]`` marks or weighs, ``[B, R]`` with zeros behind, and their weights, which
    sum to one. ``most`` of them, if that is known."""
    m, marks = asking.shape[1], asking > 0
    most = max(int(marks.sum(1).max()), 1) if most is None else most
    rows = torch.where(marks, torch.arange(m, device=asking.device), m).sort(1).values[:, :most]
    at = torch.where(rows < m, rows, 0)
    weight = asking.float().gather(1, at) * (rows < m)
    total = weight.sum(1, keepdim=True)
    return at, weight / torch.where(total > 0, total, 1)
