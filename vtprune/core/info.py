"""What there is: the public look-ups over the registries."""

from __future__ import annotations

from collections.abc import Sequence

from vtprune.models.base import ADAPTERS

from ..methods.base import METHODS, MethodInfo
from .recipes import RECIPES

# Methods by where they decide first; baselines stand apart.
GROUPS = {"pixels": "pixels", "vision": "vision tower", "projector": "projector", "llm": "LLM", "baseline": "baselines"}


def group(info: MethodInfo) -> str:
    """The key of :data:`GROUPS` that a method belongs to."""
    return "baseline" if info.paper == "baseline" else info.kinds[0]


def grouped(infos: Sequence[MethodInfo]) -> dict[str, list[MethodInfo]]:
    """Methods by the titles of :data:`GROUPS`, in their order; groups without any are left out."""
    rooms = {title: [i for i in infos if group(i) == key] for key, title in GROUPS.items()}
    return {title: mine for title, mine in rooms.items() if mine}


def methods(pattern: str = "*") -> list[str]:
    """Names of the registered methods that match an ``fnmatch`` pattern."""
    return METHODS.names(pattern)


def recipes(pattern: str = "*") -> list[str]:
    """Names of the registered recipes: one per method, and published settings."""
    return RECIPES.names(pattern)


def adapters(pattern: str = "*") -> list[str]:
    """Names of the supported model families."""
    return ADAPTERS.names(pattern)


def describe(name: str) -> MethodInfo:
    """The facts of a method: paper, idea, needs, options with defaults. Raises :class:`VtpruneError` for an unknown
    name."""
    return METHODS.get(name)
