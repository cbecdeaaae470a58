"""VisPruner: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs" (arXiv
2412.01818, ICCV 2025); its ``ratio=1`` is FasterVLM (the same paper's first version)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..core.select import from_mask
from ..core.types import Selection, TokenView
from ._tower import NEEDS, TowerScored, class_attention
from .base import Cut, MethodInfo, option, register


@register(
    MethodInfo(
        name="vispruner",
        paper="arXiv 2412.01818",
        idea="keeps the tokens of the highest class attention, and of the rest those without a near duplicate",
        kinds=("vision", "projector"),
        needs=NEEDS,
        keep=128 / 576,
        score="class attention of the last block that is used, of those kept for it; the others are not ranked",
        cases=({"keep": 0.75}, {"keep": 3}),
    )
)
@dataclass(frozen=True, kw_only=True)
class VisPruner(TowerScored):
    """Section 3.3: of the budget T the ``T * important`` most attended tokens; the rest loses, round by round, the
    tokens that are most similar to one of the other half, until T are left."""

    important: float = option(0.5, "share of the budget that goes by attention; 1: FasterVLM", least=0, most=1)
    step: int = option(8, "duplicates removed in a round", least=1)

    def score(self, view: TokenView, cut: Cut) -> Tensor:
        return class_attention(view)

    def choose(self, view: TokenView, scores: list[Tensor], cut: Cut) -> Selection:
        (attention,) = scores
        chosen, ranked_by = torch.zeros_like(view.valid), torch.full_like(attention, torch.nan)
        ranked = attention.nan_to_num(-torch.inf).masked_fill(view.protected, torch.inf)
        order = ranked.masked_fill(~view.valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        counts, forced = view.counts.tolist(), view.protected.sum(1).tolist()
        kinds: dict[tuple[int, int], list[int]] = {}  # images that go through the same rounds
        for b, there in enumerate(counts):
            keep = min(cut.keep or 0, there)
            kinds.setdefault((there, max(int(keep * self.important), forced[b])), []).append(b)
        for (there, first), images in kinds.items():
            keep = min(cut.keep or 0, there)
            first, mine = min(first, keep), torch.tensor(images, device=order.device)
            rest = self._thin(view.features[mine], order[mine, first:there], keep - first)
            best = order[mine, :first]
            chosen[mine[:, None], torch.cat([best, rest], 1)] = True
            ranked_by[mine[:, None], best] = attention[mine[:, None], best]
        return replace(from_mask(chosen), score=ranked_by)

    def _thin(self, features: Tensor, rest: Tensor, keep: int) -> Tensor:
        """``keep`` of the tokens ``rest`` ``[B, R]``, given by falling attention; alternate ones form two halves, of
        the first the most similar to one of the second go; survivors come by falling similarity, then the second
        half. ``features`` ``[B, N, C]`` of all tokens."""
        while (left := rest.shape[1]) > keep:
            a, b = rest[:, 0::2], rest[:, 1::2]
            if left == 1:
                return rest[:, :keep]
            # as the official code, but never more than there are pairs
            count = min(self.step, left - keep, left // 2)
            similar, _ = kernels.match(features, a, b)
            order = similar.argsort(dim=1, descending=True, stable=True)
            rest = torch.cat([a.gather(1, order[:, count:]), b], 1)
        return rest
