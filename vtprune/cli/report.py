"""``vtprune report``: result files as one self-contained page with figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..show.figures import accuracy
from ..show.page import write
from .options import fractions


def budget_option(text: str) -> float:
    """``0.25``."""
    values = fractions(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not one fraction such as 0.25")
    return values[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of ``vtprune report``."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="where the result files (.json) lie")
    add("--out", type=Path, metavar="FOLDER", help="where report.html and the figures go (default: beside the results)")
    add(
        "--budget",
        type=budget_option,
        default=0.25,
        metavar="FRACTION",
        help="for the figures that show one budget; the nearest is taken (default 0.25)",
    )
    add(
        "--cost",
        choices=tuple(accuracy.COST),
        default="tokens",
        help="horizontal axis of the accuracy figures (default tokens)",
    )
    add("--title", help="heading of the page")
    add("--json", action="store_true", help="print the files written as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code. Raises :class:`VtpruneError` for what the user can put right."""
    paths = write(args.folder, args.out or args.folder, budget=args.budget, cost=args.cost, title=args.title)
    print(
        json.dumps({"page": str(paths[0]), "files": [str(p) for p in paths]})
        if args.json
        else "wrote " + ", ".join(map(str, paths))
    )
    return 0
