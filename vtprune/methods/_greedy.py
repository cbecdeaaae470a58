"""What methods share that choose one token after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..core.select import from_mask, top
from ..core.types import Selection, TokenView


def chosen(view: TokenView, picks: Tensor) -> Selection:
    """Keeps ``picks`` ``[B, K]``, positions in the order of their choice (-1 behind an image's last token), and scores
    them by minus their turn. Tokens that must stay take the places of the last ones chosen."""
    (b, n), keep = view.valid.shape, picks.shape[1]
    turn = torch.arange(keep, device=picks.device, dtype=torch.float32).neg().expand_as(picks)
    # the extra column takes the padding
    score = turn.new_full((b, n + 1), torch.nan).scatter(1, torch.where(picks < 0, n, picks), turn)[:, :n]
    return replace(top(score, keep, view.valid, view.protected, span=view.extent), score=score)


def covering(x: Tensor, keep: int, view: TokenView, **how: Any) -> Selection:
    """``keep`` of each image's tokens by :func:`vtprune.kernels.coverage` of ``x`` ``[B, N, C]``."""
    if keep >= view.extent[1]:
        return from_mask(view.valid, view.extent)
    return chosen(view, kernels.coverage(x, keep, valid=view.valid, **how))
