"""VScan: "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models" (arXiv 2505.22654, TMLR
2026)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..core.select import from_mask, marked, merged, ranks, top
from ..core.types import Action, Geometry, Selection, TokenView, UnsupportedError, VtpruneError
from ._tower import NEEDS, class_attention, last_seen
from .base import Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="vscan",
        paper="arXiv 2505.22654",
        idea="scans windows by an early block and the image by the last, merges the rest; later the question prunes",
        kinds=("projector", "llm", "vision"),
        needs={**NEEDS, "llm": frozenset({"query_attention"})},
        keep=32 / 576,
        merges=True,
        raster=True,
        score="class attention of the last block that is used; in the language model the last prompt token's",
        cases=({"keep": 0.5}, {"keep": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class VScan(Method):
    """Section 3. Behind the projector ``first * keep`` tokens stay: half of them (rounded down) are those of the
    highest class attention in an early block, window by window, the others those of the highest in the last block that
    is used; every other token is merged into the one it is most similar to in projected space, a mean by sizes. In the
    language model ``keep`` of these are left, by the last prompt token's attention.

    Windows take turns: none gets a second token before all have one, nor two more than another that has some left (in
    the last round the highest go first); the official code drops the remainder. Windows of a raster that ``windows``
    does not divide are as even as can be. In units of several rasters each has its share of the first budget; in the
    language model they compete. New-line tokens are no part of windows, and neither merge nor absorb. The official code
    renumbers positions (``positions="compact"``).
    """

    first: float = option(3.0, "tokens behind the projector for each that is left in the end (96 : 32)", least=1)
    local: int | None = option(
        None, "block that ranks within windows (default: 5 of 24, in proportion, rounded down)", least=0
    )
    windows: int = option(4, "windows along each side", least=1)
    remainder: str = option(
        "turns",
        "local tokens that the windows do not divide: by 'turns', or 'drop' them: fewer than first * keep tokens then "
        "come out of the projector (official code)",
        choices=("turns", "drop"),
    )
    layer: int | None = option(None, "first layer with keep tokens (default: half the depth)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        last, n = last_seen("vscan", geometry), geometry.tokens
        if "projector" not in geometry.provides:
            raise UnsupportedError(f"vscan merges behind the projector, and {geometry.family} has none")
        local = min(5 * geometry.vision_depth // 24, last) if self.local is None else self.local
        if local > last:
            raise VtpruneError(f"vscan: local={local} is not among blocks 0..{last}, whose output is used")
        (layer,) = layers("vscan", self.layer, geometry, (geometry.llm_layers // 2,))
        assert keep is not None
        sites = (f"vision.{local}", f"vision.{last}")
        notes = [Cut(site=site, action=Action.NOTE) for site in dict.fromkeys(sites)]
        stage = Cut(site="projector", keep=max(keep, min(n, int(self.first * keep + 1e-9))), data={"sites": sites})
        return (*notes, stage, Cut(site=f"llm.{layer}", keep=keep, joint=True))

    def note(self, view: TokenView, cut: Cut) -> Tensor:
        return class_attention(view)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        if cut.kind == "llm":
            score = view.source("query_attention", layer="next")
            # a training sample without an answer stays whole
            keep = torch.where(view.source("queried"), cut.keep or 0, view.counts)
            return top(score, keep, view.valid, view.protected)
        early, last = (view.noted(site) for site in cut.data["sites"])
        return self._scanned(view, early, last, cut.keep or 0)

    def _scanned(self, view: TokenView, early: Tensor, last: Tensor, keep: int) -> Selection:
        """The tokens that windows and image rank highest, the others merged into them."""
        made = view.valid & ~last.isnan()
        total = view.counts.clamp_max(keep)
        half = total // 2
        window, count = _windows(view, self.windows)
        turn = _turns(early, window, made).masked_fill(view.protected & made, -1)
        if self.remainder == "drop":
            turn = turn.masked_fill(turn >= (half // count)[:, None], turn.shape[1])
        picked = _first(turn, early, half)
        if self.remainder == "drop":
            total = torch.where(total < view.counts, total - half + picked.sum(1), total)
        chosen = top(last, total, view.valid, view.protected | picked)
        return _merged(view, chosen, made)


def _windows(view: TokenView, side: int) -> tuple[Tensor, int]:
    """Each token's window ``[B, N]``, and how many there are."""
    rows, columns = view.grid
    down, across = min(side, rows), min(side, columns)
    index = view.index.clamp_min(0)
    return index // columns * down // rows * across + index % columns * across // columns, down * across


def _turns(score: Tensor, window: Tensor, able: Tensor) -> Tensor:
    """``[B, N]``: how many of its window have a higher score than each token; N for those that are not ``able``."""
    n = score.shape[1]
    order = score.masked_fill(~able, -torch.inf).argsort(dim=1, descending=True, stable=True)
    mine = torch.where(able, window, torch.iinfo(window.dtype).max).gather(1, order)
    grouped, by = mine.sort(dim=1, stable=True)
    turn = torch.arange(n, device=score.device) - torch.searchsorted(grouped, grouped)
    return torch.empty_like(order).scatter_(1, order.gather(1, by), turn).masked_fill(~able, n)


def _first(turn: Tensor, score: Tensor, count: Tensor) -> Tensor:
    """``[B, N]`` bool: ``count`` ``[B]`` tokens by rising turn and falling score, none whose turn never comes."""
    n = turn.shape[1]
    order = score.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, turn.gather(1, order).argsort(dim=1, stable=True))
    return (ranks(order) < count[:, None]) & (turn < n)


def _merged(view: TokenView, chosen: Selection, made: Tensor) -> Selection:
    """``chosen``, with every other token that the tower ``made`` merged into the most similar one of it."""
    n = made.shape[1]
    position = torch.arange(n, device=made.device).expand_as(view.index)
    kept = marked(chosen.kept, n)
    rest = from_mask(made & ~kept).kept
    if not rest.shape[1]:
        return chosen
    _, best = kernels.match(view.features, rest, chosen.kept, protected=~made)
    absorber = torch.where(best >= 0, chosen.kept.gather(1, best.clamp_min(0)), -1)
    destination = torch.nn.functional.pad(torch.where(kept, position, -1), (0, 1))
    destination = destination.scatter(1, torch.where(rest >= 0, rest, n), absorber)[:, :n]
    return replace(merged(kept, destination), score=chosen.score)
