"""The table of times as text and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .runs import write
from .timing import spread

HEADS = [
    "method",
    "budget",
    "batch",
    "images",
    "tokens",
    "dense ms",
    "pruned ms",
    "ttft x",
    "e2e x",
    "prefill x",
    "decode x",
]
HEADS += ["scorer ms", "noise", "note"]
HOW = (
    "Milliseconds are medians; dense and pruned those of the ttft. A ratio is the median over rounds of pruned "
    "over the mean of the two dense turns around",
    "it [20th, 80th percentile]; noise: the second of these over the first. ttft: generate() of one token, e2e: of "
    "all; prefill and decode: the language",
    "model's passes; scorer: time in the library's own hooks and decisions, part of the ttft.",
)


def cells(result: Mapping[str, Any]) -> list[list[str]]:
    """The rows as text, header first: medians; ratios with their 20th and 80th percentile."""

    def ranged(entry: Mapping[str, float] | None) -> str:
        return "-" if entry is None else f"{entry['median']:.2f} [{entry['p20']:.2f}, {entry['p80']:.2f}]"

    out = [HEADS]
    for row in result["rows"]:
        start = [row["method"], f"{100 * row['budget']:g}%", str(row["batch"]), str(row["images"])]
        if "error" in row:
            out.append([*start, *["-"] * (len(HEADS) - 5), "not possible: " + row["error"]])
            continue
        ratios = [ranged(row["ratio"][name]) for name in ("ttft", "e2e", "prefill", "decode")]
        both = [f"{row[side]['ttft_ms']['median']:.1f}" for side in ("dense", "pruned")]
        scorer, noise = f"{row['pruned']['scorer_ms']['median']:.2f}", ranged(spread(row["dense_over_dense"]))
        out.append([*start, f"{row['effective_tokens']:.1f} of {row['tokens']:g}", *both, *ratios, scorer, noise, ""])
    return out


def markdown(result: Mapping[str, Any]) -> str:
    """The verdicts, and below them the table."""
    about, versions = result["device"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    table = ["| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in cells(result)]
    how = (
        f"{result['new_tokens']} new tokens, {result['repeats']} rounds of dense, pruned, dense; {result['timer']} time"
    )
    missing = result["planned"] - len(result["rows"])
    how += f"; **unfinished: {len(result['rows'])} of {result['planned']} rows**" if missing else ""
    lines = [
        f"`{result['command']}`  ",
        f"{about['name']}, {about['threads']} threads, {about['dtype']}; {versions}; {how}",
        "",
        *(f"* {entry['verdict']}" for entry in result["break_even"]),
        "",
        *HOW,
        "",
        table[0],
        "|---" + "|--:" * (len(HEADS) - 1) + "|",
        *table[1:],
    ]
    return "\n".join(lines) + "\n"


def save(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result as JSON, or as Markdown if the name ends in ``.md``; an interruption leaves the file before.
    Raises :class:`VtpruneError` if it cannot be written."""
    write(path, markdown(result) if path.suffix == ".md" else json.dumps(result) + "\n")
