"""Clustering by density peaks with nearest neighbours (DPC-KNN: Rodriguez and Laio, Science 344, 2014; Du, Ding and
Jia, 2016), as methods of videos use it within frames. Plain PyTorch: frames are small, and nothing here is fused."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import CHUNK


def distances(x: Tensor) -> Tensor:
    """``[..., P, P]``: squared Euclidean distances of the tokens ``x`` ``[..., P, C]``, divided by C."""
    far = torch.cdist(x, x).square()
    return (far + far.mT) / (2 * x.shape[-1])  # matrix products round both ways differently, and ties would not tie


@torch.no_grad()
def prominence(x: Tensor, able: Tensor, neighbours: int) -> Tensor:
    """``[..., P]``: density times distance of the tokens ``x`` ``[..., P, C]`` among those that are ``able`` ``[...,
    P]`` (density peaks with nearest neighbours, DPC-KNN): the density is ``exp(-m)``, m the mean of the squared
    distances to the nearest ``neighbours``, the token itself among them; the distance that to the nearest denser token
    (of equal ones the lower position is denser), of the densest that to the farthest. Distances are divided by the
    root of C."""
    far = distances(x).masked_fill(~able[..., None, :], torch.inf)
    itself = torch.eye(far.shape[-1], dtype=torch.bool, device=far.device)
    far = far.masked_fill(itself, 0)  # rounding would leave more
    near = far.topk(min(neighbours, far.shape[-1]), largest=False).values
    there = near.isfinite()
    density = torch.exp(-torch.where(there, near, 0).sum(-1) / there.sum(-1).clamp_min(1))
    density = torch.where(able, density, -1)
    below = itself.new_ones(itself.shape).tril(-1)  # [i, j]: j stands in front of i
    i, j = density[..., :, None], density[..., None, :]
    denser = able[..., None, :] & ((j > i) | ((j == i) & below))
    nearest = far.masked_fill(~denser, torch.inf).amin(-1)
    farthest = far.masked_fill(~able[..., None, :], -torch.inf).amax(-1)
    return density * torch.where(denser.any(-1), nearest, farthest).clamp_min(0).sqrt()


@torch.no_grad()
def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """``[..., P]``: the position of the centre that each of the tokens ``x`` ``[..., P, C]`` is nearest to, of those
    that ``centres`` ``[..., P]`` marks (their own); 0 without any."""
    far = distances(x).masked_fill(~centres[..., None, :], torch.inf)
    own = torch.arange(far.shape[-1], device=far.device)
    return torch.where(centres, own, far.argmin(-1))


@torch.no_grad()
def closest(x: Tensor, groups: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, N, G]``: how far each of the tokens ``x`` ``[B, N, C]`` is from the nearest member of each of the
    ``groups`` ``[B, G, A, C]``, of which only those that are ``there`` ``[B, G, A]`` count, and which one that is."""
    b, g, a, _ = groups.shape
    to, out = groups.flatten(1, 2), []
    for part in x.split(max(CHUNK // (b * g * a), 1), 1):
        far = torch.cdist(part, to).unflatten(2, (g, a)).masked_fill(~there[:, None], torch.inf)
        out.append(far.min(-1))
    return torch.cat([o.values for o in out], 1), torch.cat([o.indices for o in out], 1)
