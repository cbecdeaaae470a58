"""One model that answers requests one by one, each with the recipe that it asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..check.attach import attach
from ..core.handle import Handle
from ..core.planning import bind, plan_for
from ..core.recipe import Recipe
from ..core.report import Report
from ..core.types import VtpruneError

DENSE = "dense"


@dataclass(eq=False)
class Asked:
    """What one request wants, and what came of it.

    Attributes:
        recipe: to answer with; ``None``: the dense model.
        report: of its prefill, set when it has run.
        done: once it has run, however it ended.
    """

    recipe: Recipe | None
    report: Report | None = None
    done: Future = field(default_factory=Future)


asked: ContextVar[Asked] = ContextVar("asked")  # of the request that a task of the server handles


class Pruner:
    """``model`` and the ``recipes`` that requests may name, the first being the one for those that name none;
    ``options`` of :func:`attach` for all of them."""

    def __init__(self, model: Any, recipes: Mapping[str, Recipe], **options: Any):
        self.model, self.recipes, self.options = model, dict(recipes), options
        self.handle: Handle | None = None
        self.geometry = bind(model, options.get("per")).geometry
        for recipe in self.recipes.values():
            self._plan(recipe)

    @property
    def names(self) -> list[str]:
        return [*self.recipes, DENSE]

    def chosen(self, name: str | None, keep: int | float | None) -> Recipe | None:
        """The recipe that a request asks for, ``None`` for the dense model.

        Raises:
            VtpruneError: a recipe that is not offered, a budget that it cannot have.
        """
        name = next(iter(self.recipes)) if name is None else name
        if not isinstance(name, str) or name not in self.names:
            raise VtpruneError(f"recipe {name!r} is not offered here; there are {', '.join(self.names)}")
        if name == DENSE:
            if keep is not None:
                raise VtpruneError("the dense model has no budget keep=")
            return None
        recipe = self.recipes[name]
        if keep is not None:
            recipe = recipe.override(keep=keep)
        self._plan(recipe)
        return recipe

    def _plan(self, recipe: Recipe) -> None:
        """Raises :class:`VtpruneError` for what cannot be attached."""
        plan_for(self.geometry, recipe, self.options.get("per"))

    def run(self, request: Asked, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)`` with the request's recipe attached. Never in two threads at once."""
        try:
            self._attach(request.recipe)
            out = function(*args, **kwargs)
            if self.handle is not None:
                request.report = self.handle.report()
            return out
        finally:
            request.done.set_result(None)

    def _attach(self, recipe: Recipe | None) -> None:
        if self.handle is not None and (recipe is None or self.handle.recipe.key() != recipe.key()):
            self.close()
        if recipe is not None and self.handle is None:
            self.handle = attach(self.model, recipe, **self.options)

    def close(self) -> None:
        """The model is as it was."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


def told(report: Report | None) -> dict[str, Any]:
    """What a response says of its prefill."""
    if report is None:
        return {"recipe": DENSE}
    names = ("recipe", "visual_tokens", "layer_tokens", "effective_tokens")
    costs = ("flops", "dense_flops", "kv_bytes", "dense_kv_bytes")
    return {name: getattr(report, name) for name in (*names, *costs)}
