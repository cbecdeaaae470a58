"""What is registered, as plain data for the commands that list it; as a program it writes :mod:`.catalogue`'s file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vtprune.models.base import ADAPTERS

from ..core.info import GROUPS, group
from ..core.planning import FILES, load_recipe
from ..core.recipe import Recipe
from ..core.recipes import RECIPES
from ..core.registry import Registry
from ..core.types import VtpruneError
from ..methods.base import METHODS
from .catalogue import FILE, Entry, fingerprint


def _method(name: str) -> Entry:
    info = METHODS.get(name)
    return {
        "name": info.name,
        "paper": info.paper,
        "idea": info.idea,
        "group": GROUPS[group(info)],
        "sites": info.kinds,
        "needs": {kind: sorted(names) for kind, names in info.needs.items()},
        "question_aware": info.question_aware,
        "merges": info.merges,
        "trained": info.trained,
        "fitted": info.fitted,
        "exact": info.exact,
        "dial": info.dial,
        "keep": info.keep,
        "options": info.options,
        "help": info.option_help,
        "score": info.score,
        "distribution": METHODS.distribution(name),
    }


def _recipe(name: str) -> Entry:
    return _entry(RECIPES.get(name), RECIPES.distribution(name))


def _entry(recipe: Recipe, distribution: str | None) -> Entry:
    return {**recipe.to_dict(), "key": recipe.key(), "distribution": distribution}


def _adapter(name: str) -> Entry:
    return {"name": name, "idea": ADAPTERS.get(name).idea, "distribution": ADAPTERS.distribution(name)}


KINDS: dict[str, tuple[Registry[Any], Callable[[str], Entry]]] = {
    "methods": (METHODS, _method),
    "recipes": (RECIPES, _recipe),
    "adapters": (ADAPTERS, _adapter),
}


def entries(kind: str, pattern: str) -> list[Entry]:
    """As :func:`vtprune.cli.catalogue.entries` gives them."""
    registry, entry = KINDS[kind]
    if kind == "recipes" and pattern.endswith(FILES):
        return [plain(_entry(load_recipe(pattern), None))]
    names = registry.names(pattern)
    if not names and not set("*?[") & set(pattern):
        registry.get(pattern)  # raises, naming close matches; a recipe may be there with a budget behind its name
        names = [pattern]
    if not names:
        raise VtpruneError(f"no {registry.what} matches {pattern!r}; 'vtprune {kind}' lists them all")
    return [plain(entry(name)) for name in names]


def plain(entry: Entry) -> Entry:
    """As JSON gives it back."""
    out: Entry = json.loads(json.dumps(entry))
    return out


def catalogue() -> str:
    """The contents of the file: one entry a line."""
    lists = {kind: ",\n".join(json.dumps(e) for e in entries(kind, "*")) for kind in KINDS}
    told = ",\n".join(f'"{kind}": [\n{lines}\n]' for kind, lines in lists.items())
    return f'{{"fingerprint": "{fingerprint()}", "lists": {{\n{told}\n}}}}\n'


if __name__ == "__main__":
    FILE.write_text(catalogue(), encoding="utf-8")
    print(f"written: {FILE}")
