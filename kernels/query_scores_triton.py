"""query_scores on a GPU: one pass over the keys for every row's softmax sum, one for the mean of the probabilities. The
query heads of a group are rows of the group's key head, so that every key is read once for all of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import bucket, empty, launch, op, tuned, upcast

CONFIGS = [({"BN": 16}, 4, 2), ({"BN": 32}, 4, 2), ({"BN": 64}, 4, 2), ({"BN": 128}, 4, 2)]


@triton.jit
def _logits(
    q, k, cos, sin, seen, bias, m, m_ok, n, n_ok, R, N, D, scale, cap,
    stride_qm, stride_kn, stride_kd, stride_cn, stride_sr,
    SEEN: tl.constexpr, BIAS: tl.constexpr, ROTARY: tl.constexpr,
    CAP: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logits of rows ``m`` ``[BR]`` and keys ``n`` ``[BN]``; what a row does not see is -inf. With ROTARY, BD is half a
    head."""
    d = tl.arange(0, BD)
    width = D // 2 if ROTARY else D
    d_ok = d < width
    a = tl.load(q + m[:, None] * stride_qm + d[None, :], mask=m_ok[:, None] & d_ok[None, :], other=0.0)
    key = tl.load(k + n[None, :] * stride_kn + d[:, None] * stride_kd, mask=n_ok[None, :] & d_ok[:, None], other=0.0)
    if ROTARY:
        a2 = tl.load(q + m[:, None] * stride_qm + (d + width)[None, :], mask=m_ok[:, None] & d_ok[None, :], other=0.0)
        first = key.to(tl.float32)
        second = tl.load(
            k + n[None, :] * stride_kn + (d + width)[:, None] * stride_kd, mask=n_ok[None, :] & d_ok[:, None], other=0.0
        ).to(tl.float32)
        both = n_ok[None, :] & d_ok[:, None]
        at = n[None, :] * stride_cn + d[:, None]
        c1, s1 = (
            tl.load(cos + at, mask=both, other=0.0).to(tl.float32),
            tl.load(sin + at, mask=both, other=0.0).to(tl.float32),
        )
        c2, s2 = (
            tl.load(cos + at + width, mask=both, other=0.0).to(tl.float32),
            tl.load(sin + at + width, mask=both, other=0.0).to(tl.float32),
        )
        s = tl.dot(a.to(tl.float32), first * c1 - second * s1, input_precision="ieee")
        s = tl.dot(a2.to(tl.float32), second * c2 + first * s2, s, input_precision="ieee")
    elif UPCAST:
        s = tl.dot(a.to(tl.float32), key.to(tl.float32), input_precision="ieee")
    else:
        s = tl.dot(a, key)
    s *= scale
    if CAP:
        e = tl.exp(-2.0 * tl.abs(s / cap))  # tanh without overflow
        s = tl.where(s < 0, -cap, cap) * (1.0 - e) / (1.0 + e)
    if BIAS:
        s += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    ok = m_ok[:, None] & n_ok[None, :]
    if SEEN:
        row = m % R
        ok = ok & (tl.load(seen + row[:, None] * stride_sr + n[None, :], mask=ok, other=0) != 0)
    return tl.where(ok, s, float("-inf"))


@tuned(CONFIGS, key=["LENGTH", "ROWS", "D"])
@triton.jit
def _sums(
    q, k, cos, sin, seen, bias, top, total, G, ROWS, R, N, D, scale, cap, stride_kb,
    stride_kg, stride_kn, stride_kd, stride_cb, stride_cn, stride_sb,
    stride_sr, LENGTH, SEEN: tl.constexpr, BIAS: tl.constexpr, ROTARY: tl.constexpr,
    CAP: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Per row the largest logit and the sum of exponentials. Program (block of rows, key head, image)."""
    b, g = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BR + tl.arange(0, BR)
    high = tl.full((BR,), float("-inf"), dtype=tl.float32)
    sum_ = tl.zeros((BR,), dtype=tl.float32)
    for n0 in range(0, N, BN):
        n = (n0 + tl.arange(0, BN)).to(tl.int64)
        s = _logits(
            q + (b * G + g) * ROWS * D, k + b * stride_kb + g * stride_kg, cos + b * stride_cb,
            sin + b * stride_cb, seen + b * stride_sb, bias + b * N,
            m, m < ROWS, n, n < N, R, N, D, scale, cap, D, stride_kn, stride_kd,
            stride_cn, stride_sr, SEEN, BIAS, ROTARY, CAP, BD, UPCAST,
        )  # fmt: skip
        new = tl.maximum(high, tl.max(s, axis=1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        sum_ = sum_ * tl.exp(high - safe) + tl.sum(tl.exp(s - safe[:, None]), axis=1)
        high = new
    at = (b * G + g) * ROWS + m
    tl.store(top + at, tl.where(high == float("-inf"), 0.0, high), mask=m < ROWS)
    tl.store(total + at, tl.where(sum_ == 0.0, 1.0, sum_), mask=m < ROWS)


@tuned(CONFIGS, key=["LENGTH", "ROWS", "D"])
@triton.jit
def _means(
    q, k, cos, sin, seen, bias, top, total, weight, out, H, G, ROWS, R, N, D, scale,
    cap, stride_kb, stride_kg, stride_kn, stride_kd, stride_cb, stride_cn,
    stride_sb, stride_sr, LENGTH, SEEN: tl.constexpr, BIAS: tl.constexpr,
    ROTARY: tl.constexpr, CAP: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The mean of the probabilities. Program (block of keys, image)."""
    b = tl.program_id(1).to(tl.int64)
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    mean = tl.zeros((BN,), dtype=tl.float32)
    for g in range(0, G):
        for m0 in range(0, ROWS, BR):
            m = m0 + tl.arange(0, BR)
            s = _logits(
                q + (b * G + g) * ROWS * D, k + b * stride_kb + g * stride_kg, cos + b * stride_cb,
                sin + b * stride_cb, seen + b * stride_sb, bias + b * N,
                m, m < ROWS, n, n < N, R, N, D, scale, cap, D, stride_kn, stride_kd,
                stride_cn, stride_sr, SEEN, BIAS, ROTARY, CAP, BD, UPCAST,
            )  # fmt: skip
            at = (b * G + g) * ROWS + m
            high = tl.load(top + at, mask=m < ROWS, other=0.0)
            sum_ = tl.load(total + at, mask=m < ROWS, other=1.0)
            w = tl.load(weight + b * R + m % R, mask=m < ROWS, other=0.0)
            mean += tl.sum(tl.exp(s - high[:, None]) * (w / sum_)[:, None], axis=0)
    tl.store(out + b * N + n, mean / H, mask=n < N)


@op("query_scores")
def query_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    weight: Tensor,
    seen: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cap: float | None,
) -> Tensor:
    b, h, r, d = q.shape
    g, n = k.shape[1:3]
    out = empty(q, b, n)
    if not b or not n:
        return out
    rows = h // g * r
    q = q.contiguous()
    weight = weight.float().contiguous()
    marks = q if seen is None else seen.contiguous().view(torch.uint8)
    extra = q if bias is None else bias.contiguous()
    tables = (q, q) if cos is None or sin is None else (cos.contiguous(), sin.contiguous())
    batched = cos is not None and cos.shape[0] > 1
    top, total = empty(q, b, h * r), empty(q, b, h * r)
    strides = (
        *k.stride(),
        n * d if batched else 0,
        d,
        0 if seen is None else seen.shape[1] * n,
        n if seen is not None and seen.shape[1] > 1 else 0,
    )
    width = d if cos is None else d // 2
    # tiles of both operands share what memory a program has
    block = min(64 if width <= 64 else 16, max(16, triton.next_power_of_2(rows)))
    shared = dict(
        SEEN=seen is not None, BIAS=bias is not None, ROTARY=cos is not None,
        CAP=cap is not None, BD=max(16, triton.next_power_of_2(width)),
        UPCAST=upcast(q), BR=block, sizes={"BN": 128},
    )  # fmt: skip
    limit = 1.0 if cap is None else cap
    launch(
        _sums, (triton.cdiv(rows, block), g, b), q, k, *tables, marks, extra, top, total,
        g, rows, r, n, d, scale, limit, *strides, bucket(n), **shared,
    )  # fmt: skip
    launch(
        _means, lambda meta: (triton.cdiv(n, meta["BN"]), b), q, k, *tables, marks,
        extra, top, total, weight, out, h, g, rows, r, n, d, scale, limit,
        *strides, bucket(n), **shared,
    )  # fmt: skip
    return out
