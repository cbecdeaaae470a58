"""The table as text and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .runs import write


def cells(result: Mapping[str, Any], *, abilities: bool = True) -> list[list[str]]:
    """The table as text, header first; ``abilities`` adds a column for each, what :func:`_overall` gives, and the
    difference to dense with its 95 % interval. ``kept`` tokens are nominal, behind the last cut; ``tokens`` effective,
    the mean over layers."""
    sets, kinds = result["sets"], result["abilities"] if abilities else []
    gaps = sets if abilities else []
    head = [
        "method",
        "budget",
        *(f"{s} %" for s in sets),
        *(f"{s} vs dense" for s in gaps),
        *kinds,
        *(OVERALL if abilities else []),
    ]
    out = [[*head, *COLUMNS, "note"]]
    for row in result["rows"]:
        start = [row["method"], "own" if row["budget"] is None else f"{100 * row['budget']:g}%"]
        if "error" in row:
            out.append([*start, *["-"] * (len(out[0]) - 3), "not possible: " + row["error"]])
            continue
        values = [f"{100 * row['sets'][s]['accuracy']:.1f}" for s in sets] + [_gap(row["sets"][s]) for s in gaps]
        if abilities:
            values += [*(f"{100 * row['abilities'][k]:.1f}" for k in kinds), *_overall(row)]
        out.append([*start, *values, *_costs(row), row["note"]])
    return out


OVERALL = ("average", "worst", "relative", "worst rel.", "group A")

COLUMNS = ("kept", "tokens", "FLOPs %", "prefill x", "KV %")


def _overall(row: Mapping[str, Any]) -> list[str]:
    """In percent: average and worst ability; the same as shares of dense; the samples that plain down-sampling
    loses."""
    hard = row.get("group_a")
    shares = [
        row["average"],
        row["worst"],
        row.get("relative_average"),
        row.get("relative_worst"),
        hard and hard["accuracy"],
    ]
    return ["-" if v is None else f"{100 * v:.1f}" for v in shares]


def prefill_text(row: Mapping[str, Any]) -> str:
    """The ratio of prefill times with its range; only the range, behind the verdict, where it tells nothing. Empty if
    there is none."""
    if row.get("prefill_ratio") is None:
        return ""
    ratio = row.get("prefill_verdict") or f"{row['prefill_ratio']:.2f}"
    if not row.get("prefill_range"):
        return ratio
    low, high = row["prefill_range"]
    return f"{ratio} [{low:.2f}, {high:.2f}]"


def _costs(row: Mapping[str, Any]) -> list[str]:
    """What :data:`COLUMNS` names: nominal and effective tokens, FLOPs in percent, prefill time as a ratio, cache in
    percent."""
    ratio = prefill_text(row) or ("1.00" if row["method"] == "dense" else "-")
    return [
        f"{row['nominal_tokens']:.1f}",
        f"{row['effective_tokens']:.1f}",
        f"{100 * row['flops_share']:.1f}",
        ratio,
        f"{100 * row['kv_share']:.1f}",
    ]


def _timer(result: Mapping[str, Any]) -> str:
    return "; prefill in one thread's CPU time" if result.get("timer") == "CPU" else ""


def markdown(result: Mapping[str, Any]) -> str:
    """Accuracy against tokens: for each question set methods x budgets, accuracy in percent and its difference to dense
    with the paired 95 % interval; then each ability at each budget; then what the solver chose and what is not
    possible."""
    by = {(r["method"], r["budget"]): r for r in result["rows"] if r["method"] != "dense"}
    names, budgets, dense = list(dict.fromkeys(m for m, _ in by)), result["budgets"], result["rows"][0]
    about, versions = result["device"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    out = [
        f"`{result['command']}`  ",
        f"{about['name']}, {about['threads']} threads, {about['dtype']}; {versions}{_timer(result)}",
    ]
    heads = [f"{100 * b:g} %" for b in budgets] + (["own schedule"] if any(b is None for _, b in by) else [])

    def cell(entry: Mapping[str, Any] | None, set_name: str) -> str:
        if entry is None or "error" in entry:
            return "–" if entry is None else "not possible"
        e = entry["sets"][set_name]
        own = f" at {entry['effective_tokens']:.1f} tokens" if entry["budget"] is None else ""
        return f"{100 * e['accuracy']:.1f} ({_gap(e)}){own}"

    columns: list[float | None] = [*budgets, *([None] if len(heads) > len(budgets) else [])]
    for s in result["sets"]:
        e = dense["sets"][s]
        low, high = e["interval"]
        out += [
            "",
            f"**{s}**, {e['samples']} questions, dense {100 * e['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]",
            "",
        ]
        out += _lines([["method", *heads], *([m, *(cell(by.get((m, b)), s) for b in columns)] for m in names)])
    kinds = result["abilities"]
    rows = [["method", "budget", *kinds, *OVERALL, *COLUMNS, "remarks"]]
    for r in result["rows"]:
        budget = "own" if r["budget"] is None else f"{100 * r['budget']:g} %"
        if "error" in r:
            rows.append([r["method"], budget, *["–"] * (len(rows[0]) - 3), "not possible: " + r["error"]])
            continue
        rows.append(
            [
                r["method"],
                budget,
                *(f"{100 * r['abilities'][k]:.1f}" for k in kinds),
                *_overall(r),
                *_costs(r),
                r["note"],
            ]
        )
    return "\n".join([*out, "", *LEGEND, "", *_lines(rows)]) + "\n"


LEGEND = (
    "Per ability, in percent. average, worst: over abilities; relative, worst rel.: the same as shares of dense; group "
    "A: questions that dense answers and",
    "plain down-sampling at the same budget does not (VTC-Bench, arXiv 2510.07143). kept: tokens behind the last cut; "
    "tokens: effective, the mean over",
    "layers; prefill x: time of a prefill over dense, in turns, with the least and most of its rounds; noise: they "
    "tell nothing; ?: slower for less work,",
    "which neither the library's own code nor the spread of dense runs explains.",
)


def _lines(table: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, header first; every column but the first to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return [lines[0], "|---" + "|--:" * (len(table[0]) - 1) + "|", *lines[1:]]


def kept_per_row(result: Mapping[str, Any], near: float = 0.25) -> dict[str, list[float]]:
    """Label -> tokens kept in each image row, for every method that drops some, at the budget nearest to ``near``:
    FEATHER's question (arXiv 2412.13180)."""
    budget = min(result["budgets"], key=lambda b: abs(b - near))
    return {
        f"{r['method']} {100 * budget:g}%": r["rows"] for r in result["rows"] if r["budget"] == budget and r.get("rows")
    }


def _gap(entry: Mapping[str, Any]) -> str:
    if "difference" not in entry:
        return "-"
    low, high = entry["difference_interval"]
    return f"{100 * entry['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def text(table: Sequence[Sequence[str]]) -> str:
    """Cells (header first) as aligned plain text; columns of numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    right = [all(row[i][:1] in "+-0123456789" or row[i] == "own" for row in table[1:]) for i in range(len(widths))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()

    return "\n".join([line(table[0]), "  ".join("-" * w for w in widths), *map(line, table[1:])])


def save(result: Mapping[str, Any], path: str | Path) -> None:
    """Writes a result as JSON, or as Markdown if the name ends in ``.md``. Raises :class:`VtpruneError` if the file
    cannot be written."""
    write(Path(path), markdown(result) if str(path).endswith(".md") else json.dumps(result) + "\n")
