"""Rows that say where they stand: an encoded image for an engine that would number its rows anew.

Behind its ``W`` numbers each row carries where the whole image has it, and how many positions the whole image takes:
four whole numbers of three digits to the base 128, each digit a channel of its own, so that half precision holds them
exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.types import VtpruneError

AXES, BASE, DIGITS = 3, 128, 3
CHANNELS = (AXES + 1) * DIGITS
LARGEST = BASE**DIGITS - 1


def placed(rows: Tensor, offsets: Tensor, span: int) -> Tensor:
    """``rows`` ``[K, W]`` with their places, ``[K, W + CHANNELS]``.

    Args:
        rows: what stands for the image.
        offsets: by axis each row's position behind that of the image, ``[3, K]``.
        span: positions that the whole image takes.

    Raises:
        VtpruneError: a position that no place can hold.
    """
    numbers = torch.cat([offsets, torch.full_like(offsets[:1], span)])  # [4, K]
    if not 0 < span <= LARGEST or bool((offsets < 0).any()) or bool((offsets >= span).any()):
        raise VtpruneError(f"an image of {span} positions has no places for its rows, or a row lies outside of it")
    powers = torch.tensor([BASE**d for d in range(DIGITS)], device=numbers.device)
    digits = numbers[..., None] // powers % BASE  # [4, K, DIGITS]
    return torch.cat([rows, digits.permute(1, 0, 2).flatten(1).to(rows.dtype)], dim=1)


def parted(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``wide`` ``[K, W + CHANNELS]`` the rows ``[K, W]``, their offsets ``[3, K]`` and of each row the span of its
    image ``[K]``."""
    rows, digits = wide[:, :-CHANNELS], wide[:, -CHANNELS:].unflatten(1, (AXES + 1, DIGITS)).long()
    numbers = (digits * torch.tensor([BASE**d for d in range(DIGITS)], device=wide.device)).sum(2).T  # [4, K]
    return rows, numbers[:AXES], numbers[AXES]


def check(wide: Tensor, width: int) -> int:
    """The span of an image whose rows are ``wide`` ``[K, width + CHANNELS]``. Raises :class:`VtpruneError` for rows
    that :func:`placed` did not make."""
    if wide.ndim != 2 or wide.shape[1] != width + CHANNELS:
        raise VtpruneError(
            f"encoded rows have {width + CHANNELS} numbers here, {width} of the model and {CHANNELS} that say where "
            f"they stand (Encoded.placed); these have the shape {list(wide.shape)}"
        )
    digits = wide[:, width:]
    whole = bool(((digits >= 0) & (digits < BASE) & (digits == digits.floor())).all())
    _, offsets, spans = parted(wide) if whole else (None, torch.ones(1), torch.zeros(1))
    if not len(wide) or not whole or bool((spans != spans[0]).any()) or bool((offsets >= spans[0]).any()):
        raise VtpruneError("these encoded rows do not say where they stand: make them with vtprune (Encoded.placed)")
    if not bool(torch.isfinite(wide).all()):
        raise VtpruneError("these encoded rows hold values that are not finite")
    return int(spans[0])
