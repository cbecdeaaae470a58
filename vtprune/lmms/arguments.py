"""What ``--model_args`` says: which arguments are about pruning, lists joined with ``+``, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmms_eval import utils

from ..core.planning import ATTACH_OPTIONS, TARGETS
from ..core.recipe import Recipe
from ..core.types import VtpruneError
from ..methods.base import METHODS, OWN_BUDGETS


def divide(recipe: Recipe | None, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that ``attach`` takes, with lists read, and all others."""
    known = known_options(recipe)
    own = {k: listed(v) for k, v in options.items() if k in known}
    return own, {k: v for k, v in options.items() if k not in known}


def known_options(recipe: Recipe | None) -> list[str]:
    """The arguments that ``attach`` takes for ``recipe``; none for the dense model."""
    if recipe is None:
        return []
    return ["keep", *TARGETS, *ATTACH_OPTIONS, *OWN_BUDGETS, *METHODS.get(recipe.stages[-1].method).options]


def listed(value: Any) -> Any:
    """``8+16+24`` as a list of numbers."""
    if not isinstance(value, str) or "+" not in value:
        return value
    return [utils.handle_arg_string(v) for v in value.split("+")]


def check_unknown(rest: Mapping[str, Any], recipe: Recipe | None) -> None:
    """Raises :class:`VtpruneError` for arguments that nobody takes."""
    if rest:
        known = ", ".join([*known_options(recipe), "pretrained", "base", "dtype", "device", "report", "journal"])
        raise VtpruneError(f"unknown argument {sorted(rest)[0]!r}; there are {known}")


def number_of_samples(batch_size: int | str) -> int:
    """Raises :class:`VtpruneError` for anything but a whole number from 1 on."""
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise VtpruneError(f"batch_size={batch_size!r} is not a number of samples")
    return int(batch_size)


def number_of_frames(max_frames: int | str) -> int:
    """Raises :class:`VtpruneError` for anything but a whole number from 1 on."""
    if not str(max_frames).isdecimal() or int(max_frames) < 1:
        raise VtpruneError(f"max_frames={max_frames!r} is not a number of frames")
    return int(max_frames)


def unquoted(text: str | None) -> str | None:
    """Without the quotation marks that kept its commas together."""
    return None if text is None else str(text).strip('"')
