"""Values, options and checks that commands share."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vtprune

from ..core.types import VtpruneError
from ..inputs import loading
from ..measure.text import text

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")

DTYPES = ("float32", "float16", "bfloat16")


def keep_value(text: str) -> int | float:
    """``64`` is a number of tokens, ``0.25`` a fraction."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens (64) nor a fraction (0.25)") from None


def key_value(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``; the value is JSON, or else a word."""
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def fractions(text: str) -> list[float]:
    """``0.5,0.25``."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of fractions such as 0.5,0.25") from None
    if any(not 0 < f <= 1 for f in found):
        raise argparse.ArgumentTypeError(f"budgets are fractions in (0, 1], got {text!r}")
    return list(dict.fromkeys(found))


def seed_value(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def output(path: Path | None, *endings: str) -> Path | None:
    """``path`` if a file can be put there, told before the long work, and its name ends in one of ``endings`` (none:
    anyhow). Raises :class:`VtpruneError`."""
    if path is not None and endings and path.suffix.lower() not in endings:
        raise VtpruneError(f"cannot write {path}: its name ends in {' or '.join(endings)}, which says what is written")
    if path is not None and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
        what = (
            "is a folder"
            if path.is_dir()
            else "lies in a folder that cannot be written"
            if path.parent.is_dir()
            else "lies in a folder that does not exist"
        )
        raise VtpruneError(f"cannot write {path}: it {what}")
    return path


def folder(path: Path | None) -> Path | None:
    """``path``, made if need be. Raises :class:`VtpruneError` if it cannot be written."""
    if path is None:
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise VtpruneError(f"cannot make the folder {path}: {e.strerror or e}") from e
    if not os.access(path, os.W_OK):
        raise VtpruneError(f"the folder {path} cannot be written")
    return path


def model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="folder of a model and its processor, or a hub id (default: the bundled VLM, no network)",
    )
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    group.add_argument("--dtype", default="float32", choices=DTYPES)
    group.add_argument("--seed", type=seed_value, default=0, help="for methods that draw at random (default 0)")


def recipe_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pruning").add_argument
    add(
        "--recipe",
        default="pyramiddrop",
        metavar="NAME_OR_FILE",
        help="a name ('vtprune recipes') or a .json / .yaml file (default %(default)s)",
    )
    add("--keep", type=keep_value, metavar="N_OR_FRACTION", help="visual tokens left after the last cut: 64, or 0.25")
    what = "an option of the last method, or positions= or per=, value as JSON; repeatable"
    add("--option", type=key_value, action="append", default=[], metavar="KEY=VALUE", help=what)


def chosen_options(given: Sequence[tuple[str, Any]], *own: str) -> dict[str, Any]:
    """What ``--option`` gave, by name: options of methods, of recipes and of ``attach`` alike. Raises
    :class:`VtpruneError` for one that is given twice and for those that are ``own`` options of the command."""
    names = [name for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise VtpruneError(f"--option {name}= is given {names.count(name)} times")
        if name in own:
            raise VtpruneError(f"--option {name}=: this is --{name} here")
        if name in ("model", "recipe", "self"):
            raise VtpruneError(f"there is no option {name!r}")
    return dict(given)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords for ``attach``."""
    return {
        "seed": args.seed,
        **({} if args.keep is None else {"keep": args.keep}),
        **chosen_options(args.option, *["keep"] * (args.keep is not None)),
    }


def is_local(model: str | None) -> bool:
    """Whether ``--model`` names a folder (or the bundled VLM) and no hub id. Raises :class:`VtpruneError` if it can be
    neither."""
    if model is None or Path(model).is_dir():
        return True
    if not HUB_ID.fullmatch(model):
        raise VtpruneError(f"no such model folder: {model}")
    return False


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """``(model, processor)``. A folder is read without a network, anything else is a hub id (``HF_HUB_OFFLINE=1``: as
    cached). :class:`VtpruneError` for a device that is not there and for a folder or hub id that holds no such model or
    cannot be reached."""
    import torch

    try:
        device = torch.device(args.device)
    except RuntimeError as e:
        raise VtpruneError(f"unknown device {args.device!r}") from e
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise VtpruneError(
            f"device {args.device!r} is not available here; there are cpu and {torch.cuda.device_count()} CUDA devices"
        )
    local = is_local(args.model)
    from transformers.utils import logging

    if local:
        logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype)
    if args.model is None:
        return vtprune.load_demo_model(args.device, dtype)
    model, processor = loading.load(args.model, dtype=dtype, local=local)
    with loading.told(f"cannot move {args.model} to {device}"):
        return model.to(device), processor


def show(table: Sequence[Sequence[str]]) -> None:
    print(text(table))
