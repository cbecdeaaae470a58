"""Methods with a trained part, and how each is trained: one :class:`Training` a method, one file a method."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

from ..core.handle import Handle
from ..core.registry import Registry
from ..methods.base import METHODS

Say = Callable[[str], None]
Control = tuple[
    str, str | None, dict[str, Any]
]  # a row of the comparison: its name, a recipe (None: unpruned), options


def tell(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward of a model with an attachment that is being trained.

    Attributes:
        handle: of the attachment.
        settings: the numbers of the method's losses.
        model, inputs, output: what was called, with what, and what it answered with.
        done: the share of the steps that is done, from 0 to 1.
    """

    handle: Handle
    settings: Mapping[str, float]
    model: Any
    inputs: Mapping[str, Any]
    output: Any
    done: float


def _no_losses(step: Step) -> dict[str, Tensor]:
    return {}


def _anything(options: Mapping[str, Any]) -> None:
    return None


def _nothing_told(part: Any, options: Mapping[str, Any]) -> dict[str, str]:
    return {}


def _no_controls(options: Mapping[str, Any]) -> list[Control]:
    return []


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the trained part of a method is fitted beside a frozen model.

    Attributes:
        method: its name; ``handle.modules[method]`` is what is trained.
        what: that part, in words.
        options: those of the method that its weights belong to, with the defaults here.
        settings: numbers that its losses take, with their defaults.
        help: what options and settings mean, where the method does not say so itself.
        lr: the peak learning rate by default.
        losses: what is added to the cross-entropy of the answers after each forward, by name; means over the samples.
        answers: whether that cross-entropy counts at all.
        asks: what else each forward is called with, ``output_hidden_states=True`` for one.
        check: raises :class:`~vtprune.core.types.VtpruneError` for options that leave nothing to train.
        choose: of options that are ``"auto"``, what they should be, measured on so many validation scenes:
            ``choose(model, processor, options, scenes=, batch=, dtype=)``; what was measured, to be kept beside the
            weights, comes with them.
        tells: what the method asks a file of weights for: ``tells(part, options)``, a file's metadata.
        controls: what the trained part is compared with, besides the unpruned model.
        case: how tests train it beside a tiny model of six layers: ``options``, ``settings`` and ``lr`` with which the
            loss falls, and ``shared``, arguments with which two processes decide otherwise.
    """

    method: str
    what: str
    options: Mapping[str, Any]
    settings: Mapping[str, float] = field(default_factory=dict)
    help: Mapping[str, str] = field(default_factory=dict)
    lr: float = 1e-3
    losses: Callable[[Step], dict[str, Tensor]] = _no_losses
    answers: bool = True
    asks: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = _anything
    choose: Callable[..., tuple[dict[str, Any], dict[str, Any]]] | None = None
    tells: Callable[[Any, Mapping[str, Any]], dict[str, str]] = _nothing_told
    controls: Callable[[Mapping[str, Any]], list[Control]] = _no_controls
    case: Mapping[str, Any] = field(default_factory=dict)


def _load() -> None:
    papers = {name.replace("-", "_") for name in METHODS}
    for module in iter_modules([os.path.dirname(__file__)]):
        if module.name in papers:  # one paper, one file here as there
            import_module(f"{__package__}.{module.name}")


TRAININGS: Registry[Training] = Registry("method that can be trained", _load)


def register(training: Training) -> Training:
    return TRAININGS.register(training.method, training, module=sys._getframe(1).f_globals["__name__"])
