"""Blocks of a vision tower whose rows run on parts of their width (nested experts, arXiv 2407.19985): the matrices that
read the residual stream read a row's first features, those that write into it write as many. Attention is over all rows
at its own width."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import Nesting, UnsupportedError
from . import host
from .composed import sample
from .description import Matrices, Tower
from .run import Run
from .tower_replays import in_backward
from .widths import Widths

REPLACED = (
    "a matrix of block {} of the tower was replaced or hooked by somebody else, so that it would read whole tokens: "
    "remove(), and attach behind that (adapters of peft are taken; hooks on single matrices are not)"
)
CHECKPOINTED = (
    "gradient checkpointing runs the blocks of the tower again, and their matrices are not told for which images: "
    "switch it off in the tower"
)
EIGHTHS = 8  # of the width, by which blocks are probed


class Nest:
    """The matrices of one tower's blocks. ``run()``: the pass that a thread is in."""

    def __init__(self, tower: Tower, ledger: UndoLedger, run: Callable[[], Run | None]):
        assert tower.matrices is not None and tower.width is not None
        self.full, self.matrices, self.run = tower.width, tower.matrices, run
        self.blocks: list[Matrices] = []
        self.sliced: dict[int, bool] = {}
        self.trial: Widths | None = None
        self.calls: list[nn.Module] = []
        for number, block in enumerate(tower.blocks):
            found = self._found(number, block)
            self.blocks.append(found)
            for module in found.every:
                self.sliced[id(module)] = _plain(module)
                ledger.replace(module, "forward", self._forward(number, module, found))
            self._probe(tower, number, block)

    def _found(self, number: int, block: Any) -> Matrices:
        """The matrices of a block. Raises :class:`UnsupportedError` if it has others, or none of these names."""
        name = f"block {number} ({type(block).__name__})"
        try:
            found = self.matrices(block)
        except AttributeError as e:
            raise UnsupportedError(f"{name} is not made of the matrices that this adapter knows: {e}") from e
        known = {id(p) for module in found.every for p in module.parameters()}
        other = next((n for n, p in block.named_parameters() if p.ndim > 1 and id(p) not in known), None)
        if other is not None:
            raise UnsupportedError(f"{name} has a matrix {other}, of which it is not known what a part of it would be")
        return found

    def _widths(self) -> Widths | None:
        run = self.run()
        if run is not None:
            return run.widths
        if in_backward():
            raise UnsupportedError(CHECKPOINTED)
        return self.trial

    def _forward(self, number: int, module: Any, found: Matrices) -> Callable:
        own, sliced = module.forward, self.sliced[id(module)]
        reads = any(module is m for m in found.reads)

        @functools.wraps(own)
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            widths = self._widths()
            if widths is None:
                return own(x, *args, **kwargs)
            if self.trial is widths:
                self.calls.append(module)
            if widths.whole:
                y = own(x, *args, **kwargs)
            elif sliced:
                y = (widths.read if reads else widths.write)(x, module.weight, module.bias)
            elif reads:
                y = own(widths.narrowed(x), *args, **kwargs)
            else:
                y = widths.narrowed(own(x, *args, **kwargs))
            gain = widths.gain if module is found.mlp else None
            return y if gain is None else y * gain[number][..., None].to(y.dtype)

        return torch.compiler.disable(forward)

    def begin(self, run: Run, nesting: Nesting, prefix: int) -> None:
        """The rows of a pass, from its first block on. Raises :class:`UnsupportedError` for parts that are no whole
        number of features."""
        for share, _ in nesting.widths:
            if share * self.full != round(share * self.full):
                raise UnsupportedError(f"the tower is {self.full} wide, of which {share:g} is no whole number")
        run.widths = Widths.of(nesting, self.full, prefix, run.group)
        sliced: list[Any] = [m for found in self.blocks for m in found.every if self.sliced[id(m)]]
        run.spared = sum(run.widths.spared(m.in_features, m.out_features) for m in sliced) // run.images

    def check(self, number: int, block: Any) -> None:
        """Raises :class:`UnsupportedError` if a matrix of a block is not the one that was there, or is hooked, and
        where transformers will run the block's forward again without its hooks."""
        now, then = self.matrices(block).every, self.blocks[number].every
        same = len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))
        if not same or any(m._forward_hooks or m._forward_pre_hooks for m in now):
            raise UnsupportedError(REPLACED.format(number))
        if block.training and getattr(block, "gradient_checkpointing", False) and torch.is_grad_enabled():
            raise UnsupportedError(CHECKPOINTED)

    def _probe(self, tower: Tower, number: int, block: Any) -> None:
        """Rows of each eighth of the width: every matrix is used once, and what lies behind a row's part passes through
        the block as it is."""
        noise, kwargs = sample(tower, block)
        modes = {m: m.training for m in block.modules()}
        images, rows = noise.shape[:2]
        parts = torch.arange(rows, device=noise.device).expand(images, -1) % EIGHTHS
        counts = [int((parts[0] == i).sum()) for i in range(EIGHTHS)]
        shares = [(i + 1) / EIGHTHS for i in range(EIGHTHS)]
        if self.full % EIGHTHS:
            raise UnsupportedError(f"the tower is {self.full} wide, which has no eighth")
        self.trial = Widths.of(Nesting(parts, tuple(zip(shares, counts, strict=True))), self.full, 0, 1)
        self.calls = []
        try:
            block.eval()
            with torch.no_grad(), host.gathered(block):
                out = block.forward(noise, **kwargs)
        finally:
            self.trial = None
            for module, mode in modes.items():
                module.training = mode
        out = out[0] if isinstance(out, tuple) else out
        behind = torch.arange(self.full, device=noise.device) >= (parts[..., None] + 1) * (self.full // EIGHTHS)
        once = len(self.calls) == len(self.blocks[number].every) == len({id(m) for m in self.calls})
        if not once or not torch.equal(out[behind], noise[behind]):
            raise UnsupportedError(
                f"block {number} ({type(block).__name__}) does not read and write its residual stream through the "
                "matrices that this adapter knows, so tokens cannot run on a part of it"
            )


def _plain(module: Any) -> bool:
    """Whether a part of the module's matrix can be used in its place: no adapter around it, no other arithmetic."""
    if not isinstance(module, nn.Linear) or "forward" in module.__dict__:
        return False
    return type(module).forward is nn.Linear.forward and module.weight.is_floating_point()
