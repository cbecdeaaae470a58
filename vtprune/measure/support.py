"""Which method works in which model family, found out by trying: the tables in docs/support.md.

``python -m vtprune.measure.support`` writes them; a test compares them with the registries.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtprune.models.base import ADAPTERS

from ..check.attach import attach
from ..core.info import grouped
from ..core.types import UnsupportedError
from ..methods.base import METHODS

SIGNS = {"exact": "●", "option": "◐", "refused": "–"}


@dataclass(frozen=True)
class Entry:
    """``status``: ``"exact"`` with the method's defaults, ``"option"`` with ``note``'s option or for some of the
    family's models or inputs, ``"refused"`` because of ``note``."""

    status: str
    note: str = ""


@functools.cache
def _tiny(family: str, variant: str) -> Any:
    """A tiny model and its inputs, built once: an attachment leaves it as it was."""
    return ADAPTERS.get(family).tiny[variant]()


@functools.cache
def tried(family: str, variant: str, method: str) -> Entry:
    """One method on one tiny model: attached and run, with its defaults or with the options it names for such cases."""
    (model, inputs), info = _tiny(family, variant), METHODS.get(method)
    reason = ""
    for options in (info.elsewhere,) if info.fitted else ({}, info.elsewhere):
        try:
            with attach(model, method, **options), torch.no_grad():
                model(**inputs)
        except UnsupportedError as e:
            reason = reason or str(e)
            continue
        if info.fitted:
            return Entry("option", f"with what `vtprune fit {method}` finds")
        return Entry("option", "with " + _said(options)) if options else Entry("exact")
    return Entry("refused", reason)


def entry(family: str, method: str) -> Entry:
    """What holds for a family, over its variants."""
    entries = {variant: tried(family, variant, method) for variant in ADAPTERS.get(family).tiny}
    kinds = {e.status for e in entries.values()}
    if len(kinds) == 1 and len(set(entries.values())) == 1:
        return next(iter(entries.values()))
    if kinds == {"refused"}:
        return Entry("refused", next(iter(entries.values())).note)
    return Entry(
        "option",
        "; ".join(
            f"{v}: {e.note or 'as it is'}" if e.status != "refused" else f"not {v} ({e.note})"
            for v, e in entries.items()
        ),
    )


def _said(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{k}={v!r}`" for k, v in options.items())


def table() -> str:
    """Methods down, by where they decide, families across."""
    families = list(ADAPTERS)
    rows = ["| | " + " | ".join(families) + " |", "|---|" + ":-:|" * len(families)]
    for title, infos in grouped([METHODS.get(m) for m in METHODS]).items():
        rows.append(f"| **{title}** |" + " |" * len(families))
        rows += [
            f"| {i.name} | " + " | ".join(SIGNS[entry(family, i.name).status] for family in families) + " |"
            for i in infos
        ]
    return "\n".join(rows)


def summary() -> str:
    """Families down, groups of methods across: how many of each work."""
    groups = grouped([METHODS.get(m) for m in METHODS])
    rows = ["| | " + " | ".join(groups) + " |", "|---|" + ":-:|" * len(groups)]
    return "\n".join([*rows, *(counts(family) for family in ADAPTERS)])


def counts(family: str) -> str:
    """A family's row of it."""
    cells = []
    for infos in grouped([METHODS.get(m) for m in METHODS]).values():
        works = [i for i in infos if entry(family, i.name).status != "refused"]
        cells.append("–" if not works else "all" if len(works) == len(infos) else f"{len(works)} of {len(infos)}")
    return f"| {family} | " + " | ".join(cells) + " |"


def document() -> str:
    """docs/support.md."""
    lines = [
        "# What works where",
        "",
        "Made by `python -m vtprune.measure.support` from the registries: every method is attached to the tiny models "
        "of every "
        "family and run; a test compares "
        "this page with what it finds. The contract tests then check each pair that is not refused.",
        "",
        "● works with the method's defaults · ◐ works with an option, or for some of the family's models or inputs · – "
        "refused, with the reason below",
        "",
        table(),
        "",
        "How many methods of each kind work, by where they decide:",
        "",
        summary(),
        "",
    ]
    for family in ADAPTERS:
        lines += [*section(family), ""]
    return "\n".join(lines).rstrip() + "\n"


def section(family: str) -> list[str]:
    """A family's lines in docs/support.md."""
    info = ADAPTERS.get(family)
    notes: dict[tuple[str, str], list[str]] = {}
    for method in METHODS:
        known = entry(family, method)
        if known.status != "exact":
            # Methods that are refused for the same reason stand together.
            note = re.sub(rf"^{re.escape(method)}:? ", "", known.note)
            notes.setdefault((known.status, note), []).append(method)
    lines = [f"## {family}", "", f"{info.idea[0].upper()}{info.idea[1:]}. Tested as: {', '.join(info.tiny)}.", ""]
    lines += [f"- {SIGNS[status]} {', '.join(methods)}: {note}" for (status, note), methods in notes.items()]
    return lines if notes else lines[:-1]


def main() -> int:
    root = Path(__file__).resolve().parents[2]
    (root / "docs" / "support.md").write_text(document(), encoding="utf-8")
    print(f"written: {root / 'docs' / 'support.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
