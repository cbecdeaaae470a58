"""HiRED: "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models"
(arXiv 2408.10945, AAAI 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ..core.select import ranks, top
from ..core.types import Action, Geometry, Selection, TokenView, UnsupportedError
from ._tower import NEEDS, class_attention, last_seen
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="hired",
        paper="arXiv 2408.10945",
        idea="shares the budget among an image's tiles by the first block's attention, and ranks in each by the last's",
        kinds=("projector", "vision"),
        needs={**NEEDS, "projector": frozenset({"origin"})},
        keep=0.2,
        whole=True,
        score="class attention of the last block that is used, tile by tile",
        cases=({"keep": 0.75}, {"keep": 3}),
    )
)
@dataclass(frozen=True, kw_only=True)
class HiRED(Method):
    """Of the budget T the small version of the whole image has ``int(overview T)``; its ``int(content n)`` tokens of
    the highest class attention in the first block share the rest among the tiles, by how many of them lie in each. In
    every raster the tokens of the highest class attention in the last block that is used stay.

    Shares are whole numbers by largest remainders, and what a raster cannot take goes to the others (the official code
    leaves it); new-line tokens come last of all (it drops them). An image of one raster keeps the best T. Towers
    without a class token: the attention that a patch receives."""

    overview: float = option(0.5, "share of the budget for the small version of the whole image", least=0, most=1)
    content: float = option(
        0.5, "share of that version's tokens whose places share the rest of the budget among the tiles", least=0, most=1
    )
    tiles: str = option(
        "plane",
        "where a tile lies in the small version: 'plane' as in the image (paper); 'chunks' the small version in raster "
        "order, cut into as many runs of tokens as there are tiles (official code)",
        choices=("plane", "chunks"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        last = last_seen("hired", geometry)
        if "projector" not in geometry.provides:
            raise UnsupportedError(
                f"hired decides behind the projector, where the tiles of an image meet, and {geometry.family} has none"
            )
        notes = [Cut(site=f"vision.{i}", action=Action.NOTE) for i in sorted({0, last})]
        data = {"last": last, "overview": geometry.overview, "family": geometry.family}
        return (*notes, Cut(site="projector", keep=keep, data=data))

    def note(self, view: TokenView, cut: Cut) -> Tensor:
        return class_attention(view)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        deep, keep = view.noted(f"vision.{cut.data['last']}"), cut.keep or 0
        if view.rasters:
            group, quotas = self._quotas(view, cut, keep)
        else:
            group, quotas = torch.zeros_like(view.index), [[keep]] * len(view.index)
        n = group.shape[1]
        order = deep.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = ranks(order)
        # by raster, then by rank: place within the raster
        order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
        mine = group.gather(1, order)
        quota = torch.tensor(quotas, device=order.device)
        sizes = torch.zeros_like(quota).scatter_add_(1, group, torch.ones_like(group))
        place = torch.arange(n, device=order.device) - (sizes.cumsum(1) - sizes).gather(1, mine)
        chosen = torch.zeros_like(view.valid).scatter_(1, order, place < quota.gather(1, mine))
        best = top((n * chosen.long() - rank).double(), keep, view.valid, view.protected, span=view.extent)
        return replace(best, score=deep)

    def _quotas(self, view: TokenView, cut: Cut, keep: int) -> tuple[Tensor, list[list[int]]]:
        """Of units of several rasters each token's group ``[B, N]``: 0 the small version, then the tiles, last what no
        pass of the tower made; and how many tokens of each group stay, unit by unit."""
        rasters = view.rasters[0]
        image, number = view.source("origin").unbind(-1)  # [B, N] each
        if bool((image != image[:, :1]).any()):
            raise UnsupportedError(
                "hired shares the budget of one image among its tiles, and here a budget is for several images: "
                "per='image'"
            )
        starts, which = _starts(rasters), cut.data["overview"] % len(rasters)
        begin, end = starts[which], starts[which + 1]
        column = torch.arange(number.shape[1], device=number.device)
        small = ((column >= begin) & (column < end)).expand_as(number)
        tiled = ~small & (number >= 0)
        if not bool(tiled.any()):  # one raster and a new-line token
            return (number < 0).long(), [[min(keep, end - begin), keep]] * len(number)
        first = torch.where(tiled, number, number.amax()).amin(1, keepdim=True)
        tile = torch.where(tiled, number - first, 0)
        count = int(tile.max()) + 1
        group = torch.where(small, 0, torch.where(tiled, tile + 1, count + 1))
        content = view.noted("vision.0").masked_fill(~small, torch.nan)
        best = top(content, int((end - begin) * self.content), small).kept - begin  # [B, m]
        fallen = _counts(self._where(view, cut, tiled, tile).gather(1, best), count)
        quotas = []
        for weight, (most, *room, lines) in zip(fallen, _counts(group, count + 2), strict=True):
            total = min(keep, most + sum(room) + lines)
            each = shares(total - min(int(total * self.overview), most), weight, room)
            whole = min(most, total - sum(each))
            quotas.append([whole, *each, total - sum(each) - whole])
        return group, quotas

    def _where(self, view: TokenView, cut: Cut, tiled: Tensor, tile: Tensor) -> Tensor:
        """``[B, m]``: the tile in which each token of the small version lies; ``tile`` ``[B, N]`` that of the tokens
        that are ``tiled``."""
        rasters, which = view.rasters[0], cut.data["overview"] % len(view.rasters[0])
        rows, columns = rasters[which]
        at = torch.arange(rows * columns, device=tile.device)
        if self.tiles == "chunks":
            return at * (tile.amax(1, keepdim=True) + 1) // len(at)
        planes = [i for i in range(len(rasters)) if i != which]
        if len(planes) > 1:
            raise UnsupportedError(
                f"{cut.data['family']} does not say how the {len(planes)} tiles of an image lie side by side, which "
                "hired's tiles='plane' needs; tiles='chunks' does not"
            )
        start, (height, width) = _starts(rasters)[planes[0]], rasters[planes[0]]
        made = int(tiled[0, start : start + width].sum())  # without the new-line token of each row
        down = (2 * (at // columns) + 1) * height // (2 * rows)
        right = (2 * (at % columns) + 1) * made // (2 * columns)
        return tile[:, start + down * width + right]


def _starts(rasters: Sequence[tuple[int, int]]) -> list[int]:
    """Where each of the rasters begins among the tokens of all, and where the last one ends."""
    return [0, *accumulate(r * c for r, c in rasters)]


def _counts(values: Tensor, count: int) -> list[list[int]]:
    """Row by row of ``values`` ``[B, m]``, how often each number below ``count`` stands there."""
    zeros = torch.zeros(len(values), count, dtype=torch.long, device=values.device)
    return zeros.scatter_add_(1, values, torch.ones_like(values)).tolist()


def shares(total: int, weight: Sequence[int], room: Sequence[int]) -> list[int]:
    """``total`` shared in proportion to ``weight``, by largest remainders, no share above its ``room``: what one cannot
    take goes to the others; without any weight left, evenly."""
    given = [0] * len(room)
    while (left := min(total, sum(room)) - sum(given)) > 0:
        free = [i for i in range(len(room)) if given[i] < room[i]]
        mass = [weight[i] for i in free] if any(weight[i] for i in free) else [1] * len(free)
        parts = [divmod(left * m, sum(mass)) for m in mass]
        more = sorted(range(len(free)), key=lambda i: -parts[i][1])[: left - sum(whole for whole, _ in parts)]
        for i, (g, (whole, _)) in enumerate(zip(free, parts, strict=True)):
            given[g] = min(given[g] + whole + (i in more), room[g])
    return given
