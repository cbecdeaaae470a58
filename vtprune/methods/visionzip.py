"""VisionZip: "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467, CVPR
2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..core.select import marked, merged, top
from ..core.types import Mix, Selection, TokenView
from ..kernels.base import wide
from ._tower import NEEDS, TowerScored, class_attention, projections
from .base import Cut, MethodInfo, option, register


@register(
    MethodInfo(
        name="visionzip",
        paper="arXiv 2412.04467",
        idea="keeps the tokens of the highest class attention and merges the others into a few evenly spaced ones",
        kinds=("vision", "projector"),
        needs=NEEDS,
        keep=128 / 576,
        merges=True,
        raster=True,
        score="class attention of the last block that is used; the tokens that others merge into are not ranked",
        cases=({"keep": 0.75}, {"keep": 3}, {"keep": 5, "contextual": 0.6, "merge": "mean"}),
    )
)
@dataclass(frozen=True, kw_only=True)
class VisionZip(TowerScored):
    """Section 3.2: dominant tokens have the highest class attention, averaged over heads. Of the R others M evenly
    spaced ones, at positions ``0, step, 2 step ...`` with ``step = R // M``, are targets; every other one goes to the
    target of the most similar key (mean over heads, cosine). Tiles and frames are decided one by one.

    ``keep`` counts the tokens that the language model gets, dominant and contextual. The official dominant count
    includes the class token, which that code hands to the language model and stock models do not: here all of them are
    patches. The official code hands over dominant tokens first; here all stand in raster order. Behind the projector,
    where a family folds its patches, attention and keys are means over what was folded, and projected features are
    merged. Tokens that the tower did not make (new lines) are neither ranked nor merged."""

    contextual: float = option(
        10 / 64,
        "share of keep that are contextual tokens, rounded; the paper's 64 = 54 + 10, 128 = 108 + 20, 192 = 162 + 30",
        least=0,
        most=1,
    )
    merge: str = option(
        "sum",
        "a contextual token is 'sum': its own features plus the mean of those merged into it (official code), or "
        "'mean': the mean of them all, as the paper words it",
        choices=("sum", "mean"),
    )

    def score(self, view: TokenView, cut: Cut) -> Tensor:
        """``[B, N, 1 + d]``: class attention, then the key."""
        keys = wide(projections(view).keys()).mean(1)
        return torch.cat([class_attention(view)[..., None].to(keys.dtype), keys], -1)

    def choose(self, view: TokenView, scores: list[Tensor], cut: Cut) -> Selection:
        attention, keys = scores[0][..., 0], scores[0][..., 1:]
        n, limit = view.valid.shape[1], cut.keep or 0
        known = view.valid & ~attention.isnan()  # [B, N]
        keep = view.counts.clamp_max(limit)  # [B]
        forced = torch.minimum((view.protected & view.valid).sum(1), keep)
        first = torch.maximum((keep - int(limit * self.contextual + 0.5)).clamp_min(0), forced)
        first = torch.where(known.sum(1) <= keep, keep, first)  # nothing is left to merge
        dominant = marked(top(attention, first, view.valid, view.protected).kept, n)
        rest = known & ~dominant
        target = rest & _spaced(rest, keep - first)
        sources = rest & ~target
        at = torch.arange(n, device=rest.device).expand_as(rest)
        places = torch.where(target, at, n).sort(1).values[:, : max(int(limit * self.contextual + 0.5), 1)]
        places = torch.where(places < n, places, -1)  # [B, M] positions of the targets
        _, nearest = kernels.match(keys, torch.where(sources, at, -1), places)
        into = torch.where(nearest >= 0, places.gather(1, nearest.clamp_min(0)), -1)
        kept = dominant | target
        low, high = view.extent
        chosen = merged(kept, torch.where(kept, at, into), span=(min(limit, low), min(limit, high)))
        chosen = replace(chosen, score=attention)
        return chosen if self.merge == "mean" else replace(chosen, mix=_sum(chosen, sources, view.size, at))


def _spaced(rest: Tensor, count: Tensor) -> Tensor:
    """``[B, N]`` bool: of the tokens ``rest`` the first ``count`` ``[B]`` of every ``R // count``-th."""
    step = (rest.sum(1) // count.clamp_min(1)).clamp_min(1)[:, None]
    number = rest.long().cumsum(1) - 1
    return rest & (number % step == 0) & (number // step < count[:, None])


def _sum(chosen: Selection, sources: Tensor, size: Tensor, at: Tensor) -> Mix:
    """Each slot: the token that stands there, plus the mean of the ``sources`` that go to it."""
    assert chosen.target is not None
    target, weight = chosen.target, size.double() * sources
    total = weight.new_zeros(len(target), chosen.kept.shape[1] + 1)
    slot = torch.where(target >= 0, target, total.shape[1] - 1)
    mass = total.scatter_add(1, slot, weight).gather(1, slot)
    share = weight / mass.clamp_min(torch.finfo(weight.dtype).tiny)
    return Mix(at, target, torch.where(sources, share, torch.ones_like(share)))
