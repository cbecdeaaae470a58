"""Down-sampling: fewer pixels in, the baseline that beats many methods at equal tokens (VTC-Bench, arXiv
2510.07143)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.select import merged
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from .base import Cut, Method, MethodInfo, register


@register(
    MethodInfo(
        name="downsample",
        paper="baseline",
        idea="resizes the image so that the tower makes fewer tokens",
        kinds=("pixels",),
        needs={"pixels": frozenset({"resize"})},
        exact=False,
        merges=True,
        cases=({"keep": 0.75}, {"keep": 4}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Downsample(Method):
    """The largest raster of patches with at most ``keep`` tokens (squarest on ties); each low-resolution token stands
    where its centre lies in the full raster."""

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        rows, columns = geometry.grid
        options = [
            (r * c, -abs(r * columns - c * rows), r, c)
            for r in range(1, rows + 1)
            for c in range(1, columns + 1)
            if r * c <= (keep or 0)
        ]
        if not options:
            raise VtpruneError(f"downsample: no raster of at most {keep} patches")
        _, _, r, c = max(options)
        return (Cut(site="pixels", keep=r * c, data={"raster": (r, c)}),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        (rows, columns), (r, c) = view.grid, cut.data["raster"]
        row = (2 * torch.arange(rows) + 1) * r // (2 * rows)  # the low-resolution row in which each row's centre lies
        column = (2 * torch.arange(columns) + 1) * c // (2 * columns)
        centre_row = ((2 * torch.arange(r) + 1) * rows) // (2 * r)
        centre_column = ((2 * torch.arange(c) + 1) * columns) // (2 * c)
        destination = (centre_row[row][:, None] * columns + centre_column[column][None]).flatten()
        b, device = len(view.index), view.index.device
        kept = destination == torch.arange(rows * columns)
        return merged(kept.to(device).expand(b, -1), destination.to(device).expand(b, -1))
