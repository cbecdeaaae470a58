"""``vtprune recipes``: the named recipes, and the stages or the file of one."""

from __future__ import annotations

import argparse
import json

from . import catalogue
from .catalogue import Entry
from .tables import Table, fitted, list_options, other_form, show, with_distributions

OWN = ("key", "distribution")  # of the list, not of a recipe file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    list_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError`, naming close matches, for a name that there is not."""
    single = not set("*?[") & set(args.pattern)
    found = catalogue.entries("recipes", args.pattern)
    if args.json:
        told = {k: v for k, v in found[0].items() if k not in OWN} if single else found
        print(json.dumps(told, indent=1))
    elif single:
        _one(args, found[0])
    else:
        rows = [[e["name"], " + ".join(s["method"] for s in e["stages"]), e["source"]] for e in found]
        show(args, with_distributions([["recipe", "stages", "source"], *rows], found))
    return 0


def _one(args: argparse.Namespace, recipe: Entry) -> None:
    """One recipe, stage by stage."""
    table = _stages(recipe)
    if other_form(args, table):
        return
    facts = {"source": recipe["source"] or "-", "key": recipe["key"], "from": recipe["distribution"] or "vtprune"}
    print(fitted([[recipe["name"], ""], *([f"{name}:", text] for name, text in facts.items())]))
    print(f"\n{fitted(table)}")


def _stages(recipe: Entry) -> Table:
    head = ["stage", "method", "keep", "options"]
    rows = [
        [
            str(i),
            stage["method"],
            "its own" if stage["keep"] is None else f"{stage['keep']:g}",
            ", ".join(f"{name}={json.dumps(value)}" for name, value in stage["options"].items()) or "its own",
        ]
        for i, stage in enumerate(recipe["stages"], 1)
    ]
    return [head, *rows]
