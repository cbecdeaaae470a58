"""The rank of every token as a colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .token_states import ranks

if TYPE_CHECKING:
    from ..core.report import Report

# dark blue: ranked last, yellow: first
HEAT = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))


def warmth(report: Report, sample: int, stage: int) -> np.ndarray | None:
    """``[tokens]`` from 0 (ranked last) to 1 (first) by the nearest scores at or before ``stage``, NaN where not
    ranked; ``None`` if there are none."""
    known = [r for s in report.stages[: stage + 1] if (r := ranks(s, sample)) is not None]
    if not known:
        return None
    rank, ranked = known[-1]
    return np.where(rank > 0, 1 - (rank - 1) / np.maximum(ranked - 1, 1), np.nan)


def tint(warm: np.ndarray) -> np.ndarray:
    """The colours of :func:`warmth`, ``[tokens, 3]``."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(np.nan_to_num(warm), stops, channel) for channel in np.array(HEAT).T], 1)
