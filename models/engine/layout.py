"""Where a prompt's visual tokens are: parts (one raster each) of images and videos, and the units that budgets apply
to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...core.types import VtpruneError

Grid = tuple[int, int]
Blend = tuple[Tensor, Tensor]  # of which of the tower's tokens visual tokens are means, with which weights, [n, m]


@dataclass(frozen=True)
class Raster:
    """Visual tokens that form a grid.

    Attributes:
        grid: rows and columns.
        passes: the tokens that each pass of the tower behind it makes (default: the raster is one pass).
        joins: it belongs to the frame before it.
    """

    grid: Grid
    passes: tuple[int, ...] = (-1,)
    joins: bool = False

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class RasterSpan:
    """One raster in a sample.

    Attributes:
        columns: its placeholders' positions in the sequence, ``[n]``.
        grid: rows and columns.
        image: its image's number within the sample.
        video: its video's number within the sample, -1: none.
        passes: the tokens that each pass of the tower behind it makes.
    """

    columns: Tensor
    grid: Grid
    image: int
    video: int
    passes: tuple[int, ...]


@dataclass(frozen=True)
class BudgetGroup:
    """What one budget applies to.

    Attributes:
        sample: whose.
        columns: positions in the sequence, ascending, ``[n]``.
        rasters: rows and columns of those it is made of.
        frames: tokens of each frame of a video, of each image where a unit has several, without what follows the last
            of them and was not made by the tower (new lines); empty for an image alone.
    """

    sample: int
    columns: Tensor
    rasters: tuple[Grid, ...]
    frames: tuple[int, ...] = ()


def parts(
    ids: Tensor,
    visual: Tensor,
    video_token: int | None,
    images: Iterator[list[Raster]],
    videos: Iterator[list[Raster]],
    *,
    runs: bool,
) -> list[list[RasterSpan]]:
    """Gives the placeholders ``visual`` ``[B, T]`` of ``ids`` to images and videos in order. An image is a list of
    rasters, a video one of frames.

    ``runs``: images that follow each other without a token between them are tiles of one image.

    Raises:
        VtpruneError: placeholders and images do not match.
    """
    out: list[list[RasterSpan]] = []
    for row, marks in zip(ids, visual, strict=True):
        columns = marks.nonzero()[:, 0]
        places, kinds = columns.tolist(), row[columns].tolist()
        spans: list[tuple[int, tuple]] = []  # how many placeholders each raster has, and the rest of its span
        image = video = -1
        at = 0
        while at < len(places):
            moving = kinds[at] == video_token
            rasters = next(videos if moving else images, None)
            if rasters is None:
                kind = "video" if moving else "image"
                raise VtpruneError(
                    f"the prompt has more {kind} placeholders than the inputs have {kind}s; pass the sizes that the "
                    "processor returns along"
                )
            video += moving
            for i, raster in enumerate(rasters):
                n = raster.tokens
                if len(places) < at + n or kinds[at : at + n].count(kinds[at]) < n:
                    raise VtpruneError(
                        f"the prompt's visual tokens are not whole images: the next one has {raster.grid[0]} x "
                        f"{raster.grid[1]} of them"
                    )
                joined = runs and not moving and spans and places[at - 1] == places[at] - 1
                image += not raster.joins and (moving or (i == 0 and not joined))
                passes = tuple(n if p < 0 else p for p in raster.passes)
                spans.append((n, (raster.grid, image, video if moving else -1, passes)))
                at += n
        each = columns.split([n for n, _ in spans]) if spans else ()
        out.append([RasterSpan(mine, *rest) for mine, (_, rest) in zip(each, spans, strict=True)])
    return out


def prompts(visual: Tensor, segments: Tensor | None) -> list[list[RasterSpan]]:
    """The tokens ``visual`` ``[B, T]`` of each prompt, several in a row where ``segments`` ``[B, T]`` tells them apart,
    as one row of a raster."""
    out = []
    for b, marks in enumerate(visual):
        columns = marks.nonzero()[:, 0]
        numbers = columns.new_zeros(len(columns)) if segments is None else segments.to(columns.device)[b, columns]
        each = columns.split(numbers.unique_consecutive(return_counts=True)[1].tolist())
        out.append([RasterSpan(mine, (len(mine), 1), i, -1, (len(mine),)) for i, mine in enumerate(each) if len(mine)])
    return out


def units(samples: list[list[RasterSpan]], per: str, segments: Tensor | None = None) -> list[BudgetGroup]:
    """Parts joined by ``per``: ``"tile"`` every raster alone, ``"image"`` an image (a video's frame), ``"video"`` also
    all frames of a video, ``"sample"`` everything in a sample, or in each of the prompts that are packed into a row
    (``segments`` ``[B, T]``); so does ``"prompt"``, of whose parts text is one."""
    out: list[BudgetGroup] = []
    for b, sample in enumerate(samples):
        groups: dict[object, list[RasterSpan]] = {}
        for i, part in enumerate(sample):
            whole = ("video", part.video) if part.video >= 0 else ("image", part.image)
            prompt = 0 if segments is None else int(segments[b, int(part.columns[0])])
            key = {"tile": i, "image": part.image, "video": whole, "sample": prompt, "prompt": prompt}[per]
            groups.setdefault(key, []).append(part)
        for g in groups.values():
            columns = g[0].columns if len(g) == 1 else torch.cat([p.columns for p in g])
            out.append(BudgetGroup(b, columns, tuple(p.grid for p in g), _frames(g) if per in JOINED else ()))
    return out


JOINED = ("video", "sample")  # what a budget of several frames may apply to


def _frames(unit: list[RasterSpan]) -> tuple[int, ...]:
    """Tokens of each frame of a unit (:attr:`BudgetGroup.frames`)."""
    last = max((i for i, part in enumerate(unit) if part.passes), default=-1)
    counts: dict[int, int] = {}
    for part in unit[: last + 1]:
        counts[part.image] = counts.get(part.image, 0) + len(part.columns)
    moving = all(part.video >= 0 for part in unit)
    return tuple(counts.values()) if moving or len(counts) > 1 else ()


def present(sample: list[RasterSpan], sources: Tensor, alive: Tensor, held: Tensor | None = None) -> Tensor:
    """Which of a sample's visual tokens are left, ``[n]`` bool: those ``alive`` ``[n]`` of the ones that the tower made
    (``sources`` ``[n]``, -1: it did not). A new-line token ends a row and leaves with the row's last token, unless it
    is ``held`` ``[n]``; one that has no row of its own stays."""
    out, at = alive.clone(), 0
    if not bool((sources < 0).any()):
        return out
    for part in sample:
        here = slice(at, at := at + len(part.columns))
        lines = (sources[here] < 0).view(part.grid)
        if not bool(lines.any()):
            continue
        bare = lines.all(1, keepdim=True).to(alive.device)
        lines, rows = lines.to(alive.device), alive[here].view(part.grid)
        stays = (rows & ~lines).any(1, keepdim=True) | bare
        if held is not None:
            stays = stays | held[here].view(part.grid)
        out[here] = torch.where(lines, stays, rows).flatten()
    return out


def some(grids: Tensor, pixels: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """``count`` images from ``first`` on of those whose sizes in patches are ``grids`` ``[n, 3]``: theirs, and their
    rows of ``pixels``, one per patch."""
    rows = [0, *accumulate(grids.prod(-1).tolist())]
    return grids[first : first + count], pixels[rows[first] : rows[first + count]]


def per_sample(samples: list[list[RasterSpan]], *, videos: bool = False) -> list[int]:
    """Images (without the frames of videos), or videos, in each sample."""
    return [len({p.video if videos else p.image for p in sample if (p.video >= 0) == videos}) for sample in samples]
