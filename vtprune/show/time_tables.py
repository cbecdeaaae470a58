"""The tables of time and overhead results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .figures import reading
from .tables import NONE, Table, plain_table, plain_value, share


def times_table(times: Mapping[str, Any]) -> Table:
    """All medians, dense and pruned beside each other."""

    def ms(entry: Mapping[str, Any], key: str) -> str:
        return (
            NONE
            if entry.get(key) is None
            else f"{entry[key] / 2**20:.0f}"
            if key == "peak_bytes"
            else f"{entry[key]:.{0 if entry[key] >= 100 else 1}f}"
        )

    head = ["method", "budget", "batch", "images", "tokens", "first token x"]
    head += [f"{name}: {kind}" for name in reading.TIMED.values() for kind in ("dense", "pruned")] + ["own code"]
    rows = []
    for row in times["rows"]:
        dense, pruned = row["dense"], row["pruned"]
        a, b = reading.first_token(dense), reading.first_token(pruned)
        start = [
            NONE if row.get("budget") is None else share(row["budget"]),
            *(plain_value(row.get(k)) for k in ("batch", "images", "tokens")),
        ]
        pairs = [ms(entry, key) for key in reading.TIMED for entry in (dense, pruned)]
        rows.append(
            [row["method"], *start, f"{b / a:.2f}" if a and b is not None else NONE, *pairs, ms(pruned, "scorer_ms")]
        )
    return plain_table("Medians in milliseconds", head, rows)


def break_even_table(times: Mapping[str, Any]) -> Table:
    """Per method the ratio of times at each budget, and the budget below which pruning pays."""
    rows = []
    budgets = sorted({b for e in times["break_even"] for b in e.get("budgets") or []}, reverse=True)
    for e in times["break_even"]:
        at = dict(zip(e.get("budgets") or [], e.get("ratios") or [], strict=False))
        never = all(ratio >= 1 for ratio in at.values())
        pays = (
            share(e["pays_below"]) if e.get("pays_below") is not None else "at none of them" if never and at else NONE
        )
        values = [f"{at[b]:.2f}" if b in at else NONE for b in budgets]
        rows.append(
            [
                e["method"],
                plain_value(e.get("batch")),
                plain_value(e.get("images")),
                *values,
                pays,
                e.get("verdict") or NONE,
            ]
        )
    head = ["method", "batch", "images", *map(share, budgets), "pays below", "in words"]
    return plain_table(
        "Pruned time over dense time per budget; below 1 by more than the noise, pruning pays", head, rows
    )


def overhead_table(result: Mapping[str, Any]) -> Table:
    """Every method's milliseconds dense, at the limit and pruned, and the measured ratio of the last two."""
    rows = []
    for key, title in reading.PARTS.items():
        for r in result[key]:
            ratio = r.get("overhead") or {}
            text = (
                f"{ratio['median']:.2f} [{ratio['p20']:.2f}, {ratio['p80']:.2f}]"
                if {"median", "p20", "p80"} <= ratio.keys()
                else NONE
            )
            dense = NONE if r.get("dense_ms") is None else f"{r['dense_ms']:.2f}"
            rows.append([r["method"], title, dense, f"{r['limit_ms']:.2f}", f"{r['pruned_ms']:.2f}", text])
    return plain_table(
        "Milliseconds; 20th and 80th percentile in brackets",
        ["method", "what", "dense", "the limit", "pruned", "pruned / the limit"],
        rows,
    )
