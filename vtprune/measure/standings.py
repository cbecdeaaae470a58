"""The table of methods in docs/measured.md, from what ``vtprune bench --results benchmarks/results`` measured.

``python -m vtprune.measure.standings`` writes it; a test compares it with the committed results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..core.info import grouped
from ..methods.base import METHODS

START, END = "<!-- standings: made by python -m vtprune.measure.standings -->", "<!-- end of the standings -->"
ROOT = Path(__file__).resolve().parents[2]


def table(result: dict[str, Any]) -> str:
    """Methods down, by where they decide; budgets across: accuracy on ``scenes`` in percent, the best of a group in
    bold; – where the budget cannot be met, and where a method is newer than the results. Methods that the bundled
    model's pictures say nothing about (of videos, of text, of classes, of towers whose processor cuts blocks) follow
    without figures. ``result``: the contents of a ``bench.json``."""
    budgets = result["budgets"]
    known = {(r["method"], r["budget"]): r for r in result["rows"] if "error" not in r}
    heads = ["method", "idea", "source", *(f"{100 * b:g} %" for b in budgets)]
    lines = [f"| {' | '.join(heads)} |", f"|---|---|---|{'--:|' * len(budgets)}"]
    every = [METHODS.get(m) for m in METHODS]
    apart = [i for i in every if i.video or i.of_text or i.classifies or "pixel_blocks" in i.needs.get("pixels", ())]
    for title, infos in grouped([i for i in every if i not in apart]).items():
        found = {
            (i.name, b): 100 * known[i.name, b]["sets"]["scenes"]["accuracy"]
            for i in infos
            for b in budgets
            if (i.name, b) in known
        }
        best = {b: max((v for (_, at), v in found.items() if at == b), default=None) for b in budgets}
        lines.append(f"| **{title}** |{' |' * (2 + len(budgets))}")
        for i in infos:
            cells = [_cell(found.get((i.name, b)), best[b]) for b in budgets]
            lines.append(f"| `{i.name}` | {i.idea} | {i.paper} | {' | '.join(cells)} |")
    lines.append(
        f"| **videos, screens, classes and prompts of text, which `scenes` has none of** |{' |' * (2 + len(budgets))}"
    )
    lines += [f"| `{i.name}` | {i.idea} | {i.paper} |{' |' * len(budgets)}" for i in apart]
    return "\n".join(lines)


def _cell(value: float | None, best: float | None) -> str:
    if value is None:
        return "–"
    return f"**{value:.1f}**" if value == best else f"{value:.1f}"


def page(text: str, result: dict[str, Any]) -> str:
    """``text`` with the table between its marks."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table(result)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    path = ROOT / "docs" / "measured.md"
    result = json.loads((ROOT / "benchmarks" / "results" / "bench.json").read_text(encoding="utf-8"))
    path.write_text(page(path.read_text(encoding="utf-8"), result), encoding="utf-8")
    print(f"written: the table of methods in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
