"""``vtprune doctor``: which releases are installed and tested, and whether every family computes right with them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ..check.doctor import diagnose
from .tables import fitted, other_form, table_options

WORDS = {
    "tested": "ok",
    "newer": "newer than tested",
    "older": "OLDER than supported",
    "absent": "not installed (optional)",
    "missing": "MISSING",
}
STATES = {True: "ok", False: "FAILED", None: "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--family",
        action="append",
        metavar="NAME",
        help="try this model family alone; repeatable (default: all of them, about a minute)",
    )
    table_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 if everything is sound, else 1."""
    from tqdm import tqdm

    with tqdm(unit=" families", disable=None, leave=False) as bar:
        diagnosis = diagnose(args.family, done=lambda family: bar.update())
    if args.json:
        print(json.dumps(diagnosis, indent=1))
    elif not other_form(args, _families(diagnosis)):
        _show(diagnosis)
    return 0 if diagnosis["passed"] else 1


def _families(diagnosis: Mapping[str, Any]) -> list[list[str]]:
    rows = [[f["family"], STATES[f["passed"]], f["detail"]] for f in diagnosis["families"]]
    return [["family", "result", "detail"], *rows]


def _show(diagnosis: Mapping[str, Any]) -> None:
    """The packages, their conflicts and the families as text, and whether all of it is sound."""
    print(f"vtprune {diagnosis['vtprune']}, Python {diagnosis['python']}, {diagnosis['system']}\n")
    packages = [
        [p["package"], p["installed"] or "-", f"{p['oldest']} to {p['newest']}", WORDS[p["status"]]]
        for p in diagnosis["packages"]
    ]
    print(fitted([["package", "installed", "tested", ""], *packages]))
    print("".join(f"\nconflict: {conflict}" for conflict in diagnosis["conflicts"]))
    print(fitted(_families(diagnosis)))
    failed = [f["family"] for f in diagnosis["families"] if f["passed"] is False]
    if diagnosis["passed"]:
        print("\neverything is sound")
    else:
        print(f"\nNOT sound: {', '.join(failed)} failed" if failed else "\nNOT sound: see the packages")
