"""Drop-all: every visual token leaves after some layer (VTW's withdrawal, and DPVR's LF-ideal, arXiv 2606.09131
section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.select import from_mask
from ..core.types import Geometry, Selection, TokenView
from .base import Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="drop-all",
        paper="baseline",
        idea="withdraws every visual token before one layer",
        kinds=("llm",),
        keep=None,
        budgeted=False,
        cases=({"layer": 5}, {"layer": 1}),
    )
)
@dataclass(frozen=True, kw_only=True)
class DropAll(Method):
    """``layer`` is the first decoder layer without visual tokens."""

    layer: int | None = option(None, "first decoder layer without visual tokens (default: the middle one)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        (layer,) = layers(self.info.name, self.layer, geometry, (geometry.llm_layers // 2,))
        return (Cut(site=f"llm.{layer}", keep=0),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        return from_mask(torch.zeros_like(view.valid))
