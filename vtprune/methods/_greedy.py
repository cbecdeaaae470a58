"""What methods share that choose by coverage, one token after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..core.select import from_mask
from ..core.types import Selection, TokenView
from ._turns import chosen


def covering(x: Tensor, keep: int, view: TokenView, **how: Any) -> Selection:
    """``keep`` of each image's tokens by :func:`vtprune.kernels.coverage` of ``x`` ``[B, N, C]``."""
    if keep >= view.extent[1]:  # nobody has to be chosen
        equal = torch.zeros_like(view.valid, dtype=torch.float32).masked_fill(~view.valid, torch.nan)
        return replace(from_mask(view.valid, view.extent), score=equal)
    return chosen(view, kernels.coverage(x, keep, valid=view.valid, **how))
