"""merge: the weighted mean of the tokens of each slot, and the slot's size (ToMe, arXiv 2210.09461, section 3: tokens
are averaged by size)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import KernelInfo, below, check, kinds, register, run, tokens, wide


def merge(
    x: Tensor,
    target: Tensor,
    slots: int,
    *,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens with the same target become one.

    Args:
        x: ``[B, N, C]``.
        target: ``[B, N]`` slot of every token, 0 to ``slots - 1``; -1: dropped.
        slots: K.
        weight: ``[B, N]`` of each token in its slot's mean; default: ``size``.
        size: ``[B, N]`` tokens that each stands for already; default: 1.
        backend: ``"triton"``, ``"reference"`` or ``None``: by device.

    Returns:
        means ``[B, K, C]`` of x's dtype (summed in at least 32 bits; 0 for a slot without weight) and sizes ``[B, K]``
        of ``size``'s dtype. The reference carries gradients to x, and runs where one is wanted.

    Raises:
        VtpruneError: wrong shapes, or a backend that cannot run here.
    """
    shape = tuple(x.shape[:2])
    check("merge", x, target=(target, shape), weight=(weight, shape), size=(size, shape))
    kinds("merge", torch.int64, target=target)
    below("merge", "target", target, slots)
    if size is None:
        size = torch.ones(shape, device=x.device)
    return run("merge", backend, x, target, slots, size if weight is None else weight, size)


def reference(x: Tensor, target: Tensor, slots: int, weight: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    y = wide(x)
    b, _, c = y.shape
    image = torch.arange(b, device=x.device)[:, None]
    place = torch.where((target >= 0) & (target < slots), target, slots) + image * (
        slots + 1
    )  # the extra slot takes what is dropped
    total = y.new_zeros(b * (slots + 1), c).index_add_(
        0, place.flatten(), (y * weight.to(y.dtype)[..., None]).flatten(0, 1)
    )
    mass = y.new_zeros(b * (slots + 1)).index_add_(0, place.flatten(), weight.to(y.dtype).flatten())
    sizes = size.new_zeros(b * (slots + 1)).index_add_(0, place.flatten(), size.flatten())
    mean = total / mass.clamp_min(torch.finfo(y.dtype).tiny)[:, None]
    return mean.view(b, slots + 1, c)[:, :slots].to(x.dtype), sizes.view(b, slots + 1)[:, :slots]


def plain(x: Tensor, target: Tensor, slots: int, weight: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """With the matrix of slots and tokens."""
    member = torch.nn.functional.one_hot(target.clamp_min(0), slots).to(x.dtype) * (target >= 0)[..., None]  # [B, N, K]
    share = (member * weight[..., None].to(x.dtype)).transpose(1, 2)
    mean = share @ x / share.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return mean, (member.to(size.dtype) * size[..., None]).sum(1)


def example(case: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    b = 2
    slots = (n + 1) // 2
    x = tokens(b, n, 40, dtype, generator)
    target = torch.randint(slots, (b, n), generator=generator)
    size = torch.randint(1, 5, (b, n), generator=generator).float()
    weight = size
    if case == "dropped":
        target = torch.where(torch.rand(b, n, generator=generator) < 0.3, -1, target)
    if case == "weighted":
        weight = torch.rand(b, n, generator=generator)
    if case == "few":
        slots = min(n, 8)
        target = target % slots
    if case == "strided":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x, target, slots, weight, size


def close(arguments: tuple, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(arguments[0].dtype, 1e-5)
    assert got[0].dtype == want[0].dtype
    torch.testing.assert_close(got[0], want[0], atol=tolerance, rtol=tolerance)
    assert torch.equal(got[1], want[1])


def work(arguments: tuple) -> tuple[int, int]:
    x, _, slots, _, _ = arguments
    return (x.numel() + len(x) * slots * x.shape[2]) * x.element_size() + 16 * x.shape[0] * x.shape[1], 2 * x.numel()


register(
    KernelInfo(
        name="merge",
        source="arXiv 2210.09461, section 3",
        function=merge,
        reference=reference,
        example=example,
        cases=("halves", "dropped", "weighted", "few", "strided"),
        close=close,
        plain=plain,
        work=work,
        differentiable=True,
    )
)
