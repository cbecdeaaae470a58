"""The runs of ``vtprune eval``: which recipe at which budget with which seed, and what their files are called."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..core.planning import load_recipe
from ..measure.bench import baselines, draws
from ..measure.run import of_images, portable
from ..measure.runs import slug
from ..methods.base import METHODS, make

ATTACH = ("positions", "per")  # options of attach() that --option takes as well


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs: the dense model, then every recipe at every budget (and seed, where it draws), then the baselines at
    the same budgets; on its own schedule a recipe is compared with the dense model alone. A wrong recipe or option
    raises :class:`VtpruneError` here."""
    ready = [name for name in METHODS if not METHODS.get(name).fitted]
    names = ready if args.recipes == ["all"] else args.recipes
    options = dict(args.option)
    of_images(options)
    budgets: list[dict[str, Any]] = (
        [{"effective_tokens": b} for b in dict.fromkeys(args.budgets)] or [{"keep": k} for k in args.keep] or [{}]
    )
    more = [] if args.no_baselines or budgets == [{}] else [b for b in baselines() if b not in names]
    jobs: list[dict[str, Any]] = []
    for name in dict.fromkeys([*([] if args.no_baselines else ["dense"]), *names, *more]):
        if name == "dense":
            jobs.append({"recipe": "dense", "method": "dense", "budget": {}, "seed": args.seed, "options": {}})
        else:
            jobs += _of_recipe(name, budgets, {k: v for k, v in options.items() if name in names}, args)
    return jobs


def _of_recipe(
    name: str, budgets: Sequence[dict[str, Any]], options: dict[str, Any], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The runs of one recipe."""
    recipe = load_recipe(name)
    last = recipe.stages[-1]
    make(last.method, {**last.options, **{k: v for k, v in options.items() if k not in ATTACH}})
    for budget in budgets:
        for seed in range(args.seed, args.seed + (args.seeds if draws(recipe) else 1)):
            yield {
                "recipe": name,
                "method": recipe.name,
                "budget": budget,
                "seed": seed,
                "options": options,
                "asked": portable(recipe),
            }


def stem(job: Mapping[str, Any]) -> str:
    """The name of a run's files."""
    if job["method"] == "dense":
        return "lmms-dense"
    budget = "".join(f"{k[:4]}{v!r}" for k, v in job["budget"].items()) or "own"
    return f"lmms-{slug(job['method'])}-{budget}-{job['seed']}"
