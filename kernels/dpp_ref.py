"""dpp: greedy MAP of a conditional determinantal point process (CDPruner, arXiv 2506.10967, section 3; the incremental
Cholesky form of arXiv 1709.05135)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import EQUAL, KernelInfo, first, register, rows, run, tokens, unit, wide
from .maxmin_ref import asked, small

LEAST = 1e-5  # a gain below this is rounding noise: the token adds nothing to the volume


def dpp(
    x: Tensor, keep: int, *, relevance: Tensor | None = None, valid: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Chooses ``keep`` tokens of each image that greedily maximise the determinant of ``L_ij = r_i cos(x_i, x_j) r_j``;
    ties go to the lower position.

    Args:
        x: tokens ``[B, N, C]``.
        keep: K. Beyond the rank of L every gain is noise: there the most relevant tokens left are taken, in order.
        relevance: ``[B, N]`` r, positive; default: 1.
        valid: ``[B, N]`` bool, False for padding, which is never chosen.
        backend: ``"triton"``, ``"reference"`` or ``None``: by device.

    Returns:
        positions ``[B, K]`` in the order of their choice, -1 behind the last token of an image that has fewer. No
        gradient.

    Raises:
        VtpruneError: ``keep`` is negative, a wrong shape, or a backend that cannot run here.
    """
    asked("dpp", x, keep, valid, relevance)
    return run("dpp", backend, x, keep, relevance, valid)


def share(relevance: Tensor, valid: Tensor | None) -> Tensor:
    """``relevance`` ``[B, N]`` as a share of the image's largest, as only ratios matter; 0 where it is not finite."""
    relevance = relevance.nan_to_num(0, 0, 0)
    there = relevance.abs() if valid is None else relevance.abs().masked_fill(~valid, 0)
    return relevance / there.amax(1, keepdim=True).clamp_min(torch.finfo(relevance.dtype).tiny)


@torch.no_grad()
def reference(x: Tensor, keep: int, relevance: Tensor | None, valid: Tensor | None) -> Tensor:
    u = unit(x)
    b, n, c = u.shape
    out = torch.full((b, keep), -1, device=x.device)
    if not n or not keep:
        return out
    r = u.new_ones(b, n) if relevance is None else share(wide(relevance).to(u.dtype), valid)
    u = u * r[..., None]
    gram = torch.bmm(u, u.transpose(1, 2)) if small(n, c) else None
    real = torch.full((b,), n, device=x.device) if valid is None else valid.sum(1)
    gain, floor = r.square(), LEAST * r.square()  # d^2 of every token, and what counts as none
    slack = EQUAL * gain  # of a tie
    last = r.abs() - 2  # ranks tokens without a gain behind all others, by relevance
    if valid is not None:
        gain, last = gain.masked_fill(~valid, 0), last.masked_fill(~valid, -torch.inf)
    factor = u.new_zeros(b, min(keep, n), n)  # rows of the Cholesky factor
    picks: list[Tensor] = []
    for step in range(min(keep, n)):
        if step == c:  # as many as there are channels: the rest is rounding
            gain.zero_()
        rank = torch.where(gain > floor, gain, last)
        best = rank.amax(1, keepdim=True)  # [B, 1]; negative without a gain
        pick = first(rank + torch.where(gain > floor, slack, EQUAL) >= best)[:, None]
        picks.append(pick)
        line = (
            gram.gather(1, pick[..., None].expand(b, 1, n))
            if gram is not None
            else torch.bmm(rows(u, pick), u.transpose(1, 2))
        )  # [B, 1, N]
        known = factor[:, :step]
        line = torch.baddbmm(line, known.gather(2, pick[:, None].expand(b, step, 1)).transpose(1, 2), known, alpha=-1)[
            :, 0
        ]
        line = line.mul_(torch.where(best > 0, best.rsqrt(), 0))
        factor[:, step] = line
        gain = gain.addcmul_(line, line, value=-1).scatter_(1, pick, 0)
        last = last.scatter_(1, pick, -torch.inf)  # chosen
    out[:, : len(picks)] = torch.cat(picks, 1)
    return torch.where(torch.arange(keep, device=x.device) < real[:, None], out, -1)


def plain(x: Tensor, keep: int, relevance: Tensor | None, valid: Tensor | None) -> Tensor:
    """With the whole kernel matrix, image by image."""
    out = []
    for i, image in enumerate(x):
        u = torch.nn.functional.normalize(image, dim=-1).float()
        r = torch.ones(len(u), device=x.device) if relevance is None else relevance[i].float()
        kernel = r[:, None] * (u @ u.T) * r
        gain = kernel.diagonal().clone()
        factor: list[Tensor] = []
        chosen: list[Tensor] = []
        for _ in range(keep):
            pick = gain.argmax()
            chosen.append(pick)
            line = kernel[pick]
            if factor:
                known = torch.stack(factor)
                line = line - known[:, pick] @ known
            line = line / gain[pick].clamp_min(1e-12).sqrt()
            factor.append(line)
            gain = gain - line.square()
            gain[torch.stack(chosen)] = -torch.inf
        out.append(torch.stack(chosen))
    return torch.stack(out)


def example(case: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    b, keep = 2, max(1, min(n // 4, 6))
    x = tokens(b, n, 40 if case != "gram" else max(40, n), dtype, generator)
    relevance: Tensor | None = torch.rand(b, n, generator=generator) + 0.1
    valid = None
    if case == "padded":
        valid = torch.arange(n) < torch.tensor([n, max(1, keep // 2)])[:, None]
    if case == "ties":  # rank one: the best of them, then by relevance
        x = torch.randint(2, (b, 1, 64), generator=generator).mul(2).sub(1).to(dtype).expand(-1, n, -1)
        relevance = torch.ones(b, n)
    if case == "relevant":  # rank one: the rest by relevance, however small
        x, relevance = x[:, :1].expand(-1, n, -1), 1e-4 * torch.rand(b, n, generator=generator) + 1e-6
    if case == "unweighted":
        relevance = None
    if case == "strided":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x, keep, relevance, valid


def close(arguments: tuple, got: Tensor, want: Tensor) -> None:
    """Every choice must gain as much as the best one at its turn, given the choices before it; log-determinants in
    float64."""
    x, _, relevance, valid = arguments
    u = unit(x.double())
    if relevance is not None:
        u = u * relevance.double()[..., None]
    assert torch.equal(got >= 0, want >= 0)
    for image in range(len(x)):
        real = torch.ones(x.shape[1], dtype=torch.bool) if valid is None else valid[image]
        chosen: list[int] = []
        for pick in got[image][got[image] >= 0].tolist():
            rest = u[image]
            if chosen:  # what is left of every token behind the span of the chosen ones: its squared length is the gain
                basis = torch.linalg.qr(u[image][chosen].T).Q
                rest = rest - (rest @ basis) @ basis.T
            gain = rest.square().sum(-1).masked_fill(~real, -torch.inf)
            gain[chosen] = -torch.inf
            if float(gain.max()) < 1e-5:
                break
            assert gain[pick] >= gain.max() - 1e-4 * u[image].square().sum(-1).max()
            chosen.append(pick)
        every = got[image][got[image] >= 0].tolist()
        assert len(set(every)) == len(every) and bool(real[every].all())
    if bool((x == x[:, :1]).all()):  # rank one, or ties
        assert torch.equal(got, want)


def work(arguments: tuple) -> tuple[int, int]:
    x, keep, _, _ = arguments
    b, n, c = x.shape
    return x.numel() * x.element_size() + 8 * b * keep, 2 * b * n * c * keep + b * n * keep * keep


register(
    KernelInfo(
        name="dpp",
        source="arXiv 2506.10967, section 3",
        function=dpp,
        reference=reference,
        example=example,
        cases=("relevance", "unweighted", "gram", "padded", "ties", "relevant", "strided"),
        close=close,
        plain=plain,
        work=work,
    )
)
