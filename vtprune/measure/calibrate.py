"""Methods whose number of tokens follows from the picture have a dial instead of a budget; here it is set so that, on
given inputs, they cost what another method does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..check.attach import attach
from ..core.planning import load_recipe
from ..core.recipe import Recipe
from ..core.types import VtpruneError
from ..methods.base import METHODS

if TYPE_CHECKING:
    from torch import nn

ROUNDS = 16  # halvings of the dial's range


def calibrate(
    model: nn.Module,
    recipe: str | Recipe,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    effective_tokens: float,
    **options: Any,
) -> Recipe:
    """A recipe like ``recipe`` whose last stage's dial is turned until its prefills of ``inputs`` take
    ``effective_tokens`` on average, as closely as the dial allows without passing them.

    Args:
        model: the model that will run it.
        recipe: name, path or :class:`Recipe`; its last stage's method has a :attr:`~MethodInfo.dial`.
        inputs: what the model is called with, or several such.
        effective_tokens: visual tokens averaged over samples and language-model layers (bare ViT: blocks); a float in
            (0, 1] is a fraction of the dense model's.
        **options: as for :func:`attach`.

    Raises:
        VtpruneError: the method has no dial, or no setting of it stays within the budget.
    """
    chosen = load_recipe(recipe)
    last = chosen.stages[-1]
    info = METHODS.get(last.method)
    if info.dial is None:
        raise VtpruneError(f"{info.name} has no dial: its budget is keep=, or what solve() makes of a target")
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not batches:
        raise VtpruneError("calibrate needs inputs to turn the dial on")
    name, few, many = info.dial

    def turned(value: float) -> Recipe:
        stage = replace(last, keep=None, options={**last.options, name: value})
        return replace(chosen, stages=(*chosen.stages[:-1], stage))

    least, dense = _cost(model, turned(few), batches, options)
    fraction = isinstance(effective_tokens, float) and effective_tokens <= 1
    target = effective_tokens * dense if fraction else effective_tokens
    if least > target * (1 + 1e-9):
        raise VtpruneError(
            f"{chosen.name} takes {least:.4g} effective tokens on these inputs with {name}={few:g}, its smallest "
            f"setting; {target:.4g} are asked for"
        )
    best, low, high = few, few, many
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if _cost(model, turned(middle), batches, options)[0] <= target * (1 + 1e-9):
            best, low = middle, middle
        else:
            high = middle
    return turned(best)


def _cost(
    model: nn.Module, recipe: Recipe, batches: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> tuple[float, float]:
    """Effective tokens of ``recipe``, and of the dense model, averaged over samples."""
    import torch

    spent, dense, samples = 0.0, 0.0, 0
    with attach(model, recipe, **options) as handle, torch.no_grad():
        for batch in batches:
            model(**batch)
            report = handle.report()
            count = len(report.visual_tokens)
            spent += report.effective_tokens * count
            dense += sum(report.visual_tokens)
            samples += count
    return spent / samples, dense / samples
