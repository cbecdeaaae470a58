"""Random tokens: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..select import top
from ..types import Geometry, Selection, TokenView
from ._sites import place
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="random",
        paper="baseline",
        idea="keeps tokens drawn at random (seeded)",
        kinds=("projector", "vision", "llm"),
        draws=True,
        cases=({"keep": 0.75}, {"keep": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """One draw per seed, the same for every image of the run, so that batches equal single samples; change ``seed`` (:meth:`Handle.reseed`) for other draws."""

    site: str | None = option(None, "where to cut: 'projector' (default), 'vision.<i>' or 'llm.<i>'")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        return (Cut(site=place("random", geometry, self.site), keep=keep),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        generator = torch.Generator().manual_seed(view.seed)
        draw = torch.rand(view.grid[0] * view.grid[1], generator=generator, dtype=torch.float64).to(view.features.device)
        return top(draw[view.index.clamp_min(0)], cut.keep or 0, view.valid, view.protected)
