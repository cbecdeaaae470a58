"""Clocks: one call, calls in turns, moments within the work of a model; and what a few times tell."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..core.types import VtpruneError

WARMUP = 1  # rounds that are thrown away

timer: Callable[[], float] = time.perf_counter  # seconds; read anew at every use


def use_cpu_time(device: torch.device | str) -> None:
    """For the rest of the process one thread and its CPU time instead of wall-clock time: for machines that others use
    as well. Raises :class:`VtpruneError` for another device than a CPU."""
    global timer
    if torch.device(device).type != "cpu":
        raise VtpruneError("--cpu-time is for --device cpu")
    torch.set_num_threads(1)
    timer = time.thread_time


@contextmanager
def cpu_time() -> Iterator[None]:
    """Inside, one thread and its CPU time (:func:`use_cpu_time`); as before afterwards."""
    global timer
    before, threads = timer, torch.get_num_threads()
    torch.set_num_threads(1)
    timer = time.thread_time
    try:
        yield
    finally:
        timer = before
        torch.set_num_threads(threads)


def clock(call: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Milliseconds of one of ``calls`` calls in a row, the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = timer()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (timer() - start) / calls


def spread(values: Sequence[float]) -> dict[str, float]:
    """``median``, ``p20`` and ``p80`` (20th and 80th percentile) of at least one value."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else list(values) * 4
    return {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3]}


FEWEST = 3  # rounds that can tell a ratio from noise
ODD = 0.05  # what kernels may take longer on shorter, odd lengths


def verdict(ratios: Sequence[float], noise: Sequence[float], rest: Sequence[float]) -> str:
    """What ``ratios``, pruned over dense time in each round, tell: ``""`` that pruned is faster, or slower for the
    library's own code; ``"noise"`` nothing, for they lie on both sides of 1, are fewer than :data:`FEWEST`, or two
    dense runs differ as much; ``"?"`` that a run which computes less took longer, and neither own code nor noise
    explains it. ``noise``: dense over the dense before it; ``rest``: the ratios without the library's own code."""
    if len(ratios) < FEWEST or min(ratios) <= 1 <= max(ratios):
        return "noise"
    if max(ratios) < 1 or (left := statistics.median(rest) - 1) <= ODD:
        return ""
    return "noise" if left <= max(abs(1 - n) for n in noise) else "?"


def rounds(
    sides: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    *,
    warmup: int = WARMUP,
    calls: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of one call of each side, ``repeats`` values: the sides take turns, every second round backwards.
    ``calls`` of a side in a row (default 1); ``warmup`` rounds ahead are thrown away."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warmup + repeats):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            ms = clock(sides[name], device, 1 if calls is None else calls[name])
            if i >= warmup:
                times[name].append(ms)
    return times


class Moments:
    """Moments in the work of ``model``, for the time between two of them. On one GPU a moment is an event in its queue,
    so that nothing waits for it and a part that is measured takes no longer for that; of a model spread over several
    devices everything is waited for; on a CPU it is the timer's reading."""

    def __init__(self, model: Any):
        devices = {p.device for p in model.parameters()}
        self.gpus = [d for d in devices if d.type == "cuda"]
        self.events = len(devices) == len(self.gpus) == 1

    def now(self) -> Any:
        """This moment."""
        if self.events:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.gpus[0]))
            return event
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)
        return timer()

    def ms(self, laps: Iterable[tuple[int, Any, Any]]) -> float:
        """Milliseconds of a watch's ``laps`` together, once the device has done them."""
        return sum(
            sign * (begin.elapsed_time(end) if self.events else 1000 * (end - begin)) for sign, begin, end in laps
        )
