"""coverage on a GPU: a choice scores all tokens and lists what it covers better than before, then every token's gain
loses what it would have covered of that. Where all similarities are kept one program an image runs all steps; beyond,
each step is a launch of its own, so that many programs make similarities."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import INTERPRETED, NOWHERE, TIE, cosine_tile, earlier, empty, inverse_lengths, launch, op, upcast
from .coverage_ref import SCALES, held, noise
from .maxmin_triton import cosines, similarities

NONE, MEAN, RANGE = (tl.constexpr(i) for i in range(len(SCALES)))
LEAST = tl.constexpr(noise(torch.float32))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min / 2)


@triton.jit
def _curve(s, temperature, EXP: tl.constexpr):
    """What a similarity is worth."""
    return tl.exp((s - 1.0) / temperature) if EXP else s


@triton.jit
def _terms(gain, by, floor, n, N):
    """Gains and distances of tokens ``n`` ``[BN]``, what is rounding noise as 0, and which of them can be chosen."""
    g = tl.load(gain + n, mask=n < N, other=float("-inf"))
    far = 1.0 - tl.load(by + n, mask=n < N, other=0.0)
    return tl.where(g > floor, g, 0.0), tl.where(far > LEAST, far, 0.0), g > float("-inf")


@triton.jit
def _divisors(gain, by, floor, N, SCALE: tl.constexpr, BN: tl.constexpr):
    """Of gains and of distances: what is taken from them, and 1 / what they are divided by (0 instead of infinity)."""
    count = tl.zeros((), dtype=tl.float32)
    g_sum = tl.zeros((), dtype=tl.float32)
    far_sum = tl.zeros((), dtype=tl.float32)
    g_low = tl.zeros((), dtype=tl.float32) + float("inf")
    far_low = tl.zeros((), dtype=tl.float32) + float("inf")
    g_high = tl.zeros((), dtype=tl.float32)
    far_high = tl.zeros((), dtype=tl.float32)
    for n0 in range(0, N, BN):
        n = (n0 + tl.arange(0, BN)).to(tl.int64)
        g, far, free = _terms(gain, by, floor, n, N)
        count += tl.sum(tl.where(free, 1.0, 0.0), axis=0)
        g_sum += tl.sum(tl.where(free, g, 0.0), axis=0)
        far_sum += tl.sum(tl.where(free, far, 0.0), axis=0)
        g_low = tl.minimum(g_low, tl.min(tl.where(free, g, float("inf")), axis=0))
        far_low = tl.minimum(far_low, tl.min(tl.where(free, far, float("inf")), axis=0))
        g_high = tl.maximum(g_high, tl.max(tl.where(free, g, 0.0), axis=0))
        far_high = tl.maximum(far_high, tl.max(tl.where(free, far, 0.0), axis=0))
    if SCALE == MEAN:
        g_by, far_by = g_sum / tl.maximum(count, 1.0), far_sum / tl.maximum(count, 1.0)
        g_low, far_low = g_low * 0.0, far_low * 0.0
    else:
        g_by, far_by = g_high - g_low, far_high - far_low
        g_by, far_by = tl.where(g_by > g_high * TIE, g_by, 0.0), tl.where(far_by > TIE, far_by, 0.0)
    g_by = tl.where(g_by > 0, 1.0 / tl.where(g_by > 0, g_by, 1.0), 0.0)
    far_by = tl.where(far_by > 0, 1.0 / tl.where(far_by > 0, far_by, 1.0), 0.0)
    return g_low, g_by, far_low, far_by


@triton.jit
def _scores(
    gain, by, prior, relevance, floor, n, N, diversity, g_low, g_by, far_low, far_by,
    SEED: tl.constexpr, PRIOR: tl.constexpr, RELEVANCE: tl.constexpr, FAR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What tokens ``n`` ``[BN]`` are ranked by, -inf for what is chosen or no token."""
    g, far, free = _terms(gain, by, floor, n, N)
    score = tl.zeros((BN,), dtype=tl.float32)
    if RELEVANCE:
        score += tl.load(relevance + n, mask=n < N, other=0.0)
    if not SEED:
        worth = (g - g_low) * g_by
        if PRIOR:
            worth *= tl.load(prior + n, mask=n < N, other=0.0)
        score += worth
        if FAR:
            score += diversity * ((far - far_low) * far_by)
    score = tl.minimum(tl.where(score > LOWEST, score, LOWEST), -LOWEST)  # NaN too
    return tl.where(free, score, float("-inf"))


@triton.jit
def _best(
    gain, by, prior, relevance, floor, N, diversity,
    SEED: tl.constexpr, SCALE: tl.constexpr, PRIOR: tl.constexpr, RELEVANCE: tl.constexpr, FAR: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The token to choose next, the first of those that tie; -1 if there is none."""
    g_low, g_by, far_low, far_by = 0.0, 1.0, 0.0, 1.0
    if SCALE != NONE and not SEED:
        g_low, g_by, far_low, far_by = _divisors(gain, by, floor, N, SCALE, BN)
    best = tl.zeros((), dtype=tl.float32) + float("-inf")
    for n0 in range(0, N, BN):
        n = (n0 + tl.arange(0, BN)).to(tl.int64)
        score = _scores(
            gain, by, prior, relevance, floor, n, N, diversity, g_low, g_by, far_low, far_by,
            SEED, PRIOR, RELEVANCE, FAR, BN,
        )  # fmt: skip
        best = tl.maximum(best, tl.max(score, axis=0))
    least = best - TIE * tl.abs(best)
    pick = tl.full((), NOWHERE, dtype=tl.int64)
    for n0 in range(0, N, BN):
        n = (n0 + tl.arange(0, BN)).to(tl.int64)
        score = _scores(
            gain, by, prior, relevance, floor, n, N, diversity, g_low, g_by, far_low, far_by,
            SEED, PRIOR, RELEVANCE, FAR, BN,
        )  # fmt: skip
        pick = earlier(pick, (score >= least) & (score > float("-inf")), n)
    return tl.where(pick < N, pick, -1)


@triton.jit
def _raise(s, low, high, weight, changed, m, m_ok, count):
    """Things ``m`` ``[BN]``, of which the chosen token covers ``s``: how well they are covered now, ``high``, from
    ``low``; those that gained are appended to ``changed``, of which there are ``count`` so far."""
    before = tl.load(low + m, mask=m_ok, other=0.0)
    now = tl.maximum(before, s)
    tl.store(high + m, now, mask=m_ok)
    gained = m_ok & (now > before) & (tl.load(weight + m, mask=m_ok, other=0.0) > 0)
    one = gained.to(tl.int64)
    tl.store(changed + count + tl.cumsum(one, axis=0) - 1, m, mask=gained)
    return count + tl.sum(one, axis=0)


@triton.jit
def _choose(
    x, inverse, gram, rows, prior, relevance, floor, gain, low, high, weight, changed, counts, out,
    N, C, R, stride_n, stride_c, temperature, diversity,
    SEED: tl.constexpr, SCALE: tl.constexpr, PRIOR: tl.constexpr, RELEVANCE: tl.constexpr, FAR: tl.constexpr,
    EXP: tl.constexpr, MADE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One choice of one image. Of what is to be covered the N tokens come first, then the R rows; ``counts`` ``[2]`` of
    each, how many are covered better."""
    pick = _best(
        gain, low, prior, relevance, tl.load(floor), N, diversity, SEED, SCALE, PRIOR, RELEVANCE, FAR, BN
    )  # fmt: skip
    tl.store(out, pick)
    chosen = tl.maximum(pick, 0)
    length = tl.load(inverse + chosen)
    count = tl.zeros((), dtype=tl.int64)
    for n0 in range(0, N, BN):
        n = (n0 + tl.arange(0, BN)).to(tl.int64)
        s = cosines(x, inverse, gram, n, n < N, chosen, length, N, C, stride_n, stride_c, BN, BC, MADE)
        count = _raise(_curve(s, temperature, EXP), low, high, weight, changed, n, n < N, count)
    tl.store(counts, count)
    count = tl.zeros((), dtype=tl.int64)
    for r0 in range(0, R, BN):
        r = (r0 + tl.arange(0, BN)).to(tl.int64)
        s = tl.load(rows + r * N + chosen, mask=r < R, other=0.0)
        count = _raise(s, low + N, high + N, weight + N, changed + N, r, r < R, count)
    tl.store(counts + 1, count)
    tl.debug_barrier()  # everybody has read the gain
    tl.store(gain + chosen, float("-inf"))


@triton.jit
def _between(s, low, high, weight, u, u_ok):
    """``[BV]``: of what tokens cover of the things ``u`` ``[BU]``, ``s`` ``[BU, BV]``, the part between two levels."""
    a = tl.load(low + u, mask=u_ok, other=0.0)[:, None]
    z = tl.load(high + u, mask=u_ok, other=0.0)[:, None]
    w = tl.load(weight + u, mask=u_ok, other=0.0)[:, None]
    return tl.sum(w * (tl.minimum(tl.maximum(s, a), z) - a), axis=0)


@triton.jit
def _change(
    x, inverse, gram, rows, low, high, weight, changed, counts, v, N, C, stride_n, stride_c, temperature,
    EXP: tl.constexpr, MADE: tl.constexpr, UPCAST: tl.constexpr, BU: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``[BV]``: how much of its coverage each token ``v`` has between the levels, over all that ``changed``."""
    total = tl.zeros((BV,), dtype=tl.float32)
    count = tl.load(counts)
    for k0 in range(0, count, BU):
        k = k0 + tl.arange(0, BU)
        u = tl.load(changed + k, mask=k < count, other=0)
        if MADE:
            s = tl.load(gram + u[:, None] * N + v[None, :], mask=(k < count)[:, None] & (v < N)[None, :], other=0.0)
        else:
            length = tl.load(inverse + u, mask=k < count, other=0.0)
            s = cosine_tile(
                x, inverse, u, k < count, length, v, v < N, C, stride_n, stride_c, BU, BV, BC, UPCAST
            )  # fmt: skip
        total += _between(_curve(s, temperature, EXP), low, high, weight, u, k < count)
    count = tl.load(counts + 1)
    for k0 in range(0, count, BU):
        k = k0 + tl.arange(0, BU)
        r = tl.load(changed + N + k, mask=k < count, other=0)
        s = tl.load(rows + r[:, None] * N + v[None, :], mask=(k < count)[:, None] & (v < N)[None, :], other=0.0)
        total += _between(s, low + N, high + N, weight + N, r, k < count)
    return total


@triton.jit
def _one_choice(
    x, inverse, gram, rows, prior, relevance, floor, gain, by, weight, changed, counts, out,
    N, C, R, KEEP, step, stride_b, stride_n, stride_c, temperature, diversity,
    SEED: tl.constexpr, SCALE: tl.constexpr, PRIOR: tl.constexpr, RELEVANCE: tl.constexpr, FAR: tl.constexpr,
    EXP: tl.constexpr, MADE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    low, high = by + (2 * b + step % 2) * (N + R), by + (2 * b + (step + 1) % 2) * (N + R)
    _choose(
        x + b * stride_b, inverse + b * N, gram + b * N * N, rows + b * R * N, prior + b * N, relevance + b * N,
        floor + b, gain + b * N, low, high, weight + b * (N + R), changed + b * (N + R), counts + b * 2,
        out + b * KEEP + step, N, C, R, stride_n, stride_c, temperature, diversity,
        SEED, SCALE, PRIOR, RELEVANCE, FAR, EXP, MADE, BN, BC,
    )  # fmt: skip


@triton.jit
def _one_change(
    x, inverse, gram, rows, gain, low, high, weight, changed, counts, N, C, R, sign,
    stride_b, stride_n, stride_c, stride_level, temperature,
    EXP: tl.constexpr, MADE: tl.constexpr, UPCAST: tl.constexpr, BU: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    v = (tl.program_id(0) * BV + tl.arange(0, BV)).to(tl.int64)
    total = _change(
        x + b * stride_b, inverse + b * N, gram + b * N * N, rows + b * R * N, low + b * stride_level,
        high + b * stride_level, weight + b * (N + R), changed + b * (N + R), counts + b * 2, v, N, C, stride_n,
        stride_c, temperature, EXP, MADE, UPCAST, BU, BV, BC,
    )  # fmt: skip
    before = tl.load(gain + b * N + v, mask=v < N, other=0.0)
    tl.store(gain + b * N + v, before + sign * total, mask=v < N)


@triton.jit
def _all_choices(
    x, inverse, gram, rows, prior, relevance, floor, gain, by, weight, changed, counts, out,
    N, C, R, KEEP, START, stride_b, stride_n, stride_c, temperature, diversity,
    SCALE: tl.constexpr, PRIOR: tl.constexpr, RELEVANCE: tl.constexpr, FAR: tl.constexpr, EXP: tl.constexpr,
    UPCAST: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    x += b * stride_b
    inverse += b * N
    gram += b * N * N
    rows += b * R * N
    gain += b * N
    weight += b * (N + R)
    changed += b * (N + R)
    counts += b * 2
    for step in range(START, KEEP):
        low, high = by + (2 * b + step % 2) * (N + R), by + (2 * b + (step + 1) % 2) * (N + R)
        _choose(
            x, inverse, gram, rows, prior + b * N, relevance + b * N, floor + b, gain, low, high, weight, changed,
            counts, out + b * KEEP + step, N, C, R, stride_n, stride_c, temperature, diversity,
            False, SCALE, PRIOR, RELEVANCE, FAR, EXP, True, BN, BC,
        )  # fmt: skip
        tl.debug_barrier()  # what follows reads what other threads wrote
        for v0 in range(0, N, BV):
            v = (v0 + tl.arange(0, BV)).to(tl.int64)
            total = _change(
                x, inverse, gram, rows, low, high, weight, changed, counts, v, N, C, stride_n, stride_c, temperature,
                EXP, True, UPCAST, BU, BV, BC,
            )  # fmt: skip
            before = tl.load(gain + v, mask=v < N, other=0.0)
            tl.store(gain + v, before - total, mask=v < N)
        tl.debug_barrier()


def sizes(made: bool) -> dict[str, int]:
    """Tiles: tokens that are scored at once, and things by tokens of which similarities are compared."""
    if INTERPRETED:
        return {"BN": 1024, "BU": 256, "BV": 1024, "BC": 256}
    return {"BN": 1024, "BU": 16, "BV": 256, "BC": 16} if made else {"BN": 128, "BU": 64, "BV": 128, "BC": 64}


@op("coverage")
def coverage(
    x: Tensor,
    keep: int,
    prior: Tensor | None,
    relevance: Tensor | None,
    weight: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    diversity: float,
    scale: str,
    valid: Tensor | None,
) -> Tensor:
    b, n, c = x.shape
    out = empty(x, b, keep, dtype=torch.int64)
    if not b or not keep:
        return out
    if not n:
        return out.fill_(-1)
    r = 0 if rows is None else rows.shape[1]
    w = torch.ones(b, n + r, device=x.device)
    gain = torch.zeros(b, n, device=x.device)
    if weight is not None:
        w[:, :n] = weight
    if valid is not None:
        w[:, :n].masked_fill_(~valid, 0)
        gain.masked_fill_(~valid, -torch.inf)
    by = torch.zeros(b, 2, n + r, device=x.device)  # how well everything is covered, before and behind a choice
    if relevance is not None:
        by[:, :, :n] = -torch.inf
    inverse = inverse_lengths(x)
    made = held(n, c)
    gram = similarities(x, inverse, made)
    floor, counts = torch.zeros(b, device=x.device), torch.empty(b, 2, dtype=torch.int64, device=x.device)
    # columns of what is covered better, of the tokens and of the rows
    changed = torch.empty(b, n + r, dtype=torch.int64, device=x.device)
    shared = (x, inverse, inverse if gram is None else gram, inverse if rows is None else rows.float().contiguous())
    ranks = [inverse if t is None else t.float().contiguous() for t in (prior, relevance)]
    tile = sizes(made)
    kinds = {
        "SCALE": SCALES.index(scale),
        "PRIOR": prior is not None,
        "RELEVANCE": relevance is not None,
        "FAR": diversity != 0,
        "EXP": temperature > 0,
    }
    span = {k: tile[k] for k in ("BU", "BV", "BC")}

    def choose(step: int, seed: bool) -> None:
        launch(
            _one_choice, (b,), *shared, *ranks, floor, gain, by, w, changed, counts, out, n, c, r, keep, step,
            *x.stride(), temperature, diversity, SEED=seed, **kinds, MADE=made, BN=tile["BN"], BC=tile["BC"], sizes={},
        )  # fmt: skip

    def change(low: Tensor, high: Tensor, sign: float) -> None:
        launch(
            _one_change, (triton.cdiv(n, tile["BV"]), b), *shared, gain, low, high, w, changed, counts, n, c, r, sign,
            *x.stride(), 2 * (n + r), temperature, EXP=temperature > 0, MADE=made, UPCAST=upcast(x), **span, sizes={},
        )  # fmt: skip

    start = int(relevance is not None)
    if start:
        choose(0, True)
    counts[:, 0], counts[:, 1] = n, r
    changed[:, :n], changed[:, n:] = torch.arange(n, device=x.device), torch.arange(r, device=x.device)
    by[:, 1 - start] = torch.inf
    change(by[:, start], by[:, 1 - start], 1.0)
    torch.mul(gain.amax(1), noise(torch.float32), out=floor)
    if made:
        launch(
            _all_choices, (b,), *shared, *ranks, floor, gain, by, w, changed, counts, out, n, c, r, keep, start,
            *x.stride(), temperature, diversity, **kinds, UPCAST=upcast(x), **tile, sizes={},
        )  # fmt: skip
        return out
    for step in range(start, keep):
        choose(step, False)
        change(by[:, step % 2], by[:, (step + 1) % 2], -1.0)
    return out
