"""What a layer's MLP adds to the residual stream, token by token times a factor (γ-MoD, arXiv 2410.13859: the router's
probability). Only while a prompt is read: tokens behind it are never weighed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from . import host
from .candidates import Candidates
from .description import Decoder
from .halves import probe_added
from .level import SequenceLength
from .request import Call
from .rows import rows_of, with_rows


class Weighing:
    """Multiplies what the MLPs of ``layers`` add by :attr:`Call.weights`; ``now()``: the forward that the thread is
    in."""

    def __init__(self, decoder: Decoder, layers: list[int], ledger: UndoLedger, now: Callable[[], Call | None]):
        self.now = now
        if layers:
            probe_added(decoder)
        for number in layers:
            layer = decoder.layers[number]
            module = host.added(layer)
            assert module is not None  # as probed
            ledger.after(module, self._leave(number, layer))

    def check(self, call: Call) -> None:
        """Raises :class:`UnsupportedError` for a layer in the forward that ends whose MLP did not come by."""
        if call.weights:
            raise UnsupportedError(
                f"the MLP of layer {min(call.weights)} was replaced since attach(), what stands there now is not "
                "weighed: remove() and attach again"
            )

    def _leave(self, number: int, layer: nn.Module) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            call = self.now()
            if call is None or call.aside or number not in call.weights:
                return None
            if host.without_cache(layer):
                raise UnsupportedError(
                    "gradient checkpointing runs MLPs again when nobody knows by what they are multiplied: "
                    "gradient_checkpointing_disable()"
                )
            assert call.level is not None
            x, weights = rows_of(output), call.weights.pop(number)
            here = weights.to(x.device).gather(1, call.level.on(x.device).rows)
            return with_rows(output, x * here[..., None].to(x.dtype))

        return leave


def weights_of(candidates: Candidates, level: SequenceLength, length: int, factors: Tensor) -> Tensor:
    """``[B, length]``: the ``factors`` ``[G, N]`` in the caller's positions, 1 for all other tokens."""
    place = torch.where(candidates.valid, level.rows[candidates.owner[:, None], candidates.where.clamp_min(0)], length)
    owner = candidates.owner[:, None].expand_as(place)
    every = factors.new_ones(len(level.rows), length + 1)  # the last column takes the padding
    return every.index_put((owner, place), factors)[:, :-1]
