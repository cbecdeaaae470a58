"""What methods of videos share: tokens frame by frame, and scenes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.types import Geometry, TokenView
from ..kernels.base import wide


def shape(view: TokenView) -> tuple[int, int]:
    """Frames F of a video and tokens P of each."""
    return len(view.frames[0]), view.frames[0][0]


def per_frame(geometry: Geometry) -> int:
    """Tokens of a frame of the planned video; of an image, all."""
    return geometry.grid[0] * geometry.grid[1] if geometry.frames else geometry.tokens


def frames_kept(geometry: Geometry, keep: int | None) -> int:
    """Tokens of as many whole frames as ``keep`` has room for, one at least, and of what belongs to none."""
    assert keep is not None
    if not geometry.frames:
        return keep
    p = per_frame(geometry)
    loose = geometry.tokens - geometry.frames * p
    return loose + p * max((keep - loose) // p, 1)


def framed(values: Tensor, view: TokenView) -> Tensor:
    """``values`` ``[B, N, ...]`` of a whole video's tokens as ``[B, F, P, ...]``, without what belongs to no frame."""
    f, p = shape(view)
    return values[:, : f * p].unflatten(1, (f, p))


def spread(values: Tensor, view: TokenView, rest: float | bool) -> Tensor:
    """Back from ``[B, F, P]`` to ``[B, N]``, with ``rest`` for what belongs to no frame."""
    flat = values.flatten(1)
    tail = flat.new_full((len(flat), view.valid.shape[1] - flat.shape[1]), rest)
    return torch.cat([flat, tail], 1)


def unit(x: Tensor) -> Tensor:
    """``x`` ``[..., C]`` in at least 32 bits, of length one."""
    return torch.nn.functional.normalize(wide(x), dim=-1)


def scenes(starts: Tensor) -> tuple[Tensor, Tensor]:
    """From the frames that begin a scene, ``starts`` ``[B, F]`` bool: the scene of each frame, ``[B, F]``, and the
    frames of each scene, ``[B, F]``, 0 behind the last."""
    scene = starts.long().cumsum(1) - 1
    return scene, torch.zeros_like(scene).scatter_add_(1, scene, torch.ones_like(scene))


def placed(score: Tensor, able: Tensor) -> Tensor:
    """``[..., P]``: how many of the ``able`` have a higher ``score`` than each, ties to the lower position; those that
    are not able stand behind them."""
    score = torch.where(able, score.nan_to_num(-torch.inf), -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, able.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True))
    column = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, column)
