"""What every command has: its options for errors, the log and code from outside, and what happens before it runs."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from importlib import import_module

from ..core.log import shown


def common_options(parser: argparse.ArgumentParser, *, below: bool = False) -> None:
    """``below``: for a command below a command, whose own defaults must not hide what was given above."""
    add = parser.add_argument
    off = argparse.SUPPRESS if below else False
    add("--debug", action="store_true", default=off, help="show the traceback of an error")
    add(
        "-v",
        "--verbose",
        action="store_true",
        default=off,
        help="say on stderr what is attached and how many tokens each stage keeps",
    )
    add(
        "--import",
        dest="imports_below" if below else "imports",
        action="append",
        default=argparse.SUPPRESS if below else [],
        metavar="MODULE",
        help="a module, or a .py file, that registers methods, recipes or model families of yours; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """The command itself, behind what its common options ask for."""
    with shown() if args.verbose else nullcontext():
        for name in [*args.imports, *getattr(args, "imports_below", ())]:
            import_module("vtprune.core.plugins").bring(name)  # not above: it imports more than help and lists need
        return args.action(args)
