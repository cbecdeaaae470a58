"""``verify``: the correctness contract on a user's own model, and one check of it by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.planning import ATTACH_OPTIONS, TARGETS, load_recipe
from ..core.solve import solve
from ..core.types import VtpruneError
from ..core.wrappers import unwrap
from .case import Case
from .contract import CHECKS
from .outcome import Fail, Skip


@dataclass(frozen=True)
class Check:
    """What one check of the contract came to."""

    name: str
    passed: bool | None  # None: not applicable
    detail: str  # the error, what was seen, or why it does not apply


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one (model, recipe) pair."""

    recipe: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """At least one ran and none failed."""
        ran = [c.passed for c in self.checks if c.passed is not None]
        return bool(ran) and all(ran)

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "passed": self.passed,
            "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in self.checks],
        }


def check(name: str, model: nn.Module, recipe: Any, inputs: dict[str, Any], **options: Any) -> Check:
    """One check by name. ``options`` are attach-time ones (``positions``, ``seed``); errors of the library (impossible
    pair, bad budget) are raised, not reported."""
    chosen = load_recipe(recipe)
    attached: dict[str, Any] = {k: options.pop(k) for k in ATTACH_OPTIONS if k in options}
    if options:
        chosen = chosen.override(**options)
    case = Case(unwrap(model), chosen, dict(inputs), attached)
    try:
        return Check(name, True, CHECKS[name](case))
    except Skip as e:
        return Check(name, None, str(e))
    except Fail as e:
        return Check(name, False, str(e))


def verify(model: nn.Module, recipe: Any, inputs: dict[str, Any], **options: Any) -> VerifyReport:
    """Runs the correctness contract on a model of the user's.

    Args:
        model: as for :func:`attach`, in evaluation mode.
        recipe: name, path or :class:`Recipe`.
        inputs: what the model is called with; a batch with unequal prompts shows most.
        **options: overrides as for :func:`attach` (``keep=``, ``positions=``, …).

    Raises:
        VtpruneError: the recipe does not fit the model at all, or the model is in training mode.
    """
    model = unwrap(model)
    if model.training:
        raise VtpruneError("verify needs the model in evaluation mode: model.eval()")
    chosen = load_recipe(recipe)
    target = {name: options.pop(name) for name in TARGETS if name in options}
    if target:
        attached = {name: options.pop(name) for name in ATTACH_OPTIONS if name in options}
        chosen, options = solve(model, chosen, **target, **attached, **options), attached
    checks = tuple(check(name, model, chosen, inputs, **options) for name in CHECKS)
    return VerifyReport(chosen.name, checks)
