"""``vtprune bench``: methods compared at equal effective tokens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import vtprune

from ..core.paths import folder, output
from ..core.planning import load_recipe
from ..core.recipe import Recipe
from ..core.types import VtpruneError
from ..inputs import demo_model
from ..measure import bench, text
from ..measure.samples import SETS
from ..show import web
from ..show.row_bias import row_bias_figure
from . import models
from .options import chosen_options, fractions, key_value, model_options, positive, words
from .tables import show, table_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of ``vtprune bench``, in the order in which ``--help`` shows them."""
    _table_arguments(parser)
    _run_arguments(parser)
    _result_arguments(parser)
    model_options(parser)


def _table_arguments(parser: argparse.ArgumentParser) -> None:
    """On which questions, which methods, at which budgets."""
    add = parser.add_argument
    add(
        "--abilities",
        type=words,
        default=["scenes"],
        metavar="SETS",
        help="question sets, with commas: scenes, easy-vqa, clips (short videos: the bundled model that was trained on "
        "them) (default scenes)",
    )
    add(
        "--samples",
        type=positive,
        default=100,
        metavar="N",
        help="questions of easy-VQA, scenes of about 11 questions each, or clips of about 6 (default 100)",
    )
    add(
        "--budgets",
        type=fractions,
        default=[0.75, 0.5, 0.25, 0.11],
        help="fractions of the dense effective tokens (default 0.75,0.5,0.25,0.11)",
    )
    add(
        "--methods",
        type=words,
        metavar="NAMES",
        help="recipes, with commas (default: every method); the baselines are always added",
    )
    add("--no-baselines", action="store_true", help="leave the baselines out")
    what = "an option for all of them, or positions= or per=, value as JSON; repeatable"
    add("--option", type=key_value, action="append", default=[], metavar="KEY=VALUE", help=what)
    add(
        "--both-positions",
        action="store_true",
        help="every method once more as NAME-compact: positions renumbered among the tokens that are left, as engines "
        "do that take encoded images",
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    """How often, in which batches, and how it is timed."""
    add = parser.add_argument
    add("--seeds", type=positive, default=3, help="runs of random methods (default 3)")
    add("--batch", type=positive, default=16)
    add("--timing", type=int, default=5, help="repeats of the prefill measurement (default 5; 0: none)")
    add(
        "--cpu-time",
        action="store_true",
        help="time the prefill in one thread's CPU time: for a CPU that others use as well",
    )


def _result_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the result goes."""
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="the result: everything as .json, tables as .md; repeatable",
    )
    add(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="one JSON per run in FOLDER/runs, bench.json and bench.md; what is there is not done again",
    )
    add(
        "--rows",
        type=Path,
        metavar="FILE.png",
        help="heat map of the image rows where tokens are kept, at the budget nearest to 25 %%",
    )
    table_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError` for what the user can put right."""
    _check(args)
    names, methods = _methods(args)
    # of the baselines that are added, none takes the options
    options = dict.fromkeys(names, chosen_options(args.option, "seed", "budgets"))
    if args.both_positions:
        methods += _compact(methods[: len(names)], options)
    if args.cpu_time and args.device != "cpu":
        raise VtpruneError("--cpu-time is for --device cpu")
    result = _measure(args, methods, options, folder(args.results and args.results / "runs"))
    own = [args.results / f"bench.{kind}" for kind in ("json", "md")] if args.results else []
    for path in (*own, *args.out):
        text.save(result, path)
    if args.rows is not None and (kept := text.kept_per_row(result)):
        web.write(args.rows, row_bias_figure(kept))
    if args.json:
        print(json.dumps(result))
        return 0
    show(args, text.cells(result))
    if all("error" in r for r in result["rows"][1:]):
        raise VtpruneError("no method could be measured at these budgets; the notes say why")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises :class:`VtpruneError` for files that cannot be written and for unknown question sets."""
    for path in args.out:
        output(path, ".json", ".md")
    output(args.rows, ".png")
    unknown = [name for name in args.abilities if name not in SETS]
    if unknown or not args.abilities:
        raise VtpruneError(f"unknown question set {', '.join(unknown) or '(none)'!r}; there are {', '.join(SETS)}")


def _methods(args: argparse.Namespace) -> tuple[list[str], list[Recipe]]:
    """The names of what is asked for, and the recipes to measure: these and, unless they are left out, the
    baselines."""
    videos = "clips" in args.abilities
    every = [n for n in vtprune.methods() if bench.of_pictures(n) or (videos and not vtprune.describe(n).of_text)]
    asked = [load_recipe(name) for name in (every if args.methods is None else args.methods)]
    strange = next((recipe for recipe in asked if not videos and not bench.of_pictures(recipe)), None)
    if strange is not None:
        text = any(vtprune.describe(stage.method).of_text for stage in strange.stages)
        raise VtpruneError(
            f"{strange.name} prunes {'prompts of text' if text else 'videos'}, and {', '.join(args.abilities)} asks "
            f"about pictures{'' if text else ', which it leaves whole: --abilities clips'}"
        )
    names = [recipe.name for recipe in asked]
    added = [] if args.no_baselines else [load_recipe(n) for n in bench.baselines(videos) if n not in names]
    return names, asked + added


def _compact(methods: list[Recipe], options: dict[str, dict[str, Any]]) -> list[Recipe]:
    """The same methods with compact positions, under names of their own; adds theirs to ``options``."""
    if any("positions" in own for own in options.values()):
        raise VtpruneError("--both-positions and --option positions= say two things; choose one")
    out = [replace(recipe, name=f"{recipe.name}-compact") for recipe in methods]
    for recipe, twin in zip(methods, out, strict=True):
        options[twin.name] = {**options[recipe.name], "positions": "compact"}
    return out


def _measure(
    args: argparse.Namespace, methods: list[Recipe], options: Mapping[str, Mapping[str, Any]], runs: Path | None
) -> dict[str, Any]:
    """The table, with the trained branch of the bundled model beside an untrained DPVR-LF."""
    from tqdm import tqdm

    trained = demo_model.branch() if args.model is None and any(m.name == "dpvr-lf" for m in methods) else None
    fixed = [] if trained is None else [(trained, trained.source)]
    model, processor = models.load(args)
    samples = [s for name in args.abilities for s in SETS[name](args.samples)]
    passes = bench.runs(methods, args.budgets, args.seeds, len(fixed))
    with tqdm(total=len(samples) * passes, unit="question", disable=None) as bar:
        return bench.table(
            model,
            processor,
            samples,
            methods,
            args.budgets,
            seeds=args.seeds,
            seed=args.seed,
            batch=args.batch,
            timing=args.timing,
            cpu_time=args.cpu_time,
            options=options,
            fixed=fixed,
            folder=runs,
            progress=bar.update,
            started=bar.set_description,
            command="vtprune " + " ".join(args.argv),
        )
