"""The table: every method at every budget, as plain data."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..check.attach import attach
from ..core.planning import ATTACH_OPTIONS, TARGETS, load_recipe
from ..core.recipe import Recipe
from ..core.types import VtpruneError
from ..methods.base import METHODS, OWN_BUDGETS, make
from ..version import __version__
from .run import MAX_NEW_TOKENS, _placing, _timed, evaluate, portable, prefill
from .runs import Journal, RunError, alike, digest, fingerprint, read, slug, write
from .samples import Sample
from .statistics import add_group_a, score


def environment(model: Any) -> dict[str, Any]:
    """Versions and hardware, for result files."""
    parameter = next(model.parameters())
    device = torch.cuda.get_device_name(parameter.device) if parameter.device.type == "cuda" else _cpu()
    dtype = str(parameter.dtype).removeprefix("torch.")
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "vtprune": __version__,
        },
        "device": {
            "type": parameter.device.type,
            "name": device,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "dtype": dtype,
        },
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def protocol(model: Any, processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """What a run was asked and how; the same questions in another order are another protocol."""
    asked = [[s.question, s.answer, s.ability, s.source] for s in samples]
    return {
        "harness": "vtprune bench",
        "model": {
            "name": Path(str(model.config._name_or_path)).name,
            "class": type(model).__name__,
            "fingerprint": fingerprint(model),
        },
        "sets": dict(Counter(s.set for s in samples)),
        "questions": digest(asked),
        "chat_template": digest(processor.chat_template),
        "decoding": f"greedy, {MAX_NEW_TOKENS} new tokens",
        "scoring": "exact match without spaces and case",
        "seeds": "sample i of a set draws with seed * 1000003 + i",
    }


def _kept_run(
    path: Path | None, head: Mapping[str, Any], measure: Callable[[Journal], dict[str, Any]], done: Callable[[], object]
) -> dict[str, Any]:
    """The run in ``path`` if it is finished there, else measured (going on from its journal) and put there."""
    if path is None:
        return measure(Journal(None, {}))
    if path.exists():
        found = read(path)
        alike(path, found, head)
        done()
        return found
    notes = path.with_suffix(".jsonl")
    try:
        with Journal(notes, head) as journal:
            out = {**head, **measure(journal)}
            write(path, json.dumps(out) + "\n")
            notes.unlink(missing_ok=True)
    except RunError:
        raise
    except VtpruneError:  # the method refuses: nothing to go on with
        notes.unlink(missing_ok=True)
        raise
    return out


def table(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    methods: Sequence[str | Recipe],
    budgets: Sequence[float],
    *,
    seeds: int = 3,
    seed: int = 0,
    batch: int = 16,
    timing: int = 5,
    cpu_time: bool = False,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    labels: Mapping[str, str] | None = None,
    fixed: Sequence[tuple[Recipe, str]] = (),
    folder: Path | None = None,
    progress: Callable[[int], object] | None = None,
    started: Callable[[str], object] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Every method at every budget, after the dense model. A budget is a fraction of dense effective tokens: equal
    cost.

    Args:
        methods: recipe names or recipes; those that draw at random are run with ``seeds`` seeds from ``seed`` on and
            averaged per sample.
        timing: rounds of :func:`prefill`, 0 for none; cpu_time: see there.
        options: method name -> its own options and those of ``attach``. labels: method name -> a remark for its rows.
        fixed: recipes with a remark, run once on their own schedule (their ``budget`` is ``None``).
        folder: where every run leaves ``<method>-<budget>-<seed>.json``, and ``.time.json`` with the measured times;
            runs that lie there are not done again, one that broke off goes on. ``None``: in memory.
        progress: called with numbers of samples, :func:`runs` times all of them. started: called with the name of each
            row.

    Returns:
        A JSON-safe dict. A budget that a method cannot reach gives a row with ``error``.

    Raises:
        VtpruneError: wrong arguments, or runs in ``folder`` that were made in another way; :class:`RunError` if a run
            breaks off, see :func:`evaluate`.
    """
    options, labels = options or {}, labels or {}
    recipes = [load_recipe(m) for m in methods]
    names = [r.name for r in recipes]
    if not names or len({*names}) < len(names):
        raise VtpruneError(f"methods must be named, each once; got {', '.join(names) or 'none'}")
    for recipe in recipes:  # a wrong option is told before the long work
        own = {k: v for k, v in options.get(recipe.name, {}).items() if k not in ATTACH_OPTIONS}
        if doubled := {"keep", *TARGETS, *OWN_BUDGETS} & own.keys():
            raise VtpruneError(
                f"{doubled.pop()}= is a budget of its own; the table's are fractions of the dense effective tokens"
            )
        make(recipe.stages[-1].method, {**recipe.stages[-1].options, **own})
    if timing < 0 or seeds < 1:
        raise VtpruneError(f"timing={timing} must not be negative and seeds={seeds} must be at least 1")
    if not budgets or any(not 0 < b <= 1 for b in budgets):
        raise VtpruneError(f"budgets are fractions of the dense tokens in (0, 1], got {list(budgets)}")
    about = environment(model)
    common = {"type": "vtprune.Run", "version": 1, "protocol": protocol(model, processor, samples), **about}

    def measured(
        recipe: Recipe | None, budget: float | None, s: int, extra: Mapping[str, Any], timed: bool
    ) -> dict[str, Any]:
        name = "dense" if recipe is None else recipe.name
        asked = None if recipe is None else portable(recipe)
        head = {**common, "method": name, "budget": budget, "seed": s, "asked": asked, "overrides": dict(extra)}
        spot = (
            None
            if folder is None
            else folder
            / ("dense" if recipe is None else f"{slug(name)}-{'own' if budget is None else repr(budget)}-{s}")
        )
        how: dict[str, Any] = {"batch": batch, "seed": s, "progress": progress, **extra}
        out = _kept_run(
            None if spot is None else Path(f"{spot}.json"),
            head,
            lambda journal: evaluate(model, processor, samples, recipe, journal=journal, **how),
            lambda: progress and progress(len(samples)),
        )
        if not timed or recipe is None:
            return out

        def clocked(journal: Journal) -> dict[str, Any]:
            with attach(model, recipe, seed=s, **extra) as handle:  # solved once, not in every turn
                used = handle.recipe
            with journal.located("timing the prefill"):
                return prefill(
                    model,
                    _timed(model, processor, samples),
                    used,
                    repeats=timing,
                    seed=s,
                    cpu_time=cpu_time,
                    **_placing(extra),
                )

        how = {"repeats": timing, **({"timer": "CPU"} if cpu_time else {})}
        return out | _kept_run(
            None if spot is None else Path(f"{spot}.time.json"), {**head, **how}, clocked, lambda: None
        )

    if started is not None:
        started("dense")
    dense = measured(None, 1.0, 0, {}, False)
    correct = [float(c) for c in dense["correct"]]
    rows = [{"method": "dense", "budget": 1.0, "note": "", **_row([dense], samples, None)}]
    plan: list[tuple[Recipe, float | None, str]] = [
        (r, b, labels.get(r.name, _untrained(r, options.get(r.name, {})))) for r in recipes for b in budgets
    ]
    for recipe, budget, note in [*plan, *((r, None, note) for r, note in fixed)]:
        if started is not None:
            started(recipe.name)
        extra = {} if budget is None else {**options.get(recipe.name, {}), "effective_tokens": float(budget)}
        row: dict[str, Any] = {"method": recipe.name, "budget": budget, "note": note}
        times = seeds if draws(recipe) else 1
        try:
            results = [
                measured(recipe, budget, s, extra, bool(timing) and s == seed) for s in range(seed, seed + times)
            ]
            row |= _row(results, samples, correct)
            row["note"] = ", ".join(filter(None, (note, _solved(recipe, row["recipe"]))))
        except RunError:
            raise
        except VtpruneError as e:
            row["error"] = str(e)
            if progress is not None:
                progress(times * len(samples))
        rows.append(row)
    add_group_a(rows, samples)
    facts: dict[str, Any] = {"timer": "CPU" if cpu_time else "wall-clock"} if timing else {}
    facts |= {
        "abilities": sorted({s.ability for s in samples}),
        "sets": sorted({s.set for s in samples}),
        "samples": len(samples),
        "batch": batch,
    }
    asked = {"protocol": common["protocol"], "budgets": list(budgets), "seeds": seeds}
    asked["questions"] = [[s.source, s.ability, s.question, s.answer] for s in samples]
    return {"type": "vtprune.Bench", "version": 2, "command": command, **about, **facts, **asked, "rows": rows}


def baselines() -> list[str]:
    """The registered methods that every table holds."""
    return [name for name in METHODS if METHODS.get(name).paper == "baseline"]


def runs(methods: Sequence[str | Recipe], budgets: Sequence[float], seeds: int, fixed: int = 0) -> int:
    """Passes over the samples that :func:`table` makes."""
    return 1 + fixed + len(budgets) * sum(seeds if draws(load_recipe(m)) else 1 for m in methods)


def draws(recipe: Recipe) -> bool:
    """Whether a stage draws at random, so that the seed matters."""
    return any(METHODS.get(s.method).draws for s in recipe.stages)


def _untrained(recipe: Recipe, options: Mapping[str, Any]) -> str:
    """A remark on a routing method whose side branch was never trained."""
    last = recipe.stages[-1]
    return (
        "untrained side branch"
        if METHODS.get(last.method).routes and not {**last.options, **options}.get("weights")
        else ""
    )


def _solved(asked: Recipe, used: Mapping[str, Any]) -> str:
    """The layers that the budget solver chose, in words; empty if they are the recipe's or the method's own."""
    before, after = asked.stages[-1].options, used["stages"][-1].get("options", {})
    found = {k: v for k, v in after.items() if k in ("layer", "layers", "split") and k not in before}
    return ", ".join(f"{k} {' '.join(map(str, v)) if isinstance(v, list | tuple) else v}" for k, v in found.items())


def _row(runs: list[dict[str, Any]], samples: Sequence[Sample], dense: list[float] | None) -> dict[str, Any]:
    """One table row from the runs of all seeds; costs are those of the first."""
    first = runs[0]
    correct = [sum(r["correct"][i] for r in runs) / len(runs) for i in range(len(samples))]
    return {
        **score(correct, samples, dense),
        "seed_accuracies": [sum(r["correct"]) / len(samples) for r in runs],
        "effective_tokens": first["effective_tokens"],
        **{name: first[name] for name in ("visual_tokens", "nominal_tokens", "layer_tokens")},
        "flops": first["flops"],
        "flops_share": first["flops"] / first["dense_flops"],
        "kv_bytes": first["kv_bytes"],
        "kv_share": first["kv_bytes"] / first["dense_kv_bytes"],
        **{
            k: first[k]
            for k in ("prefill_ms", "dense_prefill_ms", "prefill_ratio", "prefill_range", "prefill_verdict")
            if k in first
        },
        **{name: _summed([r[name] for r in runs]) for name in ("rows", "columns")},
        "key": first["key"],
        "recipe": first["recipe"],
        "correct": correct,
    }


def _summed(found: Sequence[Sequence[float] | None]) -> list[float] | None:
    known = [f for f in found if f is not None]
    return np.sum(known, axis=0).tolist() if len(known) == len(found) else None
