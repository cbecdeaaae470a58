"""PruMerge and PruMerge+: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (arXiv
2403.15388, ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.select import marked, merged, top
from ..core.types import Geometry, Mix, Selection, TokenView
from ..kernels.base import CHUNK, cosines, first, rows, wide
from ._tower import NEEDS, TowerScored, class_attention, projections, received_attention
from .base import Cut, MethodInfo, option, register

DIAL = ("iqr", 100.0, -2.0)
SCORE = "class attention of the last block that is used, one softmax over all heads"


@register(
    MethodInfo(
        name="prumerge",
        paper="arXiv 2403.15388",
        idea="keeps the outliers of the class attention, as many as an image has, each with a share of similar tokens",
        kinds=("vision", "projector"),
        needs=NEEDS,
        keep=None,
        merges=True,
        dial=DIAL,
        score=SCORE,
        cases=({"iqr": -0.5}, {"keep": 3}, {"keep": 0.75, "heads": "mean"}, {}),
    )
)
@dataclass(frozen=True, kw_only=True)
class PruMerge(TowerScored):
    """Section 3: without ``keep`` an image keeps the tokens whose class attention a is an outlier, ``a > Q3 + iqr (Q3 -
    Q1)``, and at least one; with it the most attended, as other papers use it. Each takes a share of its nearest, kept
    ones among them, by key cosine: ``x_i + sum_j a_j x_j``. One more token, the sum of ``a_j x_j`` over those dropped,
    counts towards ``keep`` (a budget of one has no room for it) and stands where the most attended of them stood. An
    image that loses no token is left as it is.

    The official code reads queries and keys of the tower's last block, whose output LLaVA does not use; here attention
    and keys are those of the last block that is used. Tokens stand in raster order, not by falling attention with the
    extra one at the end. The paper's numbers come from fine-tuned models. In towers without a class token a is the mean
    attention received. Behind the projector, where a family folds its patches, a and the keys are means over what was
    folded. Tokens that the tower did not make (new lines) are neither ranked nor merged."""

    iqr: float = option(
        1.5,
        "without keep=: how many interquartile ranges above the third quartile an outlier begins; less keeps more",
        least=-1000,
        most=1000,
    )
    neighbours: int = option(32, "nearest tokens of which each kept one takes a share", least=1)
    extra: bool = option(True, "one more token made of all that are dropped (official code)")
    heads: str = option(
        "joined",
        "'joined': one softmax of the product over all channels, scaled by their root (official code); 'mean': the "
        "tower's own attention, averaged over heads. Towers without a class token: always 'mean'",
        choices=("joined", "mean"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        cuts = super().plan(geometry, keep)
        return cuts if keep is not None else (*cuts[:-1], replace(cuts[-1], keep=1, adaptive=True))

    def score(self, view: TokenView, cut: Cut) -> Tensor:
        """``[B, N, 1 + C]``: attention, then the keys of all heads."""
        keys = wide(projections(view).keys()).transpose(1, 2).flatten(2)
        attention = class_attention(view) if self.heads == "mean" else joined_attention(view)
        return torch.cat([attention[..., None].to(keys.dtype), keys], -1)

    def choose(self, view: TokenView, scores: list[Tensor], cut: Cut) -> Selection:
        attention, keys = scores[0][..., 0], scores[0][..., 1:]
        n = view.valid.shape[1]
        known = view.valid & ~attention.isnan()  # [B, N]
        if cut.adaptive:
            kept, span = self._outliers(attention, known, view), None
            extra = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        else:
            limit, (low, high) = cut.keep or 0, view.extent
            span = (min(limit, low), min(limit, high))
            budget = view.counts.clamp_max(limit)  # [B]
            whole = known.sum(1) <= budget  # nothing would be left to merge
            extra = ~whole & (budget > 1)
            kept = self._most(attention, budget - (extra & self.extra).long(), whole, known, view)
        dropped = known & ~kept
        weight = torch.where(known, attention, 0)
        place = torch.zeros_like(kept)
        if self.extra:
            best = torch.where(dropped, weight, -1).argmax(1, keepdim=True)  # the first of equal ones
            place = place.scatter(1, best, (extra & dropped.any(1))[:, None])
        at = torch.arange(n, device=kept.device).expand_as(kept)
        into = torch.where(place.any(1, keepdim=True) & dropped, first(place)[:, None], -1)
        chosen = merged(kept | place, torch.where(kept, at, into), span=span)
        mix = self._mix(chosen, keys, weight, merging=known & dropped.any(1, keepdim=True), lost=into >= 0)
        return replace(chosen, mix=mix, score=attention)

    def _outliers(self, attention: Tensor, known: Tensor, view: TokenView) -> Tensor:
        """``[B, N]`` bool: what stays of each image without a budget."""
        ranked = attention.masked_fill(~known, torch.nan)
        low, high = (ranked.nanquantile(q, dim=1, keepdim=True) for q in (0.25, 0.75))
        count = (known & (attention > high + self.iqr * (high - low))).sum(1)
        count = count.clamp_min(1)
        kept = marked(top(attention, count, view.valid).kept, known.shape[1])
        return self._more(kept, known, count) | view.protected & view.valid

    def _more(self, kept: Tensor, known: Tensor, count: Tensor) -> Tensor:
        """What else stays beside the ``count`` ``[B]`` outliers ``kept``."""
        return kept

    def _most(self, attention: Tensor, count: Tensor, whole: Tensor, known: Tensor, view: TokenView) -> Tensor:
        """``[B, N]`` bool: the ``count`` ``[B]`` tokens that a budget keeps; of ``whole`` images all that are known are
        among them."""
        return marked(top(attention, count, view.valid, view.protected).kept, known.shape[1])

    def _mix(self, chosen: Selection, keys: Tensor, weight: Tensor, merging: Tensor, lost: Tensor) -> Mix:
        """What the slots hold: tokens that stay, those of them that are ``merging`` ``[B, N]`` with their neighbours'
        shares, and the sum of the ``lost``."""
        assert chosen.target is not None
        kept, target = chosen.kept, chosen.target
        token = kept.clamp_min(0)
        slot = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        own = (kept >= 0) & ~lost.gather(1, token)  # the extra token stands where one of the lost stood
        near, there = _nearest(keys, token, merging, self.neighbours)  # [B, K, k]
        there &= (own & merging.gather(1, token))[..., None]
        at = torch.arange(weight.shape[1], device=kept.device).expand_as(weight)
        tokens = (token, near.flatten(1), at)
        slots = (
            torch.where(own, slot, -1),
            torch.where(there, slot[..., None], -1).flatten(1),
            torch.where(lost, target, -1),
        )
        weights = (torch.ones_like(token, dtype=weight.dtype), weight.gather(1, near.flatten(1)), weight)
        return Mix(torch.cat(tokens, 1), torch.cat(slots, 1), torch.cat(weights, 1))


@register(
    MethodInfo(
        name="prumerge+",
        paper="arXiv 2403.15388",
        idea="PruMerge with evenly spaced tokens beside the outliers of the class attention",
        kinds=("vision", "projector"),
        needs=NEEDS,
        keep=None,
        merges=True,
        dial=DIAL,
        score=SCORE,
        cases=({"keep": 0.75}, {"keep": 3}, {}),
    )
)
@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """As :class:`PruMerge`, with spatially uniform tokens. Without ``keep``, beside n outliers of N tokens every
    ``int(int(N / n) / 3)``-th stays, never the last (official code; where that is 0 and the code fails, every one).
    With ``keep`` evenly spaced ones of the rest fill the budget."""

    attended: float = option(
        0.25,
        "with keep=: share of the tokens kept that goes by attention, at least one; the default is about what the "
        "rule without keep= comes to",
        least=0,
        most=1,
    )

    def _more(self, kept: Tensor, known: Tensor, count: Tensor) -> Tensor:
        number, total = known.long().cumsum(1) - 1, known.sum(1)
        stride = (total // count // 3).clamp_min(1)[:, None]
        return kept | known & (number % stride == 0) & (number < (total - 1)[:, None])

    def _most(self, attention: Tensor, count: Tensor, whole: Tensor, known: Tensor, view: TokenView) -> Tensor:
        first = torch.maximum((count * self.attended + 0.5).long().clamp_min(1), (view.protected & view.valid).sum(1))
        first = torch.where(whole, count, torch.minimum(first, count))
        kept = super()._most(attention, first, whole, known, view)
        return kept | _spaced(known & ~kept, count - first)


def _spaced(rest: Tensor, count: Tensor) -> Tensor:
    """``[B, N]`` bool: ``count`` ``[B]`` of the R tokens ``rest``, number i of them at place ``floor(i R / count)``."""
    number, total = rest.long().cumsum(1), rest.sum(1, keepdim=True).clamp_min(1)
    before, upto = ((n * count[:, None] + total - 1) // total for n in (number - 1, number))  # rounded up
    return rest & (upto > before)


def _nearest(keys: Tensor, token: Tensor, there: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` tokens of the most similar keys, by cosine, of each ``token`` ``[B, K]`` among the others that are
    ``there`` ``[B, N]``: ``[B, K, k]``, and which of them exist. ``keys`` ``[B, N, C]``."""
    b, n, _ = keys.shape
    near, similar = [], []
    for some in token.split(max(1, CHUNK // (b * n)), 1):
        s = cosines(rows(keys, some), keys).masked_fill(~there[:, None], -torch.inf)
        best = s.scatter(2, some[..., None], -torch.inf).sort(dim=-1, descending=True, stable=True)
        near.append(best.indices[..., : min(count, n - 1)])
        similar.append(best.values[..., : min(count, n - 1)])
    return torch.cat(near, 1), torch.cat(similar, 1) > -torch.inf


def joined_attention(view: TokenView) -> Tensor:
    """``[B, N]``: the class token's attention with all heads as one, ``softmax(q . k C^-1/2)`` over all tokens; 0 on
    padding. In towers without a class token the attention that each patch receives, averaged over all queries."""
    p = view.prefix
    if not p:
        return received_attention(view)
    t = view.source("projections")
    q, k = wide(t.q[:, :, 0]), wide(t.k)
    logits = (q[:, :, None] * k).sum((1, 3)) * q[0].numel() ** -0.5
    if t.bias is not None:
        logits = logits + t.bias[:, 0, 0]
    return t.per_token(logits.softmax(-1)[:, p:]) * view.valid
