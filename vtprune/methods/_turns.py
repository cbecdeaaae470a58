"""What methods share that choose one token after another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.select import top
from ..core.types import Selection, TokenView

SCORE = "minus the turn at which it was chosen; the others share the place behind"


def chosen(view: TokenView, picks: Tensor) -> Selection:
    """Keeps ``picks`` ``[B, K]``, positions in the order of their choice (-1 behind an image's last token), and scores
    them by minus their turn, the others by -K. Tokens that must stay take the places of the last ones chosen."""
    (b, n), keep = view.valid.shape, picks.shape[1]
    turn = torch.arange(keep, device=picks.device, dtype=torch.float32).neg().expand_as(picks)
    # the extra column takes the padding
    score = turn.new_full((b, n + 1), -keep).scatter(1, torch.where(picks < 0, n, picks), turn)[:, :n]
    return top(score, keep, view.valid, view.protected, span=view.extent)
