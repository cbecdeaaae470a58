"""The tables of a bench result: accuracy and cost per budget, accuracy per ability, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..measure.text import prefill_text
from .figures import reading
from .results import ResultFile
from .tables import NONE, Cell, Table, between, percent, plain_table, share


class Column(NamedTuple):
    """A column of the main table."""

    name: str
    text: Callable[[Mapping[str, Any]], str]  # of a row, shown
    value: Callable[[Mapping[str, Any]], float | None]  # of a row, compared; ``None``: not known
    better: int = 0  # 1 if more is, -1 if less is, 0 if neither
    spread: Callable[[Mapping[str, Any]], str] = lambda row: ""  # the interval, shown behind

    def cell(self, row: Mapping[str, Any], best: bool = False) -> Cell:
        return Cell(self.text(row), best, spread=self.spread(row))


def _group(row: Mapping[str, Any], key: str) -> Any:
    return (row.get("group_a") or {}).get(key)


def _count(key: str) -> Callable[[Mapping[str, Any]], str]:
    """Whole numbers without a decimal."""
    return lambda row: NONE if row.get(key) is None else f"{row[key]:.1f}".removesuffix(".0")


def _get(key: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: row.get(key)


def _ratio(row: Mapping[str, Any]) -> str:
    return prefill_text(row) or ("1.00" if row["method"] == "dense" else NONE)


def _sure_ratio(row: Mapping[str, Any]) -> float | None:
    return None if row.get("prefill_verdict") else row.get("prefill_ratio")


COLUMNS = [
    Column(
        "average %",
        lambda row: percent(row["average"]),
        _get("average"),
        1,
        lambda row: between(row.get("average_interval")),
    ),
    Column("of dense %", lambda row: percent(row.get("relative_average")), _get("relative_average"), 1),
    Column("worst ability %", lambda row: f"{percent(row['worst'])} {row['worst_ability']}", _get("worst"), 1),
    Column(
        "group A %",
        lambda row: percent(_group(row, "accuracy")),
        lambda row: _group(row, "accuracy"),
        1,
        lambda row: between(_group(row, "interval")),
    ),
    Column("tokens left", _count("nominal_tokens"), _get("nominal_tokens")),
    Column("effective tokens", _count("effective_tokens"), _get("effective_tokens")),
    Column("FLOPs %", lambda row: percent(row["flops_share"], 0), _get("flops_share"), -1),
    Column("KV %", lambda row: percent(row["kv_share"], 0), _get("kv_share"), -1),
    Column("prefill x", _ratio, _sure_ratio, -1),
    Column("note", lambda row: row.get("note") or "", lambda row: None),
]


def known_columns(bench: Mapping[str, Any]) -> list[Column]:
    """The columns of the main tables, the same at every budget: those that some row has."""
    return [
        c
        for c in COLUMNS
        if c.name in ("note", "prefill x") or any(c.value(r) is not None for r in reading.measured(bench))
    ]


def main_table(bench: Mapping[str, Any], budget: float | None, columns: Sequence[Column]) -> Table:
    """The rows of ``bench``, all at ``budget``, by average, dense first; the best of each column is marked by its shown
    digits, so that equal looks are marked alike."""
    base, plain = reading.dense_row(bench), reading.baselines(bench)
    rows = sorted(reading.measured(bench), key=lambda r: -r["average"])
    first: dict[str, str] = {}
    for c in columns:
        if known := [r for r in rows if c.value(r) is not None] if c.better and len(rows) > 1 else []:
            best = max(known, key=lambda r, c=c: c.better * c.value(r))  # type: ignore[misc]
            first[c.name] = c.text(best).split(" ")[0]
    body = [[Cell("dense"), *(c.cell(base) for c in columns)]]
    for row in rows:
        cells = [c.cell(row, c.text(row).split(" ")[0] == first.get(c.name)) for c in columns]
        body.append([Cell(row["method"], tag="baseline" if row["method"] in plain else ""), *cells])
    caption = (
        "Recipes on their own schedule"
        if budget is None
        else f"At {share(budget)} of the dense model's effective tokens"
    )
    if sizes := sorted({r["group_a"]["samples"] for r in rows if (r.get("group_a") or {}).get("samples") is not None}):
        caption += f"; group A holds {' to '.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))} questions"
    return Table(
        caption,
        ["method", *(c.name for c in columns)],
        body,
        ["dense", *("baseline" if r["method"] in plain else "" for r in rows)],
    )


def ability_table(bench: Mapping[str, Any], budget: float | None) -> Table:
    """The rows of ``bench``, all at ``budget``: accuracy per ability with its interval, per question set the difference
    to dense with its paired interval."""
    kinds, sets = bench["abilities"], bench["sets"]
    rows = [reading.dense_row(bench), *sorted(reading.measured(bench), key=lambda r: -r["average"])]

    def gap(entry: Mapping[str, Any] | None) -> str | Cell:
        if entry is None or "difference" not in entry:
            return NONE
        low, high = entry["difference_interval"]
        return Cell(f"{100 * entry['difference']:+.1f}", spread=f" [{100 * low:+.0f}, {100 * high:+.0f}]")

    body = []
    for row in rows:
        spans = row.get("ability_intervals") or {}
        body.append(
            [
                row["method"],
                *(Cell(percent(row["abilities"][k], 0), spread=between(spans.get(k))) for k in kinds),
                *(gap(row["sets"].get(s)) for s in sets),
            ]
        )
    return plain_table(
        f"Accuracy in percent per ability, {share(budget)}",
        ["method", *kinds, *(f"{s}: points from dense" for s in sets)],
        body,
    )


def refusals(benches: Sequence[ResultFile]) -> Table:
    """What could not be measured, and why; budgets with the same reason together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for bench in benches:
        for row in bench.data["rows"]:
            if row.get("error") is not None:
                groups.setdefault((row["method"], row["error"]), []).append(share(row.get("budget")))
    return plain_table(
        "Refused",
        ["method", "budgets", "reason"],
        ([method, ", ".join(budgets), reason] for (method, reason), budgets in groups.items()),
    )
