"""``vtprune search``: which recipe serves a model best, on training questions."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from ..core.paths import folder, output
from ..core.planning import FILES
from ..core.recipe import Recipe
from ..core.types import VtpruneError
from ..measure.samples import Sample, easy_vqa_samples, scenes_samples
from ..measure.search import candidates, search
from . import models
from .options import fractions, model_options, positive, words
from .tables import fitted, other_form, table_options

SETS = {"scenes": scenes_samples, "easy-vqa": easy_vqa_samples}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--recipes",
        type=words,
        default=[],
        metavar="NAMES",
        help="candidates, with commas (default: every method with a paper and every stack that needs no training)",
    )
    add(
        "--abilities",
        type=words,
        default=["scenes", "easy-vqa"],
        metavar="SETS",
        help="sets of training questions: scenes, easy-vqa, or both with a comma (default both)",
    )
    add(
        "--samples",
        type=positive,
        default=40,
        metavar="N",
        help="questions of easy-VQA, or scenes of about 11 questions each (default 40)",
    )
    add(
        "--budgets",
        type=fractions,
        default=[0.25, 0.11],
        help="fractions of the dense effective tokens (default 0.25,0.11)",
    )
    add("--batch", type=positive, default=16)
    add("--results", type=Path, metavar="FOLDER", help="finished runs are kept here, and not done again")
    add("--recipe-out", type=Path, metavar="FILE", help="the winner as a recipe file (.json, .yaml)")
    table_options(parser)
    model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError` for what the user can put right."""
    unknown = [name for name in args.abilities if name not in SETS]
    if unknown or not args.abilities:
        raise VtpruneError(f"unknown question set {', '.join(unknown) or '(none)'!r}; there are {', '.join(SETS)}")
    output(args.recipe_out, *FILES)
    kept = folder(args.results)
    recipes, samples = candidates(args.recipes), _questions(args.abilities, args.samples)
    model, processor = models.load(args)
    found = search(
        model,
        processor,
        recipes,
        samples,
        budgets=args.budgets,
        batch=args.batch,
        seed=args.seed,
        folder=kept,
        told=(lambda line: None) if args.json or args.csv or args.latex else print,
    )
    best = Recipe.from_dict(found["recipe"])
    if args.recipe_out is not None:
        best.save(args.recipe_out)
    if args.json:
        print(json.dumps(found))
        return 0
    last = found["rounds"][-1]
    rows = [
        [_said(c["recipe"]), *(f"{100 * v:.1f}" for v in c["right"].values()), f"{100 * c['mean']:.1f}"] for c in last
    ]
    table = [["recipe", *(f"{b:g}" for b in args.budgets), "mean"], *rows]
    if not other_form(args, table):
        print(f"\n{fitted(table)}")
    return 0


def _questions(names: list[str], count: int) -> list[Sample]:
    """Training questions of all sets, mixed, always alike: a part of them is a part of each."""
    samples = [s for name in names for s in SETS[name](count, "train")]
    random.Random(0).shuffle(samples)
    return samples


def _said(recipe: dict) -> str:
    """Stages with their budgets."""
    parts = [f"{s['method']}{'' if s.get('keep') is None else ' ' + format(s['keep'], 'g')}" for s in recipe["stages"]]
    return " + ".join(parts)
