"""The table: every method at every budget, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.planning import ATTACH_OPTIONS, TARGETS, load_recipe
from ..core.recipe import Recipe
from ..core.types import VtpruneError
from ..methods.base import METHODS, OWN_BUDGETS, make
from .bench_runs import TableRuns
from .environment import environment, protocol
from .run import of_images
from .runs import RunError
from .samples import Sample
from .statistics import add_group_a, score


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
    options = options or {}
    recipes = _loaded(methods, options)
    _check_numbers(budgets, seeds, timing)
    about, protocol_ = environment(model), protocol(model, processor, samples)
    head = {"type": "vtprune.Run", "version": 1, "protocol": protocol_, **about}
    shared = TableRuns(model, processor, samples, head, batch, timing, cpu_time, folder, progress)
    plan = [*_plan(recipes, budgets, options, labels or {}), *((r, None, note, {}) for r, note in fixed)]
    rows = list(_rows(shared, plan, range(seed, seed + seeds), started))
    add_group_a(rows, samples)
    facts: dict[str, Any] = {"timer": "CPU" if cpu_time else "wall-clock"} if timing else {}
    facts |= {"abilities": sorted({s.ability for s in samples}), "sets": sorted({s.set for s in samples})}
    facts |= {"samples": len(samples), "batch": batch}
    asked = {"protocol": protocol_, "budgets": list(budgets), "seeds": seeds}
    asked["questions"] = [[s.source, s.ability, s.question, s.answer] for s in samples]
    return {"type": "vtprune.Bench", "version": 2, "command": command, **about, **facts, **asked, "rows": rows}


def _loaded(methods: Sequence[str | Recipe], options: Mapping[str, Mapping[str, Any]]) -> list[Recipe]:
    """The recipes. Raises :class:`VtpruneError` for none, for two of one name, and for a wrong option, before the long
    work."""
    recipes = [load_recipe(m) for m in methods]
    names = [r.name for r in recipes]
    if not names or len({*names}) < len(names):
        raise VtpruneError(f"methods must be named, each once; got {', '.join(names) or 'none'}")
    for recipe in recipes:
        of_images(options.get(recipe.name, {}))
        own = {k: v for k, v in options.get(recipe.name, {}).items() if k not in ATTACH_OPTIONS}
        if doubled := {"keep", *TARGETS, *OWN_BUDGETS} & own.keys():
            raise VtpruneError(
                f"{doubled.pop()}= is a budget of its own; the table's are fractions of the dense effective tokens"
            )
        make(recipe.stages[-1].method, {**recipe.stages[-1].options, **own})
    return recipes


def _check_numbers(budgets: Sequence[float], seeds: int, timing: int) -> None:
    if timing < 0 or seeds < 1:
        raise VtpruneError(f"timing={timing} must not be negative and seeds={seeds} must be at least 1")
    if not budgets or any(not 0 < b <= 1 for b in budgets):
        raise VtpruneError(f"budgets are fractions of the dense tokens in (0, 1], got {list(budgets)}")


Planned = tuple[Recipe, float | None, str, Mapping[str, Any]]  # recipe, budget, remark, options of attach


def _plan(
    recipes: Sequence[Recipe],
    budgets: Sequence[float],
    options: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str],
) -> Iterator[Planned]:
    """Every recipe at every budget."""
    for recipe in recipes:
        own = options.get(recipe.name, {})
        note = labels.get(recipe.name, _untrained(recipe, own))
        for budget in budgets:
            yield recipe, budget, note, {**own, "effective_tokens": float(budget)}


def _rows(
    shared: TableRuns, plan: Sequence[Planned], seeds: Sequence[int], started: Callable[[str], object] | None
) -> Iterator[dict[str, Any]]:
    """The row of the dense model, then those of ``plan``, each measured when it is asked for."""
    if started is not None:
        started("dense")
    dense = shared.run(None, 1.0, 0, {})
    yield {"method": "dense", "budget": 1.0, "note": "", **_row([dense], shared.samples, None)}
    correct = [float(c) for c in dense["correct"]]
    for recipe, budget, note, options in plan:
        if started is not None:
            started(recipe.name)
        row: dict[str, Any] = {"method": recipe.name, "budget": budget, "note": note}
        own_seeds = seeds if draws(recipe) else seeds[:1]
        try:
            runs_ = [shared.run(recipe, budget, s, options, bool(shared.timing) and s == seeds[0]) for s in own_seeds]
            row |= _row(runs_, shared.samples, correct)
            row["note"] = ", ".join(filter(None, (note, _solved(recipe, row["recipe"]))))
        except RunError:
            raise
        except VtpruneError as e:
            row["error"] = str(e)
            if shared.progress is not None:
                shared.progress(len(own_seeds) * len(shared.samples))
        yield row


def baselines(videos: bool = False) -> list[str]:
    """The registered methods that every table holds, of questions about pictures or ``videos``."""
    return [name for name in METHODS if METHODS.get(name).paper == "baseline" and (videos or of_pictures(name))]


def of_pictures(recipe: str | Recipe) -> bool:
    """Whether every stage of a recipe prunes pictures, and not the frames of videos, or text, alone."""
    infos = [METHODS.get(stage.method) for stage in load_recipe(recipe).stages]
    return not any(info.video or info.of_text for info in infos)


def runs(methods: Sequence[str | Recipe], budgets: Sequence[float], seeds: int, fixed: int = 0) -> int:
    """Passes over the samples that :func:`table` makes."""
    return 1 + fixed + len(budgets) * sum(seeds if draws(load_recipe(m)) else 1 for m in methods)


def draws(recipe: Recipe) -> bool:
    """Whether a stage draws at random, so that the seed matters."""
    return any(METHODS.get(s.method).draws for s in recipe.stages)


def _untrained(recipe: Recipe, options: Mapping[str, Any]) -> str:
    """A remark on a method whose side branch, or gates, were never trained."""
    last = recipe.stages[-1]
    info = METHODS.get(last.method)
    if not info.trained or {**last.options, **options}.get("weights"):
        return ""
    if info.routes:
        return "untrained side branch" if "branch_layers" in info.options else "untrained"
    return "untrained module" if info.learns else "untrained gates"


def _solved(asked: Recipe, used: Mapping[str, Any]) -> str:
    """The layers that the budget solver chose, in words; empty if they are the recipe's or the method's own."""
    before, after = asked.stages[-1].options, used["stages"][-1].get("options", {})
    chosen = {k: v for k, v in after.items() if k in ("layer", "layers", "split") and k not in before}
    return ", ".join(f"{k} {' '.join(map(str, v)) if isinstance(v, list | tuple) else v}" for k, v in chosen.items())


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


def _summed(counts: Sequence[Sequence[float] | None]) -> list[float] | None:
    """Their sum, place by place; ``None`` if one of them is not known."""
    known = [c for c in counts if c is not None]
    return np.sum(known, axis=0).tolist() if len(known) == len(counts) else None
