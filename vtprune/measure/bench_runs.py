"""The runs of a table: one per method, budget and seed, each in a file of its own, so that none is done twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..check.attach import attach
from ..core.recipe import Recipe
from ..core.types import VtpruneError
from .prefill import prefill
from .run import evaluate, placing, portable, timed_inputs
from .runs import Journal, RunError, alike, read, slug, write
from .samples import Sample


@dataclass(frozen=True)
class TableRuns:
    """What all runs of a table share."""

    model: Any
    processor: Any
    samples: Sequence[Sample]
    head: Mapping[str, Any]  # of every file: how it was made
    batch: int  # questions per forward
    timing: int  # rounds of :func:`.prefill.prefill`, 0 for none
    cpu_time: bool  # one thread's CPU time instead of wall-clock time
    folder: Path | None  # where the files lie; ``None``: nowhere
    progress: Callable[[int], object] | None  # called with numbers of samples

    def run(
        self, recipe: Recipe | None, budget: float | None, seed: int, options: Mapping[str, Any], timed: bool = False
    ) -> dict[str, Any]:
        """Answers and costs of ``recipe`` (``None``: the dense model) with one seed, with ``timed`` its prefill times
        as well."""
        name = "dense" if recipe is None else recipe.name
        asked = None if recipe is None else portable(recipe)
        head = {**self.head, "method": name, "budget": budget, "seed": seed, "asked": asked, "overrides": dict(options)}
        how: dict[str, Any] = {"batch": self.batch, "seed": seed, "progress": self.progress, **options}
        stem = name if recipe is None else f"{slug(name)}-{'own' if budget is None else repr(budget)}-{seed}"
        out = kept_run(
            self._path(f"{stem}.json"),
            head,
            lambda journal: evaluate(self.model, self.processor, self.samples, recipe, journal=journal, **how),
            lambda: self.progress and self.progress(len(self.samples)),
        )
        if recipe is None or not timed:
            return out
        how = {"repeats": self.timing, **({"timer": "CPU"} if self.cpu_time else {})}
        return out | kept_run(
            self._path(f"{stem}.time.json"),
            {**head, **how},
            lambda journal: self._times(journal, recipe, seed, options),
            lambda: None,
        )

    def _times(self, journal: Journal, recipe: Recipe, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        with attach(self.model, recipe, seed=seed, **options) as handle:  # solved once, not in every turn
            used = handle.recipe
        how: dict[str, Any] = {"repeats": self.timing, "seed": seed, "cpu_time": self.cpu_time, **placing(options)}
        with journal.located("timing the prefill"):
            return prefill(self.model, timed_inputs(self.model, self.processor, self.samples), used, **how)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name


def kept_run(
    path: Path | None, head: Mapping[str, Any], measure: Callable[[Journal], dict[str, Any]], done: Callable[[], object]
) -> dict[str, Any]:
    """The run in ``path`` if it is finished there, else measured (going on from its journal) and put there."""
    if path is None:
        return measure(Journal(None, {}))
    if path.exists():
        kept = read(path)
        alike(path, kept, head)
        done()
        return kept
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
