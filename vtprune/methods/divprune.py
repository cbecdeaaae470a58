"""DivPrune: "Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import kernels
from ..core.select import top
from ..core.types import Geometry, Selection, TokenView
from .base import Cut, Method, MethodInfo, register


@register(
    MethodInfo(
        name="divprune",
        paper="arXiv 2503.02175",
        idea="keeps the tokens that are farthest from one another, without looking at attention or text",
        kinds=("projector",),
        keep=0.098,
        score="minus the turn at which it was chosen; the others are not ranked",
        cases=({"keep": 0.75}, {"keep": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """Section 3: max-min diversity on projected tokens, by ``1 - cos``. Greedily: first the token farthest from its
    nearest neighbour, then again and again the one farthest from its nearest chosen token. What one budget applies to
    is one pool, new-line tokens included. The official code may choose a duplicate twice; here a chosen token is out.
    Tokens that must stay take the places of the last ones chosen."""

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        return (Cut(site="projector", keep=keep),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        keep = cut.keep or 0
        picks = kernels.maxmin(view.features, keep, valid=view.valid)  # [B, K], -1 behind an image's last token
        b, n = view.valid.shape
        turn = torch.arange(keep, device=picks.device, dtype=torch.float32).neg().expand_as(picks)
        score = turn.new_full((b, n + 1), torch.nan).scatter(1, torch.where(picks < 0, n, picks), turn)[:, :n]
        return replace(top(score, keep, view.valid, view.protected, span=view.extent), score=score)
