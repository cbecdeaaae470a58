"""What the Triton kernels share: registration, launching, and the tile of cosines. Loads of other than tl.dot's
operands are widened to float32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base import EQUAL, interpreted

INTERPRETED = interpreted()
_lock = threading.Lock()  # the interpreter patches triton.language while it runs


# Tiles of similarities: for the autotuner, and for the interpreter, whose time is that of its steps.
TILES = [
    ({"BM": 64, "BN": 64, "BC": 64}, 4, 3),
    ({"BM": 64, "BN": 128, "BC": 64}, 4, 3),
    ({"BM": 128, "BN": 128, "BC": 64}, 8, 3),
    ({"BM": 128, "BN": 64, "BC": 64}, 4, 4),
]
SIZES = {"BM": 256, "BN": 256, "BC": 256}


def op(name: str) -> Callable[[Callable], Callable]:
    """Registers a launcher as ``vtprune::<name>``, so that torch.compile sees it; the interpreter's kernels cannot be
    traced, and stay plain functions."""

    def wrap(function: Callable) -> Callable:
        return function if INTERPRETED else torch.library.triton_op(f"vtprune::{name}", function, mutates_args=())

    return wrap


def tuned(configs: Sequence[tuple[dict[str, int], int, int]], key: Sequence[str]) -> Callable[[Any], Any]:
    """Autotunes over ``(sizes, warps, stages)`` for every value of ``key``; the interpreter takes the sizes that
    :func:`launch` is given."""

    def wrap(kernel: Any) -> Any:
        if INTERPRETED:
            return kernel
        return triton.autotune(
            [triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in configs],
            key=list(key),
        )(kernel)

    return wrap


def launch(
    kernel: Any,
    grid: Callable[[dict[str, int]], tuple[int, ...]] | tuple[int, ...],
    *arguments: Any,
    sizes: dict[str, int],
    **constants: Any,
) -> None:
    """Runs ``kernel``; ``sizes`` are the autotuned ones, for the interpreter."""
    if not INTERPRETED:
        torch.library.wrap_triton(kernel)[grid](*arguments, **constants)
        return
    with _lock:
        kernel[grid](*arguments, **constants, **sizes)


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output, all of which the kernel has to write."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def bucket(n: int) -> int:
    """The autotuner's key for a length: the next power of two."""
    return max(16, triton.next_power_of_2(n))


def upcast(x: Tensor) -> bool:
    """Whether tiles of ``x`` become float32 before tl.dot: products of 16-bit floats are exact there anyway, but the
    interpreter has no bf16 arithmetic."""
    return INTERPRETED or x.dtype == torch.float32


TIE, NOWHERE = tl.constexpr(EQUAL), tl.constexpr(2**62)


@triton.jit
def earlier(pick, ties, n):
    """The lowest of ``pick`` and of those positions ``n`` ``[BN]`` that ``ties``; :data:`NOWHERE` to begin with."""
    return tl.minimum(pick, tl.min(tl.where(ties, n, NOWHERE), axis=0))


@triton.jit
def cosine_tile(
    x, inverse, i, i_ok, i_length, j, j_ok, C, stride_n, stride_c,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Cosines of rows ``i`` ``[BM]`` and ``j`` ``[BN]`` of ``x`` ``[N, C]``: ``[BM, BN]`` float32. ``inverse`` ``[N]``
    and, of the rows i, ``i_length`` are :func:`inverse_lengths`."""
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        a = tl.load(x + i[:, None] * stride_n + c[None, :] * stride_c, mask=i_ok[:, None] & (c < C)[None, :], other=0.0)
        b = tl.load(x + j[None, :] * stride_n + c[:, None] * stride_c, mask=j_ok[None, :] & (c < C)[:, None], other=0.0)
        if UPCAST:
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(a, b, total)
    s = total * i_length[:, None] * tl.load(inverse + j, mask=j_ok, other=0.0)[None, :]
    return tl.where(s == s, s, 0.0)  # what is not finite is similar to nothing


@triton.jit
def _lengths(x, out, N, C, stride_b, stride_n, stride_c, BN: tl.constexpr, BC: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), dtype=tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        a = tl.load(
            x + b * stride_b + n[:, None].to(tl.int64) * stride_n + c[None, :] * stride_c,
            mask=(n < N)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        a = a.to(tl.float32)
        total += tl.sum(a * a, axis=1)
    tl.store(out + b * N + n, tl.where(total > 0, 1.0 / tl.sqrt(total), 0.0), mask=n < N)


def inverse_lengths(x: Tensor) -> Tensor:
    """``1 / |x_n|`` ``[B, N]``, 0 for zero rows."""
    b, n, c = x.shape
    out = empty(x, b, n)
    block = 16 if not INTERPRETED else 256
    launch(_lengths, (triton.cdiv(n, block), b), x, out, n, c, *x.stride(), BN=block, BC=128, sizes={})
    return out
