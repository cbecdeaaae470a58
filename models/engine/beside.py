"""Modules that stand beside a model's own: copied layers of side branches, and what a trained method makes keys, values
and queries with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.types import Lender, UnsupportedError
from . import host


def follow(module: nn.Module, source: nn.Module) -> None:
    """Moves a copied ``module`` to where the model's own has been moved since, and into its mode; one in float32 stays
    that under autocast, as when it is being trained beside a model in half precision."""
    if module.training != source.training:
        module.train(source.training)
    mine, its = next(module.parameters(), None), next(source.parameters(), None)
    if mine is None or its is None:
        return
    long = mine.dtype == torch.float32 and torch.is_autocast_enabled(its.device.type)
    dtype = mine.dtype if long else its.dtype
    moved = (mine.dtype, mine.device) != (dtype, its.device)
    if moved and mine.is_floating_point() and its.is_floating_point():
        if dtype != mine.dtype and mine.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(
                f"what is being trained is {mine.dtype}, the model {its.dtype}: train it under autocast, or cast it "
                "yourself first"
            )
        module.to(its.device, dtype)


def lent(lender: Lender, layers: Any, rows: Tensor) -> Tensor:
    """What the projections of a layer that borrows are given of the ``rows`` ``[B, M, C]``; ``layers`` are the
    model's."""
    source = layers[lender.beside].input_layernorm
    follow(lender.norm, source)
    at = next((p.device for p in source.parameters()), rows.device)
    out: Tensor = lender.norm(rows.to(at))
    return out.to(rows.device)


def projected(lender: Lender, layer: Any, name: str, x: Tensor) -> Tensor:
    """What projection ``name`` (q, k, v) of ``lender`` makes of ``x`` ``[B, M, C]``, where ``layer`` lies."""
    own, part = getattr(getattr(layer, host.HALVES["attention"]), f"{name}_proj"), lender.projections[name]
    follow(part, own)
    out: Tensor = part(x)
    return out
