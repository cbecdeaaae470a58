"""Blocks of a vision tower composed of their own halves, so that a decision can fall between attention and MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from . import host
from .description import Tower

PATCHES = 7  # of the input by which a composed block is compared with the original


def compose(
    block: Any, number: int, ledger: UndoLedger, forward: Callable, noise: Tensor, kwargs: dict[str, Any]
) -> None:
    """Gives ``block`` the ``forward`` that is made of its own children. It must equal the original on ``noise`` and
    ``kwargs``; anything that it does not know (another norm order, a scale, a gate) shows here, at attach time."""
    matrices, dtype = [p for p in block.parameters() if p.ndim == 2], noise.dtype
    modes = {m: m.training for m in block.modules()}
    try:
        block.eval()
        with torch.no_grad(), host.gathered(block):
            want = block.forward(noise, **kwargs)
            ledger.replace(block, "forward", forward)
            got = block.forward(noise, **kwargs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    want = want[0] if isinstance(want, tuple) else want
    error = float((want - got).abs().max() / want.abs().max().clamp_min(1e-6))
    exact = dtype in (torch.float32, torch.float64) and all(p.is_floating_point() for p in matrices)
    if not error <= (1e-5 if exact else 2e-2):
        raise UnsupportedError(
            f"block {number} ({type(block).__name__}) is not the pre-norm residual block this adapter knows: its "
            f"parts give a result {error:.1e} off"
        )


def noise_for(block: nn.Module, *shape: int) -> Tensor:
    """An input of ``block``, where its matrices are and of their type."""
    matrices = [p for p in block.parameters() if p.ndim == 2]
    # matrices may be stored in integers: then the norms'
    dtype = next(p.dtype for p in (*matrices, *block.parameters()) if p.is_floating_point())
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(matrices[0].device, dtype)


def sample(tower: Tower, block: Any) -> tuple[Tensor, dict[str, Any]]:
    """An input of ``block``, and the keywords that go with it."""
    width = tower.width or next(m.normalized_shape[0] for m in block.modules() if isinstance(m, nn.LayerNorm))
    noise = noise_for(block, 2, tower.prefix + PATCHES, width)
    dtype = noise.dtype
    kwargs: dict[str, Any] = {} if tower.mask is None else {tower.mask: None}
    if tower.rope is not None:
        assert tower.sample is not None
        table = tower.sample(block, PATCHES)
        kwargs[tower.rope] = tuple(t.to(dtype) for t in table) if isinstance(table, tuple) else table.to(dtype)
    return noise, kwargs
