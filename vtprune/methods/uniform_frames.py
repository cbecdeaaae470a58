"""Evenly spaced frames of a video."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.select import from_mask
from ..core.types import Geometry, Selection, TokenView
from ._video import frames_kept, shape, spread
from .base import Cut, Method, MethodInfo, register


@register(
    MethodInfo(
        name="uniform-frames",
        paper="baseline",
        idea="keeps whole frames of a video, evenly spaced in time",
        kinds=("projector",),
        exact=False,
        video=True,
        whole=True,
        cases=({"keep": 0.75}, {"keep": 0.3}),
    )
)
@dataclass(frozen=True, kw_only=True)
class UniformFrames(Method):
    """The budget is rounded down to whole frames, one at least: the k-th of m frames from F is frame ``(2 k + 1) F //
    (2 m)``. What belongs to no frame stays."""

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        return (Cut(site="projector", keep=frames_kept(geometry, keep)),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        f, p = shape(view)
        m = ((cut.keep or 0) - (view.valid.shape[1] - f * p)) // p
        frames = torch.zeros(f, dtype=torch.bool)
        frames[[(2 * k + 1) * f // (2 * m) for k in range(m)]] = True
        mask = frames.to(view.valid.device)[None, :, None].expand(len(view.valid), f, p)
        return from_mask(spread(mask, view, True) | view.protected)
