"""energy on a GPU: a tile of similarities at a time, reduced as it is made."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import SIZES, TILES, bucket, cosine_tile, empty, inverse_lengths, launch, op, tuned, upcast
from .energy_ref import FUNCTIONS

ELU, JUMP, ABOVE, EXP, NEAREST = (tl.constexpr(i) for i in range(len(FUNCTIONS)))


@tuned(TILES, key=["LENGTH", "C", "FUNCTION"])
@triton.jit
def _energy(
    x, inverse, valid, out, N, C, stride_b, stride_n, stride_c, margin, alpha,
    LENGTH, FUNCTION: tl.constexpr, VALID: tl.constexpr, ITSELF: tl.constexpr,
    TOP: tl.constexpr, SLOTS: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    x += b * stride_b
    inverse += b * N
    i = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    i_ok = i < N
    i_length = tl.load(inverse + i, mask=i_ok, other=0.0)
    total = tl.zeros((BM,), dtype=tl.float32)
    count = tl.zeros((BM,), dtype=tl.float32)
    slot = tl.arange(0, SLOTS)
    best = tl.where((slot < TOP)[None, :], float("-inf"), float("inf")) + tl.zeros((BM, SLOTS), dtype=tl.float32)
    for j0 in range(0, N, BN):
        j = (j0 + tl.arange(0, BN)).to(tl.int64)
        j_ok = j < N
        s = cosine_tile(x, inverse, i, i_ok, i_length, j, j_ok, C, stride_n, stride_c, BM, BN, BC, UPCAST)
        if VALID:
            j_ok = j_ok & (tl.load(valid + b * N + j, mask=j_ok, other=0) != 0)
        seen = j_ok[None, :] & i_ok[:, None]
        if not ITSELF:
            seen = seen & (i[:, None] != j[None, :])
        if FUNCTION == NEAREST:
            s = tl.where(seen, s, float("-inf"))
            for _ in tl.static_range(TOP):  # the tile's largest replaces the smallest of the best, TOP times
                top = tl.max(s, axis=1)
                at = tl.argmax(s, axis=1, tie_break_left=True)
                s = tl.where(tl.arange(0, BN)[None, :] == at[:, None], float("-inf"), s)
                least = tl.min(best, axis=1)
                weakest = tl.argmin(best, axis=1, tie_break_left=True)
                best = tl.where((slot[None, :] == weakest[:, None]) & (top > least)[:, None], top[:, None], best)
        else:
            if FUNCTION == ABOVE:
                f = tl.where(s >= margin, 1.0, 0.0)
            elif FUNCTION == EXP:
                f = tl.exp((s - margin) / alpha)
            elif FUNCTION == ELU:
                f = tl.where(s > margin, s - margin, alpha * (tl.exp(s - margin) - 1.0))
            else:
                f = tl.where(s >= margin, s, alpha * (tl.exp(s - margin) - 1.0))
            total += tl.sum(tl.where(seen, f, 0.0), axis=1)
            count += tl.sum(tl.where(seen, 1.0, 0.0), axis=1)
    if FUNCTION == NEAREST:
        present = (best > float("-inf")) & (slot < TOP)[None, :]
        count = tl.sum(tl.where(present, 1.0, 0.0), axis=1)
        total = tl.where(
            count > 0, tl.sum(tl.where(present, best, 0.0), axis=1) / tl.where(count > 0, count, 1.0), float("-inf")
        )
    elif FUNCTION != ABOVE:
        total = total / tl.where(count > 0, count, 1.0)
    if VALID:
        total = tl.where(tl.load(valid + b * N + i, mask=i_ok, other=0) != 0, total, 0.0)
    tl.store(out + b * N + i, total, mask=i_ok)


@op("energy")
def energy(
    x: Tensor, function: str, margin: float, alpha: float, nearest: int, valid: Tensor | None, itself: bool
) -> Tensor:
    b, n, c = x.shape
    out = empty(x, b, n)
    if b and n:
        marks = None if valid is None else valid.contiguous().view(torch.uint8)
        launch(
            _energy, lambda meta: (triton.cdiv(n, meta["BM"]), b), x, inverse_lengths(x),
            marks, out, n, c, *x.stride(), margin, alpha, bucket(n),
            FUNCTION=FUNCTIONS.index(function), VALID=marks is not None, ITSELF=itself,
            TOP=nearest, SLOTS=triton.next_power_of_2(nearest),
            UPCAST=upcast(x), sizes=SIZES,
        )  # fmt: skip
    return out
