"""HiPrune: "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models" (arXiv
2508.00553, Findings of ACL 2026)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.select import marked, ranks, top
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from ._tower import NEEDS, TowerScored, received_attention
from .base import Cut, MethodInfo, option, register

MIDDLE = 9 / 24  # of CLIP ViT-L/14's blocks, counted from 1: block 9
NEIGHBOURS = ((0, 1), (0, -1), (1, 0), (-1, 0))


@register(
    MethodInfo(
        name="hiprune",
        paper="arXiv 2508.00553",
        idea="keeps what a middle block attends to most, with its neighbours, then what the last block attends to most",
        kinds=("vision", "projector"),
        needs=NEEDS,
        keep=128 / 576,
        raster=True,
        score="attention received in the last block that is used; anchors and their neighbours go first",
        cases=({"keep": 0.75}, {"keep": 0.2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class HiPrune(TowerScored):
    """With ``g`` the attention that a patch receives, mean over heads and queries, the ``round(alpha T / 5)`` patches
    of the highest ``g`` in the middle block are anchors (halves are rounded to even, as the official code), their four
    neighbours are buffers, and the rest of the budget T are registers, by the ``g`` of the last block that is used. A
    budget that anchors and buffers exceed goes to the anchors, then to the buffers of the highest ``g`` in that block
    (the official code has no rule for it)."""

    alpha: float = option(0.1, "share of the budget for anchors with their four neighbours", least=0, most=1)
    layer: int | None = option(
        None,
        "the middle block, counted from 1 (default: 9 of 24 blocks, as the official code, elsewhere in proportion)",
        least=1,
    )
    wrap: bool = option(
        True,
        "neighbours by number, as the official code: left of a row's first patch is the last one of the row above, and "
        "numbers beyond the raster are its first or last patch; False: neighbours on the grid alone",
    )

    def blocks(self, geometry: Geometry) -> tuple[int, ...]:
        """The middle block and the last one that is used, which may be the same."""
        count = geometry.seen_layers
        if self.layer is not None and self.layer > count:
            raise VtpruneError(f"hiprune: layer={self.layer} is not one of the {count} blocks whose output is used")
        middle = self.layer or min(max(round(MIDDLE * geometry.vision_depth), 1), count)
        return tuple(sorted({middle - 1, count - 1}))

    def score(self, view: TokenView, cut: Cut) -> Tensor:
        return received_attention(view)

    def choose(self, view: TokenView, scores: list[Tensor], cut: Cut) -> Selection:
        middle, deep = scores[0], scores[-1]
        keep = cut.keep or 0
        anchors = top(middle, round(keep * self.alpha / 5), view.valid, span=view.extent).kept
        first = marked(anchors, view.valid.shape[1])
        buffers = self._around(view, anchors) & view.valid & ~first
        # ranks of the deep score, whole numbers, below those of buffers, below those of anchors
        n = deep.shape[1]
        order = deep.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
        tier = 2 * first.long() + buffers.long()
        chosen = top((n * tier - ranks(order)).double(), keep, view.valid, view.protected, span=view.extent)
        return replace(chosen, score=deep)

    def _around(self, view: TokenView, anchors: Tensor) -> Tensor:
        """``[B, N]`` bool: the neighbours of the tokens at ``anchors`` ``[B, A]`` (-1: padding)."""
        rows, columns = view.grid
        n = rows * columns
        place = view.index.gather(1, anchors.clamp_min(0))
        row, column = place // columns, place % columns
        marks = torch.zeros(len(place), n + 1, dtype=torch.bool, device=place.device)  # the last one takes what is none
        for down, right in NEIGHBOURS:
            if self.wrap:
                beside = (place + down * columns + right).clamp(0, n - 1)
            else:
                inside = (row + down).clamp(0, rows - 1) == row + down
                inside &= (column + right).clamp(0, columns - 1) == column + right
                beside = torch.where(inside, place + down * columns + right, n)
            marks.scatter_(1, torch.where(anchors >= 0, beside, n), True)
        return marks[:, :n].gather(1, view.index.clamp(0, n - 1))
