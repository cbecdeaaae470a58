"""``vtprune methods``: the methods, and the options of one."""

from __future__ import annotations

import argparse
import json

from . import catalogue
from .catalogue import Entry
from .tables import ANY, fitted, list_options, other_form, shortened, with_distributions

LEGEND = """what: q looks at the question, m merges, t needs a trained part, f its fit ('vtprune fit'),
~ no exact count. vtprune methods NAME tells all of one and its options, docs/support.md which
model families take it."""
GROUPS = ("pixels", "vision tower", "projector", "LLM", "baselines")  # in the order of the list


def _what(entry: Entry) -> str:
    marks = {
        "q": entry["question_aware"],
        "m": entry["merges"],
        "t": entry["trained"],
        "f": entry["fitted"],
        "~": entry["dial"] is not None or not entry["exact"],
    }
    return "".join(mark for mark, holds in marks.items() if holds) or "-"


def _keep(entry: Entry) -> str:
    return "-" if entry["keep"] is None else f"{entry['keep']:.2g}"


def _table(found: list[Entry]) -> list[list[str]]:
    """A row for each."""
    rows = [[e["name"], ", ".join(e["sites"]), _keep(e), _what(e), e["paper"], e["idea"]] for e in found]
    return with_distributions([["method", "sites", "keep", "what", "paper", "idea"], *rows], found)


def _grouped(found: list[Entry]) -> str:
    """The list, one line for each, under the titles of the groups."""
    rows = [[*row[:4], row[4].removeprefix("arXiv "), *row[6:], row[5]] for row in _table(found)]  # the idea last: cut
    title, rule, *lines = fitted(shortened(rows), ANY).splitlines()
    out, group = [title, rule], None
    for entry, line in zip(found, lines, strict=True):
        if entry["group"] != group:
            group = entry["group"]
            out.append(f"{group}:")
        out.append(line)
    return "\n".join(out)


def _one(entry: Entry) -> str:
    """All about one method."""
    facts = {
        "idea": entry["idea"],
        "paper": entry["paper"],
        "cuts at": ", ".join(entry["sites"]),
        "keeps": f"{_keep(entry)} by default" if entry["keep"] is not None else "what it decides itself",
        "ranks by": entry["score"] or "nothing",
        "from": entry["distribution"] or "vtprune",
    }
    about = fitted([[entry["name"], ""], *([f"{name}:", text] for name, text in facts.items())])
    return f"{about}\n\n{fitted(_options(entry))}"


def _options(entry: Entry) -> list[list[str]]:
    rows = [[name, json.dumps(default), entry["help"][name]] for name, default in entry["options"].items()]
    return [["option", "default", "meaning"], *rows]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    list_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError`, naming close matches, for a name that there is not."""
    found = catalogue.entries("methods", args.pattern)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    found.sort(key=lambda entry: GROUPS.index(entry["group"]))
    if other_form(args, _table(found)):
        return 0
    print(_one(found[0]) if len(found) == 1 else f"{_grouped(found)}\n\n{LEGEND}")
    return 0
