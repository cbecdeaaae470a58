"""Two sides measured in turns, and one recipe's line in a comparison of all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from vtprune.core.types import VtpruneError
from vtprune.measure import run, samples

from .answers import Answerer
from .results import Entry, Rounds
from .sides import Side, solved

Times = tuple[float, float]  # seconds: of the prefill, to the first token


def in_turns(
    first_token: Callable[[Side], tuple[Times, Side]],
    sides: Sequence[Side],
    repeats: int,
    limit_s: float,
    stop: threading.Event,
) -> Rounds | None:
    """Up to ``repeats`` rounds A B, B A, A B ..., as many as fit into ``limit_s`` seconds but at least one; ``None`` if
    ``stop`` came before one was complete. ``first_token`` measures a side and returns it as solved."""
    sides = list(sides)
    measured: list[list[Times]] = []  # per round, per side
    begin = time.perf_counter()
    while len(measured) < repeats and _fits(time.perf_counter() - begin, len(measured), limit_s):
        turn: list[Times] = [(0.0, 0.0)] * 2
        for i in (0, 1) if len(measured) % 2 == 0 else (1, 0):
            if stop.is_set():
                break
            turn[i], sides[i] = first_token(sides[i])
        if stop.is_set():
            break
        measured.append(turn)
    if not measured:
        return None
    prefill, ttft = (tuple((1000 * first[k], 1000 * second[k]) for first, second in measured) for k in (0, 1))
    return Rounds(prefill, ttft)


def _fits(seconds: float, rounds: int, limit_s: float) -> bool:
    """Whether one more round is likely to end before ``limit_s``."""
    return not rounds or seconds * (rounds + 1) / rounds <= limit_s


def entry(answerer: Answerer, side: Side, parts: list[dict[str, Any]], question: str, truth: str | None) -> Entry:
    """The line of ``side``; what cannot run is one with a note."""
    try:
        result = answerer.answer(side, parts, question, run.MAX_NEW_TOKENS, lambda: False, lambda text: None)
        (prefill, _), _ = answerer.first_token(solved(side, result.recipe), parts, question)
    except VtpruneError as e:
        return Entry(side.name, note=str(e))
    right = None if truth is None else samples.matches(result.answer, truth)
    return Entry(side.name, result, right, 1000 * prefill)
