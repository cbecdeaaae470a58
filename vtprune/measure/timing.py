"""Wall-clock times: one call, calls in turns, and where the time of a dense and a pruned generation goes. What is
compared is measured in turns in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..check.attach import attach
from ..core.ledger import UndoLedger
from ..core.planning import ATTACH_OPTIONS, bind
from ..core.recipe import Recipe
from ..core.stopwatch import Watch, stopwatch
from ..core.types import UnsupportedError, VtpruneError
from ..models.engine.host import backend

WARMUP = 1  # rounds that are thrown away
PARTS = ("e2e_ms", "ttft_ms", "vision_ms", "prefill_ms", "decode_ms", "scorer_ms")
COMPARED = ("e2e", "ttft", "prefill", "decode")  # pruned over dense

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


@dataclass
class _Parts:
    """``vision`` one lap for every call of the encoders, ``passes`` one for every call of the language model."""

    vision: Watch
    passes: list[tuple[int, Any, Any]] = field(default_factory=list)


@contextmanager
def _parted(model: Any, adapter: Any, moments: Moments) -> Iterator[_Parts]:
    """Watches the parts of ``model``, with what an attachment does in them; it has to be made before this and removed
    after."""
    parts, ledger = _Parts(Watch(moments.now)), UndoLedger()
    begun: list[Any] = []

    def enter(module: Any, args: tuple, kwargs: dict) -> None:
        begun[:] = [moments.now()]

    def leave(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        parts.passes.append((1, begun[0], moments.now()))

    try:
        for name in adapter.encoders():
            ledger.replace(model.base_model, name, parts.vision.timed(getattr(model.base_model, name)))
        ledger.before(adapter.lm, enter, first=True)
        ledger.after(adapter.lm, leave, first=False)
        yield parts
    finally:
        ledger.undo()


def generate(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> None:
    """Exactly ``new_tokens`` greedy tokens. Raises :class:`VtpruneError` where the model stops earlier."""
    out = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1)
    made = out.shape[1] - inputs["input_ids"].shape[1]
    if made != new_tokens:
        raise VtpruneError(
            f"the model generated {made} tokens instead of {new_tokens}, so its times cannot be compared"
        )


def _turn(model: Any, adapter: Any, inputs: Mapping[str, Any], new_tokens: int, moments: Moments) -> dict[str, Any]:
    """One turn: a generation of one token and one of ``new_tokens``, with their parts; the names of :data:`PARTS` but
    the scorer, and ``peak_bytes``."""
    device = model.device
    with _parted(model, adapter, moments) as parts:
        out: dict[str, Any] = {"ttft_ms": clock(lambda: generate(model, inputs, 1), device)}
        out["vision_ms"] = moments.ms(parts.vision.laps) if adapter.encoders() else None
        out["prefill_ms"] = moments.ms(parts.passes[:1])
        parts.passes.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        out["e2e_ms"] = clock(lambda: generate(model, inputs, new_tokens), device)
        out["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
        later = parts.passes[1:]
        out["decode_ms"] = moments.ms(later) / len(later) if later else None
    return out


@torch.no_grad()
def measure(
    model: Any,
    inputs: Mapping[str, Any],
    recipe: str | Recipe,
    *,
    new_tokens: int,
    repeats: int,
    seed: int = 0,
    **attach_options: Any,
) -> dict[str, Any]:
    """Where the time of a generation goes, without and with ``recipe``, for one batch of prompts.

    A round is dense, pruned, dense; there are ``repeats`` after one that is thrown away. Attaching, and the first
    prefill of an attachment, which plans for the images' sizes, are not part of any time.

    Args:
        inputs: what the processor returns, on the model's device.
        new_tokens: of the long generation (at least 1).
        **attach_options: as for :func:`vtprune.attach`; a budget is solved once.

    Returns:
        A JSON-safe dict. ``dense`` and ``pruned`` hold, each as ``{"median", "p20", "p80"}`` in milliseconds (``None``
        where there is no such part):

        * ``e2e_ms``, ``ttft_ms``: ``generate`` of exactly ``new_tokens`` tokens, and of one;
        * ``vision_ms``: tower and projector, ``prefill_ms``: the language model's first pass (without the head), both
            within the ``ttft_ms``;
        * ``decode_ms``: a later pass of it;
        * ``scorer_ms``: time in the library's own hooks and decisions during one prefill, in prefills of their own. It
            is part of the others, not in addition;

        ``peak_bytes``: allocated at most during the long generation beyond what was there before, on CUDA (the model's
        first device); ``None`` on a CPU, whose allocator keeps no books. ``kv_bytes``: keys and values of the real
        tokens after the prefill.

        ``ratio``: for ``e2e``, ``ttft``, ``prefill`` and ``decode`` the spread over rounds of pruned over the mean of
            the two dense ones around it.
        ``dense_over_dense``: per round the ``ttft_ms`` of the second dense turn over the first's: the noise. ``tokens``
        and ``effective_tokens``: visual tokens per prompt; ``attention``: the language model's attention
        implementation; ``recipe``: the key of what was attached.

    Raises:
        VtpruneError: a model without language model, or whatever :func:`vtprune.attach` refuses. The model is left as
            it was.
    """
    adapter = bind(model)
    if adapter.geometry.llm_layers == 0:
        raise UnsupportedError(f"{type(model).__name__} has no language model; times are those of generate()")
    if new_tokens < 1 or repeats < 1:
        raise VtpruneError(f"new_tokens={new_tokens} and repeats={repeats} must be at least 1")
    moments, options = (
        Moments(model),
        {"seed": seed, **{k: v for k, v in attach_options.items() if k in ATTACH_OPTIONS}},
    )
    with attach(model, recipe, seed=seed, **attach_options) as handle:
        solved = handle.recipe
        generate(model, inputs, 1)
        report = handle.report()
    triples = []  # dense, pruned, dense
    for _ in range(WARMUP + repeats):
        before = _turn(model, adapter, inputs, new_tokens, moments)
        with attach(model, solved, **options):
            generate(model, inputs, 1)
            pruned = _turn(model, adapter, inputs, new_tokens, moments)
        triples.append((before, pruned, _turn(model, adapter, inputs, new_tokens, moments)))
    del triples[:WARMUP]
    scorer = []
    with stopwatch(moments.now) as watch, attach(model, solved, **options):
        for _ in range(WARMUP + repeats):
            watch.laps.clear()
            clock(lambda: generate(model, inputs, 1), model.device)
            scorer.append(moments.ms(watch.laps))
    return {
        "tokens": sum(report.visual_tokens) / len(report.visual_tokens),
        "effective_tokens": report.effective_tokens,
        "attention": backend(adapter.lm.config),
        "recipe": solved.key(),
        "dense": {
            **_summary([turn for a, _, c in triples for turn in (a, c)], [0.0]),
            "kv_bytes": report.dense_kv_bytes,
        },
        "pruned": {**_summary([b for _, b, _ in triples], scorer[WARMUP:]), "kv_bytes": report.kv_bytes},
        "ratio": {name: _ratio(triples, f"{name}_ms") for name in COMPARED},
        "dense_over_dense": [c["ttft_ms"] / a["ttft_ms"] for a, _, c in triples],
    }


def _summary(turns: Sequence[Mapping[str, Any]], scorer: Sequence[float]) -> dict[str, Any]:
    values = {name: [t[name] for t in turns] for name in PARTS if name != "scorer_ms"} | {"scorer_ms": scorer}
    peaks = [t["peak_bytes"] for t in turns]
    return {
        **{name: None if None in v else spread(v) for name, v in values.items()},
        "peak_bytes": None if None in peaks else max(peaks),
    }


def _ratio(triples: Sequence[Sequence[Mapping[str, Any]]], name: str) -> dict[str, float] | None:
    if triples[0][0][name] is None:
        return None
    return spread([2 * b[name] / (a[name] + c[name]) for a, b, c in triples])
