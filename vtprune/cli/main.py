"""The command line: ``vtprune COMMAND``, see ``--help``. Model libraries are loaded by the commands that need a
model."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ..version import __version__
from . import (
    adapters,
    analyze,
    bench,
    demo,
    doctor,
    encode,
    eval,
    fit,
    methods,
    recipes,
    report,
    run,
    search,
    serve,
    train,
    verify,
)
from .errors import Parser, guarded

# Every command's module has ``add_arguments(parser)`` and ``run(args)``, which returns the exit code.
COMMANDS: dict[str, tuple[Any, str]] = {
    "methods": (methods, "list the methods; one name also lists its options"),
    "recipes": (recipes, "list the named recipes; one name with --json prints a recipe file"),
    "adapters": (adapters, "list the model families"),
    "run": (run, "answer a question about an image, dense and pruned"),
    "serve": (serve, "answer chats over HTTP as OpenAI's servers do, with a recipe attached"),
    "encode": (encode, "encode images and prune them, for a language model that runs elsewhere"),
    "bench": (bench, "compare methods at equal effective tokens"),
    "search": (search, "choose the recipe that serves a model best, on training questions; resumable"),
    "analyze": (analyze, "say whether recipes pay on a model and this device, and from which budget on"),
    "verify": (verify, "check the correctness contract on a model; exit code 1 if a check fails"),
    "doctor": (
        doctor,
        "say which releases are installed and tested, and which families pass; exit code 1 if something fails",
    ),
    "eval": (eval, "run lmms-eval with recipes attached, resumable, one JSON per run"),
    "fit": (fit, "fit to a model what a method decides beforehand, as a recipe"),
    "train": (train, "train what a method needs trained"),
    "demo": (demo, "open a page on which to ask, compare recipes and watch the tokens"),
    "report": (report, "show result files as one self-contained page with figures"),
}


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = Parser(
        prog="vtprune",
        description="Visual-token pruning, merging and routing inside unmodified multimodal models and vision transformers.",  # noqa: E501
    )
    top.add_argument("--version", action="version", version=f"vtprune {__version__}")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (command, help) in COMMANDS.items():
        own = sub.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        own.set_defaults(action=command.run)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_arguments(own)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 only on success, 1 for an error, 2 for a wrong call, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(words)
    except SystemExit as e:  # help and version end with 0
        return e.code if isinstance(e.code, int) else 2
    args.argv = words
    if not args.debug:
        warnings.filterwarnings("ignore")
    return guarded(args.action, args)
