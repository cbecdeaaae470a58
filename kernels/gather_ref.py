"""gather: the same rows of several tensors, in one pass: hidden states, rotary tables, position ids, masks of one
sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.types import VtpruneError
from .base import KernelInfo, below, kinds, register, rows, run, tokens


def gather(index: Tensor, *tensors: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
    """Rows ``index`` ``[B, K]`` (-1: zeros) of every tensor ``[B or 1, N, ...]``, each ``[B, K, ...]`` of its own
    dtype. The reference carries gradients, and runs where one is wanted.

    Raises:
        VtpruneError: wrong shapes, or a backend that cannot run here.
    """
    lengths = {t.shape[1] for t in tensors if t.ndim > 1}
    if index.ndim != 2 or len(lengths) != 1 or any(t.ndim < 2 or t.shape[0] not in (1, len(index)) for t in tensors):
        raise VtpruneError(
            f"gather: index [B, K] and tensors [B or 1, N, ...] are needed, got {list(index.shape)} and "
            f"{[list(t.shape) for t in tensors]}"
        )
    kinds("gather", torch.int64, index=index)
    below("gather", "index", index, lengths.pop())
    return tuple(run("gather", backend, index, list(tensors)))


def reference(index: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    pad = index < 0
    return [rows(t, index).masked_fill_(pad.reshape(*pad.shape, *[1] * (t.ndim - 2)), 0) for t in tensors]


def plain(index: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    where = torch.arange(len(index), device=index.device)[:, None]
    return [
        (
            t.expand(len(index), *t.shape[1:])[where, index.clamp_min(0)]
            * (index >= 0).reshape(*index.shape, *[1] * (t.ndim - 2))
        )
        for t in tensors
    ]


def example(case: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    b, k = 2, (n + 1) // 2
    index = torch.rand(b, n, generator=generator).argsort(1)[:, :k]
    x = tokens(b, n, 40, dtype, generator)
    if case == "strided":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    if case == "hidden":
        return index, [x]
    if case == "padded":
        index[1, k // 2 :] = -1
    table = torch.randn(1, n, 24, generator=generator).to(dtype)
    mask = torch.rand(b, n, generator=generator) < 0.5
    return index, [x, table.cos(), table.sin(), torch.arange(n)[None] + 5, mask]


def close(arguments: tuple, got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def work(arguments: tuple) -> tuple[int, int]:
    index, tensors = arguments
    return sum(2 * index.numel() * t[0, 0].numel() * t.element_size() for t in tensors), 0


register(
    KernelInfo(
        name="gather",
        source="every method that prunes",
        function=gather,
        reference=reference,
        example=example,
        cases=("sequence", "hidden", "padded", "strided"),
        close=close,
        plain=plain,
        work=work,
        differentiable=True,
    )
)
