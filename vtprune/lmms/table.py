"""The table of ``vtprune eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table: the first metric of every task, and what it cost."""
    done = [r for r in rows if "error" not in r]
    tasks = list(dict.fromkeys(t for r in done for t, scores in r["scores"].items() if scores))
    first = {t: next(m for r in done for m in r["scores"].get(t, {}) if not m.endswith("_stderr")) for t in tasks}
    scores = [f"{t} {first[t]}" for t in tasks]
    out = [["method", "budget", "seed", *scores, "tokens", "FLOPs %", "KV %", "ttft ms", "note"]]
    for r in rows:
        start = [r["method"], "-" if r["method"] == "dense" else budget_text(r["budget"]), str(r["seed"])]
        if "error" in r:
            out.append([*start, *["-"] * (len(tasks) + 4), "not possible: " + r["error"]])
            continue
        c = r["costs"]
        shares = [f"{100 * c[k] / c[f'dense_{k}']:.1f}" for k in ("flops", "kv_bytes")]
        values = [f"{r['scores'][t][first[t]]:.4g}" if first[t] in r["scores"].get(t, {}) else "-" for t in tasks]
        out.append([*start, *values, f"{c['effective_tokens']:.1f}", *shares, f"{c['ttft_ms']:.0f}", ""])
    return out


def budget_text(budget: Mapping[str, Any]) -> str:
    """A budget in a table."""
    if "keep" in budget:
        return f"keep {budget['keep']:g}"
    return f"{100 * budget['effective_tokens']:g}%" if budget else "own"
