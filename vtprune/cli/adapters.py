"""``vtprune adapters``: the model families."""

from __future__ import annotations

import argparse
import json

from . import catalogue
from .tables import list_options, show, with_distributions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    list_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError`, naming close matches, for a name that there is not."""
    found = catalogue.entries("adapters", args.pattern)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(args, with_distributions([["family", "models"], *([e["name"], e["idea"]] for e in found)], found))
    return 0
