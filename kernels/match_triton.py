"""match on a GPU: a tile of similarities at a time, running maximum and its index in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import SIZES, TILES, bucket, cosine_tile, empty, inverse_lengths, launch, op, tuned, upcast


@tuned(TILES, key=["LENGTH", "C"])
@triton.jit
def _match(
    x, inverse, sources, targets, protected, penalty, score, index, N, M, K, C, stride_b, stride_n, stride_c,
    LENGTH, PROTECTED: tl.constexpr, PENALTY: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    x += b * stride_b
    inverse += b * N
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i = tl.load(sources + b * M + m, mask=m < M, other=-1)
    i_ok = i >= 0
    if PROTECTED:
        i_ok = i_ok & (tl.load(protected + b * N + i, mask=i_ok, other=1) == 0)
    i_length = tl.load(inverse + i, mask=i_ok, other=0.0)
    best = tl.full((BM,), float("-inf"), dtype=tl.float32)
    where = tl.full((BM,), -1, dtype=tl.int32)
    for k0 in range(0, K, BN):
        k = k0 + tl.arange(0, BN)
        j = tl.load(targets + b * K + k, mask=k < K, other=-1)
        j_ok = j >= 0
        if PROTECTED:
            j_ok = j_ok & (tl.load(protected + b * N + j, mask=j_ok, other=1) == 0)
        s = cosine_tile(x, inverse, i, i_ok, i_length, j, j_ok, C, stride_n, stride_c, BM, BN, BC, UPCAST)
        if PENALTY:
            s -= tl.load(penalty + b * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        s = tl.where(j_ok[None, :], s, float("-inf"))
        top = tl.max(s, axis=1)
        at = tl.argmax(s, axis=1, tie_break_left=True) + k0
        better = top > best  # not >=: ties go to the lower index
        best = tl.where(better, top, best)
        where = tl.where(better, at, where)
    tl.store(score + b * M + m, tl.where(i_ok, best, float("-inf")), mask=m < M)
    tl.store(index + b * M + m, tl.where(i_ok, where, -1).to(tl.int64), mask=m < M)


@op("match")
def match(
    x: Tensor, sources: Tensor, targets: Tensor, protected: Tensor | None, penalty: Tensor | None, padded: bool
) -> tuple[Tensor, Tensor]:
    b, n, c = x.shape
    sources, targets = sources.contiguous(), targets.contiguous()
    m, k = sources.shape[1], targets.shape[1]
    score, index = empty(x, b, m), empty(x, b, m, dtype=torch.int64)
    if b and m:
        marks = None if protected is None else protected.contiguous().view(torch.uint8)
        extra = None if penalty is None else penalty.contiguous()
        launch(
            _match, lambda meta: (triton.cdiv(m, meta["BM"]), b), x, inverse_lengths(x), sources,
            targets, marks, extra, score, index, n, m, k, c, *x.stride(),
            bucket(max(m, k)), PROTECTED=marks is not None, PENALTY=extra is not None, UPCAST=upcast(x), sizes=SIZES,
        )  # fmt: skip
    return score, index
