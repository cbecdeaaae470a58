"""Tables as data, their HTML, and numbers as their cells show them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

NONE = "–"


class Cell(NamedTuple):
    """A table cell."""

    text: str
    best: bool = False  # marks it within its column
    tag: str = ""  # a small word behind the text
    spread: str = ""  # an interval behind the text, for which a phone has no room


class Table(NamedTuple):
    """A table to be."""

    caption: str
    head: list[str]  # columns headed by a name in :data:`WORDS` hold text, others numbers
    rows: list[list[Cell]]  # the first cell names the row
    classes: list[str]  # CSS, one per row


WORDS = {"method", "note", "reason", "budgets", "what"}


def esc(value: object) -> str:
    return html.escape(str(value))


def table_html(table: Table) -> str:
    """The table in a region that scrolls sideways, also from the keyboard."""
    side = [' class="text"' if name in WORDS else "" for name in table.head]
    head = "".join(f'<th scope="col"{s}>{esc(_unit(name))}</th>' for name, s in zip(table.head, side, strict=True))
    body = []
    for row, name in zip(table.rows, table.classes, strict=True):
        cells = [f'<th scope="row">{_cell(row[0])}</th>']
        for cell, s in zip(row[1:], side[1:], strict=True):
            cells.append(
                f'<td class="best">{_cell(cell)}<span class="hidden"> (best)</span></td>'
                if cell.best
                else f"<td{s}>{_cell(cell)}</td>"
            )
        body.append(f'<tr class="{name}">{"".join(cells)}</tr>')
    frame = f'<div class="wide" tabindex="0" role="region" aria-label="{esc(table.caption)}"><table>\n<caption><span>{esc(table.caption)}</span></caption>\n'  # noqa: E501
    return frame + f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table></div>"


def _unit(name: str) -> str:
    """``name`` with a unit at its end that does not come off on a line of its own."""
    return name[:-2] + "\u00a0" + name[-1] if name.endswith((" %", " x")) else name


def _cell(cell: Cell) -> str:
    spread = f'<span class="spread">{esc(cell.spread)}</span>' if cell.spread else ""
    return esc(cell.text) + spread + (f'<span class="tag">{esc(cell.tag)}</span>' if cell.tag else "")


def plain_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> Table:
    """A table without marks, of texts and ready cells; columns in which every row has :data:`NONE` are left out."""
    listed = [list(row) for row in rows]
    shown = [i for i in range(len(head)) if i == 0 or any(row[i] != NONE for row in listed)]
    cells = [[c if isinstance(c := row[i], Cell) else Cell(c) for i in shown] for row in listed]
    return Table(caption, [head[i] for i in shown], cells, [""] * len(listed))


def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}"


def between(pair: Sequence[float] | None) -> str:
    """An interval in whole percent: its ends are no better known."""
    return "" if pair is None else f" [{100 * pair[0]:.0f}, {100 * pair[1]:.0f}]"


def share(budget: float | None) -> str:
    return "own schedule" if budget is None else f"{100 * budget:g} %"


def plain_value(value: Any) -> str:
    """A scalar of a table of unknown columns: three significant digits, whole numbers as they are."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def generic_table(result: Mapping[str, Any], caption: str) -> Table:
    """Every scalar of every row, columns in the order in which they first appear."""
    rows = result["rows"]
    names = dict.fromkeys(k for r in rows for k, v in r.items() if v is None or isinstance(v, str | int | float))
    head = sorted(names, key=lambda k: k != "method")
    return plain_table(
        caption,
        head,
        ([plain_value(v if isinstance(v := r.get(k), str | int | float) else None) for k in head] for r in rows),
    )
