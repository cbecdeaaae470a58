"""What the site-free baselines share: where they cut, and the cells of the image plane."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..core.select import bands
from ..core.types import Geometry, VtpruneError


def place(name: str, geometry: Geometry, site: str | None) -> str:
    """``site`` checked, or the default: behind the projector, in a bare ViT behind the middle block, in a model without
    images in front of its first layer."""
    if site is None:
        defaults = {"projector": "projector", "vision": f"vision.{geometry.vision_layers // 2}", "llm": "llm.0"}
        return next(at for kind, at in defaults.items() if kind in geometry.provides)
    kind, _, number = site.partition(".")
    count = {"projector": 0, "vision": geometry.vision_layers, "llm": geometry.llm_layers}.get(kind)
    if count is None or kind not in geometry.provides:
        raise VtpruneError(
            f"{name}: site={site!r} does not exist here; there are "
            f"{', '.join(k for k in geometry.provides if k != 'pixels')}"
        )
    if kind == "projector" and not number:
        return site
    if number not in map(str, range(count)):
        raise VtpruneError(f"{name}: site={site!r} does not exist here; {kind} has layers 0..{count - 1}")
    return site


@lru_cache(maxsize=256)
def cells(rows: int, columns: int, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``kept`` ``[N]`` bool marks each cell's central token, ``destination`` ``[N]`` the central token of every token's
    cell. Made once: read only."""
    cell = bands(rows, columns, keep)
    at = torch.stack([torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns], 1)
    n = torch.arange(rows * columns)
    # Means are compared as whole numbers, times the cell's size: ties are true ties, and go to the first token.
    size = torch.zeros(keep, dtype=torch.long).index_add_(0, cell, torch.ones_like(n))
    total = torch.zeros(keep, 2, dtype=torch.long).index_add_(0, cell, at)
    far = (at * size[cell][:, None] - total[cell]).square().sum(1)
    nearest = torch.full((keep,), torch.iinfo(torch.long).max).scatter_reduce_(0, cell, far, "amin")
    centre = torch.full((keep,), len(n)).scatter_reduce_(0, cell, torch.where(far == nearest[cell], n, len(n)), "amin")
    return centre[cell] == n, centre[cell]
