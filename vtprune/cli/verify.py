"""``vtprune verify``: the correctness contract on a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import vtprune

from ..core.planning import load_recipe
from ..data import scenes
from ..inputs.chats import prepare
from ..inputs.images import open_image
from ..measure.text import text
from . import models
from .options import model_options, overrides, recipe_options

STATES = {True: "ok", False: "FAILED", None: "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of ``vtprune verify``."""
    parser.add_argument("--image", type=Path, help="default: two generated pictures")
    parser.add_argument("--question", default="how many red shapes are there ?")
    parser.add_argument("--json", action="store_true")
    model_options(parser)
    recipe_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every check passes, else 1; raises :class:`VtpruneError` for what the user can put right."""
    recipe, images = load_recipe(args.recipe), _images(args.image)
    model, processor = models.load(args)
    inputs = prepare(processor, images, [args.question, "what color is it ?"]).to(model.device, model.dtype)
    report = vtprune.verify(model, recipe, dict(inputs), **overrides(args))
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        rows = [[check.name, STATES[check.passed], check.detail] for check in report.checks]
        print(text([["check", "result", "detail"], *rows]))
        print(f"\n{report.recipe}: {'passed' if report.passed else 'FAILED'}")
    return 0 if report.passed else 1


def _images(path: Path | None) -> list[Any]:
    """Two pictures: the user's, twice, or generated ones."""
    from PIL import Image

    if path:
        return [open_image(path)] * 2
    return [Image.fromarray(scenes.scene(i, "test").image) for i in range(2)]
