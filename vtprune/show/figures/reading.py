"""What figures and tables read off a result: rows, accuracies with their intervals, costs, times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ...methods.base import METHODS
from .style import LINE, styles


def dense_row(bench: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the dense model."""
    return next(r for r in bench["rows"] if r["method"] == "dense")


def measured(bench: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows with numbers, without dense."""
    return [r for r in bench["rows"] if r.get("error") is None and r["method"] != "dense"]


def nearest(rows: Iterable[Mapping[str, Any]], budget: float) -> float | None:
    """The budget of ``rows`` that is nearest to ``budget``; ``None`` if no row has one."""
    return min({r["budget"] for r in rows if r.get("budget") is not None}, key=lambda b: abs(b - budget), default=None)


def at(rows: Iterable[Mapping[str, Any]], budget: float | None) -> list[Mapping[str, Any]]:
    """Rows at exactly ``budget``."""
    return [r for r in rows if r.get("budget") == budget]


def baselines(bench: Mapping[str, Any]) -> set[str]:
    """Names of rows whose stages are all registered as baselines."""

    def plain(row: Mapping[str, Any]) -> bool:
        names = [s["method"] for s in (row.get("recipe") or {}).get("stages", ())] or [row["method"]]
        return all(name in METHODS and METHODS.get(name).paper == "baseline" for name in names)

    return {r["method"] for r in bench["rows"] if plain(r)}


class Panel(NamedTuple):
    """One accuracy of the rows, as a fraction."""

    title: str
    value: Callable[[Mapping[str, Any]], Any]  # of a row
    interval: Callable[[Mapping[str, Any]], Any]  # of a row, 95 %; ``None`` where it has none
    dense: float  # the dense model's value


def panels(bench: Mapping[str, Any]) -> list[Panel]:
    """The average, the worst ability, group A (if some row has it; dense answers all of it by definition) and every
    ability."""
    base = dense_row(bench)

    def between(name: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda row: (row.get("ability_intervals") or {}).get(name)

    def reached(name: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda row: row["abilities"][name]

    def group(key: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda row: (row.get("group_a") or {}).get(key)

    out = [
        Panel(
            "average of abilities", lambda row: row["average"], lambda row: row.get("average_interval"), base["average"]
        ),
        Panel("worst ability", lambda row: row["worst"], lambda row: between(row["worst_ability"])(row), base["worst"]),
    ]
    if any(r.get("group_a") for r in measured(bench)):
        out.append(Panel("group A", group("accuracy"), group("interval"), 1.0))
    return out + [Panel(a, reached(a), between(a), base["abilities"][a]) for a in bench["abilities"]]


def costs(bench: Mapping[str, Any], cost: str = "tokens") -> Callable[[Mapping[str, Any]], float]:
    """A row's cost as a fraction of dense: effective ``"tokens"`` or ``"flops"``."""
    base = dense_row(bench)["effective_tokens"]
    return (lambda row: row["flops_share"]) if cost == "flops" else (lambda row: row["effective_tokens"] / base)


MOST_METHODS, MOST_POINTS = 60, 40  # what a figure can show: lines that look apart, points on one of them


def fewer(bench: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """``bench`` with the rows that figures can show, the most accurate :data:`MOST_METHODS` methods at up to
    :data:`MOST_POINTS` budgets each, and how many rows that leaves out."""
    by: dict[str, list[Mapping[str, Any]]] = {}
    for row in measured(bench):
        by.setdefault(row["method"], []).append(row)
    if len(by) <= MOST_METHODS and all(len(rows) <= MOST_POINTS for rows in by.values()):
        return bench, 0
    best = sorted(by, key=lambda name: -max(r["average"] for r in by[name]))[:MOST_METHODS]
    shown = []
    for name in (n for n in by if n in {*best}):
        rows = sorted(by[name], key=lambda r: r["effective_tokens"])
        step = max(1, -(-len(rows) // MOST_POINTS))
        shown += rows[::step]
    return {**bench, "rows": [dense_row(bench), *shown]}, len(measured(bench)) - len(shown)


def front(
    rows: Iterable[Mapping[str, Any]],
    cost: Callable[[Mapping[str, Any]], float],
    value: Callable[[Mapping[str, Any]], Any],
) -> list[Any]:
    """The Pareto front, cheapest first: rows than which no other is more accurate at the same or a smaller cost."""
    out: list[Mapping[str, Any]] = []
    best = -math.inf
    for row in sorted((r for r in rows if value(r) is not None), key=lambda r: (cost(r), -value(r))):
        if (reached := value(row)) is not None and reached > best:
            best = reached
            out.append(row)
    return out


def looks(bench: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """:func:`styles` of the measured methods: in the table's order, baselines behind the others."""
    plain, names = baselines(bench), dict.fromkeys(r["method"] for r in measured(bench))
    return styles(sorted(names, key=lambda n: n in plain), plain)


MANY = 12  # lines that a panel can tell apart
OTHERS: dict[str, Any] = {"color": LINE, "linestyle": "-", "marker": None, "lw": 0.8, "zorder": 1.3}


def highlights(bench: Mapping[str, Any], cost: str = "tokens") -> dict[str, dict[str, Any]]:
    """:func:`looks`; of more than :data:`MANY` methods that are no baselines those on the front of the average have
    looks of their own, the rest :data:`OTHERS`."""
    every, plain, rows = looks(bench), baselines(bench), measured(bench)
    if len([name for name in every if name not in plain]) <= MANY:
        return every
    best = {row["method"] for row in front(rows, costs(bench, cost), panels(bench)[0].value)}
    own = styles([name for name in every if name in best or name in plain], plain)
    return {name: own.get(name, OTHERS) for name in every}


def first_token(entry: Mapping[str, Any]) -> float | None:
    """Milliseconds to the first token: ``ttft_ms``, or else ``vision_ms`` and ``prefill_ms`` together (``None`` without
    either)."""
    if entry.get("ttft_ms") is not None:
        return entry["ttft_ms"]
    return None if entry.get("prefill_ms") is None else entry["prefill_ms"] + (entry.get("vision_ms") or 0.0)


def speed(row: Mapping[str, Any]) -> float:
    """Pruned over dense time to the first token, of a row that has both."""
    return (first_token(row["pruned"]) or math.nan) / (first_token(row["dense"]) or math.nan)


def settings(times: Mapping[str, Any], budget: float) -> dict[str, list[Mapping[str, Any]]]:
    """Rows at ``budget`` that have both times, under ``"batch 8, 1 image"``."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in at(times["rows"], budget):
        if first_token(row["dense"]) is not None and first_token(row["pruned"]) is not None:
            images = row.get("images", 1)
            out.setdefault(f"batch {row.get('batch', 1)}, {images} image{'s' if images != 1 else ''}", []).append(row)
    return out


TIMED = {
    "ttft_ms": "first token",
    "e2e_ms": "whole answer",
    "vision_ms": "tower",
    "prefill_ms": "prefill",
    "decode_ms": "per decoded token",
    "peak_bytes": "peak MiB",
}

PARTS = {"prefill": "Prefill", "decode": "Decoding, per token", "hooks": "Decoding, tiny layers"}
