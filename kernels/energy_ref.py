"""energy: a row reduction of a function of the cosine similarity of all pairs. PiToMe's energy (arXiv 2405.16148, eq.
4), votes, densities and nearest-neighbour similarities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.types import VtpruneError
from .base import CHUNK, KernelInfo, check, kinds, register, run, tokens, unit

FUNCTIONS = ("elu", "jump", "above", "exp", "nearest")


def energy(
    x: Tensor,
    function: str = "elu",
    *,
    margin: float = 0.0,
    alpha: float = 1.0,
    nearest: int = 1,
    valid: Tensor | None = None,
    itself: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``E_i``, a reduction over all real tokens j of ``f(cos(x_i, x_j))``.

    Args:
        x: tokens ``[B, N, C]``.
        function: ``"elu"`` the mean of ``ELU_alpha(cos - margin)`` (PiToMe's official code); ``"jump"`` the mean of cos
            where it reaches the margin and of ``alpha (exp(cos - margin) - 1)`` below it (PiToMe, eq. 4); ``"above"``
            the number of j with ``cos >= margin`` (votes); ``"exp"`` the mean of ``exp((cos - margin) / alpha)`` (a
            density: with margin 1, a Gaussian kernel of variance alpha over the distance of unit vectors);
            ``"nearest"`` the mean of the ``nearest`` largest cosines, of all where there are fewer.
        nearest: 1 to 16.
        valid: ``[B, N]`` bool, False for padding, which counts for nobody and gets 0.
        itself: whether a token's similarity with itself takes part.
        backend: ``"triton"``, ``"reference"`` or ``None``: by device.

    Returns:
        ``[B, N]`` float32 (float64 for float64). 0 where no token takes part (``"nearest"``: -inf). No gradient.

    Raises:
        VtpruneError: an unknown function, a wrong shape, or a backend that cannot run here.
    """
    kinds("energy", torch.bool, valid=valid)
    check("energy", x, valid=(valid, tuple(x.shape[:2])))
    if function not in FUNCTIONS:
        raise VtpruneError(f"energy: function={function!r} is not one of {', '.join(map(repr, FUNCTIONS))}")
    if not 1 <= nearest <= 16 or alpha == 0:
        raise VtpruneError(f"energy: nearest={nearest} must lie in 1..16 and alpha={alpha} must not be 0")
    return run("energy", backend, x, function, float(margin), float(alpha), nearest, valid, itself)


@torch.no_grad()
def reference(
    x: Tensor, function: str, margin: float, alpha: float, nearest: int, valid: Tensor | None, itself: bool
) -> Tensor:
    u = unit(x)
    b, n, _ = u.shape
    out, t = u.new_empty(b, n), u.transpose(1, 2)
    real = torch.ones(b, n, dtype=torch.bool, device=x.device) if valid is None else valid
    others = real.sum(1, keepdim=True) - (0 if itself else real.int())  # [B, 1 or N]
    tile = u.new_empty(b * n * (step := max(1, min(n, CHUNK // max(b * n, 1)))))  # one for all turns
    for i in range(0, n, step):
        part = u[:, i : i + step]
        s = torch.bmm(part, t, out=tile[: b * n * part.shape[1]].view(b, part.shape[1], n))  # [B, step, N]
        skip = None
        if valid is not None or not itself:
            skip = (~real[:, None]).expand_as(s).clone()
            if not itself:
                skip.diagonal(i, 1, 2).fill_(True)
        if function == "nearest":
            s = s if skip is None else s.masked_fill_(skip, -torch.inf)
            best = s.max(-1, keepdim=True).values if nearest == 1 else s.topk(min(nearest, n), -1).values
            present = best > -torch.inf
            mean = best.masked_fill(~present, 0).sum(-1) / present.sum(-1)
            out[:, i : i + step] = mean.masked_fill(~present.any(-1), -torch.inf)
            continue
        if function == "above":
            s = (s >= margin).to(s.dtype)
        elif function == "exp":
            s = s.sub_(margin).div_(alpha).exp_()
        elif function == "elu":
            s = F.elu(s.sub_(margin), alpha=alpha, inplace=True)
        else:
            s = torch.where(s >= margin, s, alpha * ((s - margin).exp() - 1))
        out[:, i : i + step] = (s if skip is None else s.masked_fill_(skip, 0)).sum(-1)
    if function not in ("above", "nearest"):
        out = out / others.clamp_min(1)
    return out.masked_fill(~real, 0)


def plain(
    x: Tensor, function: str, margin: float, alpha: float, nearest: int, valid: Tensor | None, itself: bool
) -> Tensor:
    u = F.normalize(x, dim=-1)
    return F.elu(u @ u.transpose(1, 2) - margin, alpha=alpha).mean(-1)


def example(case: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    x = tokens(2, n, 40, dtype, generator)
    valid = None
    if case in ("padded", "above", "others"):
        valid = torch.rand(2, n, generator=generator) < 0.7
        valid[1] = n == 1
    if case == "strided":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    function = case if case in FUNCTIONS else "nearest" if case in ("others", "knn") else "elu"
    margin = 0.123456 if case == "above" else 1.0 if case == "exp" else 0.4
    return (
        x,
        function,
        margin,
        0.7 if case in ("exp", "jump") else 1.0,
        5 if case == "knn" else 1,
        valid,
        case not in ("others", "knn"),
    )


def close(arguments: tuple, got: Tensor, want: Tensor) -> None:
    """Equal within rounding; votes may differ where a similarity falls on the margin, and eq. 4 jumps by the margin
    there."""
    x, function, margin, _, _, valid, _ = arguments
    slack = torch.zeros_like(want)
    if function in ("above", "jump") and x.shape[1]:
        u = unit(x.double())
        near = ((u @ u.transpose(1, 2) - margin).abs() < 1e-5).sum(-1).to(want.dtype)
        slack = near if function == "above" else near * abs(margin) / x.shape[1]
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite) and torch.equal(got[~finite].to(want.dtype), want[~finite])
    assert bool(((got - want).abs() <= 2e-5 + slack)[finite].all()), (got - want)[finite].abs().max()


def work(arguments: tuple) -> tuple[int, int]:
    x = arguments[0]
    b, n, c = x.shape
    return b * n * (c * x.element_size() + 4), 2 * b * n * n * c


register(
    KernelInfo(
        name="energy",
        source="arXiv 2405.16148, eq. 4",
        function=energy,
        reference=reference,
        example=example,
        cases=("elu", "jump", "above", "exp", "nearest", "knn", "others", "padded", "strided"),
        close=close,
        plain=plain,
        work=work,
    )
)
