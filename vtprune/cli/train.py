"""``vtprune train METHOD``: trains what a method needs trained."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..core.paths import output
from ..core.planning import bind
from ..core.types import VtpruneError
from ..methods.base import METHODS, make
from ..train.base import TRAININGS, Training, tell
from ..train.card import read_facts, save
from ..train.compare import compare, markdown
from ..train.fit import fit
from ..train.questions import easy_items, encode, own_items, scene_items
from . import models
from .errors import Parser
from .options import positive, seed_value

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One command below this one for each method that can be trained."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="METHOD", parser_class=Parser)
    for name, training in TRAININGS.items():
        own = kinds.add_parser(name, help=training.what)
        own.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        method_arguments(own, training)


def method_arguments(parser: argparse.ArgumentParser, training: Training) -> None:
    """All options of ``vtprune train METHOD``, in the order in which ``--help`` shows them."""
    _part_arguments(parser, training)
    _fitting_arguments(parser, training)
    _data_arguments(parser)
    _other_arguments(parser)


def _part_arguments(parser: argparse.ArgumentParser, training: Training) -> None:
    """The model, what is trained beside it and where it goes."""
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        help="where the weights go (.safetensors); FILE.json and FILE.compare.json are written beside it",
    )
    add("--model", help="folder or hub id of a LLaVA (default: the bundled VLM)")
    told = METHODS.get(training.method).option_help
    for name, default in training.options.items():
        what = training.help.get(name, told[name])
        shown = "" if default is None else f" (default {default})"
        add(f"--{name.replace('_', '-')}", type=_value, default=default, metavar="VALUE", help=what + shown)


def _value(text: str) -> Any:
    """JSON, or else a word."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _fitting_arguments(parser: argparse.ArgumentParser, training: Training) -> None:
    """How it is trained, and for how long."""
    add = parser.add_argument
    for name, value in training.settings.items():
        add(f"--{name.replace('_', '-')}", type=float, default=value, help=f"{training.help[name]} (default {value:g})")
    add("--lr", type=float, default=training.lr, help=f"peak learning rate (default {training.lr:g})")
    add("--steps", type=int, default=600, help="optimiser steps (default 600)")
    add("--batch", type=int, default=32, help="questions per step, of all processes together (default 32)")
    add(
        "--save-every",
        type=positive,
        metavar="STEPS",
        help="write a checkpoint into OUT.checkpoints now and then; a run that was broken off goes on with --resume",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint, with the same options")


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    """On how many images it is trained, chosen and compared."""
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help='questions of yours instead of generated ones: a JSON object a line, {"image": FILE, "question": ..., '
        '"answer": ...}',
    )
    add("--scenes", type=int, default=1000, help="generated training images (default 1000)")
    add("--easy", type=int, default=150, help="easy-VQA training images (default 150)")
    add("--val-scenes", type=int, default=30, help="images for options that are 'auto' (default 30)")
    add("--eval-scenes", type=int, default=100, help="test images for the comparison afterwards (default 100; 0: none)")
    add("--eval-easy", type=int, default=30, help="easy-VQA test images for it (default 30)")


def _other_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--compare-only", action="store_true", help="no training: compare the weights that lie at --out")
    add("--device", default="cpu")
    add(
        "--dtype",
        default="bfloat16",
        choices=tuple(DTYPES),
        help="arithmetic (default bfloat16; what is trained is float32 meanwhile)",
    )
    add("--seed", type=seed_value, default=0, help="order of the questions")


def _check(args: argparse.Namespace, training: Training) -> None:
    """Everything wrong is told before anything is loaded."""
    if args.out.suffix != ".safetensors":
        raise VtpruneError(f"--out {args.out} must end in .safetensors")
    for name in ("scenes", "easy", "val_scenes", "eval_scenes", "eval_easy", *training.settings):
        if not getattr(args, name) >= 0:
            raise VtpruneError(f"--{name.replace('_', '-')} must not be negative")
    for name in ("steps", "batch", "lr"):
        if not getattr(args, name) > 0:
            raise VtpruneError(f"--{name} must be above 0")
    if not args.compare_only and args.data is None and args.scenes + args.easy == 0:
        raise VtpruneError("--scenes and --easy are both 0: there is nothing to train on")
    if args.resume and args.save_every is None:
        raise VtpruneError("--resume goes on from what --save-every wrote: give both")
    options = {name: getattr(args, name) for name in training.options}
    training.check(options)
    make(training.method, {name: value for name, value in options.items() if value != "auto"})
    if args.data is not None and not args.data.is_file():
        raise VtpruneError(f"no such file {args.data}")


def run(args: argparse.Namespace) -> int:
    """Options that are measured, training, saving, comparison. Returns the exit code; raises :class:`VtpruneError` for
    what the user can put right."""
    training = TRAININGS.get(args.what)
    _check(args, training)
    facts = read_facts(args.out, training.method) if args.compare_only else {}
    for path in (args.out, args.out.with_suffix(".json"), args.out.with_suffix(".compare.json")):
        output(path)
    weights = "float32" if args.device == "cpu" else args.dtype  # on a CPU only the arithmetic is short
    device = args.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes (torchrun)
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    model, processor = models.load(argparse.Namespace(model=args.model, device=device, dtype=weights))
    if args.compare_only:
        options = facts["options"]
    else:
        options = _train(args, training, model, processor)
    if args.eval_scenes + args.eval_easy > 0 and _first():
        dtype = DTYPES[args.dtype]
        items = chain(scene_items("test", 0, args.eval_scenes, 2), easy_items("test", args.eval_easy))
        data = encode(model, processor, items, dtype=dtype)
        table = compare(model, data, training, options, args.out, batch=args.batch, dtype=dtype)
        args.out.with_suffix(".compare.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        print(markdown(table))
    return 0


def _first() -> bool:
    """Whether this is the process that writes, of those that train together."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _train(args: argparse.Namespace, training: Training, model: Any, processor: Any) -> dict[str, Any]:
    """Trains, saves, and returns the options that it was trained with."""
    dtype, told = DTYPES[args.dtype], dict[str, Any]()
    options = {name: getattr(args, name) for name in training.options}
    if training.choose is not None:
        sizes = {"scenes": args.val_scenes, "batch": args.batch}
        options, told = training.choose(model, processor, options, dtype=dtype, **sizes)
    began = time.monotonic()
    data = encode(model, processor, _items(args), dtype=dtype)
    tell(f"{len(data.images)} images, {len(data.rows)} questions, {time.monotonic() - began:.0f}s")
    part, facts = fit(
        model,
        data,
        training.method,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        dtype=dtype,
        settings={name: getattr(args, name) for name in training.settings},
        folder=args.out.with_suffix(".checkpoints"),
        save_every=args.save_every or 0,
        resume=args.resume,
        **options,
    )
    facts["model"] = "bundled" if args.model is None else Path(args.model).name
    facts["command"] = shlex.join(["vtprune", *args.argv])
    if _first():
        save(part, args.out, {**facts, **told}, bind(model).decoder_layers())
        share = f"{facts['parameters']:,} parameters ({100 * facts['parameter_share']:.2f} %)"
        print(f"{args.out}: {share}, {facts['steps']} steps, {facts['seconds']:.0f} s")
    return options


def _items(args: argparse.Namespace) -> Iterable[Any]:
    """What is trained on."""
    if args.data is not None:
        return own_items(args.data)
    return chain(scene_items("train", 0, args.scenes, 3), easy_items("train", args.easy))
