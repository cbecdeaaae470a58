"""DivPrune: "Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from .. import kernels
from ..core.types import Geometry, Selection, TokenView
from ._turns import SCORE, chosen
from .base import Cut, Method, MethodInfo, register


@register(
    MethodInfo(
        name="divprune",
        paper="arXiv 2503.02175",
        idea="keeps the tokens that are farthest from one another, without looking at attention or text",
        kinds=("projector",),
        keep=0.098,
        score=SCORE,
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
        return chosen(view, kernels.maxmin(view.features, cut.keep or 0, valid=view.valid))
