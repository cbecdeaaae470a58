"""``vtprune train``: trains what a method needs trained."""

from __future__ import annotations

import argparse
import json
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..core.paths import output
from ..core.types import VtpruneError
from ..train.dpvr_compare import choose_split, compare, markdown, withdrawal_curve
from ..train.dpvr_fit import train
from ..train.dpvr_lf import BRANCH, read_facts, save, tell
from ..train.dpvr_questions import easy_items, encode, scene_items
from . import models
from .errors import Parser
from .options import seed_value

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One command below this one for each method that can be trained."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="METHOD", parser_class=Parser)
    branch = kinds.add_parser("dpvr-lf", help="the side branch of DPVR-LF")
    branch.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    branch_arguments(branch)


def branch_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of ``vtprune train dpvr-lf``, in the order in which ``--help`` shows them."""
    _branch_arguments(parser)
    _fitting_arguments(parser)
    _data_arguments(parser)
    _other_arguments(parser)


def _branch_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the branch and where it goes."""
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        help="where the branch goes (.safetensors); FILE.json and FILE.compare.json are written beside it",
    )
    add("--model", help="folder or hub id of a LLaVA (default: the bundled VLM)")
    add(
        "--split",
        default="auto",
        help="first layer without visual tokens; 'auto' measures where withdrawing the image still costs accuracy",
    )
    add("--fusion", type=int, default=1, help="last layers that see text and visual tokens (default 1)")
    add("--branch-layers", type=int, default=1, help="layers of the side branch (default 1)")
    add(
        "--init",
        default="copy",
        choices=("copy", "identity", "random"),
        help="the branch before training (default copy, of layer SPLIT)",
    )
    add(
        "--variant",
        default="lf",
        choices=("lf", "pc", "kv"),
        help="late fusion; persistent context, or the same with keys and values only (default lf)",
    )


def _fitting_arguments(parser: argparse.ArgumentParser) -> None:
    """How it is trained, and for how long."""
    add = parser.add_argument
    add(
        "--lr",
        type=float,
        default=1e-3,
        help="peak learning rate (default 1e-3 for the bundled VLM; the paper's 7B model takes 1e-4)",
    )
    add("--steps", type=int, default=600, help="optimiser steps (default 600)")
    add("--batch", type=int, default=32, help="questions per step (default 32)")
    add(
        "--minutes",
        type=float,
        default=10.0,
        help="wall clock of the training; the learning rate ends with whatever ends first (default 10)",
    )


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    """On how many images it is trained, chosen and compared."""
    add = parser.add_argument
    add("--scenes", type=int, default=1000, help="generated training images (default 1000)")
    add("--easy", type=int, default=150, help="easy-VQA training images (default 150)")
    add("--val-scenes", type=int, default=30, help="images for --split auto (default 30, about 330 questions)")
    add("--eval-scenes", type=int, default=100, help="test images for the comparison afterwards (default 100; 0: none)")
    add("--eval-easy", type=int, default=30, help="easy-VQA test images for it (default 30)")


def _other_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--compare-only", action="store_true", help="no training: compare the branch that lies at --out")
    add("--device", default="cpu")
    add(
        "--dtype",
        default="bfloat16",
        choices=tuple(DTYPES),
        help="arithmetic (default bfloat16; the branch's own weights are float32 while it is trained)",
    )
    add("--seed", type=seed_value, default=0, help="order of the questions")


def _check(args: argparse.Namespace) -> int | None:
    """The split as a number, ``None`` for auto; everything wrong is told before anything is loaded."""
    if args.out.suffix != ".safetensors":
        raise VtpruneError(f"--out {args.out} must end in .safetensors")
    for name in ("scenes", "easy", "val_scenes", "eval_scenes", "eval_easy"):
        if getattr(args, name) < 0:
            raise VtpruneError(f"--{name.replace('_', '-')} must not be negative")
    for name in ("steps", "batch", "lr", "minutes"):
        if not getattr(args, name) > 0:
            raise VtpruneError(f"--{name} must be above 0")
    if not args.compare_only and args.scenes + args.easy == 0:
        raise VtpruneError("--scenes and --easy are both 0: there is nothing to train on")
    if args.split == "auto":
        return None
    if not str(args.split).isdecimal():
        raise VtpruneError(f"--split {args.split} is neither 'auto' nor a layer number")
    return int(args.split)


def run(args: argparse.Namespace) -> int:
    """``vtprune train dpvr-lf``: split, training, saving, comparison. Returns the exit code; raises
    :class:`VtpruneError` for what the user can put right."""
    split = _check(args)
    facts = read_facts(args.out) if args.compare_only else {}
    for path in (args.out, args.out.with_suffix(".json"), args.out.with_suffix(".compare.json")):
        output(path)
    weights = "float32" if args.device == "cpu" else args.dtype  # on a CPU only the arithmetic is short
    model, processor = models.load(argparse.Namespace(model=args.model, device=args.device, dtype=weights))
    if args.compare_only:
        options = {name: facts[name] for name in BRANCH if name in facts}
    else:
        options = _train(args, model, processor, split)
    if args.eval_scenes + args.eval_easy > 0:
        sizes = {"eval_scenes": args.eval_scenes, "eval_easy": args.eval_easy, "batch": args.batch}
        table = compare(model, processor, args.out, dtype=DTYPES[args.dtype], **sizes, **options)
        args.out.with_suffix(".compare.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        print(markdown(table))
    return 0


def _train(args: argparse.Namespace, model: Any, processor: Any, split: int | None) -> dict[str, Any]:
    """Trains the branch at ``split`` (``None``: where the model's own withdrawal curve puts it), saves it, and returns
    the options that it was trained with."""
    dtype, curve = DTYPES[args.dtype], None
    if split is None:
        val = encode(model, processor, scene_items("val", 0, args.val_scenes, 2), dtype=dtype)
        curve = withdrawal_curve(model, val, batch=args.batch, dtype=dtype)
        split = choose_split(curve, args.fusion)
        tell(f"split {split}")
    options = {
        "split": split,
        "fusion": args.fusion,
        "branch_layers": args.branch_layers,
        "init": args.init,
        "variant": args.variant,
    }
    began = time.monotonic()
    items = chain(scene_items("train", 0, args.scenes, 3), easy_items("train", args.easy))
    data = encode(model, processor, items, dtype=dtype)
    tell(f"{len(data.images)} images, {len(data.rows)} questions, {time.monotonic() - began:.0f}s")
    settings = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed, "minutes": args.minutes}
    branch, facts = train(model, data, dtype=dtype, **settings, **options)
    facts["model"] = "bundled" if args.model is None else Path(args.model).name
    save(branch, args.out, facts if curve is None else {**facts, "withdrawal": curve})
    print(
        f"{args.out}: {facts['parameters']:,} parameters ({100 * facts['parameter_share']:.2f} %), "
        f"{facts['steps']} steps, {facts['seconds']:.0f} s"
    )
    return options
