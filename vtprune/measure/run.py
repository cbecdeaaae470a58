"""One method on questions: answers, costs, where tokens are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..check.attach import attach
from ..core import cost
from ..core.handle import Handle
from ..core.planning import ATTACH_OPTIONS, bind
from ..core.recipe import Recipe
from ..core.report import Report
from ..core.types import VtpruneError
from ..inputs.chats import generate, prepare
from .prefill import prefill
from .runs import Journal
from .samples import Sample, matches, numbers, sample_seed

TIMED = 4  # questions in the batch whose prefill is timed
MAX_NEW_TOKENS = 5
COSTS = ("flops", "dense_flops", "kv_bytes", "dense_kv_bytes")


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
            read, the model fails or the disk is full: its message says what is kept.
    """
    if not samples or batch < 1:
        raise VtpruneError(f"nothing to evaluate: {len(samples)} samples in batches of {batch}")
    journal = Journal(None, {}) if journal is None else journal
    handle = None if recipe is None else attach(model, recipe, seed=seed, **overrides)
    try:
        _answer(model, processor, samples, handle, journal, batch, seed, progress)
        used = None if handle is None else handle.recipe
    finally:
        if handle is not None:
            handle.remove()
    out = {**_total(journal), **identity(used)}
    if timing:
        inputs = timed_inputs(model, processor, samples)
        out |= prefill(model, inputs, used, repeats=timing, seed=seed, **placing(overrides))
    return out


def _answer(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    handle: Handle | None,
    journal: Journal,
    batch: int,
    seed: int,
    progress: Callable[[int], object] | None,
) -> None:
    """Answers what ``journal`` does not hold yet, batch after batch, into it."""
    first = len(journal.records)
    seeds = [sample_seed(seed, n) for n in numbers(samples)]
    if progress is not None and first:
        progress(first)
    for lo in range(first, len(samples), batch):
        part = samples[lo : lo + batch]
        with journal.located(f"question{'' if len(part) == 1 else 's'} {_range(part, lo)}"):
            inputs = _inputs(model, processor, part)
            if handle is not None:
                handle.reseed(seeds[lo : lo + batch])
            answers = generate(model, processor, inputs, MAX_NEW_TOKENS)
            report = dense_report(model, inputs) if handle is None else handle.report()
            records = [_record(s, a, report, i) for i, (s, a) in enumerate(zip(part, answers, strict=True))]
        journal.add(records, **{name: getattr(report, name) for name in COSTS})
        if progress is not None:
            progress(len(part))


def _inputs(model: Any, processor: Any, samples: Sequence[Sample]) -> Any:
    inputs = prepare(processor, [s.shown() for s in samples], [s.question for s in samples])
    return inputs.to(model.device, model.dtype)


def placing(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What ``attach`` has to be told again of a recipe whose budget is solved."""
    return {k: v for k, v in overrides.items() if k in ATTACH_OPTIONS and k != "seed"}


def _range(part: Sequence[Sample], first: int) -> str:
    """Which questions, for messages."""
    last = first + len(part) - 1
    return f"{first}" if last == first else f"{first} to {last}"


def timed_inputs(model: Any, processor: Any, samples: Sequence[Sample]) -> Any:
    """The batch whose prefill is timed."""
    return _inputs(model, processor, samples[:TIMED])


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
        counts = [r[name] for r in records if r[name] is not None]
        alike = len({len(c) for c in counts}) == 1
        out[name] = np.sum(counts, axis=0).tolist() if alike else None
    return out | {name: sum(b[name] for b in journal.batches) for name in COSTS}


def identity(recipe: Recipe | None) -> dict[str, Any]:
    """``recipe`` as used and its ``key``, the same on every machine; ``None`` is the unpatched model."""
    if recipe is None:
        return {"recipe": None, "key": "dense"}
    used = portable(recipe)
    return {"recipe": used, "key": Recipe.from_dict(used).key()}


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
    shapes, parts = adapter.cost, adapter.parts(inputs["input_ids"], inputs)
    visual = [sum(len(p.columns) for p in sample) for sample in parts]
    layers = [[n] * shapes.depth for n in inputs["attention_mask"].sum(1).tolist()]
    passes = [n for sample in parts for p in sample for n in p.passes]
    flops = sum(cost.vision(shapes, 1, n, [n] * shapes.vdepth) for n in passes)
    flops += sum(cost.prefill(shapes, row) for row in layers)
    held = sum(cost.kv_bytes(shapes, row) for row in layers)
    return Report(
        visual_tokens=visual,
        stages=(),
        layer_tokens=[[n] * shapes.depth for n in visual],
        flops=flops,
        dense_flops=flops,
        kv_bytes=held,
        dense_kv_bytes=held,
        recipe="dense",
        grids=[[p.grid for p in sample] for sample in parts],
    )


def of_images(options: Mapping[str, Any]) -> None:
    """Raises :class:`VtpruneError` for ``options`` of ``attach`` with which something else than images is pruned: their
    tokens cannot stand beside the dense model's visual ones, nor beside those of a baseline."""
    if options.get("per") == "prompt":
        raise VtpruneError(
            "per='prompt' counts a prompt's text among its tokens, so its budgets are not those of images that this "
            "compares: attach() and report() tell of it"
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
