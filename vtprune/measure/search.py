"""Which recipe serves a model best: candidates answer training questions at equal effective tokens, in rounds that
leave the better half, and the last one standing is the model's default."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.planning import load_recipe
from ..core.recipe import Recipe
from ..core.recipes import RECIPES
from ..core.types import VtpruneError
from ..methods.base import METHODS
from .bench_runs import kept_run
from .environment import environment
from .run import evaluate, portable
from .runs import digest, fingerprint
from .samples import Sample

SHARES = (0.75, 0.5)  # of the tokens, that a stage leaves which others follow
FIRST = 0.25  # of the questions, in the first round
LEAST = 2  # candidates that the last round compares


@dataclass(frozen=True)
class Candidate:
    """One candidate, as far as it has come.

    Attributes:
        recipe: without its last budget.
        right: by budget, the share of right answers in the last round it was in.
        questions: of that round.
        refused: why it cannot run, "" if it can.
    """

    recipe: Recipe
    right: Mapping[str, float]
    questions: int = 0
    refused: str = ""

    @property
    def mean(self) -> float:
        return sum(self.right.values()) / max(len(self.right), 1)


def candidates(names: Sequence[str] = ()) -> list[Recipe]:
    """Recipes to search among: those named, or every method with a paper and every stack of several stages that needs
    no training; of stacks, each with its earlier stages at several budgets."""
    chosen = [load_recipe(name) for name in names] if names else [RECIPES.get(name) for name in RECIPES if _plain(name)]
    out: dict[str, Recipe] = {}
    for recipe in chosen:
        for variant in _variants(recipe):
            out.setdefault(variant.key(), variant)
    return list(out.values())


def _plain(name: str) -> bool:
    stages = RECIPES.get(name).stages
    infos = [METHODS.get(s.method) for s in stages]
    if any(i.routes or not i.budgeted for i in infos[-1:]) or any(i.trained for i in infos):
        return False
    return len(stages) > 1 or (name in METHODS and infos[0].paper != "baseline")


def _variants(recipe: Recipe) -> list[Recipe]:
    """``recipe``, and with its earlier stages' budgets changed."""
    *ahead, last = recipe.stages
    if not ahead or any(s.keep is None and not METHODS.get(s.method).budgeted for s in ahead):
        return [recipe]
    return [recipe, *(replace(recipe, stages=(*(replace(s, keep=share) for s in ahead), last)) for share in SHARES)]


def search(
    model: Any,
    processor: Any,
    recipes: Sequence[Recipe],
    samples: Sequence[Sample],
    *,
    budgets: Sequence[float] = (0.25, 0.11),
    batch: int = 16,
    seed: int = 0,
    folder: Path | None = None,
    told: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """The recipe that answers most of ``samples`` rightly, on average over ``budgets``. A first round asks a quarter
    of the questions of all candidates, every further one twice as many of the better half.

    Args:
        model: with its ``processor``.
        recipes: the candidates.
        samples: questions that nothing is measured on later.
        budgets: fractions of the dense effective tokens.
        batch: questions per forward.
        seed: of methods that draw.
        folder: where every finished run is kept, so that a search goes on where it was stopped; ``None``: nowhere.
        told: called with a line for each candidate and round.

    Returns:
        JSON-safe: ``rounds``, each a list of candidates, best first (``recipe``, ``key``, ``right`` by budget,
        ``mean``, ``refused``), and the winner's ``recipe``.

    Raises:
        VtpruneError: nothing to choose from, or every candidate is refused.
    """
    if not recipes or not samples:
        raise VtpruneError(f"nothing to search: {len(recipes)} recipes, {len(samples)} questions")
    runs = _Runs(model, processor, tuple(budgets), batch, seed, folder)
    left, share, rounds = [Candidate(r, {}) for r in recipes], FIRST, list[list[Candidate]]()
    while True:
        part = samples[: max(round(len(samples) * min(share, 1.0)), 1)]
        left = sorted((runs.asked(c.recipe, part, told) for c in left), key=lambda c: -c.mean)
        rounds.append(left)
        able = [c for c in left if not c.refused]
        if not able:
            raise VtpruneError(f"no candidate can run on this model; {left[0].recipe.name}: {left[0].refused}")
        if share >= 1:
            break
        left, share = able[: max((len(able) + 1) // 2, LEAST)], share * 2
    best = able[0]
    return {
        "type": "vtprune.Search",
        "budgets": list(budgets),
        "questions": len(samples),
        "recipe": best.recipe.to_dict(),
        "rounds": [[_entry(c) for c in made] for made in rounds],
    }


def _entry(c: Candidate) -> dict[str, Any]:
    recipe = c.recipe.to_dict()
    return {
        "recipe": recipe,
        "right": dict(c.right),
        "mean": c.mean,
        "questions": c.questions,
        "refused": c.refused,
    }


@dataclass(frozen=True)
class _Runs:
    """What all runs share; see :func:`search`."""

    model: Any
    processor: Any
    budgets: tuple[float, ...]
    batch: int
    seed: int
    folder: Path | None

    def asked(self, recipe: Recipe, part: Sequence[Sample], told: Callable[[str], object]) -> Candidate:
        """``recipe`` at every budget on the questions ``part``."""
        right: dict[str, float] = {}
        for budget in self.budgets:
            try:
                run = self._run(recipe, budget, part)
            except VtpruneError as e:
                told(f"{recipe.name}: {e}")
                return Candidate(recipe, {}, len(part), str(e))
            right[f"{budget:g}"] = sum(run["correct"]) / len(part)
        told(f"{recipe.name}: {', '.join(f'{100 * v:.1f} % at {b}' for b, v in right.items())} ({len(part)} questions)")
        return Candidate(recipe, right, len(part))

    def _run(self, recipe: Recipe, budget: float, part: Sequence[Sample]) -> dict[str, Any]:
        asked = portable(recipe)
        what = digest(asked, budget, [s.source for s in part], [s.question for s in part])
        head = {
            "type": "vtprune.SearchRun",
            "asked": asked,
            "budget": budget,
            "seed": self.seed,
            "questions": len(part),
            "model": fingerprint(self.model),
            **environment(self.model),
        }
        path = None if self.folder is None else self.folder / f"{what}.json"
        how: dict[str, Any] = {"batch": self.batch, "seed": self.seed, "effective_tokens": budget}
        return kept_run(
            path,
            json.loads(json.dumps(head)),
            lambda journal: evaluate(self.model, self.processor, part, recipe, journal=journal, **how),
            lambda: None,
        )
