"""One answer's times, dense and pruned in turns."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from ..check.attach import attach
from ..core.recipe import Recipe
from . import timing

PATIENCE = 20_000  # milliseconds of measured calls: no further round begins behind them
SPANS = ("first_token", "answer")


@torch.no_grad()
def turns(
    model: Any, inputs: Any, recipe: Recipe, chosen: Mapping[str, Any], *, new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Times of ``generate`` to the first token and to the end of an answer of at most ``new_tokens``, in wall-clock
    time. A pruned turn stands between two dense ones; attaching and what it plans for these pictures' sizes is in no
    time.

    Args:
        chosen: keywords for ``attach``. rounds: at most so many; none begins behind :data:`PATIENCE`.

    Returns:
        ``rounds``, ``clock``, and for each of :data:`SPANS` ``dense_ms`` and ``pruned_ms`` (medians), ``ratio`` (the
        median over rounds of pruned over the mean of the dense turns around it) and ``range`` (smallest and largest).
    """

    def once(tokens: int) -> float:
        call = lambda: model.generate(**inputs, max_new_tokens=tokens, do_sample=False)  # noqa: E731
        return timing.clock(call, model.device)

    def turn() -> tuple[float, float]:
        once(1)
        return once(1), once(new_tokens)

    pruned: list[tuple[float, float]] = []
    dense, spent = [turn()], 0.0
    while len(pruned) < rounds and (not pruned or spent < PATIENCE):
        with attach(model, recipe, **chosen):
            pruned.append(turn())
        dense.append(turn())
        spent += 2 * sum(pruned[-1]) + 2 * sum(dense[-1])
    out: dict[str, Any] = {"rounds": len(pruned), "clock": "wall clock"}
    for i, name in enumerate(SPANS):
        around = [(a[i] + b[i]) / 2 for a, b in itertools.pairwise(dense)]
        ratios = [p[i] / d for p, d in zip(pruned, around, strict=True)]
        out[name] = {
            "dense_ms": statistics.median(d[i] for d in dense),
            "pruned_ms": statistics.median(p[i] for p in pruned),
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
    return out
