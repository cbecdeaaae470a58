"""What a block of the vision tower finds when gradient checkpointing runs it again in the backward pass."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ...core.types import UnsupportedError
from .run import Run

REPLAYS = 64  # passes whose blocks may still be run again
FORGOTTEN = f"gradient checkpointing runs a block again whose pass is not known any more (the last {REPLAYS} are)"
BY_ITSELF = (
    "a block of the attached tower was called by itself; blocks and encoders are pruned within a call of the tower "
    "only: call the model, or remove()"
)


def in_backward() -> bool:
    """Whether the autograd engine runs, so that a block called now is one that gradient checkpointing runs again."""
    return torch._C._current_graph_task_id() != -1


class BlockReplays:
    """Remembers the state in front of each block by the place of its input. ``depth``: how many blocks there are."""

    def __init__(self, depth: int):
        self.depth = depth
        self.states: OrderedDict[Any, tuple[Run, tuple]] = OrderedDict()

    def expect(self, number: int, x: Tensor, run: Run) -> None:
        """Keeps what block ``number`` finds: a checkpoint runs it again in the backward pass with the same input, which
        it holds until then."""
        place = _place(number, x)
        if place is not None:
            self.states[place] = (run, (run.index, run.size, run.slot, run.merges, run.present))
            self.states.move_to_end(place)
            while len(self.states) > REPLAYS * self.depth:
                self.states.popitem(last=False)

    def again(self, number: int, x: Tensor) -> Run:
        """The pass in which block ``number`` ran with the input ``x``, as it was in front of that block. Raises
        :class:`UnsupportedError` if none is known."""
        state = self.states.get(_place(number, x)) if in_backward() else None
        if state is None:
            raise UnsupportedError(FORGOTTEN if in_backward() else BY_ITSELF)
        first, (index, size, slot, merges, present) = state
        return Run(
            first.images,
            first.tokens,
            index,
            size,
            slot,
            merges=merges,
            raster=first.raster,
            decided=first.decided,
            present=present,
            squares=first.squares,
            widths=first.widths,
            again=True,
        )


def _place(number: int, x: Tensor) -> tuple | None:
    """Names the input of block ``number`` by where it lies; ``None`` for tensors that lie nowhere."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or not x.data_ptr():
        return None
    return number, x.device, x.data_ptr(), tuple(x.shape)
