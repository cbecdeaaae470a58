"""coverage: greedy facility location (SCOPE, arXiv 2510.24214; MMTok, arXiv 2508.18264; with relevance and diversity
TOPS, arXiv 2606.27161): again and again the token that adds most to what the chosen ones cover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.types import VtpruneError
from .base import CHUNK, EQUAL, KernelInfo, check, first, register, run, tokens, unit, wide
from .maxmin_ref import asked

SCALES = ("none", "mean", "range")
LIMIT = 4096  # tokens


def held(n: int, c: int) -> bool:
    """Whether all similarities of n tokens of c channels are kept: up to a size, and while they take no more room than
    the tokens themselves."""
    return n <= min(c, LIMIT)


def noise(dtype: torch.dtype) -> float:
    """What is left of a gain by rounding, as a share of the largest in the beginning: less counts as nothing."""
    return 8 * torch.finfo(dtype).eps


def coverage(
    x: Tensor,
    keep: int,
    *,
    prior: Tensor | None = None,
    relevance: Tensor | None = None,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 0.0,
    diversity: float = 0.0,
    scale: str = "none",
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Chooses ``keep`` tokens of each image, one after the other, each time the v of the highest

    ``relevance_v + diversity * (1 - c_v) + prior_v * (sum_u weight_u max(0, S_uv - c_u) + sum_r max(0, rows_rv -
    d_r))``

    with ``c_u = max S_us`` and ``d_r = max(0, rows_rs)`` over the chosen s; ties go to the lower position (two
    tokens that cover nothing but each other tie but for rounding where neither prior nor weight tells them apart).
    Without a relevance c begins at 0; with one the first choice goes by it alone, and c begins there.

    The similarities are kept where they take no more room than the tokens (up to 4096 of them). Beyond, those of a
    token are made once in the beginning and again whenever a choice covers it better, which is a few times for a token:
    time grows with N^2, memory with N. A gain of less than rounding leaves of it counts as 0.

    Args:
        x: tokens ``[B, N, C]``.
        keep: K.
        prior: ``[B, N]``; default: 1. NaN ranks last.
        relevance: ``[B, N]``. NaN ranks last.
        weight: ``[B, N]``, 0 or more, of the tokens that are to be covered; default: 1.
        rows: ``[B, R, N]``, what else is to be covered and how well each token does it; finite.
        temperature: 0: ``S_uv = cos(x_u, x_v)``; else ``exp((cos(x_u, x_v) - 1) / temperature)``, a softmax over v but
            for a factor of the row, which belongs into ``weight``.
        diversity: of the second term.
        scale: what the second term and the gain are divided by at each choice: ``"none"``, ``"mean"`` their mean over
            the tokens that are not chosen, ``"range"`` their range over these, from which the least was taken first.
        valid: ``[B, N]`` bool, False for padding, which is never chosen and need not be covered.
        backend: ``"triton"``, ``"reference"`` or ``None``: by device.

    Returns:
        positions ``[B, K]`` in the order of their choice, -1 behind the last token of an image that has fewer. No
        gradient.

    Raises:
        VtpruneError: ``keep`` or ``temperature`` is negative, an unknown scale, a wrong shape, or a backend that cannot
            run here.
    """
    asked("coverage", x, keep, valid, relevance)
    b, n = x.shape[:2]
    r = rows.shape[1] if rows is not None and rows.ndim == 3 else 0
    check("coverage", x, prior=(prior, (b, n)), weight=(weight, (b, n)), rows=(rows, (b, r, n)))
    if scale not in SCALES:
        raise VtpruneError(f"coverage: scale={scale!r} is not one of {', '.join(map(repr, SCALES))}")
    if temperature < 0:
        raise VtpruneError(f"coverage: temperature={temperature} must not be negative")
    return run(
        "coverage", backend, x, keep, prior, relevance, weight, rows, float(temperature), float(diversity), scale, valid
    )


@torch.no_grad()
def reference(
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
    u = unit(x)
    b, n, _ = u.shape
    out = torch.full((b, keep), -1, device=x.device)
    if not n or not keep:
        return out
    real = torch.ones(b, n, dtype=torch.bool, device=x.device) if valid is None else valid
    w = real.to(u.dtype) if weight is None else wide(weight).to(u.dtype).masked_fill(~real, 0)
    everything = [_tokens(u, temperature, w, 0.0 if relevance is None else -torch.inf)]
    if rows is not None:
        everything.append(_given(wide(rows).to(u.dtype)))
    free, image, least = real.clone(), torch.arange(b, device=x.device), noise(u.dtype)
    gain, floor = u.new_zeros(b, n, dtype=torch.float64), u.new_zeros(b, 1, dtype=torch.float64)
    for step in range(min(keep, n)):
        seed = step == 0 and relevance is not None
        if step == int(relevance is not None):
            gain = torch.stack([part.gains() for part in everything]).sum(0)
            floor = gain.masked_fill(~real, 0).amax(1, keepdim=True) * least
        score = torch.zeros_like(gain) if relevance is None else relevance.double()
        if not seed:
            worth = _scaled(torch.where(gain > floor, gain, 0), free, scale)
            score = score + (worth if prior is None else worth * prior)
            if diversity:
                far = 1 - everything[0].by.double()
                score = score + diversity * _scaled(torch.where(far > least, far, 0), free, scale, 1.0)
        lowest = torch.finfo(score.dtype).min / 2
        score = score.nan_to_num(lowest, -lowest, lowest).masked_fill(~free, -torch.inf)
        best = score.amax(1, keepdim=True)
        pick = first(score >= best - EQUAL * best.abs())
        out[:, step] = pick
        free[image, pick] = False
        for part in everything:
            now = torch.maximum(part.by, part.column(pick))
            gain = gain if seed else gain - part.between(now)
            part.by = now
    return torch.where(torch.arange(keep, device=x.device) < real.sum(1)[:, None], out, -1)


@dataclass
class _Covered:
    """What is to be covered, M things of each image, by N tokens.

    Attributes:
        of: ``of(i, at)``: how well each token covers the things ``at`` ``[k]`` of image i, ``[k, N]``.
        column: ``column(pick)``: how well the tokens ``pick`` ``[B]`` cover everything, ``[B, M]``.
        weight: ``[B, M]``.
        by: ``[B, M]``: how well the chosen tokens cover it.
        step: things that are looked at at once.
    """

    of: Callable[[int, Tensor], Tensor]
    column: Callable[[Tensor], Tensor]
    weight: Tensor
    by: Tensor
    step: int

    def gains(self) -> Tensor:
        """``[B, N]``: what each token would add."""
        return self.between(torch.full_like(self.by, torch.inf))

    def between(self, top: Tensor) -> Tensor:
        """``[B, N]``: of what each token covers, the part between :attr:`by` and ``top`` ``[B, M]``."""
        every, out = torch.arange(top.shape[1], device=top.device), []
        some = (top > self.by) & (self.weight > 0)
        for i in range(len(top)):
            # (a compiler does not know how many there are)
            at = every if torch.compiler.is_compiling() else every[some[i]]
            total = top.new_zeros((), dtype=torch.float64)
            for part in at.split(self.step):
                low = self.by[i, part, None]
                value = torch.clamp(self.of(i, part), low, top[i, part, None]).sub_(low)
                total = total + (self.weight[i, part] @ value).double()
            out.append(total)
        return torch.stack(out)


def _tokens(u: Tensor, temperature: float, weight: Tensor, start: float) -> _Covered:
    """The tokens ``u`` ``[B, N, C]``, of length one, by themselves."""
    b, n, c = u.shape
    gram = _curve(torch.bmm(u, u.transpose(1, 2)), temperature) if held(n, c) else None
    image = torch.arange(b, device=u.device)

    def of(i: int, at: Tensor) -> Tensor:
        return _curve(u[i].index_select(0, at) @ u[i].T, temperature) if gram is None else gram[i].index_select(0, at)

    def column(pick: Tensor) -> Tensor:
        if gram is not None:
            return gram[image, pick]
        return _curve(torch.bmm(u, u[image, pick][..., None])[..., 0], temperature)

    return _Covered(of, column, weight, torch.full_like(weight, start), max(1, CHUNK // n))


def _given(rows: Tensor) -> _Covered:
    """The rows ``[B, R, N]``."""
    ones = rows.new_ones(rows.shape[:2])
    image = torch.arange(len(rows), device=rows.device)
    return _Covered(
        lambda i, at: rows[i].index_select(0, at),
        lambda pick: rows[image, :, pick],
        ones,
        torch.zeros_like(ones),
        max(1, CHUNK // rows.shape[2]),
    )


def _curve(cosine: Tensor, temperature: float) -> Tensor:
    """What a similarity is worth; in place."""
    return cosine.sub_(1).div_(temperature).exp_() if temperature else cosine


def _scaled(value: Tensor, free: Tensor, scale: str, size: float | None = None) -> Tensor:
    """``value`` ``[B, N]`` divided by its mean or range over the tokens ``free``; 0 where that is 0, or where the range
    is rounding: :data:`EQUAL` of ``size``, by default of the largest."""
    if scale == "none":
        return value
    if scale == "mean":
        by = value.masked_fill(~free, 0).sum(1, keepdim=True) / free.sum(1, keepdim=True).clamp_min(1)
    else:
        low = value.masked_fill(~free, torch.inf).amin(1, keepdim=True)
        high = value.masked_fill(~free, -torch.inf).amax(1, keepdim=True)
        value = (value - low).masked_fill(~free, 0)
        by = torch.where(high - low > EQUAL * (high.abs() if size is None else size), high - low, 0)
    return torch.where(by > 0, value / by, 0)


def plain(
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
    """With the whole matrix, all of it at every choice, image by image."""
    out = []
    for i, image in enumerate(x):
        u = torch.nn.functional.normalize(image, dim=-1).float()
        s = u @ u.T
        covered, free = s.new_zeros(len(s)), torch.ones(len(s), dtype=torch.bool, device=x.device)
        chosen = []
        for _ in range(keep):
            gain = (s - covered[:, None]).clamp_min(0).sum(0)
            score = gain if prior is None else gain * prior[i]
            pick = score.masked_fill(~free, -torch.inf).argmax()
            free[pick] = False
            covered = torch.maximum(covered, s[:, pick])
            chosen.append(pick)
        out.append(torch.stack(chosen))
    return torch.stack(out)


def example(case: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    b, keep = 2, max(1, min(n // 4, 6))
    x = tokens(b, n, n if case == "gram" else 40, dtype, generator)
    prior: Tensor | None = torch.rand(b, n, generator=generator) + 0.1
    relevance = weight = rows = valid = None
    temperature, diversity, scale = 0.0, 0.0, "none"
    if case in ("relevance", "range"):
        relevance, prior = prior, None if case == "range" else torch.full((b, n), 0.5)
        diversity, scale = 0.5, "mean" if case == "relevance" else "range"
    if case == "rows":
        prior, temperature = None, 0.2
        weight = torch.rand(b, n, generator=generator) * 0.1
        rows = (3 * torch.randn(b, 5, n, generator=generator)).softmax(-1)
    if case in ("padded", "relevance", "range"):
        valid = torch.arange(n) < torch.tensor([n, max(1, keep // 2)])[:, None]
    if case == "ties":
        x, prior = torch.randint(2, (b, 1, 64), generator=generator).mul(2).sub(1).to(dtype).expand(-1, n, -1), None
    if case == "duplicates":  # all of four directions: what comes then adds nothing
        x = x[:, :4].repeat(1, n // 4 + 1, 1)[:, :n].contiguous()
    if case == "negative":
        prior = torch.full((b, n), -1.0)
    if case == "strided":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x, keep, prior, relevance, weight, rows, temperature, diversity, scale, valid


def close(arguments: tuple, got: Tensor, want: Tensor) -> None:
    """Every choice must score as much as the best one at its turn, given the choices before it; computed here in
    float64."""
    x, _, prior, relevance, weight, rows, temperature, diversity, scale, valid = arguments
    u = unit(x.double())
    assert torch.equal(got >= 0, want >= 0)
    for i in range(len(x)):
        free = torch.ones(x.shape[1], dtype=torch.bool) if valid is None else valid[i].clone()
        w = free.double() if weight is None else weight[i].double() * free
        s, p = _curve(u[i] @ u[i].T, temperature), torch.ones_like(w) if prior is None else prior[i].double()
        if rows is not None:  # what covers these and what covers tokens is added up
            s, w = torch.cat([s, rows[i].double()]), torch.cat([w, torch.ones(rows.shape[1]).double()])
        c = torch.full_like(w, 0.0 if relevance is None else -torch.inf)
        c[x.shape[1] :] = 0
        first = float((w[:, None] * s.clamp_min(0)).sum(0).max())
        for step, pick in enumerate(got[i][got[i] >= 0].tolist()):
            score, slack = torch.zeros_like(p) if relevance is None else relevance[i].double(), 1e-6
            if step or relevance is None:
                gain = (w[:, None] * (s - c[:, None]).clamp_min(0)).sum(0)
                worth = _scaled(gain[None], free[None], scale)[0] * p
                far = _scaled((1 - c[None, : len(p)]).clamp_min(0), free[None], scale, 1.0)[0]
                score = score + worth + (diversity * far if diversity else 0)
                if scale != "none":
                    slack += 1e-6 * first / float(gain[free].mean().clamp_min(1e-9 * first))
                else:
                    slack += 3e-6 * first * float(p.abs().max())
            assert free[pick] and score[pick] >= score[free].max() - slack
            c, free[pick] = torch.maximum(c, s[:, pick]), False
    if bool((x == x[:, :1]).all()):  # ties
        assert torch.equal(got, want)


def work(arguments: tuple) -> tuple[int, int]:
    x, keep, *_ = arguments
    b, n, c = x.shape
    return x.numel() * x.element_size() + 8 * b * keep, 2 * b * n * n * c


register(
    KernelInfo(
        name="coverage",
        source="arXiv 2510.24214, section 3; arXiv 2508.18264; arXiv 2606.27161",
        function=coverage,
        reference=reference,
        example=example,
        cases=(
            "saliency",
            "gram",
            "relevance",
            "range",
            "rows",
            "padded",
            "ties",
            "duplicates",
            "negative",
            "strided",
        ),
        close=close,
        plain=plain,
        work=work,
    )
)
