"""PixelPrune: predictive coding of pixels, so that redundant blocks never enter the vision tower (arXiv 2604.00886)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.select import from_mask
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from ..kernels.base import rows, wide
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="pixelprune",
        paper="arXiv 2604.00886",
        idea="leaves out the blocks of pixels that their neighbours predict, in front of the tower",
        kinds=("pixels",),
        needs={"pixels": frozenset({"pixel_blocks"})},
        keep=None,
        exact=False,
        budgeted=False,
        raster=True,
        whole=True,
        dial=("threshold", 1.0, 0.0),
        cases=({"threshold": 1.0, "std": (0.25,)}, {"threshold": 1.0, "std": (0.15,)}),
    )
)
@dataclass(frozen=True, kw_only=True)
class PixelPrune(Method):
    """The pixels of what becomes one visual token, a block, are predicted from those to the left (A), above (B) and up
    to the left (C): B if C is like A and not like B, else A; in the first row A, in the first column B. A block stays
    if it is unlike its prediction; the first always does. Two blocks are alike if no pixel differs by more than
    ``threshold``; where a block does not stay, its neighbours compare with the one that stands for it. Of a step in
    time of a video the first moment is compared, with nothing of other steps.

    What is left out enters neither tower nor language model; the others keep their positions in both. How many stay
    follows from the picture: noise of JPEG files leaves nothing out at ``threshold=0``, screens and documents lose half
    of it and more."""

    threshold: float = option(
        0.0,
        "largest difference of two pixels that are alike, as a share of the range from black to white",
        least=0,
        most=1,
    )
    std: tuple[float, ...] = option(
        (0.5,),
        "standard deviations that the processor divides pixels by, one for each channel or for all (Qwen3-VL: 0.5; "
        "Qwen2-VL and Qwen2.5-VL: 0.26862954, 0.26130258, 0.27577711); without effect at threshold=0",
        above=0,
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        return (Cut(site="pixels", keep=1, adaptive=True),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        x = wide(view.source("pixel_blocks"))  # [B, N, group, channels, n]
        if len(self.std) not in (1, x.shape[3]):
            raise VtpruneError(f"pixelprune: std= has {len(self.std)} numbers, and pixels have {x.shape[3]} channels")
        x = x * x.new_tensor(self.std)[:, None]
        return from_mask(unpredicted(x.flatten(2), view.grid, self.threshold))


def unpredicted(x: Tensor, grid: tuple[int, int], threshold: float) -> Tensor:
    """``[B, N]`` bool: which of the blocks ``x`` ``[B, N, C]``, rows and columns ``grid``, their neighbours do not
    predict."""
    height, width = grid
    stands = torch.arange(height * width, device=x.device).repeat(len(x), 1)  # the block that stands for each
    kept = torch.ones_like(stands, dtype=torch.bool)

    def alike(one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().amax(-1) <= threshold

    for d in range(1, height + width - 1):  # diagonals: the neighbours of one lie on those before
        row = torch.arange(max(0, d - width + 1), min(d, height - 1) + 1, device=x.device)
        column = d - row
        at = row * width + column
        left, above = at - 1, at - width
        left, above = torch.where(column > 0, left, above), torch.where(row > 0, above, left)
        corner = torch.where((row > 0) & (column > 0), at - width - 1, left)
        a, b, c = (stands[:, place] for place in (left, above, corner))
        x_a, x_b, x_c = (rows(x, place) for place in (a, b, c))
        upper = alike(x_c, x_a) & ~alike(x_c, x_b)
        predicted = torch.where(upper, b, a)
        gone = alike(x[:, at], torch.where(upper[..., None], x_b, x_a))
        kept[:, at], stands[:, at] = ~gone, torch.where(gone, predicted, at)
    return kept
