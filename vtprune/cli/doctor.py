"""``vtprune doctor``: which releases are installed and tested, and whether every family computes right with them."""

from __future__ import annotations

import argparse
import json

from ..check.doctor import diagnose
from .options import show

WORDS = {
    "tested": "ok",
    "newer": "newer than tested",
    "older": "OLDER than supported",
    "absent": "not installed (optional)",
    "missing": "MISSING",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--family",
        action="append",
        metavar="NAME",
        help="try this model family alone; repeatable (default: all of them, about a minute)",
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Returns 0 if everything is sound, else 1."""
    from tqdm import tqdm

    with tqdm(unit=" families", disable=None, leave=False) as bar:
        found = diagnose(args.family, done=lambda family: bar.update())
    if args.json:
        print(json.dumps(found, indent=1))
        return 0 if found["passed"] else 1
    print(f"vtprune {found['vtprune']}, Python {found['python']}, {found['system']}\n")
    rows = [
        [p["package"], p["installed"] or "-", f"{p['oldest']} to {p['newest']}", WORDS[p["status"]]]
        for p in found["packages"]
    ]
    show([["package", "installed", "tested", ""], *rows])
    print("".join(f"\nconflict: {said}" for said in found["conflicts"]))
    state = {True: "ok", False: "FAILED", None: "-"}
    show([["family", "result", "detail"], *([f["family"], state[f["passed"]], f["detail"]] for f in found["families"])])
    failed = [f["family"] for f in found["families"] if f["passed"] is False]
    print(
        "\neverything is sound"
        if found["passed"]
        else f"\nNOT sound: {', '.join(failed)} failed"
        if failed
        else "\nNOT sound: see the packages"
    )
    return 0 if found["passed"] else 1
