"""One method on questions: answers, costs, where tokens are kept, prefill time against dense in the same run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..check.attach import attach
from ..core import cost
from ..core.planning import ATTACH_OPTIONS, bind
from ..core.recipe import Recipe
from ..core.report import Report
from ..core.stopwatch import stopwatch
from ..core.types import VtpruneError
from ..inputs.chats import generate, prepare
from . import timing
from .runs import Journal
from .samples import Sample, matches, numbers, sample_seed

TIMED = 4  # questions in the batch whose prefill is timed

MAX_NEW_TOKENS = 5


@torch.no_grad()
def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    recipe: str | Recipe | None,
    *,
    batch: int = 16,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    timing: int = 0,
    journal: Journal | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Answers ``samples`` with ``recipe`` attached (``None``: the unpatched model). In float32 the result does not
    depend on ``batch``.

    Args:
        batch: questions per forward.
        seed: methods that draw at random draw for sample i of its set with :func:`sample_seed` of ``seed`` and i.
        progress: called with the number of samples after each batch.
        timing: repeats of the prefill measurement (:func:`prefill`) on the first :data:`TIMED` samples; 0 leaves it
            out.
        journal: keeps what is done; samples that it holds already are not done again.
        **overrides: as for :func:`vtprune.attach`.

    Returns:
        ``answers`` and ``correct`` per sample; means over samples: ``effective_tokens`` of ``visual_tokens``,
        ``nominal_tokens`` behind the last stage, ``layer_tokens`` per language-model layer; ``flops``, ``kv_bytes`` and
        their ``dense_`` counterparts, sums over samples; ``rows`` and ``columns``: tokens kept by the last dropping
        stage per image row and column (``None`` if none dropped); ``recipe`` as used, ``key``; with ``timing`` what
        :func:`prefill` gives.

    Raises:
        VtpruneError: no samples, or whatever :func:`vtprune.attach` refuses; :class:`RunError` if a sample cannot be
            read, the model fails or the disk is
        full: its message says what is kept.
    """
    if not samples or batch < 1:
        raise VtpruneError(f"nothing to evaluate: {len(samples)} samples in batches of {batch}")
    journal = Journal(None, {}) if journal is None else journal
    first = len(journal.records)
    seeds = [sample_seed(seed, n) for n in numbers(samples)]
    handle = None if recipe is None else attach(model, recipe, seed=seed, **overrides)
    try:
        if progress is not None and first:
            progress(first)
        for lo in range(first, len(samples), batch):
            part = samples[lo : lo + batch]
            with journal.located(f"question{'' if len(part) == 1 else 's'} {_range(part, lo)}"):
                inputs = prepare(processor, [s.picture() for s in part], [s.question for s in part]).to(
                    model.device, model.dtype
                )
                if handle is not None:
                    handle.reseed(seeds[lo : lo + batch])
                answers = generate(model, processor, inputs, MAX_NEW_TOKENS)
                report = dense_report(model, inputs) if handle is None else handle.report()
                records = [_record(s, a, report, i) for i, (s, a) in enumerate(zip(part, answers, strict=True))]
            journal.add(records, **{name: getattr(report, name) for name in COSTS})
            if progress is not None:
                progress(len(part))
        used = None if handle is None else handle.recipe
    finally:
        if handle is not None:
            handle.remove()
    out = {**_total(journal), **identity(used)}
    if timing:
        out |= prefill(model, _timed(model, processor, samples), used, repeats=timing, seed=seed, **_placing(overrides))
    return out


def _placing(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What ``attach`` has to be told again of a recipe whose budget is solved."""
    return {k: v for k, v in overrides.items() if k in ATTACH_OPTIONS and k != "seed"}


COSTS = ("flops", "dense_flops", "kv_bytes", "dense_kv_bytes")


def _range(part: Sequence[Sample], first: int) -> str:
    """Which questions, for messages."""
    last = first + len(part) - 1
    return f"{first}" if last == first else f"{first} to {last}"


def _timed(model: Any, processor: Any, samples: Sequence[Sample]) -> Any:
    part = samples[:TIMED]
    return prepare(processor, [s.picture() for s in part], [s.question for s in part]).to(model.device, model.dtype)


def _record(sample: Sample, answer: str, report: Report, i: int) -> dict[str, Any]:
    """What is kept of sample ``i`` of a batch."""
    layers = report.layer_tokens[i]
    places = kept_places(report, i)
    return {
        "answer": answer,
        "correct": matches(answer, sample.answer),
        "visual": report.visual_tokens[i],
        "nominal": report.stages[-1].tokens_out[i] if report.stages else report.visual_tokens[i],
        "layers": layers,
        "rows": None if places is None else places[0].tolist(),
        "columns": None if places is None else places[1].tolist(),
    }


def _total(journal: Journal) -> dict[str, Any]:
    """The whole run; sums go over samples in order, so that batches do not matter."""
    records = journal.records
    n = len(records)
    layers = np.sum([r["layers"] for r in records], axis=0)
    out: dict[str, Any] = {
        "answers": [r["answer"] for r in records],
        "correct": [r["correct"] for r in records],
        "effective_tokens": float(layers.mean() / n),
        "visual_tokens": sum(r["visual"] for r in records) / n,
        "nominal_tokens": sum(r["nominal"] for r in records) / n,
        "layer_tokens": (layers / n).tolist(),
    }
    for name in ("rows", "columns"):
        found = [r[name] for r in records if r[name] is not None]
        out[name] = np.sum(found, axis=0).tolist() if found and len({len(f) for f in found}) == 1 else None
    return out | {name: sum(b[name] for b in journal.batches) for name in COSTS}


def identity(recipe: Recipe | None) -> dict[str, Any]:
    """``recipe`` as used and its ``key``, the same on every machine; ``None`` is the unpatched model."""
    told = None if recipe is None else portable(recipe)
    return {"recipe": told, "key": "dense" if told is None else Recipe.from_dict(told).key()}


def portable(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a dict; of a file with weights only the name, since result files travel."""
    out = recipe.to_dict()
    for stage in out["stages"]:
        if stage["options"].get("weights"):
            stage["options"]["weights"] = Path(stage["options"]["weights"]).name
    return out


def dense_report(model: Any, inputs: Any) -> Report:
    """What one prefill of ``inputs`` costs without pruning."""
    adapter = bind(model)
    s, found = adapter.cost, adapter.parts(inputs["input_ids"], inputs)
    visual = [sum(len(p.columns) for p in parts) for parts in found]
    layers = [[n] * s.depth for n in inputs["attention_mask"].sum(1).tolist()]
    passes = [n for parts in found for p in parts for n in p.passes]
    flops = sum(cost.vision(s, 1, n, [n] * s.vdepth) for n in passes) + sum(cost.prefill(s, row) for row in layers)
    held = sum(cost.kv_bytes(s, row) for row in layers)
    return Report(
        visual_tokens=visual,
        stages=(),
        layer_tokens=[[n] * s.depth for n in visual],
        flops=flops,
        dense_flops=flops,
        kv_bytes=held,
        dense_kv_bytes=held,
        recipe="dense",
        grids=[[p.grid for p in parts] for parts in found],
    )


def kept_places(report: Report, i: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens of sample ``i`` kept per image row and per image column, by the last stage that dropped some but not all
    (``None``: none did, or the sample's images have several shapes). A merged group is spread over its members."""
    grids = {*report.grids[i]}
    partial = [s for s in report.stages if 0 < s.tokens_out[i] < report.visual_tokens[i]]
    if len(grids) != 1 or not partial:
        return None
    height, width = next(iter(grids))
    where = partial[-1].kept[i].cpu().numpy()
    share = np.ones(len(where))
    if (assignment := partial[-1].assignment) is not None:
        slot = assignment[i].cpu().numpy()
        where = np.flatnonzero(slot >= 0)
        share = 1 / np.bincount(slot[where])[slot[where]]
    where = where % (height * width)
    return np.bincount(where // width, weights=share, minlength=height), np.bincount(
        where % width, weights=share, minlength=width
    )


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
