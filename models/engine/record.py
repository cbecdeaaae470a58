"""What is told of one decision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Record:
    """One applied decision.

    Attributes:
        site: where it fell.
        stage: its stage's number in the recipe.
        tokens_in: per image, the tokens in front of it.
        tokens_out: per image, those behind it.
        kept: per image, the original indices kept, ascending.
        assignment: per image, for merges, the slot of every original token.
        ranked: the original index and the score of each token, ``[G, n]`` each.
        scores: of a record told per sample, as in :class:`vtprune.core.report.StageReport`.
        units: likewise.
    """

    site: str
    stage: int
    tokens_in: list[int]
    tokens_out: list[int]
    kept: list[Tensor]
    assignment: list[Tensor] | None
    ranked: tuple[Tensor, Tensor] | None = None
    scores: list[Tensor] | None = None
    units: list[Tensor] | None = None

    def scored(self, g: int, tokens: int) -> Tensor:
        """The scores of image ``g``'s original tokens, ``[tokens]`` float64, NaN where there is none."""
        out = torch.full((tokens,), torch.nan, dtype=torch.float64)
        if self.ranked is not None:
            self.ranked = self.ranked[0].cpu(), self.ranked[1].cpu()  # once for all images
            index, score = (t[g] for t in self.ranked)
            there = (index >= 0) & (index < tokens)
            out[index[there]] = score[there].double()
        return out
