"""``vtprune methods``: the methods, and the options of one."""

from __future__ import annotations

import argparse
import json
from typing import Any

import vtprune

from ..measure.text import text
from ..methods.base import METHODS, MethodInfo
from .options import list_options
from .sources import with_distributions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    list_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError`, naming close matches, for a name that there is not."""
    names = vtprune.methods(args.pattern)
    if not names and not set("*?[") & set(args.pattern):
        vtprune.describe(args.pattern)  # raises, naming close matches
    infos = [vtprune.describe(n) for n in names]
    if args.json:
        print(json.dumps([_entry(i) for i in infos], indent=1))
        return 0
    rows = [[i.name, ", ".join(i.kinds), "-" if i.keep is None else f"{i.keep:.3g}", i.paper, i.idea] for i in infos]
    print(text(with_distributions(METHODS, [["method", "sites", "keep", "paper", "idea"], *rows])))
    if len(infos) == 1:
        (info,) = infos
        print(f"\nranks by: {info.score or 'nothing'}\n")
        options = [[name, json.dumps(default), info.option_help[name]] for name, default in info.options.items()]
        print(text([["option", "default", "meaning"], *options]))
    return 0


def _entry(info: MethodInfo) -> dict[str, Any]:
    """One method as plain data."""
    needs = {kind: sorted(names) for kind, names in info.needs.items()}
    facts: dict[str, Any] = {"name": info.name, "paper": info.paper, "idea": info.idea}
    facts |= {"sites": info.kinds, "needs": needs}
    facts |= {"keep": info.keep, "options": info.options, "help": info.option_help, "score": info.score}
    return {**facts, "distribution": METHODS.distribution(info.name)}
