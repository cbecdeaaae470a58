"""The command line: ``vtprune COMMAND``, see ``--help``. A command's module is imported when the command is typed, so
that help and lists come without torch."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..version import __version__
from . import common
from .errors import Parser, guarded

# Command -> its help; the module of its name has ``add_arguments(parser)`` and ``run(args)``, which returns the exit
# code.
COMMANDS: dict[str, str] = {
    "methods": "list the methods; one name also lists its options",
    "recipes": "list the named recipes; one name shows its stages, with --json as a recipe file",
    "adapters": "list the model families",
    "run": "answer a question about an image, dense and pruned",
    "serve": "answer chats over HTTP as OpenAI's servers do, with a recipe attached",
    "encode": "encode images and prune them, for a language model that runs elsewhere",
    "bench": "compare methods at equal effective tokens",
    "search": "choose the recipe that serves a model best, on training questions; resumable",
    "analyze": "say whether recipes pay on a model and this device, and from which budget on",
    "verify": "check the correctness contract on a model; exit code 1 if a check fails",
    "doctor": "say which releases are installed and tested, and which families pass; exit code 1 if something fails",
    "eval": "run lmms-eval with recipes attached, resumable, one JSON per run",
    "fit": "fit to a model what a method decides beforehand, as a recipe",
    "train": "train what a method needs trained",
    "demo": "open a page on which to ask, compare recipes and watch the tokens",
    "report": "show result files as one self-contained page with figures",
}


class Command(Parser):
    """The parser of one command, whose module says which arguments there are when it is asked to read some."""

    filled = False

    def fill(self) -> None:
        """Adds the arguments, once."""
        if self.filled:
            return
        self.filled = True
        name = self.prog.split()[-1]
        module: Any = import_module(f"{__package__}.{name}")
        self.set_defaults(action=module.run)
        common.common_options(self)
        module.add_arguments(self)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self.fill()
        return super().parse_known_args(args, namespace)


def _parser() -> tuple[Parser, list[Command]]:
    top = Parser(
        prog="vtprune",
        description="Visual-token pruning, merging and routing inside unmodified multimodal models and vision transformers.",  # noqa: E501
    )
    top.add_argument("--version", action="version", version=f"vtprune {__version__}")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Command)
    return top, [
        sub.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".") for name, help in COMMANDS.items()
    ]


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top, commands = _parser()
    for command in commands:
        command.fill()
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 only on success, 1 for an error, 2 for a wrong call, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser()[0].parse_args(words)
    except SystemExit as e:  # help and version end with 0
        return e.code if isinstance(e.code, int) else 2
    args.argv = words
    if not args.debug:
        warnings.filterwarnings("ignore")
    return guarded(common.run, args)
