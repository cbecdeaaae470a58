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


def loose(geometry: Geometry) -> int:
    """Tokens of the planned video that belong to no frame."""
    return geometry.tokens - max(geometry.frames, 1) * per_frame(geometry)


def frames_kept(geometry: Geometry, keep: int | None) -> int:
    """Tokens of as many whole frames as ``keep`` has room for, one at least, and of what belongs to none."""
    assert keep is not None
    if not geometry.frames:
        return keep
    p, rest = per_frame(geometry), loose(geometry)
    return rest + p * max((keep - rest) // p, 1)


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


def begins(scene: Tensor, size: Tensor) -> Tensor:
    """``[B, F]``: the first frame of each frame's scene, for what :func:`scenes` answers."""
    return (size.cumsum(1) - size).gather(1, scene)


def summed(values: Tensor, scene: Tensor) -> Tensor:
    """``values`` ``[B, F, ...]`` of frames added up over those of each ``scene`` ``[B, F]``, zeros behind the last."""
    at = scene.view(*scene.shape, *[1] * (values.ndim - 2)).expand_as(values)
    return torch.zeros_like(values).scatter_add_(1, at, values)
