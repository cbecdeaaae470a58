"""``vtprune fit``: fits to a model what a method decides beforehand, and writes it as a recipe."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.paths import output
from ..core.planning import FILES
from ..core.types import VtpruneError
from ..inputs.images import open_image
from ..measure.environment import environment
from ..measure.fit import THRESHOLD, Fit, left_out, removals, routed, withdrawal
from ..measure.samples import Sample, scenes_samples
from ..measure.similarity import MEANS
from ..methods.adaskip import HALVES
from . import models
from .common import common_options
from .errors import Parser
from .options import keep_value, model_options, positive
from .tables import fitted, other_form, table_options


def threshold_value(text: str) -> float:
    """``0.003``."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One command below this one for each method that can be fitted."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="METHOD", parser_class=Parser)
    layer = kinds.add_parser("vtw", help="the layer before which all visual tokens leave")
    layer.add_argument(
        "--threshold",
        type=threshold_value,
        default=THRESHOLD,
        help="by how many nats (KL divergence) the next token's distribution may move (default %(default)s)",
    )
    counts = kinds.add_parser("fitprune", help="how many tokens leave at each layer, for a budget")
    budget = counts.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--keep", type=keep_value, metavar="N_OR_FRACTION", help="visual tokens left after the last cut: 64, or 0.25"
    )
    budget.add_argument(
        "--effective-tokens",
        type=keep_value,
        metavar="N_OR_FRACTION",
        help="visual tokens averaged over layers: 64, or 0.25 of the dense model's",
    )
    halves = kinds.add_parser("adaskip", help="which attentions and MLPs are left out, and what takes their places")
    halves.add_argument(
        "--sublayers", type=positive, default=8, metavar="N", help="how many of them (default %(default)s)"
    )
    halves.add_argument(
        "--online",
        type=positive,
        default=0,
        metavar="N",
        help="watch the first N tokens of every answer, and leave more MLPs out behind them (default: none)",
    )
    halves.add_argument(
        "--mean",
        choices=MEANS,
        default=MEANS[0],
        help="similarities and ratios are averaged over all tokens (the paper) or prompt by prompt, with a ratio of "
        "whole prompts' norms (the official code; default %(default)s)",
    )
    depths = kinds.add_parser("gamma-mod", help="which layers are routed: those of the lowest attention rank")
    depths.add_argument(
        "--layers", type=positive, metavar="N", help="how many of them (default: all but four, as the code's preset)"
    )
    depths.add_argument(
        "--keep",
        type=keep_value,
        default=0.5,
        metavar="N_OR_FRACTION",
        help="visual tokens that run in each of them, for the recipe (default %(default)s)",
    )
    for own in (layer, counts, halves, depths):
        common_options(own, below=True)
        _prompt_arguments(own)
        model_options(own)


def _prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the recipe goes, and on which prompts it is fitted."""
    add = parser.add_argument
    add("--recipe-out", type=Path, required=True, metavar="FILE", help="the recipe, .json or .yaml")
    add(
        "--images",
        type=positive,
        default=16,
        metavar="N",
        help="generated training pictures of about 11 questions each (default %(default)s)",
    )
    add(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture of yours, with its --question, instead of generated ones; repeatable",
    )
    add("--question", action="append", default=[], help="about the --image of the same place; repeatable")
    add("--batch", type=positive, default=16, help="prompts per forward (default %(default)s)")
    table_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError` for what the user can put right."""
    from tqdm import tqdm

    output(args.recipe_out, *FILES)
    samples = _samples(args)
    model, processor = models.load(args)
    with tqdm(unit="prompt", disable=None) as bar:
        fit = FITS[args.what](args, model, processor, samples, bar.update)
    fit.recipe.save(args.recipe_out)
    facts = {"command": "vtprune " + " ".join(args.argv), **fit.facts, **environment(model)}
    if args.json:
        print(json.dumps({"recipe": fit.recipe.to_dict(), "file": str(args.recipe_out), **facts}))
        return 0
    if not other_form(args, _table(fit)):
        print(f"{fitted(_table(fit))}\n\n{fit.recipe.source}\nwrote {args.recipe_out}")
    return 0


def _samples(args: argparse.Namespace) -> list[Sample]:
    """The user's pictures with their questions, or generated ones of the training set."""
    if len(args.image) != len(args.question):
        raise VtpruneError(
            f"give one --question for each --image; got {len(args.image)} pictures and {len(args.question)} questions"
        )
    pairs = zip(args.image, args.question, strict=True)
    own = [Sample(open_image(image), question, "", "") for image, question in pairs]
    return own or scenes_samples(args.images, "train")


def _withdrawal(args: argparse.Namespace, model: Any, processor: Any, samples: list[Sample], told: Any) -> Fit:
    return withdrawal(model, processor, samples, threshold=args.threshold, batch=args.batch, progress=told)


def _removals(args: argparse.Namespace, model: Any, processor: Any, samples: list[Sample], told: Any) -> Fit:
    budget = {"keep": args.keep, "effective_tokens": args.effective_tokens}
    return removals(model, processor, samples, **budget, batch=args.batch, progress=told)


def _left_out(args: argparse.Namespace, model: Any, processor: Any, samples: list[Sample], told: Any) -> Fit:
    asked = {"sublayers": args.sublayers, "online": args.online, "mean": args.mean}
    return left_out(model, processor, samples, **asked, batch=args.batch, progress=told)


def _routed(args: argparse.Namespace, model: Any, processor: Any, samples: list[Sample], told: Any) -> Fit:
    return routed(model, processor, samples, layers=args.layers, keep=args.keep, progress=told)


FITS: dict[str, Callable[..., Fit]] = {
    "vtw": _withdrawal,
    "fitprune": _removals,
    "adaskip": _left_out,
    "gamma-mod": _routed,
}


def _table(fit: Fit) -> list[list[str]]:
    """What was found, layer by layer."""
    if "kl" in fit.facts:
        return [["first layer without", "KL"], *([str(i), f"{value:.3g}"] for i, value in fit.facts["kl"].items())]
    if "ratio" in fit.facts:
        similarity, ratio, gone = (fit.facts[name] for name in ("similarity", "ratio", "left_out"))
        names = [f"llm.{n // 2}.{HALVES[n % 2]}" for n in range(len(ratio))]
        rows = zip(names, similarity, ratio, strict=True)
        head = ["sub-layer", "similarity", "norm ratio", ""]
        return [head, *([n, f"{s:.4f}", f"{r:.4f}", "left out" if n in gone else ""] for n, s, r in rows)]
    if "arank" in fit.facts:
        chosen, found = fit.facts["routed"], enumerate(fit.facts["arank"])
        return [["layer", "rank", ""], *([str(i), f"{r:.1f}", "routed" if i in chosen else ""] for i, r in found)]
    return [["layer", "visual tokens"], *([str(i), str(count)] for i, count in enumerate(fit.facts["left"]))]
