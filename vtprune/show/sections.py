"""The sections of the report page: the facts, tables and figures of each kind of result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .bench_tables import ability_table, known_columns, main_table
from .fields import is_number
from .figures import reading
from .results import OVERHEAD, ResultFile
from .tables import esc, generic_table, share, table_html
from .time_tables import break_even_table, overhead_table, times_table


def facts_html(result: Mapping[str, Any]) -> str:
    """Command, device and versions, as far as the file tells them."""
    device, versions = result.get("device"), result.get("versions")
    if isinstance(device, dict):
        parts = [
            device.get("name"),
            f"{device['threads']} threads" if "threads" in device else None,
            device.get("dtype"),
        ]
        device = ", ".join(str(p) for p in parts if p)
    if isinstance(versions, dict):
        versions = ", ".join(f"{k} {v}" for k, v in versions.items())
    command = f"<code>{esc(result['command'])}</code>" if result.get("command") else ""
    listed = [("command", command), ("device", esc(device or "")), ("versions", esc(versions or ""))]
    if is_number(result.get("samples")):
        listed.append(("questions", esc(f"{result['samples']} ({', '.join(map(str, result.get('sets') or []))})")))
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in listed if text) + "</dl>"


HOW = {
    "tokens": "Budgets are equal effective tokens: visual tokens averaged over the layers of the language model, as a "
    "share of the dense model's. A method that cuts late has to cut more. Tokens left is what remains after the last "
    "cut.",
    "intervals": "Intervals hold 95 %. They come from bootstraps that draw images, not questions, so that questions "
    "about one image stay together; differences to dense are paired, question by question. Narrow screens leave them "
    "out.",
    "relative": "Of dense %: each ability's accuracy over the dense model's, then averaged.",
    "group": "Group A (VTC-Bench, arXiv 2510.07143): the questions that the dense model answers and plain "
    "down-sampling at the same budget does not. Only they tell whether choosing tokens helps; dense has 100 % there "
    "and down-sampling 0 % by definition.",
    "prefill": "Prefill x: time of a prefill, tower included, over dense in turns, with the least and most of its "
    "rounds; noise: they tell nothing; ?: slower for less work, which neither the library's own code nor the spread "
    "of dense runs explains. FLOPs and KV are shares of the dense prefill and its cache.",
    "marks": "Rows are sorted by average; the best of a column is bold on green, baselines are in italics.",
}


def how_html(results: Sequence[ResultFile]) -> str:
    """What the columns mean, as far as some table has them; nothing without a table of accuracies."""
    rows = [r for f in results if f.kind == "vtprune.Bench" for r in f.data["rows"]]
    fields = (("group", "group_a"), ("relative", "relative_average"))
    absent = {key for key, field in fields if not any(r.get(field) for r in rows)}
    lines = "".join(f"<li>{esc(text)}</li>" for key, text in HOW.items() if key not in absent)
    return f'<section id="how"><h2>How to read it</h2><ul>{lines}</ul></section>' if rows else ""


def bench_html(result: ResultFile, pictures: Sequence[str]) -> str:
    """Tables per budget, then the figures; the first, the overview, comes before the tables."""
    bench, columns = result.data, known_columns(result.data)
    at: dict[float | None, list[Any]] = {}
    for row in reading.measured(bench):
        at.setdefault(row.get("budget"), []).append(row)
    out = [facts_html(bench), *pictures[:1]]
    for budget in sorted(at, key=lambda b: -1 if b is None else b, reverse=True):
        part = {**bench, "rows": [reading.dense_row(bench), *at[budget]]}
        out += [
            f"<h3>{esc('Own schedule' if budget is None else f'Budget {share(budget)}')}</h3>",
            table_html(main_table(part, budget, columns)),
        ]
        out.append(
            "<details><summary>Per ability, "
            f"{esc(share(budget))}</summary>{table_html(ability_table(part, budget))}</details>"
        )
    return "\n".join([*out, *pictures[1:]])


def times_html(result: ResultFile, pictures: Sequence[str]) -> str:
    """Figures, the table of times, and where pruning pays."""
    out = [facts_html(result.data), *pictures, table_html(times_table(result.data))]
    if result.data.get("break_even"):
        out += ["<h3>Where pruning pays</h3>", table_html(break_even_table(result.data))]
    return "\n".join(out)


def section(result: ResultFile, pictures: Sequence[str]) -> str:
    """What the page shows of one result file; ``pictures``: its figures, ready."""
    if result.kind == "vtprune.Bench":
        return bench_html(result, pictures)
    if result.kind == "vtprune.Times":
        return times_html(result, pictures)
    if result.kind == OVERHEAD:
        table = overhead_table(result.data)
    else:
        table = generic_table(result.data, f"Vision transformers, {result.stem}")
    return "\n".join([facts_html(result.data), *pictures, table_html(table)])
