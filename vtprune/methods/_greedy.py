"""What methods share that choose by coverage, one token after another."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import kernels
from ..core.select import from_mask
from ..core.types import Selection, TokenView
from ._turns import chosen


def covering(x: Tensor, keep: int, view: TokenView, **how: Any) -> Selection:
    """``keep`` of each image's tokens by :func:`vtprune.kernels.coverage` of ``x`` ``[B, N, C]``."""
    if keep >= view.extent[1]:
        return from_mask(view.valid, view.extent)
    return chosen(view, kernels.coverage(x, keep, valid=view.valid, **how))
