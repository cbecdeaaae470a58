"""For the tests of methods, recipes and adapters, ours and others': tiny random models, and the correctness contract as
parameters of pytest. A method proves itself in ten lines::

    import pytest
    from vtprune import testing

    @pytest.mark.parametrize("case", testing.contract("mine", families=("llava", "qwen2-vl")))
    def test_contract(case):
        testing.check(case)
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.models.base import ADAPTERS

from .check.attach import attach
from .check.verify import CHECKS
from .check.verify import check as run_check
from .core.info import describe, methods
from .core.planning import bind, load_recipe, plan
from .core.types import Action, UnsupportedError, VtpruneError

LEAST = 3  # checks that must have run before a case counts as passed


@dataclass(frozen=True)
class Case:
    """One method or recipe on one tiny model, in one of the method's registered cases."""

    recipe: str  # name of a method or a recipe
    family: str  # name of an adapter
    variant: str  # of the family's tiny models
    number: int  # of ``MethodInfo.cases``; 0 for a recipe, which comes with its own options

    def __str__(self) -> str:
        return f"{self.family}-{self.variant}-{self.recipe}-{self.number}"


def tiny(family: str, variant: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny random model of ``family`` in float32 on the CPU, and inputs to call it with; a copy for each caller.

    Args:
        family: a name of :func:`vtprune.adapters`.
        variant: of the family's tiny models (default: the first).

    Returns:
        ``(model, inputs)``: the model in evaluation mode, and its keywords. With a language model these are a padded
        batch of prompts, ``input_ids`` and ``attention_mask`` ``[B, T]`` and what the family takes besides
        (``pixel_values``, grids, sizes); of a tower the images, ``[B, 3, H, W]``.

    Raises:
        VtpruneError: there is no such family or variant.
        UnsupportedError: building it needs an optional package that is not installed.
    """
    info = ADAPTERS.get(family)
    if variant is not None and variant not in info.tiny:
        raise VtpruneError(f"{family} has no tiny model {variant!r}; there are {', '.join(info.tiny)}")
    if info.package is not None and find_spec(info.package) is None:
        raise UnsupportedError(f"the tiny models of {family} need the package {info.package}")
    model, inputs = _built(info.tiny[variant or next(iter(info.tiny))])
    return copy.deepcopy(model), {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


@functools.cache
def _built(builder: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> tuple[nn.Module, dict[str, Any]]:
    return builder()


def case_options(model: nn.Module, method: str, number: int) -> dict[str, Any]:
    """The keywords of :func:`vtprune.attach` for ``method``'s registered case ``number`` on ``model``: where a tower
    sees tiles and the method cuts in it, counts of tokens are per tile.

    Raises:
        VtpruneError: there is no such method.
        UnsupportedError: no adapter takes the model.
    """
    geometry, case = bind(model).geometry, describe(method).cases[number]
    if "tile" not in geometry.per[1:]:
        return dict(case)
    try:
        stages = plan(geometry, load_recipe(method).override(**case))
    except VtpruneError:  # what cannot be planned has no budget either
        return dict(case)
    inside = any(c.kind in ("pixels", "vision") and c.action is not Action.NOTE for *_, cuts in stages for c in cuts)
    return {**case, **({"per": "tile"} if inside else {})}


def contract(recipe: str, families: Iterable[str] | None = None, *, variants: bool = False) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize("case", ...)``, each a :class:`Case` for :func:`check`: every registered
    case of a method, or a recipe as it is, on the tiny models.

    Args:
        recipe: name of a method or of a recipe.
        families: names of :func:`vtprune.adapters` (default: all).
        variants: all tiny models of each family (default: the first).

    Raises:
        VtpruneError: there is no such method, recipe or family.
        ImportError: pytest is not installed.
    """
    import pytest

    load_recipe(recipe)
    count = len(describe(recipe).cases) if recipe in methods() else 1
    cases = []
    for family in list(ADAPTERS) if families is None else families:
        names = list(ADAPTERS.get(family).tiny)
        cases += [Case(recipe, family, v, n) for v in (names if variants else names[:1]) for n in range(count)]
    return [pytest.param(case, id=str(case)) for case in cases]


def check(case: Case, checks: Sequence[str] | None = None, **options: Any) -> None:
    """Runs the correctness contract, or ``checks`` of it (names of :data:`vtprune.check.verify.CHECKS`), on one case.
    The test is skipped, with the reason, where the model refuses the method; what a check of a case does not apply to
    (a tower generates nothing) is left out.

    Args:
        case: from :func:`contract`.
        checks: default: all.
        **options: of :func:`vtprune.attach`, over those of the case.

    Raises:
        VtpruneError: what :func:`vtprune.attach` says of the options; a check that there is not.
        pytest.fail.Exception: a check fails (all that do are named), or fewer than :data:`LEAST` of them apply.
    """
    import pytest

    names = tuple(CHECKS) if checks is None else tuple(checks)
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise VtpruneError(f"there is no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    try:
        model, inputs = tiny(case.family, case.variant)
        chosen = {**(case_options(model, case.recipe, case.number) if case.recipe in methods() else {}), **options}
        with attach(model, case.recipe, **chosen), torch.no_grad():
            model(**inputs)
    except UnsupportedError as e:
        pytest.skip(str(e))
    results = [run_check(name, model, case.recipe, inputs, **chosen) for name in names]
    failed = [f"{r.name}: {r.detail}" for r in results if r.passed is False]
    if failed:
        pytest.fail(f"{case}: " + "\n".join(failed), pytrace=False)
    ran = sum(r.passed is not None for r in results)
    if ran < min(LEAST, len(names)):
        pytest.fail(f"{case}: only {ran} of {len(names)} checks apply, which proves little", pytrace=False)
