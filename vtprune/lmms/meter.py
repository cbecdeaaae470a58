"""What a run cost: tokens, FLOPs, times and memory of every generation, summed up."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..core.report import Report

SUMS = ("visual_tokens", "effective_tokens", "flops", "dense_flops", "kv_bytes", "dense_kv_bytes")


class FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first token was there."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.at = now, 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        self.at = self.at or self.now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, with the device's queue empty."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def generate(
    model: Any, inputs: Any, report: Callable[[], Report], asked: float | None = None, **kwargs: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """``model.generate`` and what it cost, sums over the batch.

    Args:
        report: gives the report of the prefill that has just run.
        asked: :func:`clock` when the questions arrived, so that the time to the first token holds their preparation;
            ``None``: now.

    Returns:
        The output, and ``samples``, ``new_tokens`` (the longest answer's), :data:`SUMS` (tokens and bytes summed over
        samples), ``seconds`` of everything, ``ttft`` from ``asked`` to the first token, ``prefill`` the model's part of
        it (tower, projector, prompt), ``decode`` all later tokens.
    """
    now = clock(model.device)
    start = now()
    first = FirstToken(now)
    criteria = StoppingCriteriaList([first, *kwargs.pop("stopping_criteria", ())])
    out = model.generate(**inputs, **kwargs, stopping_criteria=criteria)
    end = now()
    before = start if asked is None else asked
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    samples, length = inputs["input_ids"].shape
    cost = {"samples": samples, "new_tokens": sequences.shape[1] - length, **spent(report(), samples)}
    return out, {
        **cost,
        "seconds": end - before,
        "ttft": first.at - before,
        "prefill": first.at - start,
        "decode": end - first.at,
    }


def spent(report: Report, samples: int) -> dict[str, float]:
    """:data:`SUMS` of a prefill; beams count as the work that they are, their tokens once."""
    cost: dict[str, float] = {
        "visual_tokens": sum(report.visual_tokens) * samples / len(report.visual_tokens),
        "effective_tokens": report.effective_tokens * samples,
    }
    return cost | {name: getattr(report, name) for name in SUMS[2:]}


def scored(report: Report, seconds: float) -> dict[str, Any]:
    """The cost of a forward pass that scores given words, as :func:`generate` counts."""
    samples = len(report.visual_tokens)
    return {
        "samples": samples,
        "new_tokens": 0,
        **spent(report, samples),
        "seconds": seconds,
        "ttft": seconds,
        "prefill": seconds,
        "decode": 0.0,
    }


def summary(costs: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Means per sample: tokens, FLOPs, cache bytes; milliseconds per batch to the first token, of the prefill, and per
    later token; peak memory of the device, or on a CPU of the process."""
    samples = sum(c["samples"] for c in costs)
    out: dict[str, Any] = {"samples": samples, "batches": len(costs)}
    if not samples:
        return out
    out |= {name: sum(c[name] for c in costs) / samples for name in SUMS}
    out |= {f"{name}_ms": 1000 * sum(c[name] for c in costs) / len(costs) for name in ("ttft", "prefill")}
    later = sum(max(c["new_tokens"] - 1, 0) for c in costs)
    out["decode_ms_per_token"] = 1000 * sum(c["decode"] for c in costs) / later if later else 0.0
    out["samples_per_second"] = samples / sum(c["seconds"] for c in costs)
    out["peak_memory_bytes"] = peak_memory(device)
    return out


def peak_memory(device: torch.device) -> int:
    """Bytes: what tensors held at most on a CUDA device, elsewhere the largest resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
