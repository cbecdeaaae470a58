"""``vtprune analyze``: whether recipes pay on a model and this device, and from which budget on; ``flow`` and
``suggest`` are in :mod:`.flow`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vtprune

from ..core.paths import output
from ..core.planning import ATTACH_OPTIONS
from ..core.recipe import Recipe
from ..core.types import VtpruneError
from ..inputs.images import open_image
from ..measure import timing
from ..measure.analyze import BUDGETS, REPEATS, check, times
from ..measure.times_text import cells, save
from ..methods.base import make
from . import flow, models
from .options import chosen_options, fractions, key_value, model_options, positive, words
from .tables import fitted, other_form, table_options


def counts(text: str) -> list[int]:
    """``1,8``."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers of at least 1, such as 1,8")
    return list(dict.fromkeys(map(int, parts)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of ``vtprune analyze``."""
    add = parser.add_argument
    add("--recipes", type=words, metavar="NAMES", help="names or files, with commas (default: every method)")
    add(
        "--budgets",
        type=fractions,
        default=list(BUDGETS),
        help="fractions of the dense effective tokens (default 0.75,0.5,0.25,0.11)",
    )
    add("--batches", type=counts, default=[1, 8], metavar="NUMBERS", help="prompts per batch (default 1,8)")
    add(
        "--images",
        type=counts,
        default=[1],
        metavar="NUMBERS",
        help="images per prompt, e.g. 1,2,4: more visual tokens (default 1)",
    )
    add(
        "--image",
        type=Path,
        metavar="FILE",
        help="the picture, for families whose tokens depend on its size (default: generated ones)",
    )
    add("--new-tokens", type=positive, default=8, help="of the long generation (default 8)")
    add("--repeats", type=positive, default=5, help=f"rounds after the warm-up, at least {REPEATS} (default 5)")
    add("--cpu-time", action="store_true", help="one thread and its CPU time: for a CPU that others use as well")
    what = "an option for all of them, or positions= or per=, value as JSON; repeatable"
    add("--option", type=key_value, action="append", default=[], metavar="KEY=VALUE", help=what)
    add(
        "--out",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="the result, saved after every row: all as .json, tables as .md; repeatable",
    )
    table_options(parser)
    model_options(parser)
    flow.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError` for what the user can put right."""
    if args.what is not None:
        return flow.run(args)
    from tqdm import tqdm

    for path in args.out:
        output(path, ".json", ".md")
    recipes = check(vtprune.methods() if args.recipes is None else args.recipes, args.repeats)
    options = chosen_options(args.option, "seed", "budgets")
    _check_options(recipes, options)
    picture = None if args.image is None else open_image(args.image)
    if args.cpu_time:
        timing.use_cpu_time(args.device)
    model, processor = models.load(args)

    def saved(result: dict[str, Any]) -> None:
        bar.update()
        for path in args.out:
            save(result, path)

    rows = len(recipes) * len(args.budgets) * len(args.batches) * len(args.images)
    with tqdm(total=rows, unit="row", disable=None) as bar:
        result = times(
            model,
            processor,
            recipes,
            args.budgets,
            batches=args.batches,
            images=args.images,
            new_tokens=args.new_tokens,
            repeats=args.repeats,
            seed=args.seed,
            options=options,
            pictures=None if picture is None else lambda i: picture,
            command="vtprune " + " ".join(args.argv),
            saved=saved,
            progress=bar.set_description,
        )
    if args.json:
        print(json.dumps(result))
    elif not other_form(args, cells(result)):
        verdicts = "\n".join(entry["verdict"] for entry in result["break_even"])
        print(f"{fitted(cells(result))}\n\n{verdicts}")
    if all("error" in row for row in result["rows"]):
        raise VtpruneError("nothing could be measured; the notes say why")
    return 0


def _check_options(recipes: Sequence[Recipe], options: Mapping[str, Any]) -> None:
    """Raises :class:`VtpruneError` for an option that a recipe's last method does not have, before the long work."""
    own = {name: value for name, value in options.items() if name not in ATTACH_OPTIONS}
    for recipe in recipes:
        make(recipe.stages[-1].method, {**recipe.stages[-1].options, **own})
