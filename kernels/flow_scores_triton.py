"""flow_scores on a GPU: one pass over keys and values for the two softmax sums, one for the three results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import bucket, empty, launch, op, tuned

CONFIGS = [({"BN": 32}, 4, 2), ({"BN": 64}, 4, 2), ({"BN": 128}, 4, 2)]


@triton.jit
def _logits(x, vector, mark, n, n_ok, d, d_ok, scale, stride_n, stride_d, BIAS: tl.constexpr, SEEN: tl.constexpr):
    """``x_n . vector * scale`` ``[BN]`` and the rows ``[BN, BD]``; ``mark`` is added (BIAS) or says what is seen
    (SEEN)."""
    rows = tl.load(x + n[:, None] * stride_n + d[None, :] * stride_d, mask=n_ok[:, None] & d_ok[None, :], other=0.0).to(
        tl.float32
    )
    s = tl.sum(rows * vector[None, :], axis=1) * scale
    ok = n_ok
    if BIAS:
        s += tl.load(mark + n, mask=n_ok, other=0.0).to(tl.float32)
    if SEEN:
        ok = ok & (tl.load(mark + n, mask=n_ok, other=0) != 0)
    return tl.where(ok, s, float("-inf")), rows


@triton.jit
def _online(s, high, sum_):
    """One more tile of logits for a running maximum and sum of exponentials."""
    new = tl.maximum(high, tl.max(s, axis=0))
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, sum_ * tl.exp(high - safe) + tl.sum(tl.exp(s - safe), axis=0)


@tuned(CONFIGS, key=["LENGTH", "D"])
@triton.jit
def _sums(
    query, value, k, v, bias, value_seen, sums, H, N, D, scale, value_scale, kb, kh, kn, kd, vb, vh, vn, vd,
    LENGTH, BIAS: tl.constexpr, VALUE_SEEN: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    d_ok = d < D
    q_row = tl.load(query + (b * H + h) * D + d, mask=d_ok, other=0.0).to(tl.float32)
    v_row = tl.load(value + (b * H + h) * D + d, mask=d_ok, other=0.0).to(tl.float32)
    high = tl.zeros((), dtype=tl.float32) + float("-inf")
    v_high = tl.zeros((), dtype=tl.float32) + float("-inf")
    sum_ = tl.zeros((), dtype=tl.float32)
    v_sum = tl.zeros((), dtype=tl.float32)
    for n0 in range(0, N, BN):
        n = (n0 + tl.arange(0, BN)).to(tl.int64)
        s, _ = _logits(k + b * kb + h * kh, q_row, bias + b * N, n, n < N, d, d_ok, scale, kn, kd, BIAS, False)
        high, sum_ = _online(s, high, sum_)
        s, _ = _logits(
            v + b * vb + h * vh, v_row, value_seen + b * N, n, n < N, d, d_ok, value_scale, vn, vd, False, VALUE_SEEN
        )
        v_high, v_sum = _online(s, v_high, v_sum)
    at = sums + (b * H + h) * 4
    tl.store(at, tl.where(high == float("-inf"), 0.0, high))
    tl.store(at + 1, tl.where(sum_ == 0.0, 1.0, sum_))
    tl.store(at + 2, tl.where(v_high == float("-inf"), 0.0, v_high))
    tl.store(at + 3, tl.where(v_sum == 0.0, 1.0, v_sum))


@tuned(CONFIGS, key=["LENGTH", "D"])
@triton.jit
def _scores(
    query, value, k, v, bias, value_seen, sums, attention, similarity, strength,
    H, N, D, scale, value_scale, kb, kh, kn, kd, vb, vh, vn, vd,
    LENGTH, BIAS: tl.constexpr, VALUE_SEEN: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    d = tl.arange(0, BD)
    d_ok = d < D
    attended = tl.zeros((BN,), dtype=tl.float32)
    similar = tl.zeros((BN,), dtype=tl.float32)
    mean = tl.zeros((BN, BD), dtype=tl.float32)
    for h in range(0, H):
        q_row = tl.load(query + (b * H + h) * D + d, mask=d_ok, other=0.0).to(tl.float32)
        v_row = tl.load(value + (b * H + h) * D + d, mask=d_ok, other=0.0).to(tl.float32)
        at = sums + (b * H + h) * 4
        s, _ = _logits(k + b * kb + h * kh, q_row, bias + b * N, n, n < N, d, d_ok, scale, kn, kd, BIAS, False)
        attended += tl.exp(s - tl.load(at)) / tl.load(at + 1)
        s, rows = _logits(
            v + b * vb + h * vh, v_row, value_seen + b * N, n, n < N, d, d_ok, value_scale, vn, vd, False, VALUE_SEEN
        )
        similar += tl.exp(s - tl.load(at + 2)) / tl.load(at + 3)
        mean += rows
    tl.store(attention + b * N + n, attended / H, mask=n < N)
    tl.store(similarity + b * N + n, similar / H, mask=n < N)
    tl.store(strength + b * N + n, tl.sum(tl.abs(mean), axis=1) / H, mask=n < N)


@op("flow_scores")
def flow_scores(
    query: Tensor,
    value: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    value_scale: float,
    bias: Tensor | None,
    value_seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, d = k.shape
    attention, similarity, strength = (empty(k, b, n) for _ in range(3))
    if b and n:
        query, value = query.contiguous(), value.contiguous()
        marks = [
            query if bias is None else bias.contiguous(),
            query if value_seen is None else value_seen.contiguous().view(torch.uint8),
        ]
        sums = empty(k, b, h, 4)
        tail = (h, n, d, scale, value_scale, *k.stride(), *v.stride(), bucket(n))
        flags = dict(
            BIAS=bias is not None,
            VALUE_SEEN=value_seen is not None,
            BD=max(16, triton.next_power_of_2(d)),
            sizes={"BN": 128},
        )
        launch(_sums, (h, b), query, value, k, v, *marks, sums, *tail, **flags)
        launch(
            _scores, lambda meta: (triton.cdiv(n, meta["BN"]), b), query, value, k, v, *marks,
            sums, attention, similarity, strength, *tail, **flags
        )  # fmt: skip
    return attention, similarity, strength
