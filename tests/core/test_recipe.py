"""Names of recipes, with a budget behind them."""

from __future__ import annotations

import pytest

import vtprune
from vtprune.core.recipes import RECIPES


@pytest.mark.parametrize(
    "name, keep", [("vispruner@64", 64), ("pyramiddrop@0.25", 0.25), ("flowcut-then-fastv@640/2880", 640 / 2880)]
)
def test_a_budget_may_stand_behind_a_recipe_s_name(name, keep):
    recipe = RECIPES.get(name)
    assert recipe.name == name and recipe.stages[-1].keep == keep
    assert recipe.stages[:-1] == RECIPES.get(name.partition("@")[0]).stages[:-1]
    assert vtprune.Recipe.from_dict(recipe.to_dict()) == recipe
    assert RECIPES.distribution(name) is None


@pytest.mark.parametrize(
    "name, says",
    [
        ("fastv@", "behind the @ stands a budget"),
        ("fastv@many", "behind the @ stands a budget"),
        ("fastv@1/0", "behind the @ stands a budget"),
        ("fastv@1.5", "a fraction lies in"),
        ("fastv@nan", "a fraction lies in"),
        ("fastvv@64", "did you mean fastv"),
        ("@64", "unknown recipe"),
    ],
)
def test_other_words_behind_a_name_are_refused(name, says):
    with pytest.raises(vtprune.VtpruneError, match=says):
        RECIPES.get(name)
