"""``vtprune adapters``: the model families."""

from __future__ import annotations

import argparse
import json

import vtprune
from vtprune.models.base import ADAPTERS

from ..measure.text import text
from .options import list_options
from .sources import with_distributions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    list_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError`, naming close matches, for a name that there is not."""
    names = vtprune.adapters(args.pattern) if set("*?[") & set(args.pattern) else [args.pattern]
    ideas = [(name, ADAPTERS.get(name).idea) for name in names]
    if args.json:
        listed = [{"name": n, "idea": idea, "distribution": ADAPTERS.distribution(n)} for n, idea in ideas]
        print(json.dumps(listed, indent=1))
        return 0
    print(text(with_distributions(ADAPTERS, [["family", "models"], *([name, idea] for name, idea in ideas)])))
    return 0
