"""Values and options that commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..core.planning import ATTACH_OPTIONS, TARGETS, load_recipe
from ..core.recipe import Recipe
from ..core.types import VtpruneError

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
        budgets = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of fractions such as 0.5,0.25") from None
    if any(not 0 < f <= 1 for f in budgets):
        raise argparse.ArgumentTypeError(f"budgets are fractions in (0, 1], got {text!r}")
    return list(dict.fromkeys(budgets))


def seed_value(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def odd(text: str) -> int:
    """An odd whole number of at least 1."""
    number = positive(text)
    if number % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not odd")
    return number


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def words(text: str) -> list[str]:
    """``tome,fastv``."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return found


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


def engine_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe for an engine that knows nothing of ``attach``. Raises :class:`VtpruneError` for options that belong
    to it alone."""
    chosen = overrides(args)
    if chosen.pop("seed"):
        raise VtpruneError("an engine draws with seed 0: leave --seed out")
    strange = sorted({*ATTACH_OPTIONS, *TARGETS} & set(chosen))
    if strange:
        raise VtpruneError(
            f"--option {strange[0]}= is one of attach; an engine keeps original positions, image by image"
        )
    return load_recipe(args.recipe).override(**chosen)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords for ``attach``."""
    return {
        "seed": args.seed,
        **({} if args.keep is None else {"keep": args.keep}),
        **chosen_options(args.option, *["keep"] * (args.keep is not None)),
    }
