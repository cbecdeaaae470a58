"""Keep-last: early attention's bias for late positions made explicit (FEATHER, arXiv 2412.13180: FastV keeps the bottom
of the image)."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.select import top
from ..core.types import Geometry, Selection, TokenView
from ._sites import place
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="keep-last",
        paper="baseline",
        idea="keeps the last tokens in raster order: the bottom of the image",
        kinds=("projector", "vision", "llm"),
        score="place in raster order",
        cases=({"keep": 0.75}, {"keep": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class KeepLast(Method):
    """Score = position."""

    site: str | None = option(None, "where to cut: 'projector' (default), 'vision.<i>' or 'llm.<i>'")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        return (Cut(site=place("keep-last", geometry, self.site), keep=keep),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        return top(view.index.double(), cut.keep or 0, view.valid, view.protected)
