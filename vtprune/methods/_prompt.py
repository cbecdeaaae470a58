"""What methods that rank a long prompt's tokens share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.types import TokenView


def pooled(view: TokenView, layer: str | int, width: int, *, last: bool) -> Tensor:
    """``[B, N]``: the products that the prompt's last token gives to each token of ``layer`` (source ``products``),
    averaged over ``width`` neighbours in the prompt; beyond its ends, and without ``last`` at the last token itself,
    there are zeros, which count."""
    told = view.source("products", layer=layer)
    there = told.score > -torch.inf
    own = told.score.masked_fill(~there, 0)
    if not last:
        own = own.masked_fill(there & (there.cumsum(1) == there.sum(1, keepdim=True)), 0)
    mean = torch.nn.functional.avg_pool1d(own[:, None], width, 1, width // 2)[:, 0]
    return mean.gather(1, told.place.clamp_min(0))
