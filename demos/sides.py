"""What runs on one side of a comparison: a recipe, its budget, its options; or the dense model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vtprune.core.handle import Handle
from vtprune.core.planning import ATTACH_OPTIONS, TARGETS, check_seed
from vtprune.core.recipe import Recipe
from vtprune.core.types import VtpruneError

BUDGETS = ("own", "keep", "effective")


@dataclass(frozen=True)
class Side:
    """What runs on one side of a comparison.

    Attributes:
        recipe: ``None`` is the dense model; else a registered name, ``"dpvr-lf (trained)"``, a :class:`vtprune.Recipe`
            or a path to its file.
        budget: ``"own"`` as the recipe says, ``"keep"`` the ``share`` of tokens behind the last cut, ``"effective"``
            the ``share`` of the dense model's effective tokens, for the solver.
        share: in (0, 1], unused with ``"own"``.
        options: of the last stage's method, and ``positions`` and ``per`` of :func:`vtprune.attach`.
        seed: for methods that draw at random.

    Raises :class:`VtpruneError` for anything else.
    """

    recipe: str | os.PathLike | Recipe | None = None
    budget: str = "own"
    share: float = 0.5
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recipe is not None and not isinstance(self.recipe, str | os.PathLike | Recipe):
            raise VtpruneError(f"recipe={self.recipe!r} is neither a name, a file nor a recipe")
        if self.budget not in BUDGETS:
            raise VtpruneError(f"budget={self.budget!r} is not one of {', '.join(map(repr, BUDGETS))}")
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise VtpruneError(f"the share of tokens lies above 0 and is at most 1, got {self.share!r}")
        check_seed(self.seed)
        if not isinstance(self.options, Mapping) or not all(
            isinstance(name, str) and name.isidentifier() for name in self.options
        ):
            raise VtpruneError(f"options={self.options!r} are not names with values")
        taken = sorted({"keep", "seed", *TARGETS} & set(self.options))
        if taken:
            raise VtpruneError(f"{taken[0]} is not an option: set it with the budget, the share or the seed")

    def attach_options(self) -> dict[str, Any]:
        """The keywords for :func:`vtprune.attach`."""
        keywords = {"keep": "keep", "effective": "effective_tokens"}
        budget = {keywords[self.budget]: float(self.share)} if self.budget in keywords else {}
        return {**budget, **self.options, "seed": self.seed}

    @property
    def name(self) -> str:
        if self.recipe is None:
            return "dense"
        return self.recipe.name if isinstance(self.recipe, Recipe) else os.fspath(self.recipe)


def solved(side: Side, ran: Handle | Recipe | None) -> Side:
    """``side`` with the schedule that ran, so that nothing is solved again."""
    if ran is None:
        return side
    recipe = ran.recipe if isinstance(ran, Handle) else ran
    return Side(recipe, options={k: v for k, v in side.options.items() if k in ATTACH_OPTIONS}, seed=side.seed)
