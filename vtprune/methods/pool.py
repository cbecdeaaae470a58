"""Average pooling over near-square cells of the image plane."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.select import merged
from ..core.types import Geometry, Selection, TokenView, UnsupportedError
from ._sites import cells, place
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="pool",
        paper="baseline",
        idea="averages neighbouring tokens into an even grid of cells",
        kinds=("projector", "vision"),
        merges=True,
        raster=True,
        whole=True,
        cases=({"keep": 0.75}, {"keep": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Pool(Method):
    """Each cell's mean takes the place of the token nearest to the cell's centre."""

    site: str | None = option(None, "where to pool: 'projector' (default) or 'vision.<i>'")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        return (Cut(site=place("pool", geometry, self.site), keep=keep),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        rows, columns = view.grid
        if view.index.shape[1] != rows * columns:
            raise UnsupportedError("pool needs the whole raster; it cannot follow a stage that drops or merges tokens")
        kept, destination = cells(rows, columns, cut.keep or 0)
        b, device = len(view.index), view.features.device
        return merged(kept.to(device).expand(b, -1), destination.to(device).expand(b, -1), torch.ones_like(view.size))
