"""Random tokens: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.select import top
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from ._sites import place
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="random",
        paper="baseline",
        idea="keeps tokens drawn at random (seeded)",
        kinds=("projector", "vision", "llm"),
        draws=True,
        score="a random draw",
        cases=({"keep": 0.75}, {"keep": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """One draw per seed, the same for every image of the run, so that batches equal single samples;
    :meth:`Handle.reseed` takes one seed for all samples of the next forward, or one for each."""

    site: str | None = option(None, "where to cut: 'projector' (default), 'vision.<i>' or 'llm.<i>'")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        return (Cut(site=place("random", geometry, self.site), keep=keep),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        seeds = (view.seed,) if isinstance(view.seed, int) else view.seed
        if len(seeds) not in (1, len(view.index)):
            raise VtpruneError(
                f"{len(seeds)} seeds were given for {len(view.index)} images; inside the tower there must be one for "
                "each image or tile"
            )
        draws = [
            torch.rand(view.grid[0] * view.grid[1], generator=torch.Generator().manual_seed(s), dtype=torch.float64)
            for s in seeds
        ]
        draw = torch.stack(draws).to(view.features.device).expand(len(view.index), -1)  # [B, tokens of the raster]
        return top(draw.gather(1, view.index.clamp_min(0)), cut.keep or 0, view.valid, view.protected, span=view.extent)
