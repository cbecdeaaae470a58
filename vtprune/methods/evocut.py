"""EvoCut: "EvoCut: Multi-Layer Evolution-Aware Visual Token Compression for Efficient Large Vision-Language Models"
(arXiv 2606.01756)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.select import top
from ..core.types import Geometry, Selection, TokenView, UnsupportedError, VtpruneError
from ..kernels.base import rows, unit, wide
from ._tower import TowerScored
from .base import Cut, MethodInfo, option, register

GOLDEN = (5**0.5 - 1) / 2
ROUNDING = 64  # times the precision: what is nearer than this to its group deviates by nothing


@register(
    MethodInfo(
        name="evocut",
        paper="arXiv 2606.01756",
        idea="keeps the patches whose updates, block by block, go elsewhere than those of the large groups",
        kinds=("vision", "projector"),
        keep=128 / 576,
        carries=True,
        score="running average over blocks of one minus the cosine between a patch's update and the nearest group's",
        cases=({"keep": 0.75}, {"keep": 0.2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class EvoCut(TowerScored):
    """``d = unit(x_l - x_(l-1))`` is the direction of a patch's update in block l; K-means gives M directions ``u``,
    each the mean of its group at length one; ``r = 1 - max_m d . u_m``; ``s <- ema s + (1 - ema) r`` over the blocks
    from the middle one to the last that is used, behind which the patches of the highest s stay.

    Groups are assigned by cosine. One without members keeps its direction, and a patch that a block leaves as it is
    has ``r = 1``. K-means starts from patches all over the raster: started from those that differ most, it gives these
    groups of their own, and so no deviation."""

    groups: int = option(8, "M: group directions of a block", least=1)
    iterations: int = option(
        2, "rounds of K-means (the paper's cost counts 2; it does not say how many it runs)", least=0
    )
    ema: float = option(0.95, "weight of the old score in the running average", least=0, below=1)
    first: int | None = option(
        None,
        "the first block whose update counts, counted from 1 (default: half of the blocks: 12 of CLIP's 24, which with "
        "LLaVA's features are 12 updates)",
        least=2,
    )
    init: str = option(
        "spread",
        "where K-means starts (the paper does not say): 'spread' over the raster by steps of the golden ratio, "
        "'farthest': from the update farthest from its nearest, then the one farthest from the chosen",
        choices=("spread", "farthest"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        if not geometry.seen_layers:
            raise UnsupportedError(
                f"evocut follows patches through the blocks of the vision tower, which {geometry.family} "
                f"({geometry.arch}) does not show"
            )
        return super().plan(geometry, keep)

    def blocks(self, geometry: Geometry) -> tuple[int, ...]:
        """The block in front of the first whose update counts, and those up to the last that is used."""
        count = geometry.seen_layers
        if count < 2:
            raise UnsupportedError(
                f"evocut compares the outputs of consecutive blocks, and {geometry.family} uses the first block's alone"
            )
        first = self.first or min(max(geometry.vision_depth // 2, 2), count)
        if first > count:
            raise VtpruneError(f"evocut: first={first} is not one of the {count} blocks whose output is used")
        return tuple(range(first - 2, count))

    def score(self, view: TokenView, cut: Cut) -> Tensor:
        """``[B, N]``: the running average behind this block; 0 behind the first one."""
        x = wide(view.features)
        score = x.new_zeros(x.shape[:2])
        if "before" in view.memory:
            index, before, score = view.memory["before"]
            if index is not view.index:  # other stages have dropped tokens since
                at = _places(index, view)
                before, score = rows(before, at), score.gather(1, at)
            score = self.ema * score + (1 - self.ema) * self._deviation(x - before, view)
        view.memory["before"] = (view.index, x, score)
        return score

    def select(self, view: TokenView, cut: Cut) -> Selection:
        inside = cut.kind == "vision"
        score = self.score(view, cut) if inside else view.noted(f"vision.{cut.data['blocks'][-1]}")
        return top(score, cut.keep or 0, view.valid, view.protected, span=view.extent)

    def _deviation(self, update: Tensor, view: TokenView) -> Tensor:
        """``[B, N]``: ``r`` of the updates ``[B, N, C]``; 0 on padding."""
        d = unit(update)
        n, device = d.shape[1], d.device
        patches, targets = torch.arange(n, device=device), torch.arange(n, n + self.groups, device=device)
        u = rows(d, self._start(d, view))  # [B, M, C]
        for _ in range(self.iterations):
            group = kernels.match(torch.cat([d, u], 1), patches, targets)[1]
            mean, size = kernels.merge(d, torch.where(view.valid, group, -1), self.groups)
            u = torch.where((size > 0)[..., None], unit(mean), u)
        nearest = kernels.match(torch.cat([d, u], 1), patches, targets)[0]
        r = (1 - nearest) * view.valid
        return r.masked_fill(r <= ROUNDING * torch.finfo(r.dtype).eps, 0)  # else rounding would choose among equals

    def _start(self, d: Tensor, view: TokenView) -> Tensor:
        """``[B, M]``: the patches whose updates ``d`` ``[B, N, C]`` K-means starts from."""
        if self.init == "farthest":
            chosen = kernels.maxmin(d, self.groups, valid=view.valid)
            return torch.where(chosen >= 0, chosen, chosen[:, :1]).clamp_min(0)
        steps = (torch.arange(self.groups, device=d.device) + 0.5) * GOLDEN % 1
        return (steps * view.counts[:, None]).long()


def _places(index: Tensor, view: TokenView) -> Tensor:
    """``[B, N]``: where the tokens of the view stood among those that had the original numbers ``index``."""
    n = view.grid[0] * view.grid[1]
    column = torch.arange(index.shape[1], device=index.device).expand_as(index)
    table = index.new_zeros(len(index), n + 1).scatter(1, index % (n + 1), column)  # the last one takes the padding
    return table.gather(1, view.index.clamp_min(0))
