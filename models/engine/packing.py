"""Which patches of several rasters stand where in the rows that a vision tower's blocks see, and what of them the
language model gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from ...core.select import ranks
from ...core.types import UnsupportedError
from .layout import Grid

CACHED = 256  # shapes of images whose order is remembered


@dataclass(frozen=True, eq=False)
class PackedRaster:
    """One image, tile or step in time, whose patches attend to each other.

    Attributes:
        grid: rows and columns of patches.
        place: where each of them stands among the raster's rows, in raster order, ``[n]``.
        rows: that the raster has; some may hold patches that nothing attends to.
        tokens: rows and columns of the visual tokens that it becomes.
        windows: the patches of each window, padded with -1, in the order of the rows, ``[W, m]``; ``None``: no block
            attends within windows.
    """

    grid: Grid
    place: Tensor
    rows: int
    tokens: Grid
    windows: Tensor | None = None


@lru_cache(maxsize=CACHED)
def in_order(rows: int, columns: int, fold: int) -> PackedRaster:
    """Patches in raster order; what ``fold`` does not divide is left out behind the tower."""
    return PackedRaster((rows, columns), torch.arange(rows * columns), rows * columns, (rows // fold, columns // fold))


@lru_cache(maxsize=CACHED)
def in_corner(rows: int, columns: int, whole: Grid, fold: int) -> PackedRaster:
    """The upper left corner of a tile of ``whole`` patches, the rest of which nothing attends to."""
    place = torch.arange(whole[0] * whole[1]).view(whole)[:rows, :columns].flatten()
    return PackedRaster((rows, columns), place, whole[0] * whole[1], (whole[0] // fold, whole[1] // fold))


@lru_cache(maxsize=CACHED)
def in_squares(rows: int, columns: int, fold: int, window: int | None = None) -> PackedRaster:
    """Squares of ``fold`` x ``fold`` patches that become one token follow each other, in raster order; with ``window``,
    in windows of as many squares along each side, these in raster order."""
    row, column = torch.arange(rows)[:, None].expand(rows, columns), torch.arange(columns).expand(rows, columns)
    side = fold * (window or max(rows, columns, 1))
    down, across = row // side, column // side
    patch = torch.arange(rows * columns).view(rows, columns)
    order = patch.flatten()
    # from the innermost to the outermost
    for key in (column % fold, row % fold, column // fold, row // fold, across, down):
        order = order[key.flatten()[order].argsort(stable=True)]
    place = ranks(order[None])[0]
    inside = None
    if window is not None:
        number = (down * (int(across.max()) + 1) + across).flatten()[order] if len(order) else order
        counts = number.unique(return_counts=True)[1].tolist()
        inside = torch.nn.utils.rnn.pad_sequence(order.split(counts), batch_first=True, padding_value=-1)
    return PackedRaster((rows, columns), place, len(order), (rows // fold, columns // fold), inside)


@lru_cache(maxsize=CACHED)
def squares_of(raster: PackedRaster) -> tuple[Tensor, Tensor]:
    """Of a raster's tokens, in raster order: the rows of their patches ``[N, fold^2]``, and which window each is in
    ``[N]`` (zeros: there are none). Raises :class:`UnsupportedError` where patches are left over."""
    (rows, columns), (down, across) = raster.grid, raster.tokens
    high, wide = rows // max(down, 1), columns // max(across, 1)
    if down * high != rows or across * wide != columns:
        raise UnsupportedError(
            f"an image of {rows} x {columns} patches leaves some that become no visual token; stages in the tower need "
            "images whose sides its squares divide"
        )
    patches = torch.arange(rows * columns).view(down, high, across, wide).transpose(1, 2).reshape(-1, high * wide)
    window = torch.zeros(len(patches), dtype=torch.long)
    if raster.windows is not None:
        there = raster.windows >= 0
        number = torch.arange(len(there))[:, None].expand_as(there)[there]
        window = torch.empty(rows * columns, dtype=torch.long).index_put((raster.windows[there],), number)[
            patches[:, 0]
        ]
    return raster.place[patches].sort(1).values, window


@dataclass(frozen=True, eq=False)
class Kind:
    """Rasters of one pass that are alike: ``numbers`` among all of the pass; ``at`` ``[g, n]`` the rows of their
    patches, ``flat`` ``[g, n]`` their places among the patches of all rasters."""

    raster: PackedRaster
    numbers: list[int]
    at: Tensor
    flat: Tensor


@lru_cache(maxsize=CACHED)
def window_sizes(raster: PackedRaster) -> tuple[int, ...]:
    """The patches of each of its windows."""
    return () if raster.windows is None else tuple((raster.windows >= 0).sum(1).tolist())


class Packing:
    """What one pass of a tower sees: its ``rasters``, one behind the other in one sequence, or the rows of a batch
    (``batched``)."""

    def __init__(self, rasters: Sequence[PackedRaster], device: torch.device, *, batched: bool = False):
        self.rasters, self.device, self.batched = list(rasters), device, batched
        self.starts = [0, *accumulate(r.rows for r in self.rasters)]  # of the rows
        self.patches = [0, *accumulate(len(r.place) for r in self.rasters)]
        self.known: list[tuple[Tensor, bool]] = []

    @cached_property
    def kinds(self) -> list[Kind]:
        found: dict[int, list[int]] = {}
        for i, raster in enumerate(self.rasters):
            found.setdefault(id(raster), []).append(i)
        kinds = []
        for numbers in found.values():
            raster = self.rasters[numbers[0]]
            begin, flat = (torch.tensor([s[i] for i in numbers])[:, None] for s in (self.starts, self.patches))
            n = torch.arange(len(raster.place))
            kinds.append(Kind(raster, numbers, (begin + raster.place).to(self.device), (flat + n).to(self.device)))
        return kinds

    @property
    def windows(self) -> list[int]:
        """Where windows begin, and where the last one ends."""
        return [0, *accumulate(n for r in self.rasters for n in window_sizes(r))]
