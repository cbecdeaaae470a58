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


EQUAL = "equal"  # as ``effective_tokens=`` or ``flops=`` of a control: what the trained method spends


def rivals(*methods: str, by: str = "effective_tokens", **options: Any) -> list[Control]:
    """Methods without training as controls that spend as much as what is trained, ``by`` ``"effective_tokens"`` or
    ``"flops"``."""
    words = {"effective_tokens": "as many effective tokens", "flops": "as many FLOPs"}
    return [(f"{method}, {words[by]}", method, {**options, by: EQUAL}) for method in methods]


def tell(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def _not_known() -> Any:
    raise NotImplementedError("how the model was called is not known")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward of a model with an attachment that is being trained.

    Attributes:
        handle: of the attachment.
        settings: the numbers of the method's losses.
        model, inputs, output: what was called, with what, and what it answered with.
        again: calls it so once more.
        done: the share of the steps that is done, from 0 to 1.
    """

    handle: Handle
    settings: Mapping[str, float]
    model: Any
    inputs: Mapping[str, Any]
    output: Any
    done: float
    again: Callable[[], Any] = _not_known


def _no_losses(step: Step) -> dict[str, Tensor]:
    return {}


def _nothing_prepared(handle: Handle, settings: Mapping[str, float], done: float) -> None:
    return None


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
        prepare: what is set ahead of each forward, ``prepare(handle, settings, done)``, as of a :class:`Step`.
        during: options of the attachment while it is trained, which its weights do not belong to.
        least: rows of each process in a step.
        rests: whether parts of it may get no gradient in a step.
        asks: what else each forward is called with, ``output_hidden_states=True`` for one.
        check: raises :class:`~vtprune.core.types.VtpruneError` for options that leave nothing to train.
        choose: of options that are ``"auto"``, what they should be, measured on so many validation scenes:
            ``choose(model, processor, options, scenes=, batch=, dtype=)``; what was measured, to be kept beside the
            weights, comes with them.
        tells: what the method asks a file of weights for: ``tells(part, options)``, a file's metadata.
        controls: what the trained part is compared with, besides the unpruned model (:func:`rivals` among them).
        part: whether the method has a part of its own; one without trains LoRA adapters of the model alone.
        case: how tests train it beside a tiny model of six layers: ``options``, ``settings`` and ``lr`` with which the
            loss falls (to ``falls`` of what it was, 0.95), and ``shared``, arguments with which two processes decide
            otherwise; ``own``: the answers are the tiny model's own; ``pictures``: it is trained on labels alone.
    """

    method: str
    what: str
    options: Mapping[str, Any]
    settings: Mapping[str, float] = field(default_factory=dict)
    help: Mapping[str, str] = field(default_factory=dict)
    lr: float = 1e-3
    losses: Callable[[Step], dict[str, Tensor]] = _no_losses
    answers: bool = True
    prepare: Callable[[Handle, Mapping[str, float], float], None] = _nothing_prepared
    during: Mapping[str, Any] = field(default_factory=dict)
    least: int = 1
    rests: bool = False
    asks: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = _anything
    choose: Callable[..., tuple[dict[str, Any], dict[str, Any]]] | None = None
    tells: Callable[[Any, Mapping[str, Any]], dict[str, str]] = _nothing_told
    controls: Callable[[Mapping[str, Any]], list[Control]] = _no_controls
    part: bool = True
    case: Mapping[str, Any] = field(default_factory=dict)


def _load() -> None:
    papers = {name.replace("-", "_") for name in METHODS}
    for module in iter_modules([os.path.dirname(__file__)]):
        if module.name in papers:  # one paper, one file here as there
            import_module(f"{__package__}.{module.name}")


TRAININGS: Registry[Training] = Registry("method that can be trained", _load)


def register(training: Training) -> Training:
    return TRAININGS.register(training.method, training, module=sys._getframe(1).f_globals["__name__"])
