"""Where registered things come from, as a column of the commands that list them."""

from __future__ import annotations

from typing import Any

from ..core.registry import Registry


def with_distributions(registry: Registry[Any], table: list[list[str]]) -> list[list[str]]:
    """``table``, whose rows below the head begin with a registered name, with a column that says which distribution
    each comes from, if any of them comes from a plug-in."""
    head, *rows = table
    sources = [registry.distribution(row[0]) for row in rows]
    if not any(sources):
        return table
    return [[*head, "distribution"], *([*row, source or "vtprune"] for row, source in zip(rows, sources, strict=True))]
