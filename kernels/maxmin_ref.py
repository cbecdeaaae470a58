"""maxmin: greedy max-min diversity (DivPrune, arXiv 2503.02175, section 3: the token farthest from what is chosen,
again and again)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.types import VtpruneError
from .base import EQUAL, KernelInfo, check, first, kinds, register, rows, run, tokens, unit
from .energy_ref import reference as energy

GRAM = 2048


def small(n: int, c: int) -> bool:
    """Whether all similarities of n tokens of c channels are made at once: up to a size, and while they take no more
    room than the tokens themselves."""
    return n <= min(c, GRAM)


def asked(name: str, x: Tensor, keep: int, valid: Tensor | None, relevance: Tensor | None = None) -> None:
    """Raises :class:`VtpruneError` unless the arguments of a greedy choice fit together."""
    shape = tuple(x.shape[:2])
    kinds(name, torch.bool, valid=valid)
    check(name, x, relevance=(relevance, shape), valid=(valid, shape))
    if not isinstance(keep, int) or keep < 0:
        raise VtpruneError(f"{name}: keep={keep} must be a number of tokens")


def maxmin(x: Tensor, keep: int, *, valid: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Chooses ``keep`` tokens of each image: first the one farthest from its nearest neighbour, then the one farthest
    from its nearest chosen token, by ``1 - cos``; ties, up to ``EQUAL``, go to the lower position.

    Args:
        x: tokens ``[B, N, C]``.
        keep: K.
        valid: ``[B, N]`` bool, False for padding, which is never chosen.
        backend: ``"triton"``, ``"reference"`` or ``None``: by device.

    Returns:
        positions ``[B, K]`` in the order of their choice, -1 behind the last token of an image that has fewer. No
        gradient.

    Raises:
        VtpruneError: ``keep`` is negative, a wrong shape, or a backend that cannot run here.
    """
    asked("maxmin", x, keep, valid)
    return run("maxmin", backend, x, keep, valid)


@torch.no_grad()
def reference(x: Tensor, keep: int, valid: Tensor | None) -> Tensor:
    u = unit(x)
    b, n, c = u.shape
    out = torch.full((b, keep), -1, device=x.device)
    if not n or not keep:
        return out
    gram = torch.bmm(u, u.transpose(1, 2)) if small(n, c) else None
    if gram is None:
        nearest = energy(x, "nearest", 0.0, 1.0, 1, valid, False)
    else:  # the diagonal is needed no more: a chosen token is taken out by hand
        gram.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        nearest = (gram if valid is None else gram.masked_fill(~valid[:, None], -torch.inf)).amax(-1)
    real = torch.full((b,), n, device=x.device) if valid is None else valid.sum(1)
    # chosen, or no token
    closed = torch.zeros(b, n, dtype=torch.bool, device=x.device) if valid is None else valid.logical_not()
    near = u.new_full((b, n), -torch.inf)  # similarity with the nearest chosen token
    image = torch.arange(b, device=x.device)
    for step in range(min(keep, n)):
        left = (nearest if step == 0 else near).masked_fill(closed, torch.inf)
        pick = first(left <= left.amin(1, keepdim=True) + EQUAL)
        out[:, step] = pick
        closed[image, pick] = True
        s = gram[image, pick] if gram is not None else torch.bmm(u, rows(u, pick[:, None]).transpose(1, 2))[..., 0]
        torch.maximum(near, s, out=near)
    return torch.where(torch.arange(keep, device=x.device) < real[:, None], out, -1)


def plain(x: Tensor, keep: int, valid: Tensor | None) -> Tensor:
    """With the whole matrix of distances, image by image."""
    out = []
    for image in x:
        u = torch.nn.functional.normalize(image, dim=-1)
        distance = 1 - u @ u.T
        pick = distance.topk(2, dim=0, largest=False).values[1].argmax()
        near, chosen = distance[pick].clone(), [pick]
        for _ in range(keep - 1):
            near[pick] = -1
            pick = near.argmax()
            chosen.append(pick)
            near = torch.minimum(near, distance[pick])
        out.append(torch.stack(chosen))
    return torch.stack(out)


def example(case: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    b, keep = 2, max(1, min(n // 4, 6))
    x = tokens(b, n, 40 if case != "gram" else n, dtype, generator)
    valid = None
    if case == "padded":
        valid = torch.arange(n) < torch.tensor([n, max(1, keep // 2)])[:, None]
    if case == "ties":
        x = torch.randint(2, (b, 1, 64), generator=generator).mul(2).sub(1).to(dtype).expand(-1, n, -1)
    if case == "strided":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x, keep, valid


def close(arguments: tuple, got: Tensor, want: Tensor) -> None:
    """Every choice must be as good as the best one at its turn, given the choices before it; computed here in
    float64."""
    x, keep, valid = arguments
    u = unit(x.double())
    assert torch.equal(got >= 0, want >= 0)
    for image in range(len(x)):
        real = torch.ones(x.shape[1], dtype=torch.bool) if valid is None else valid[image]
        s = (
            (u[image] @ u[image].T)
            .masked_fill(torch.eye(len(real), dtype=torch.bool), -torch.inf)
            .masked_fill(~real, -torch.inf)
        )
        near, free = s.amax(-1), real.clone()
        for step, pick in enumerate(got[image][got[image] >= 0].tolist()):
            assert free[pick] and near[pick] <= near[free].min() + 1e-5
            near = s[:, pick].clone() if step == 0 else torch.maximum(near, s[:, pick])
            free[pick] = False
    if bool((x == x[:, :1]).all()):  # ties
        assert torch.equal(got, want)


def work(arguments: tuple) -> tuple[int, int]:
    x, keep, _ = arguments
    b, n, c = x.shape
    return x.numel() * x.element_size() + 8 * b * keep, 2 * b * n * c * (keep + n)


register(
    KernelInfo(
        name="maxmin",
        source="arXiv 2503.02175, section 3",
        function=maxmin,
        reference=reference,
        example=example,
        cases=("tokens", "gram", "padded", "ties", "strided"),
        close=close,
        plain=plain,
        work=work,
    )
)
