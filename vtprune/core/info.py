"""What there is: the public look-ups over the registries."""

from __future__ import annotations

from vtprune.models.base import ADAPTERS

from ..methods.base import METHODS, MethodInfo
from .recipes import RECIPES


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
