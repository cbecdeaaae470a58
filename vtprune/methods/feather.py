"""FEATHER: "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration" (arXiv
2412.13180, ICCV 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..core.select import absorbing, from_mask, top
from ..core.types import Geometry, Selection, TokenView, UnsupportedError, VtpruneError
from .base import Cut, Method, MethodInfo, layers, option, register

SHARE = 0.3  # 1 - R


@register(
    MethodInfo(
        name="feather",
        paper="arXiv 2412.13180",
        idea="ranks twice by attention without rotary positions; a grid of the image plane joins the first choice",
        kinds=("llm",),
        needs={"llm": frozenset({"query_attention"})},
        keep=(SHARE + (1 - SHARE) / 9) * SHARE**2,
        elsewhere={"stride": 0},
        score="attention of the last prompt token without rotary positions, softmax over visual keys; 1 more on the "
        "grid of the first cut",
        cases=({"keep": 0.75}, {"keep": 2, "layers": (1, 3)}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Feather(Method):
    """Section 4.2, with R of the tokens to go: the first cut keeps the best ``floor(N (1 - R))`` and the tokens of
    every ``stride``-th row and column besides (the official code's union), the second ``floor(N' (1 - R)^2)`` of the N'
    that are left, none of them for its place. ``keep`` = K is exact: of the first cut's union with a grid of G tokens
    ``N q + G (1 - q)`` are expected at ``q = 1 - R``, so q is where ``(N q + G (1 - q)) q^2`` is K + 1/2; the default
    is R = 0.7. An image of several rasters has a grid in each and one ranking."""

    layers: tuple[int, ...] | None = option(
        None, "the two layers in front of which it cuts, above 0 (default: a quarter and half of the depth)"
    )
    r: float | None = option(
        None,
        "R; replaces keep=: the second cut keeps its share of whatever the first has left, at least one token "
        "(official: 0.7)",
        least=0,
        below=1,
    )
    stride: int = option(3, "of the grid that joins the first cut's tokens; 0: no grid (the paper's phi_-R)", least=0)

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        if self.stride and not geometry.raster:
            raise UnsupportedError(
                f"feather samples the image plane, which is not known of this model ({geometry.family}, "
                f"{geometry.arch}): stride=0 leaves the grid out"
            )
        depth, n = geometry.llm_layers, geometry.tokens
        early = max(min(round(depth / 4), depth - 2), 1)
        chosen = layers("feather", self.layers, geometry, (early, max(depth // 2, early + 1)))
        if len(chosen) != 2 or chosen[0] < 1:
            raise VtpruneError(f"feather: layers={list(chosen)} must be two layers of at least 1")
        squares = int(on_grid(geometry.rasters or (geometry.grid,), self.stride).sum())
        if self.r is None:
            assert keep is not None
            share = _share(n, squares, keep + 0.5)
        else:
            share = 1 - self.r
        best = max(1, _floor(n * share))
        most = min(n, best + squares)
        first = Cut(
            site=f"llm.{chosen[0]}",
            keep=best,
            observe=(chosen[0] - 1,),
            adaptive=best < most,
            most=most,
            data={"stride": self.stride},
        )
        if self.r is None:
            return first, Cut(site=f"llm.{chosen[1]}", keep=keep, observe=(chosen[1] - 1,))
        fewest, largest = (max(1, _floor(m * share**2)) for m in (max(best, squares), most))
        second = Cut(
            site=f"llm.{chosen[1]}",
            keep=fewest,
            observe=(chosen[1] - 1,),
            adaptive=fewest < largest,
            most=largest,
            data={"share": share**2},
        )
        return first, second

    def select(self, view: TokenView, cut: Cut) -> Selection:
        score = view.source("query_attention", layer="previous", keys="visual", rope=False)
        if "share" in cut.data:
            left = (view.counts.double() * cut.data["share"] + 1e-9).long().clamp_min(1)
            return top(score, left, view.valid, view.protected)
        best = top(score, cut.keep or 0, view.valid, view.protected)
        if not cut.data.get("stride"):
            return best
        rasters = view.rasters[0] if view.rasters else (view.grid,)
        there = on_grid(rasters, cut.data["stride"]).to(view.index.device)
        grid = there[view.index.clamp_min(0)] & view.valid
        chosen = (absorbing(best, view.valid.shape[1]) >= 0) | grid
        return replace(from_mask(chosen), score=score + grid)


@lru_cache(maxsize=256)
def on_grid(rasters: tuple[tuple[int, int], ...], stride: int) -> Tensor:
    """``[N]`` bool: the tokens of every ``stride``-th row and column of their raster, the first among them; none for
    0. Made once: read only."""
    marks = []
    for rows, columns in rasters:
        marks.append(torch.zeros(rows, columns, dtype=torch.bool))
        if stride:
            marks[-1][::stride, ::stride] = True
    return torch.cat([m.flatten() for m in marks])


def _share(tokens: int, squares: int, left: float) -> float:
    """The q in (0, 1] at which ``(tokens q + squares (1 - q)) q^2``, which grows with q, is ``left``."""
    low, high = 0.0, 1.0
    for _ in range(60):
        q = (low + high) / 2
        low, high = (q, high) if (tokens * q + squares * (1 - q)) * q * q < left else (low, q)
    return high


def _floor(x: float) -> int:
    return math.floor(x + 1e-9)
