"""Options as inputs of the demo's page."""

from __future__ import annotations

import pytest
from vtprune.demos import options
from vtprune.demos.forms import side

from vtprune.core.info import GROUPS, group
from vtprune.core.recipes import RECIPES
from vtprune.core.types import VtpruneError
from vtprune.methods.base import METHODS, make


def started(recipe: str) -> dict[str, list]:
    """What the page sends of inputs that nobody has touched, with those of no option behind."""
    out: dict[str, list] = {kind: [] for kind in options.KINDS}
    for field in options.fields(recipe):
        out[field.kind].append(field.start)
    return {kind: [*values, *[None] * (options.most()[kind] - len(values))] for kind, values in out.items()}


@pytest.mark.parametrize("recipe", RECIPES.names("*"))
def test_inputs_that_nobody_touched_set_nothing(recipe):
    values = started(recipe)
    assert options.chosen(recipe, values) == {}
    assert all(len(mine) == options.most()[kind] for kind, mine in values.items())


@pytest.mark.parametrize("name", METHODS.names("*"))
def test_every_option_has_an_input_of_its_kind(name):
    """What is chosen there is a value that the method takes, but for files of the machine that runs the demo."""
    shown = {field.name: field for field in options.fields(name)}
    assert set(shown) == set(METHODS.get(name).options) - options.FILES
    for field in shown.values():
        for text in field.choices:
            values = started(name)
            place = [f.name for f in shown.values() if f.kind == "choice"].index(field.name)
            values["choice"][place] = text
            found = options.chosen(name, values)
            assert found == ({} if text in (field.start, options.OWN) else {field.name: field.choices[text]})
            make(name, found)


@pytest.mark.parametrize(
    "recipe, kind, place, value, expected",
    [
        ("fastv", "number", 0, 4.0, {"layer": 4}),
        ("fastv-k2-r50", "number", 0, 3, {"layer": 3}),
        ("fastv-k2-r50", "number", 0, 2, {}),
        ("fastv", "switch", 0, False, {"rope": False}),
        ("pyramiddrop", "text", 0, "3, 6", {"layers": [3, 6]}),
        ("pyramiddrop", "text", 1, "0.5,0.25 , 0.1", {"ratios": [0.5, 0.25, 0.1]}),
        ("tome", "text", 0, "8", {"r": 8}),
        ("uniform", "text", 0, "llm.2", {"site": "llm.2"}),
        ("dense", "number", 0, 4, {}),
    ],
)
def test_what_is_typed_is_the_option(recipe, kind, place, value, expected):
    values = started(recipe)
    values[kind][place] = value
    assert options.chosen(recipe, values) == expected


def test_inputs_reach_the_side_and_text_counts_more():
    page = {"recipe": "fastv", "chosen": {"number": [4]}, "budget": "own", "share": 0.5, "seed": 0}
    assert side(page, "B", RECIPES.names).options == {"layer": 4}
    assert side({**page, "options": '{"layer": 5}'}, "B", RECIPES.names).options == {"layer": 5}
    recipe = RECIPES.get("tome").to_json()
    assert side({**page, "file": recipe}, "B", RECIPES.names).options == {}, "they are of the recipe that is not asked"


def test_a_number_that_is_none_is_refused():
    with pytest.raises(VtpruneError, match="write numbers with commas"):
        options.chosen("pyramiddrop", {"text": ["", "half"]})


def test_recipes_are_grouped_and_each_has_a_line():
    labels = options.labelled(RECIPES.names("*"))
    assert {name for _, name in labels} == set(RECIPES.names("*"))
    for label, name in labels:
        head, _, line = label.partition(": ")
        if name in METHODS:
            assert (head, line) == (f"{name} · {GROUPS[group(METHODS.get(name))]}", METHODS.get(name).idea)
        assert line, name
    groups = [label.partition(": ")[0].partition(" · ")[2] for label, _ in labels]
    assert len([g for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g]) == len(set(groups)) > 4
