"""What the page sends, as sides; every mistake in it is a message that says which side and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from vtprune.core.recipe import Recipe
from vtprune.core.types import VtpruneError
from vtprune.inputs import demo_model

from .checks import proper, short
from .options import chosen
from .sides import Side

LONGEST_JSON, LONGEST_NAME = 100_000, 200  # characters of a recipe file, and of the name in it


def side(fields: Mapping[str, Any], name: str, recipes: Callable[[], Collection[str]]) -> Side:
    """A side from what the page sends: ``recipe`` (a name; ``"dense"``), ``file`` (a recipe's JSON text instead),
    ``budget``, ``share``, ``chosen`` (of the recipe's inputs, as :func:`vtprune.demos.options.chosen` takes them; not
    with a file), ``options`` (JSON text, which counts more) and ``seed``. ``recipes`` gives the names that there are.
    Raises :class:`VtpruneError` that says which side and what is wrong."""
    try:
        options = json_object(fields.get("options") or "{}", "options")
        if fields.get("file") is None:
            options = {**chosen(str(fields["recipe"]), fields.get("chosen") or {}), **options}
        recipe = _recipe(fields, recipes)
        _check_weights(options, recipe)
        return Side(recipe, fields.get("budget", "own"), fields.get("share", 0.5), options, fields.get("seed", 0))
    except VtpruneError as e:
        raise VtpruneError(f"{name}: {e}") from e


def _recipe(fields: Mapping[str, Any], recipes: Callable[[], Collection[str]]) -> str | Recipe | None:
    if fields.get("file") is not None:
        if not fields["file"].strip():
            raise VtpruneError("the recipe file is empty")
        recipe = Recipe.from_dict(json_object(fields["file"], "recipe file"))
        short(str(recipe.name), "the recipe's name", LONGEST_NAME)
        return recipe
    if fields["recipe"] == "dense":
        return None
    if fields["recipe"] not in recipes():
        raise VtpruneError(f"unknown recipe {fields['recipe']!r}")
    return fields["recipe"]


def _check_weights(options: Mapping[str, Any], recipe: str | Recipe | None) -> None:
    """Nobody who asks through the page reads files of the machine that runs the demo."""
    stages = recipe.stages if isinstance(recipe, Recipe) else ()
    weights = [o["weights"] for o in (options, *(s.options for s in stages)) if o.get("weights")]
    if any(Path(str(w)).parent != demo_model.FOLDER for w in weights):
        raise VtpruneError("weights= names a file of the machine that runs the demo; give it on the command line")


def json_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object in ``text``. Raises :class:`VtpruneError`, with ``what`` it is, for anything else."""
    short(text, what, LONGEST_JSON)
    try:
        value = json.loads(text)
        plain = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError) as e:  # also numbers that are too long, and lists in lists without end
        raise VtpruneError(f"{what}: not JSON ({e})") from e
    proper(plain, what)  # an escape in the text may have become half of a character
    if not isinstance(value, dict):
        raise VtpruneError(f'{what}: a JSON object is needed, such as {{"layer": 3}}')
    return value
