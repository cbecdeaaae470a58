"""``vtprune analyze flow`` and ``suggest``: where information flows from the image to the answer, and schedules that
follow it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..core.paths import folder, output
from ..core.types import VtpruneError
from ..measure.flow import FLOWS, NUMBERS, flow, suggest
from ..measure.samples import scenes_samples
from ..show import web
from ..show.figures.flow import flow_figure
from ..show.figures.style import encode
from . import models
from .common import common_options
from .errors import Parser
from .options import model_options, odd, positive
from .tables import fitted, other_form, show, table_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of ``vtprune analyze``."""
    below = parser.add_subparsers(dest="what", metavar="WHAT", title="what else can be analysed", parser_class=Parser)
    one = below.add_parser("flow", help="where information flows from the image to the answer: knock-outs, logit lens")
    two = below.add_parser("suggest", help="schedules that follow what flow has found, as recipe files")
    one.add_argument("--scenes", type=positive, default=10, metavar="N", help="training scenes to ask about (10)")
    one.add_argument("--window", type=odd, metavar="K", help="layers of a knock-out, odd (default: 9 of 32)")
    one.add_argument(
        "--out", type=Path, action="append", default=[], metavar="FILE", help=".json, .png or .svg; repeatable"
    )
    two.add_argument("found", type=Path, metavar="FILE", help="the .json that flow has written")
    two.add_argument("--tolerance", type=float, default=0.05, help="what withdrawing the image may cost (0.05)")
    two.add_argument("--ability", default="all", help="go by the questions of one ability (default: all)")
    two.add_argument("--folder", type=Path, metavar="FOLDER", help="where the recipe files go")
    for sub in (one, two):
        common_options(sub, below=True)
        table_options(sub)
    model_options(one)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError` for what the user can put right."""
    return _flow(args) if args.what == "flow" else _suggest(args)


def _flow(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    for path in args.out:
        output(path, ".json", ".png", ".svg")
    model, processor = models.load(args)
    samples = scenes_samples(args.scenes, "train")
    with tqdm(total=len(samples), unit="question", disable=None) as bar:
        command = "vtprune " + " ".join(args.argv)
        told = flow(model, processor, samples, window=args.window, command=command, progress=bar.update)
    for path in args.out:
        if path.suffix.lower() == ".json":
            web.write(path, (json.dumps(told, indent=1) + "\n").encode())
        else:
            web.write(path, encode(flow_figure(told), path.suffix.lower()[1:]))
    if args.json:
        print(json.dumps(told))
        return 0
    every = told["abilities"]["all"]
    heads = ("layer", *FLOWS, *(name.replace("_", " ") for name in NUMBERS))
    rows = [
        (str(i), *(f"{every[f]['mean'][i]:.1f} %" for f in FLOWS), *(f"{every[n]['mean'][i]:.3f}" for n in NUMBERS))
        for i in range(told["layers"])
    ]
    if not other_form(args, [heads, *rows]):
        print(f"{every['correct']} of {every['asked']} questions answered; windows of {told['window']} layers\n")
        print(fitted([heads, *rows]))
    return 0


def _suggest(args: argparse.Namespace) -> int:
    try:
        told = json.loads(args.found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise VtpruneError(f"cannot read {args.found}: {e}") from e
    if not isinstance(told, dict) or told.get("type") != "vtprune.Flow":
        raise VtpruneError(f"{args.found} is not what vtprune analyze flow writes")
    found = suggest(told, tolerance=args.tolerance, ability=args.ability)
    if not found:
        raise VtpruneError("the image is needed up to the last layer, so no schedule can be suggested")
    if folder(args.folder) is not None:
        for name, one in found.items():
            web.write(args.folder / f"{name}.json", (json.dumps(one["recipe"], indent=1) + "\n").encode())
    if args.json:
        print(json.dumps(found))
        return 0
    rows = [
        (name, json.dumps(one["recipe"]["stages"][-1]["options"]), f"{100 * one['share']:.1f} %", one["expects"])
        for name, one in found.items()
    ]
    show(args, [("method", "options", "effective tokens", "because"), *rows])
    return 0
