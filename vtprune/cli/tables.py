"""Tables of the command line: as wide as the terminal, or as CSV or LaTeX for another program."""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 100  # where nobody says how wide the terminal is
GAP = "  "
LEAST = 16  # a column of text is not made narrower
ANY = 10_000  # a width that everything fits into
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
}

Table = Sequence[Sequence[str]]


def table_options(parser: argparse.ArgumentParser) -> None:
    """Of the commands that print a table: in which form."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print the table as CSV")
    form.add_argument("--latex", action="store_true", help="print the table as a LaTeX tabular")


def list_options(parser: argparse.ArgumentParser) -> None:
    """Of the commands that list what is registered."""
    parser.add_argument("pattern", nargs="?", default="*", help="only names that match, e.g. 'py*'")
    table_options(parser)


def other_form(args: argparse.Namespace, table: Table) -> bool:
    """Prints the table, header first, in the form that was asked for; False if it is to be read here."""
    if args.csv:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(table)
        print(out.getvalue(), end="")
    if args.latex:
        print(latex(table))
    return bool(args.csv or args.latex)


def show(args: argparse.Namespace, table: Table) -> None:
    """Prints the table, header first, in the form that was asked for."""
    if not other_form(args, table):
        print(fitted(table))


def latex(table: Table) -> str:
    """A ``tabular`` that needs no package."""
    right = _numbers(table)

    def line(row: Sequence[str]) -> str:
        return " & ".join("".join(LATEX.get(c, c) for c in cell) for cell in row) + r" \\"

    columns = "".join("r" if r else "l" for r in right)
    body = [line(table[0]), r"\hline", *map(line, table[1:])]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def _numbers(table: Table) -> list[bool]:
    """Which columns hold numbers, and go to the right."""
    return [
        all(row[i][:1] in ("", *"+-0123456789") or row[i] == "own" for row in table[1:]) for i in range(len(table[0]))
    ]


def shortened(table: Table, width: int | None = None) -> list[list[str]]:
    """The table with its last column cut so that every row is one line."""
    width = width or shutil.get_terminal_size((WIDTH, 24)).columns
    *others, last = (max(len(row[i]) for row in table) for i in range(len(table[0])))
    room = max(LEAST // 2, width - _total([*others, 0]))
    return [[*row[:-1], textwrap.shorten(row[-1], room, placeholder=" ...")] for row in table]


def with_distributions(table: Table, entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """``table``, whose rows below the head are those of ``entries``, with a column that says which distribution each
    comes from, if any of them comes from outside."""
    head, *rows = table
    sources = [entry["distribution"] for entry in entries]
    if not any(sources):
        return [list(row) for row in table]
    return [[*head, "distribution"], *([*row, s or "vtprune"] for row, s in zip(rows, sources, strict=True))]


def fitted(table: Table, width: int | None = None) -> str:
    """Cells (header first) as aligned plain text of at most ``width`` columns (default: the terminal's): long text is
    wrapped, and where that is not enough the columns stand in several blocks, each with the first columns, as many as
    tell the rows apart."""
    width = width or shutil.get_terminal_size((WIDTH, 24)).columns
    right = _numbers(table)
    natural = [max(len(row[i]) for row in table) for i in range(len(right))]
    least = [
        min(natural[i], max(_longest(table[0][i]), *(len(row[i]) if right[i] else LEAST for row in table[1:]), 0))
        for i in range(len(right))
    ]
    keys = _keys(table)
    blocks, block = [], list(keys)
    for i in range(len(keys), len(right)):
        if len(block) > len(keys) and _total([least[j] for j in (*block, i)]) > width:
            blocks.append(block)
            block = list(keys)
        block.append(i)
    return "\n\n".join(_block(table, columns, natural, least, right, width) for columns in (*blocks, block))


def _keys(table: Table) -> range:
    """The first columns that tell the rows apart, at most half of them; or the first one."""
    half = len(table[0]) // 2
    apart = (k for k in range(1, half + 1) if len({tuple(row[:k]) for row in table[1:]}) == len(table) - 1)
    return range(next(apart, 1))


def _longest(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _block(
    table: Table,
    columns: Sequence[int],
    natural: Sequence[int],
    least: Sequence[int],
    right: Sequence[bool],
    width: int,
) -> str:
    """Some of the columns, the widest narrowed until all of them fit."""
    widths = {i: natural[i] for i in columns}
    while _total(list(widths.values())) > width:
        spare = {i: w for i, w in widths.items() if w > least[i]}
        if not spare:
            break
        widths[max(spare, key=lambda i: spare[i])] -= 1

    def lines(row: Sequence[str]) -> list[str]:
        wrapped = [
            textwrap.wrap(row[i], max(widths[i], 1), break_on_hyphens=False) if len(row[i]) > widths[i] else [row[i]]
            for i in columns
        ]
        tall = max(map(len, wrapped))
        cells = [[*cell, *[""] * (tall - len(cell))] for cell in wrapped]
        out = []
        for n in range(tall):
            parts = [
                cell[n].rjust(widths[i]) if right[i] else cell[n].ljust(widths[i])
                for cell, i in zip(cells, columns, strict=True)
            ]
            out.append(GAP.join(parts).rstrip())
        return out

    rule = GAP.join("-" * widths[i] for i in columns)
    return "\n".join([*lines(table[0]), rule, *(line for row in table[1:] for line in lines(row))])
