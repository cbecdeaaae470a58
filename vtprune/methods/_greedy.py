"""What methods share that choose one token after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..core.select import from_mask, top
from ..core.types import Selection, TokenView


def covering(x: Tensor, keep: int, view: TokenView, **how: Any) -> Selection:
    """``keep`` of each image's tokens by :func:`vtprune.kernels.coverage` of ``x`` ``[B, N, C]``; ranked by the order
    of their choice. Protected tokens come first."""
    if keep >= view.extent[1]:
        return from_mask(view.valid, view.extent)
    picks = kernels.coverage(x, keep, valid=view.valid, **how)
    b, n = view.valid.shape
    place = torch.arange(keep, device=picks.device).neg().expand_as(picks).float()
    order = torch.full((b, n + 1), torch.nan, device=picks.device)  # the last column takes what is no token
    order.scatter_(1, torch.where(picks >= 0, picks, n), place)
    return top(order[:, :n], keep, view.valid, view.protected, span=view.extent)
