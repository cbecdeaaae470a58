"""merge on a GPU: tokens sorted by slot, one program per block of slots; no atomics, so that the sum is the same each
time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import INTERPRETED, launch, op


@triton.jit
def _merge(
    x, order, start, weight, size, out, sizes, N, K, C, stride_b, stride_n, stride_c, BK: tl.constexpr, BC: tl.constexpr
):
    b = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = k < K
    first = tl.load(start + b * (K + 1) + k, mask=ok, other=0)
    count = tl.load(start + b * (K + 1) + k + 1, mask=ok, other=0) - first
    mass = tl.zeros((BK,), dtype=tl.float32)
    held = tl.zeros((BK,), dtype=tl.float32)
    total = tl.zeros((BK, BC), dtype=tl.float32)
    for i in range(0, tl.max(count, axis=0)):  # the i-th member of every slot
        member = i < count
        n = tl.load(order + b * N + first + i, mask=member, other=0)
        w = tl.load(weight + b * N + n, mask=member, other=0.0).to(tl.float32)
        mass += w
        held += tl.load(size + b * N + n, mask=member, other=0.0).to(tl.float32)
        rows = tl.load(
            x + b * stride_b + n[:, None] * stride_n + c[None, :] * stride_c,
            mask=member[:, None] & (c < C)[None, :],
            other=0.0,
        )
        total += rows.to(tl.float32) * w[:, None]
    mean = total * tl.where(mass > 0, 1.0 / tl.where(mass > 0, mass, 1.0), 0.0)[:, None]
    at = (b * K + k).to(tl.int64)
    tl.store(out + at[:, None] * C + c[None, :], mean.to(out.dtype.element_ty), mask=ok[:, None] & (c < C)[None, :])
    if tl.program_id(1) == 0:
        tl.store(sizes + at, held, mask=ok)


@op("merge")
def merge(x: Tensor, target: Tensor, slots: int, weight: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    b, n, c = x.shape
    out = torch.empty((b, slots, c), dtype=x.dtype, device=x.device)
    sizes = torch.empty((b, slots), dtype=size.dtype, device=x.device)
    if b and slots:
        ordered, order = target.sort(dim=1, stable=True)
        start = torch.searchsorted(ordered, torch.arange(slots + 1, device=x.device).expand(b, -1).contiguous())
        block, width = (128, 256) if INTERPRETED else (8, 128)
        launch(
            _merge, (triton.cdiv(slots, block), triton.cdiv(c, width), b), x, order, start,
            weight.contiguous(), size.contiguous(), out, sizes, n, slots, c,
            *x.stride(), BK=block, BC=width, sizes={},
        )  # fmt: skip
    return out, sizes
