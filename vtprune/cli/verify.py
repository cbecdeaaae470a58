"""``vtprune verify``: the correctness contract on a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import vtprune

from ..core.planning import load_recipe
from ..data import scenes
from ..inputs import demo_model
from ..inputs.chats import prepare
from ..inputs.images import open_image
from ..measure.samples import scenes_samples
from ..serving.vllm.compare import compare
from . import models
from .options import engine_recipe, key_value, model_options, overrides, positive, recipe_options
from .tables import fitted, other_form, table_options

STATES = {True: "ok", False: "FAILED", None: "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of ``vtprune verify``."""
    parser.add_argument("--image", type=Path, help="default: generated pictures")
    parser.add_argument("--question", default="how many red shapes are there ?")
    table_options(parser)
    parser.add_argument(
        "--engine",
        choices=("vllm",),
        help="compare the attached model's greedy answers with those of this engine instead (docs/serving.md)",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=8,
        metavar="N",
        help="questions for the engine (default %(default)s)",
    )
    parser.add_argument("--new-tokens", type=positive, default=8, metavar="N", help="of its answers (%(default)s)")
    parser.add_argument("--encoded", action="store_true", help="give the engine images that vtprune has encoded")
    parser.add_argument(
        "--compact", action="store_true", help="with --encoded: encoded images with compact positions, on both sides"
    )
    parser.add_argument(
        "--engine-option",
        type=key_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a keyword of vllm.LLM, value as JSON; repeatable",
    )
    model_options(parser)
    recipe_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every check passes, else 1; raises :class:`VtpruneError` for what the user can put right."""
    if args.engine:
        return _engine(args)
    recipe, images = load_recipe(args.recipe), _images(args.image)
    model, processor = models.load(args)
    inputs = prepare(processor, images, [args.question, "what color is it ?"]).to(model.device, model.dtype)
    report = vtprune.verify(model, recipe, dict(inputs), **overrides(args))
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        rows = [[check.name, STATES[check.passed], check.detail] for check in report.checks]
        if not other_form(args, table := [["check", "result", "detail"], *rows]):
            print(fitted(table))
            print(f"\n{report.recipe}: {'passed' if report.passed else 'FAILED'}")
    return 0 if report.passed else 1


def _engine(args: argparse.Namespace) -> int:
    """As :func:`run`, for ``--engine``."""
    recipe = engine_recipe(args)
    pictures: list[Any] = [open_image(args.image)] if args.image else []
    asked = [args.question]
    if args.image is None:
        samples = scenes_samples(args.samples)[: args.samples]
        pictures, asked = [s.image for s in samples], [s.question for s in samples]
    model, processor = models.load(args)
    folder = args.model or demo_model.bundled()
    answers = compare(
        model,
        processor,
        folder,
        recipe,
        [[picture] for picture in pictures],
        asked,
        new_tokens=args.new_tokens,
        encoded=args.encoded,
        positions="compact" if args.compact else "original",
        dtype=args.dtype,
        **dict(args.engine_option),
    )
    wrong = [a for a in answers if not a.same and not a.tie]
    same, ties = sum(a.same for a in answers), sum(a.tie for a in answers)
    facts = {
        "recipe": recipe.key(),
        "questions": len(answers),
        "same": same,
        "ties": ties,
        "different": len(wrong),
        "prompt_tokens": [a.prompt for a in answers],
        "largest_difference": max(a.difference for a in answers),
    }
    if args.json:
        print(json.dumps({**facts, "answers": [dataclasses.asdict(a) for a in answers]}, indent=1))
    else:
        print(
            f"{recipe.name}: {same} of {len(answers)} answers are the attached model's token by token, {ties} part at "
            f"a tie, {len(wrong)} are others; log-probabilities differ by at most {facts['largest_difference']:.1e}"
        )
        for a in wrong:
            print(f"  attached {list(a.wanted)}, vLLM {list(a.got)}, apart by {a.margin:.3f}")
    return 1 if wrong else 0


def _images(path: Path | None) -> list[Any]:
    """Two pictures: the user's, twice, or generated ones."""
    from PIL import Image

    if path:
        return [open_image(path)] * 2
    return [Image.fromarray(scenes.scene(i, "test").image) for i in range(2)]
