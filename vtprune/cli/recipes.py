"""``vtprune recipes``: the named recipes, and the file of one."""

from __future__ import annotations

import argparse
import json

import vtprune

from ..core.recipes import RECIPES
from ..measure.text import text
from .options import list_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    list_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError`, naming close matches, for a name that there is not."""
    single = not set("*?[") & set(args.pattern)
    recipes = [RECIPES.get(n) for n in ([args.pattern] if single else vtprune.recipes(args.pattern))]
    if args.json and single:
        print(recipes[0].to_json())
    elif args.json:
        print(json.dumps([{**r.to_dict(), "key": r.key()} for r in recipes], indent=1))
    else:
        rows = [[r.name, " + ".join(s.method for s in r.stages), r.source] for r in recipes]
        print(text([["recipe", "stages", "source"], *rows]))
    return 0
