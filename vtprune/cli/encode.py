"""``vtprune encode``: images as the rows that a recipe leaves of them, in a file or for another engine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import vtprune

from ..core.paths import output
from ..core.planning import load_recipe
from ..core.types import VtpruneError
from ..inputs.chats import prepare
from ..inputs.images import open_image
from ..serving.openai import content
from . import models
from .options import model_options, overrides, recipe_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of ``vtprune encode``."""
    parser.add_argument("--image", type=Path, required=True, action="append", help="may be given several times")
    parser.add_argument("--question", required=True, help="what the prompt asks about the images")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the encoded prompt, for Encoded.load (.safetensors)")
    parser.add_argument(
        "--openai",
        action="store_true",
        help="print the content of a message to an OpenAI-compatible server that takes encoded images (vLLM with "
        "--enable-mm-embeds)",
    )
    parser.add_argument(
        "--placed",
        action="store_true",
        help="with --openai: for a server with vtprune's plug-in, which keeps positions",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    model_options(parser)
    recipe_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError` for what the user can put right."""
    if args.out is None and not args.openai:
        raise VtpruneError("say what for: --out FILE, --openai, or both")
    if args.placed and not args.openai:
        raise VtpruneError("--placed says how --openai prints images")
    if args.json and args.openai:
        raise VtpruneError("--json and --openai both print; choose one")
    recipe, out, chosen = load_recipe(args.recipe), output(args.out, ".safetensors"), overrides(args)
    images = [open_image(path) for path in args.image]
    model, processor = models.load(args)
    inputs = prepare(processor, [images], [args.question]).to(model.device, model.dtype)
    encoded = vtprune.encode(model, recipe, dict(inputs), **chosen)
    if out is not None:
        encoded.save(out)
    if args.openai:
        print(json.dumps(content(encoded, args.question, placed=args.placed)))
    elif args.json:
        print(json.dumps(encoded.report().to_dict()))
    else:
        for path, rows in zip(args.image, encoded.embeds, strict=True):
            print(f"{path.name}: {len(rows)} rows of {rows.shape[1]} numbers")
        print(f"prompt: {encoded.input_ids.shape[1]} of {inputs['input_ids'].shape[1]} tokens, saved as {out}")
    return 0
