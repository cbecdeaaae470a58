"""Frames of a video that differ most."""

from __future__ import annotations

from dataclasses import dataclass

from .. import kernels
from ..core.select import from_mask, marked
from ..core.types import Geometry, Selection, TokenView
from ..kernels.base import wide
from ._video import framed, frames_kept, shape, spread
from .base import Cut, Method, MethodInfo, register


@register(
    MethodInfo(
        name="key-frames",
        paper="baseline",
        idea="keeps whole frames of a video, those that are farthest from one another",
        kinds=("projector",),
        exact=False,
        video=True,
        whole=True,
        cases=({"keep": 0.75}, {"keep": 0.3}),
    )
)
@dataclass(frozen=True, kw_only=True)
class KeyFrames(Method):
    """The budget is rounded down to whole frames, one at least: those that a max-min search over the frames' mean
    tokens by ``1 - cos`` chooses (as :class:`~vtprune.methods.divprune.DivPrune` does of tokens). What belongs to no
    frame stays."""

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        return (Cut(site="projector", keep=frames_kept(geometry, keep)),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        f, p = shape(view)
        m = ((cut.keep or 0) - (view.valid.shape[1] - f * p)) // p
        means = wide(framed(view.features, view)).mean(2)  # [B, F, C]
        frames = marked(kernels.maxmin(means, m), f)
        return from_mask(spread(frames[..., None].expand(-1, -1, p), view, True) | view.protected)
