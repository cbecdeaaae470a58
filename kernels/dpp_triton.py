"""dpp on a GPU: one program an image runs all steps; see maxmin."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import NOWHERE, TIE, earlier, empty, inverse_lengths, launch, op
from .dpp_ref import LEAST, share
from .maxmin_ref import small
from .maxmin_triton import cosines, similarities, steps

NONE = tl.constexpr(LEAST)


@triton.jit
def _ranks(gain, relevance, n0, N, any_left, BN: tl.constexpr):
    """What tokens ``n`` ``[BN]`` from ``n0`` on are ranked by, within which difference they tie, and ``n``.
    ``any_left``: fewer are chosen than there are channels; behind that a gain is rounding."""
    n = (n0 + tl.arange(0, BN)).to(tl.int64)
    g = tl.load(gain + n, mask=n < N, other=float("-inf"))
    r = tl.load(relevance + n, mask=n < N, other=0.0)
    useful = (g > r * r * NONE) & any_left
    rank = tl.where(useful, g, tl.abs(r) - 2.0)
    return tl.where(g == float("-inf"), float("-inf"), rank), tl.where(useful, r * r * TIE, TIE), n


@triton.jit
def _dpp(
    x, inverse, gram, relevance, gain, factor, out, N, C, KEEP, stride_b, stride_n,
    stride_c, MADE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """``gain`` ``[B, N]``: what each token adds to the volume, -inf for what is chosen or no token; ``factor`` ``[B, K,
    N]``: rows of the Cholesky factor."""
    b = tl.program_id(0).to(tl.int64)
    x += b * stride_b
    inverse += b * N
    gram += b * N * N
    relevance += b * N
    gain += b * N
    factor += b * KEEP * N
    for step in range(0, KEEP):
        best = tl.zeros((), dtype=tl.float32) + float("-inf")
        for n0 in range(0, N, BN):
            rank, _, _ = _ranks(gain, relevance, n0, N, step < C, BN)
            best = tl.maximum(best, tl.max(rank, axis=0))
        pick = tl.full((), NOWHERE, dtype=tl.int64)
        for n0 in range(0, N, BN):
            rank, slack, n = _ranks(gain, relevance, n0, N, step < C, BN)
            pick = earlier(pick, (rank + slack >= best) & (rank > float("-inf")), n)
        pick = tl.where(pick < N, pick, -1)
        tl.store(out + b * KEEP + step, pick)
        chosen = tl.maximum(pick, 0)
        length, r_pick, g_pick = tl.load(inverse + chosen), tl.load(relevance + chosen), tl.load(gain + chosen)
        # the constant last: triton 3.8 makes a constant of the product otherwise
        useful = (g_pick > r_pick * r_pick * NONE) & (step < C)
        root = tl.sqrt(tl.where(useful, g_pick, 1.0))
        tl.debug_barrier()  # everybody has read the gain before it changes
        for n0 in range(0, N, BN):
            n = (n0 + tl.arange(0, BN)).to(tl.int64)
            r = tl.load(relevance + n, mask=n < N, other=0.0)
            line = (
                cosines(x, inverse, gram, n, n < N, chosen, length, N, C, stride_n, stride_c, BN, BC, MADE) * r * r_pick
            )
            for t0 in range(0, step, BT):
                t = (t0 + tl.arange(0, BT)).to(tl.int64)
                mine = tl.load(factor + t * N + chosen, mask=t < step, other=0.0)
                theirs = tl.load(
                    factor + t[:, None] * N + n[None, :], mask=(t < step)[:, None] & (n < N)[None, :], other=0.0
                )
                line -= tl.sum(mine[:, None] * theirs, axis=0)
            line = tl.where(useful, line / root, 0.0)
            tl.store(factor + step * N + n, line, mask=n < N)
            g = tl.load(gain + n, mask=n < N, other=0.0)
            tl.store(gain + n, tl.where((n == pick) | (g == float("-inf")), float("-inf"), g - line * line), mask=n < N)
        tl.debug_barrier()  # the next step reads what other threads wrote


@op("dpp")
def dpp(x: Tensor, keep: int, relevance: Tensor | None, valid: Tensor | None) -> Tensor:
    b, n, c = x.shape
    out = empty(x, b, keep, dtype=torch.int64)
    if not b or not keep:
        return out
    if not n:
        return out.fill_(-1)
    r = torch.ones(b, n, device=x.device) if relevance is None else share(relevance.float(), valid).contiguous()
    gain = r.square()
    if valid is not None:
        gain = gain.masked_fill(~valid, -torch.inf)
    inverse = inverse_lengths(x)
    gram = similarities(x, inverse, small(n, c))
    made = gram is not None
    factor = empty(x, b, keep, n)
    launch(
        _dpp, (b,), x, inverse, inverse if gram is None else gram, r, gain,
        factor, out, n, c, keep, *x.stride(), MADE=made,
        **steps(made), BT=8, sizes={},
    )  # fmt: skip
    return out
