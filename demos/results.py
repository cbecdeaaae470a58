"""What the engine gives back: steps of an answer, what one side did, times in turns, lines of a comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vtprune.core.recipe import Recipe
from vtprune.core.report import Report

from .sides import Side


@dataclass(frozen=True)
class Turn:
    """One step of a streamed answer.

    Attributes:
        text: all of the answer so far.
        done: whether this is the last step.
        result: what the last step carries; ``None``: stopped before the model began.
    """

    text: str
    done: bool = False
    result: Result | None = None


@dataclass(frozen=True)
class Result:
    """What one side did with one question.

    Milliseconds are taken with the device's queue empty.

    Attributes:
        side: as it was asked for.
        name: of the recipe; of an uploaded file, the one inside.
        question: as it was put to the model.
        answer: decoded, without special tokens.
        stopped: whether somebody ended the answer before the model did.
        report: of the prefill.
        recipe: as it ran, behind the solver; ``None``: dense.
        views: one picture for each raster of ``report.grids[0]``, plain grey where none can be matched.
        overview: the number of the view that shows the whole image.
        new_tokens: with the end token.
        ttft_ms: from the question to the first token, with the preparation of the picture and without attaching and
            waiting for others.
        prefill_ms: from the start of ``generate`` to the first token.
        token_ms: the median of the later tokens; ``None``: there are fewer than three, of which none tells much.
        total_ms: from the question to the last token.
        note: why no picture could be matched to the views.
    """

    side: Side
    name: str
    question: str
    answer: str
    stopped: bool
    report: Report
    recipe: Recipe | None
    views: tuple[Image.Image, ...]
    overview: int
    new_tokens: int
    ttft_ms: float
    prefill_ms: float
    token_ms: float | None
    total_ms: float
    note: str = ""


@dataclass(frozen=True)
class Rounds:
    """Times of two sides measured in turns, milliseconds: ``(first, second)`` of every round. Both of a round saw the
    same machine, so their ratio means more than that of two medians, and the spread of the ratios tells how far to
    believe it.

    Attributes:
        prefill_ms: from the start of ``generate`` to the first token.
        ttft_ms: from the question to the first token.
    """

    prefill_ms: tuple[tuple[float, float], ...]
    ttft_ms: tuple[tuple[float, float], ...]

    @property
    def rounds(self) -> int:
        return len(self.prefill_ms)


def typical(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The round whose ratio is the median, of two in the middle the lower: on a machine that others use as well the
    medians of both sides may be of unlike rounds, and say the contrary."""
    return sorted(pairs, key=lambda pair: pair[1] / pair[0])[(len(pairs) - 1) // 2]


def ratios(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Second over first, round by round: the median, and between which two of the rounds it lies with 95 % confidence,
    by the sign test: the lowest and the highest of up to eight rounds (fewer than six are too few for 95 %), the second
    lowest and the second highest of nine, and so on."""
    quotients = sorted(second / first for first, second in pairs)
    n, k, outside = len(quotients), 1, 0.5 ** len(quotients)  # the chance that all lie above their median
    while 2 * k < n and outside + math.comb(n, k) * 0.5**n <= 0.025:
        outside += math.comb(n, k) * 0.5**n
        k += 1
    return statistics.median(quotients), quotients[k - 1], quotients[n - k]


@dataclass(frozen=True)
class Offer:
    """A recipe that there is.

    Attributes:
        name: as it is registered.
        reason: why this model does not take it; empty: it does.
    """

    name: str
    reason: str = ""


@dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Attributes:
        name: of the recipe.
        result: ``None`` where the recipe cannot run at the budget.
        right: whether the answer is; ``None`` where no right one is known.
        prefill_ms: one prefill behind a warm-up; :meth:`vtprune.demos.engine.Engine.rounds` compares times properly.
        note: why it cannot run, or at which budget it did.
    """

    name: str
    result: Result | None = None
    right: bool | None = None
    prefill_ms: float | None = None
    note: str = ""

    @property
    def answer(self) -> str | None:
        return None if self.result is None else self.result.answer

    @property
    def report(self) -> Report | None:
        return None if self.result is None else self.result.report

    @property
    def effective_tokens(self) -> float | None:
        return None if self.result is None else self.result.report.effective_tokens

    @property
    def flops_share(self) -> float | None:
        """Of the dense model's."""
        return None if self.result is None else self.result.report.flops / self.result.report.dense_flops

    @property
    def kv_share(self) -> float | None:
        """Of the dense model's."""
        return None if self.result is None else self.result.report.kv_bytes / self.result.report.dense_kv_bytes
