"""maxmin on a GPU: one program an image runs all steps. Up to a size all similarities are made before; beyond, each
step makes its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import INTERPRETED, NOWHERE, TIE, cosine_tile, earlier, empty, inverse_lengths, launch, op, upcast
from .energy_triton import energy
from .maxmin_ref import small


@triton.jit
def _gram(
    x, inverse, out, N, C, stride_b, stride_n, stride_c, UPCAST: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    b = tl.program_id(2).to(tl.int64)
    i = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    j = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    inverse += b * N
    i_length = tl.load(inverse + i, mask=i < N, other=0.0)
    s = cosine_tile(x + b * stride_b, inverse, i, i < N, i_length, j, j < N, C, stride_n, stride_c, BM, BM, BC, UPCAST)
    tl.store(out + (b * N + i)[:, None] * N + j[None, :], s, mask=(i < N)[:, None] & (j < N)[None, :])


def similarities(x: Tensor, inverse: Tensor, made: bool) -> Tensor | None:
    """All cosines ``[B, N, N]``, or ``None`` if they are not to be made."""
    b, n, c = x.shape
    if not made:
        return None
    out = empty(x, b, n, n)
    block, depth = (256, 256) if INTERPRETED else (64, 64)
    launch(
        _gram,
        (triton.cdiv(n, block), triton.cdiv(n, block), b),
        x,
        inverse,
        out,
        n,
        c,
        *x.stride(),
        UPCAST=upcast(x),
        BM=block,
        BC=depth,
        sizes={},
    )
    return out


@triton.jit
def cosines(
    x,
    inverse,
    gram,
    n,
    n_ok,
    pick,
    length,
    N,
    C,
    stride_n,
    stride_c,
    BN: tl.constexpr,
    BC: tl.constexpr,
    MADE: tl.constexpr,
):
    """Similarities of tokens ``n`` ``[BN]`` with token ``pick``, from the matrix or made here."""
    if MADE:
        return tl.load(gram + pick * N + n, mask=n_ok, other=0.0)
    s = tl.zeros((BN,), dtype=tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        row = tl.load(x + pick * stride_n + c * stride_c, mask=c < C, other=0.0).to(tl.float32)
        tile = tl.load(
            x + n[:, None] * stride_n + c[None, :] * stride_c, mask=n_ok[:, None] & (c < C)[None, :], other=0.0
        ).to(tl.float32)
        s += tl.sum(tile * row[None, :], axis=1)
    s *= length * tl.load(inverse + n, mask=n_ok, other=0.0)
    return tl.where(s == s, s, 0.0)


@triton.jit
def _nearest_none(near, N, BN: tl.constexpr):
    """The first of the tokens with the lowest similarity ``near`` ``[N]``, up to ``EQUAL``; -1 if all are infinite."""
    lowest = tl.zeros((), dtype=tl.float32) + float("inf")
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        lowest = tl.minimum(lowest, tl.min(tl.load(near + n, mask=n < N, other=float("inf")), axis=0))
    pick = tl.full((), NOWHERE, dtype=tl.int64)
    for n0 in range(0, N, BN):
        n = (n0 + tl.arange(0, BN)).to(tl.int64)
        s = tl.load(near + n, mask=n < N, other=float("inf"))
        pick = earlier(pick, (s <= lowest + TIE) & (s < float("inf")), n)
    return tl.where(pick < N, pick, -1)


@triton.jit
def _maxmin(
    x, inverse, gram, nearest, near, out, N, C, KEEP,
    stride_b, stride_n, stride_c, MADE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """``near`` ``[B, N]``: similarity with the nearest chosen token, +inf for what is chosen or no token."""
    b = tl.program_id(0).to(tl.int64)
    x += b * stride_b
    inverse += b * N
    gram += b * N * N
    near += b * N
    pick = _nearest_none(nearest + b * N, N, BN)
    for step in range(0, KEEP):
        tl.store(out + b * KEEP + step, pick)
        chosen = tl.maximum(pick, 0)
        length = tl.load(inverse + chosen)
        for n0 in range(0, N, BN):
            n = (n0 + tl.arange(0, BN)).to(tl.int64)
            s = cosines(x, inverse, gram, n, n < N, chosen, length, N, C, stride_n, stride_c, BN, BC, MADE)
            s = tl.maximum(tl.load(near + n, mask=n < N, other=float("inf")), s)
            s = tl.where(n == pick, float("inf"), s)
            tl.store(near + n, s, mask=n < N)
        tl.debug_barrier()  # what follows reads what other threads wrote
        pick = _nearest_none(near, N, BN)


def steps(made: bool) -> dict[str, int]:
    """Tile of one step: of made similarities a long vector, else rows of the tokens."""
    if INTERPRETED:
        return {"BN": 1024, "BC": 256}
    return {"BN": 1024, "BC": 16} if made else {"BN": 128, "BC": 64}


@op("maxmin")
def maxmin(x: Tensor, keep: int, valid: Tensor | None) -> Tensor:
    b, n, c = x.shape
    out = empty(x, b, keep, dtype=torch.int64)
    if not b or not keep:
        return out
    if not n:
        return out.fill_(-1)
    nearest = energy(x, "nearest", 0.0, 1.0, 1, valid, False)
    near = torch.full((b, n), -torch.inf, device=x.device)
    if valid is not None:
        nearest, near = nearest.masked_fill(~valid, torch.inf), near.masked_fill(~valid, torch.inf)
    inverse = inverse_lengths(x)
    gram = similarities(x, inverse, small(n, c))
    made = gram is not None
    launch(
        _maxmin, (b,), x, inverse, inverse if gram is None else gram, nearest,
        near, out, n, c, keep, *x.stride(), MADE=made,
        **steps(made), sizes={},
    )  # fmt: skip
    return out
