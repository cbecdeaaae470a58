"""``vtprune methods``: the methods, and the options of one."""

from __future__ import annotations

import argparse
import json
from typing import Any

import vtprune

from ..core.info import grouped
from ..measure.text import text
from ..methods.base import METHODS, MethodInfo
from .options import list_options
from .sources import with_distributions

LEGEND = (
    "what: q looks at the question, m merges, t needs a trained part, f its fit ('vtprune fit'), ~ no exact count\n"
    "vtprune methods NAME tells the options of one, docs/support.md which model families take it"
)


def _what(info: MethodInfo) -> str:
    marks = {
        "q": info.question_aware,
        "m": info.merges,
        "t": info.trained,
        "f": info.fitted,
        "~": info.dial is not None or not info.exact,
    }
    return "".join(mark for mark, holds in marks.items() if holds) or "-"


def _table(infos: list[MethodInfo]) -> list[list[str]]:
    """A row for each, grouped by where it works."""
    rows: list[list[str]] = []
    titles: dict[int, str] = {}
    for title, mine in grouped(infos).items():
        if len(infos) > 1:
            titles[len(rows)] = title
        rows += [
            [i.name, ", ".join(i.kinds), "-" if i.keep is None else f"{i.keep:.3g}", _what(i), i.paper, i.idea]
            for i in mine
        ]
    head, *rows = with_distributions(METHODS, [["method", "sites", "keep", "what", "paper", "idea"], *rows])
    out = [head]
    for n, row in enumerate(rows):
        if n in titles:
            out.append([f"{titles[n]}:", *[""] * (len(head) - 1)])
        out.append(row)
    return out


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
    print(text(_table(infos)))
    if len(infos) > 1:
        print(f"\n{LEGEND}")
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
    facts |= {
        "question_aware": info.question_aware,
        "merges": info.merges,
        "trained": info.trained,
        "fitted": info.fitted,
    }
    facts |= {"exact": info.exact, "dial": info.dial}
    facts |= {"keep": info.keep, "options": info.options, "help": info.option_help, "score": info.score}
    return {**facts, "distribution": METHODS.distribution(info.name)}
