"""gather on a GPU: a program copies one block of rows of up to four tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import INTERPRETED, launch, op


@triton.jit
def _copy(x, out, b, rows, k, ok, W, K, N, stride_b, stride_n, stride_w, BW: tl.constexpr):
    for w0 in range(0, W, BW):
        w = w0 + tl.arange(0, BW)
        w_ok = (w < W)[None, :]
        row = tl.load(
            x + b * stride_b + rows[:, None] * stride_n + w[None, :] * stride_w,
            mask=(ok & (rows >= 0) & (rows < N))[:, None] & w_ok,
            other=0,
        )
        tl.store(out + (b * K + k)[:, None] * W + w[None, :], row, mask=ok[:, None] & w_ok)


@triton.jit
def _gather(
    index, x0, x1, x2, x3, out0, out1, out2, out3, K, N, W0, W1, W2, W3, b0, n0, w0,
    b1, n1, w1, b2, n2, w2, b3, n3, w3, COUNT: tl.constexpr, BK: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    k = (tl.program_id(0) * BK + tl.arange(0, BK)).to(tl.int64)
    ok = k < K
    rows = tl.load(index + b * K + k, mask=ok, other=-1)
    _copy(x0, out0, b, rows, k, ok, W0, K, N, b0, n0, w0, BW)
    if COUNT > 1:
        _copy(x1, out1, b, rows, k, ok, W1, K, N, b1, n1, w1, BW)
    if COUNT > 2:
        _copy(x2, out2, b, rows, k, ok, W2, K, N, b2, n2, w2, BW)
    if COUNT > 3:
        _copy(x3, out3, b, rows, k, ok, W3, K, N, b3, n3, w3, BW)


@op("gather")
def gather(index: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    b, k = index.shape
    index = index.contiguous()
    gathered = []
    for i in range(0, len(tensors), 4):
        part = tensors[i : i + 4]
        # Bools travel as bytes; one row is one vector of numbers.
        flat = [_bytes(t).flatten(2) if t.ndim > 2 else _bytes(t)[..., None] for t in part]
        outs = [torch.empty((b, k, t.shape[2]), dtype=t.dtype, device=t.device) for t in flat]
        if b and k:
            block = 128 if INTERPRETED else 8
            more, n = 4 - len(flat), flat[0].shape[1]
            strides = [s for t in flat for s in (0 if t.shape[0] == 1 else t.stride(0), t.stride(1), t.stride(2))]
            launch(
                _gather, (triton.cdiv(k, block), b), index, *flat, *[flat[0]] * more, *outs, *[outs[0]] * more, k, n,
                *[t.shape[2] for t in flat], *[0] * more,
                *strides, *[0] * 3 * more, COUNT=len(flat), BK=block, BW=128, sizes={},
            )  # fmt: skip
        for t, out in zip(part, outs, strict=True):
            shaped = out.view(b, k, *t.shape[2:])
            gathered.append(shaped.view(torch.bool) if t.dtype == torch.bool else shaped)
    return gathered


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype == torch.bool else t
