"""Prefill time, dense and pruned in turns."""

from __future__ import annotations

import itertools
import statistics
from contextlib import nullcontext
from typing import Any

import torch

from ..check.attach import attach
from ..core.recipe import Recipe
from ..core.stopwatch import stopwatch
from . import timing


@torch.no_grad()
def prefill(
    model: Any,
    inputs: Any,
    recipe: Recipe | None,
    *,
    repeats: int = 5,
    seed: int = 0,
    cpu_time: bool = False,
    **extra: Any,
) -> dict[str, Any]:
    """Times of one prefill. Dense and pruned take turns, so that a busy machine slows both, and every pruned one stands
    between two dense ones: a round's ratio is pruned over their mean. Attaching and the first prefill behind it, which
    plans for the pictures' sizes, are in no time.

    Args:
        repeats: rounds, after one dense prefill that is thrown away. cpu_time: one thread's CPU time, for machines that
            others use as well.

    Returns:
        ``prefill_ms`` and ``dense_prefill_ms``, medians in milliseconds; ``prefill_ratio`` the median of the rounds'
        ratios, ``prefill_range`` the smallest and largest; ``prefill_verdict`` what they tell
        (:func:`vtprune.measure.timing.verdict`). Of ``recipe`` ``None`` the dense time alone.
    """
    with timing.cpu_time() if cpu_time else nullcontext():
        moments = timing.Moments(model)

        def once() -> float:
            return timing.clock(lambda: model(**inputs, logits_to_keep=1, use_cache=True), model.device)

        once()
        dense, pruned, own = [once()], [], []
        for _ in range(repeats):
            if recipe is not None:
                with stopwatch(moments.now) as watch, attach(model, recipe, seed=seed, **extra):
                    once()
                    watch.laps.clear()
                    pruned.append(once())
                    own.append(moments.ms(watch.laps))
            dense.append(once())
    if recipe is None:
        alone = statistics.median(dense)
        return {"prefill_ms": alone, "dense_prefill_ms": alone, "prefill_ratio": 1.0}
    both = [(a + b) / 2 for a, b in itertools.pairwise(dense)]
    ratios = [p / d for p, d in zip(pruned, both, strict=True)]
    rest = [(p - o) / d for p, o, d in zip(pruned, own, both, strict=True)]
    out: dict[str, Any] = {"prefill_ms": statistics.median(pruned), "dense_prefill_ms": statistics.median(dense)}
    out |= {"prefill_ratio": statistics.median(ratios), "prefill_range": [min(ratios), max(ratios)]}
    return {**out, "prefill_verdict": timing.verdict(ratios, [b / a for a, b in itertools.pairwise(dense)], rest)}
