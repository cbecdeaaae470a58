"""What a report says of every original token of a sample: which token stands for it behind each stage, and its rank.

Indices are a sample's original visual tokens, raster order on ``grid`` (rows, columns), as :class:`vtprune.Report`
gives them.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from ..core.types import VtpruneError

if TYPE_CHECKING:
    from ..core.report import Report, StageReport


def check_sample(report: Report, sample: int) -> None:
    if not 0 <= sample < len(report.visual_tokens):
        raise VtpruneError(f"the report has {len(report.visual_tokens)} samples, there is no sample {sample}")


def starts(report: Report, sample: int) -> list[int]:
    """Where the tokens of each raster of a sample start, and, last, their number."""
    return [0, *accumulate(rows * columns for rows, columns in report.grids[sample])]


def owners(report: Report, sample: int, number: int | None = None) -> list[np.ndarray]:
    """Per stage, for every original token of the sample (of its raster ``number``), ``[tokens]``, the token of the
    sample that stands for it: itself if kept, another if merged, -1 if dropped. A routed token comes back with those
    that were merged into it before."""
    bounds = starts(report, sample)
    stood, out = np.arange(bounds[-1]), []
    for stage in report.stages:
        kept = stage.kept[sample].cpu().numpy()
        if stage.assignment is not None:
            slot = stage.assignment[sample].cpu().numpy()
            now = np.where(slot >= 0, kept[slot], -1) if len(kept) else np.full(len(stood), -1)
            stood = np.where(now >= 0, now, stood)
        else:
            now = np.where(np.isin(stood, kept), stood, -1)
        out.append(now)
    if number is None:
        return out
    number %= len(bounds) - 1
    return [now[bounds[number] : bounds[number + 1]] for now in out]


def ranks(stage: StageReport, sample: int) -> tuple[np.ndarray, np.ndarray] | None:
    """``rank`` ``[tokens]`` of every original token among those it shared a budget with: 1 has the best score, ties go
    to the lower index, 0 is not ranked; and how many were ``ranked`` there, ``[tokens]``. ``None`` for a stage without
    scores."""
    if stage.scores is None or stage.units is None:
        return None
    scores, units = stage.scores[sample].cpu().numpy(), stage.units[sample].cpu().numpy()
    rank, ranked = np.zeros(len(scores), dtype=int), np.zeros(len(scores), dtype=int)
    for unit in np.unique(units[units >= 0]):
        mine = np.flatnonzero((units == unit) & ~np.isnan(scores))
        rank[mine[np.argsort(-scores[mine], kind="stable")]] = np.arange(len(mine)) + 1
        ranked[mine] = len(mine)
    return rank, ranked
