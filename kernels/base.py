"""What an op is, and which of its two implementations runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..core.registry import Registry
from ..core.types import VtpruneError

BACKENDS = ("triton", "reference")
# elements of the largest similarity tile that a reference makes at once: 4 MB, which stays in a CPU's cache
CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class KernelInfo:
    """The registered facts of an op, from which its tests and its benchmark are generated.

    Attributes:
        name: of the op; its Triton launcher lies in ``<name>_triton.py``, with the name and parameters of
            ``reference``.
        source: the paper, with its equation.
        function: what users call.
        reference: the same without ``backend``, positional.
        example: ``example(case, n, dtype, generator)`` makes the positional arguments of a test with n tokens on the
            CPU.
        cases: those that ``example`` knows.
        close: ``close(arguments, got, want)`` asserts that two results agree: indices by the score of what was chosen.
        plain: the straightforward torch implementation with the full matrix.
        work: ``work(arguments)`` gives the bytes that have to be moved and the floating-point operations (2 per
            multiply-add).
        differentiable: the reference carries gradients; what only chooses has none to carry.
        loaded: the launcher, once it was asked for.
    """

    name: str
    source: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    example: Callable[[str, int, torch.dtype, torch.Generator], tuple[Any, ...]]
    cases: tuple[str, ...]
    close: Callable[[tuple[Any, ...], Any, Any], None]
    plain: Callable[..., Any]
    work: Callable[[tuple[Any, ...]], tuple[int, int]]
    differentiable: bool = False
    loaded: dict[str, Callable[..., Any]] = field(default_factory=dict, compare=False, repr=False)

    def triton(self) -> Callable[..., Any]:
        """The Triton launcher; imports triton."""
        if "triton" not in self.loaded:
            self.loaded["triton"] = getattr(import_module(f"{__package__}.{self.name}_triton"), self.name)
        return self.loaded["triton"]


KERNELS: Registry[KernelInfo] = Registry("kernel")
_forced: ContextVar[str | None] = ContextVar("backend", default=None)


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Within the block every op runs on ``backend``: ``"triton"``, ``"reference"`` or ``None`` (by device). Raises
    :class:`VtpruneError` for other words."""
    if backend is not None:
        _known(backend)
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def register(info: KernelInfo) -> None:
    """Raises unless the op has at least two cases and a source."""
    if len(info.cases) < 2 or not info.source:
        raise ValueError(f"kernel {info.name!r} needs a source and at least two cases")
    KERNELS.register(info.name, info)


def run(name: str, backend: str | None, *arguments: Any) -> Any:
    """Runs op ``name``. By device: Triton for CUDA tensors of at most 32 bits that need no gradient, else the
    reference.

    Raises:
        VtpruneError: ``backend`` is unknown, or ``"triton"`` and cannot run here.
    """
    info = KERNELS.get(name)
    wanted = _known(backend) if backend is not None else _forced.get()
    tensors = [t for a in arguments for t in (a if isinstance(a, list | tuple) else (a,)) if isinstance(t, Tensor)]
    if wanted == "reference" or (wanted is None and (not tensors or tensors[0].device.type != "cuda")):
        return _reference(info, arguments, tensors)
    why = _not_triton(tensors, info.differentiable)
    if why is None:
        device = tensors[0].device
        with torch.no_grad():
            if device.type != "cuda" or torch.compiler.is_compiling():
                return info.triton()(*arguments)
            with torch.cuda.device(device):  # Triton launches on the current device, which need not be the layer's
                return info.triton()(*arguments)
    if wanted == "triton":
        raise VtpruneError(f"{name}: backend='triton' cannot run here: {why}; use backend='reference' or none")
    return _reference(info, arguments, tensors)


def _reference(info: KernelInfo, arguments: tuple[Any, ...], tensors: list[Tensor]) -> Any:
    kind = tensors[0].device.type if tensors else "cpu"
    if not torch.is_autocast_enabled(kind):
        return info.reference(*arguments)
    with torch.autocast(kind, enabled=False):  # it would multiply in 16 bits
        return info.reference(*arguments)


def _not_triton(tensors: list[Tensor], differentiable: bool) -> str | None:
    """Why Triton cannot take these tensors."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if any(t.device.type != "cuda" for t in tensors) and not interpreted():
        return (
            f"the tensors are on {tensors[0].device} and Triton needs CUDA (or TRITON_INTERPRET=1, set before triton "
            "is imported, which is slow)"
        )
    if any(t.dtype == torch.float64 for t in tensors):
        return "it computes in 32 bits and there are 64-bit floats"
    if differentiable and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it has no backward pass and a gradient is wanted"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise VtpruneError(f"backend={backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    return backend


# ------------------------------------------------------------------------------------------------- what references
# share


def wide(x: Tensor) -> Tensor:
    """At least 32 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x: Tensor) -> Tensor:
    """Rows ``[..., C]`` at length 1, at least 32 bits; zero rows stay zero, and rows that are not finite become zero:
    similar to nothing."""
    x = wide(x)
    length = x.norm(dim=-1, keepdim=True)
    return (x / length.clamp_min(torch.finfo(x.dtype).tiny)).masked_fill_(~length.isfinite(), 0)


EQUAL = 2.0**-18  # similarities that differ by less tie, so that equal tokens do whatever the rounding


def first(where: Tensor) -> Tensor:
    """``[B]``: the first True of each row of ``where`` ``[B, N]``; 0 if there is none."""
    return where.to(torch.uint8).argmax(1)


@torch.no_grad()
def cosines(q: Tensor, x: Tensor) -> Tensor:
    """Of a few rows ``q`` ``[B, R, C]`` the cosine with each token of ``x`` ``[B, N, C]``: ``[B, R, N]``, at least 32
    bits."""
    with torch.autocast(x.device.type, enabled=False):
        a, b = unit(q), unit(x)
        return torch.bmm(a, b.to(a.dtype).transpose(1, 2))


def squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared L2 distances ``[B, M, K]`` of tokens ``x`` ``[B, M, C]`` and ``y`` ``[B, K, C]``, at least 32 bits. Of x
    and x itself they are exactly the same from either side, and 0 on the diagonal."""
    same, centre = x is y, wide(y).mean(1, keepdim=True)
    y = wide(y) - centre  # products of small numbers lose less
    x = y if same else wide(x) - centre
    product = x @ y.transpose(1, 2)
    product = product + (product.transpose(1, 2) if same else product)
    out = (x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None] - product).clamp_min_(0)
    if same:
        out.diagonal(dim1=1, dim2=2).zero_()
    return out


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``[B, K]`` (-1: row 0) of ``x`` ``[B or 1, N, ...]``: ``[B, K, ...]``. Whole rows are copied,
    which on a CPU takes a tenth of the time of torch.gather with an expanded index."""
    index = index.clamp_min(0)
    image = torch.arange(len(index), device=index.device)[:, None] if len(x) > 1 else 0
    if not x.is_contiguous():
        return x[image, index]
    return x.flatten(0, 1).index_select(0, (index + image * x.shape[1]).flatten()).view(*index.shape, *x.shape[2:])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout of Llama, Mistral, Qwen and Gemma: x ``[B, H, R, d]``, tables ``[B or 1, R,
    d]``."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def per_image(index: Tensor, batch: int) -> Tensor:
    """``[M]`` or ``[B, M]`` to ``[B, M]``."""
    return index.expand(batch, -1)


def check(name: str, x: Tensor, **shaped: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises :class:`VtpruneError` unless ``x`` is ``[B, N, C]`` of floats and every other tensor has the shape it
    should have."""
    if x.ndim != 3 or not x.is_floating_point():
        raise VtpruneError(
            f"{name}: the tokens must be floats [B, N, C], got {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        )
    for what, (tensor, shape) in shaped.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise VtpruneError(f"{name}: {what} must be {list(shape)}, got {list(tensor.shape)}")


def kinds(name: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Raises :class:`VtpruneError` unless every tensor has ``dtype``: a mask is bool, a position int64."""
    for what, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise VtpruneError(
                f"{name}: {what} must be {str(dtype).removeprefix('torch.')}, got "
                f"{str(tensor.dtype).removeprefix('torch.')}"
            )


def below(name: str, what: str, index: Tensor, limit: int) -> None:
    """Raises :class:`VtpruneError` for positions beyond the end: on a CPU, where looking is free; kernels drop them.
    Read as an array, which is no operator."""
    if index.device.type != "cpu" or not index.numel() or torch.compiler.is_compiling():
        return
    largest = int(index.max() if torch._C._functorch.is_functorch_wrapped_tensor(index) else index.numpy().max())
    if largest >= limit:
        raise VtpruneError(f"{name}: {what} has entries up to {largest}, there are {limit}")


def tokens(batch: int, n: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random tokens ``[B, n, width]`` for examples, of a few directions plus noise, as image patches are: similarities
    spread over the whole range."""
    centres = torch.randn(batch, 7, width, generator=generator)
    which = torch.randint(7, (batch, n), generator=generator)
    noise = torch.randn(batch, n, width, generator=generator)
    return (rows(centres, which) + 0.7 * noise).to(dtype)
