"""Uniform sampling of the image plane: strong at shallow cuts (FEATHER, arXiv 2412.13180, table 1)."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.select import top
from ..core.types import Geometry, Selection, TokenView
from ._sites import cells, place
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="uniform",
        paper="baseline",
        idea="keeps an even grid of tokens",
        kinds=("projector", "vision", "llm"),
        raster=True,
        score="1 at the centre of a cell, 0 elsewhere",
        cases=({"keep": 0.75}, {"keep": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Uniform(Method):
    """The raster is cut into exactly ``keep`` near-square cells and the token nearest to each cell's centre stays."""

    site: str | None = option(None, "where to cut: 'projector' (default), 'vision.<i>' or 'llm.<i>'")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        return (Cut(site=place("uniform", geometry, self.site), keep=keep),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        centre, _ = cells(*view.grid, cut.keep or 0)
        # A later stage may find some centres gone; then the first of the other tokens fill up.
        return top(
            centre.double().to(view.features.device)[view.index.clamp_min(0)], cut.keep or 0, view.valid, view.protected
        )
