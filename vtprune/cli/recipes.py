"""``vtprune recipes``: the named recipes, and the file of one."""

from __future__ import annotations

import argparse
import json

import vtprune

from ..core.recipes import RECIPES
from ..measure.text import text
from .options import list_options
from .sources import with_distributions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    list_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError`, naming close matches, for a name that there is not."""
    single = not set("*?[") & set(args.pattern)
    names = [args.pattern] if single else vtprune.recipes(args.pattern)
    recipes = [RECIPES.get(name) for name in names]
    if args.json and single:
        print(recipes[0].to_json())
    elif args.json:
        pairs = zip(names, recipes, strict=True)
        listed = [{**r.to_dict(), "key": r.key(), "distribution": RECIPES.distribution(name)} for name, r in pairs]
        print(json.dumps(listed, indent=1))
    else:
        pairs = zip(names, recipes, strict=True)
        rows = [[name, " + ".join(s.method for s in r.stages), r.source] for name, r in pairs]
        print(text(with_distributions(RECIPES, [["recipe", "stages", "source"], *rows])))
    return 0
