"""Layers that are run before their turn, to ask a later one what it would attend to (GemFilter, arXiv 2409.17422)."""

from __future__ import annotations

from contextvars import Context
from typing import Any

import torch
from torch import Tensor

from ...core.types import UnsupportedError
from ..base import PlannedCut
from . import host
from .description import Decoder
from .level import SequenceLength
from .request import Call
from .rows import rows_of
from .serving import Serving


def check_ahead(decoder: Decoder, planned: PlannedCut) -> None:
    """Raises :class:`UnsupportedError` for a cut that asks a layer which cannot be reached before its turn."""
    number = planned.cut.ahead
    if number is None:
        return
    if host.takes_planes(decoder.lm):
        raise UnsupportedError(
            f"{type(decoder.lm).__name__} adds planes of the image between its layers (DeepStack), so none of them can "
            f"be asked before its turn, as layer {number} would have to be"
        )
    kinds = decoder.kinds[planned.cut.layer : number + 1]
    if len(set(kinds)) > 1:
        raise UnsupportedError(
            f"layer {number} would have to be asked before its turn, but layers {planned.cut.layer} to {number} attend "
            f"in several ways ({', '.join(sorted(set(kinds)))}), whose masks are not all made by then"
        )


@torch.no_grad()
def read_ahead(
    decoder: Decoder, serving: Serving, call: Call, first: int, number: int, x: Tensor, level: SequenceLength
) -> Tensor:
    """What layer ``number`` reads if the layers from ``first`` on, whose input is ``x`` ``[B, M, C]``, see all of
    ``level``. No cache is filled, nothing is recorded."""
    request = call.request
    assert request is not None
    request.ahead.append((first, number, level.valid.sum(1).tolist()))

    def run() -> Tensor:
        out: Any = x.detach()
        for i in range(first, number):
            dense = call.dense[decoder.kinds[i]]
            kwargs = {**dense, **serving.prefill(call, level, i, dense, out), **host.uncached(dense)}
            kwargs.pop("hidden_states", None)
            if isinstance(mask := kwargs.get(host.MASK), Tensor):
                kwargs[host.MASK] = mask[..., : out.shape[1]]  # not the free columns of a cache of fixed size
            out = decoder.layers[i](out, **kwargs)
            out = rows_of(out)
        return out

    call.aside = True
    try:
        return Context().run(run)  # an empty context: transformers' collectors of hidden states are not in it
    finally:
        call.aside = False
