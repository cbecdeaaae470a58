"""What generated pages quote: papers, measured rows, the table of methods and families. Read from the repository, never
stated twice."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune.core.info import GROUPS, group
from vtprune.methods.base import METHODS, MethodInfo

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
STATUS = {"●": "yes", "◐": "with an option", "–": "no"}


@dataclass(frozen=True)
class Paper:
    """What the docstring of a method's module says of its source."""

    title: str
    arxiv: str
    venue: str

    @property
    def year(self) -> int:
        """Of the first version, as the arXiv id has it."""
        return 2000 + int(self.arxiv[:2])


def module_doc(info: MethodInfo) -> str:
    assert info.cls is not None
    return inspect.getdoc(sys.modules[info.cls.__module__]) or ""


def paper(info: MethodInfo) -> Paper | None:
    """``None`` for a baseline; ``title`` is empty where the docstring does not quote it."""
    if info.paper == "baseline":
        return None
    text = " ".join(module_doc(info).split())
    registered = info.paper.removeprefix("arXiv ")
    for title, arxiv, venue in re.findall(r'"([^"]+)"[^(]*\(arXiv ([\d.]+)(?:, ([^);]+))?', text):
        if arxiv == registered:
            return Paper(title, arxiv, venue)
    return Paper("", registered, "")


def every_method() -> list[MethodInfo]:
    """Ours, in the order of their groups."""
    infos = [METHODS.get(name) for name in METHODS if METHODS.distribution(name) is None]
    return sorted(infos, key=lambda i: (list(GROUPS).index(group(i)), i.name))


@functools.cache
def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def bench_rows(file: str, method: str) -> list[dict[str, Any]]:
    """A method's rows of a ``bench.json``, largest budget first, those that met their budget."""
    return [r for r in results(file)["rows"] if r["method"] == method and "error" not in r]


def bench_dense(file: str) -> dict[str, Any]:
    return next(r for r in results(file)["rows"] if r["method"] == "dense")


def trained_runs(method: str) -> list[dict[str, Any]]:
    """The runs of ``trained-cpu.json`` that train this method."""
    runs = [run for runs in results("trained-cpu.json").values() for run in runs]
    return [run for run in runs if run["command"].startswith(f"vtprune train {method} ")]


def tables_with(method: str) -> list[Path]:
    """Committed tables whose rows begin with the method's name."""
    row = re.compile(rf"^\| `?{re.escape(method)}`?[ ,|]", re.MULTILINE)
    return [p for p in sorted(RESULTS.glob("*.md")) if row.search(p.read_text(encoding="utf-8"))]


@functools.cache
def support() -> dict[str, dict[str, str]]:
    """Family -> method -> one of ``● ◐ –``, from docs/support.md, which a test compares with what is found by
    trying."""
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line[:2] == "| "]
    families = rows[0][1:]
    marked = [row for row in rows[1:] if set(row[1:]) <= set(STATUS)]
    return {family: {row[0]: row[i] for row in marked} for i, family in enumerate(families, 1)}


@functools.cache
def reasons() -> dict[str, list[tuple[str, tuple[str, ...], str]]]:
    """Family -> (sign, methods, what is said of them), from the sections of docs/support.md."""
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    out: dict[str, list[tuple[str, tuple[str, ...], str]]] = {}
    for section in text.split("\n## ")[1:]:
        family, _, body = section.partition("\n")
        lines = re.findall(r"^- ([◐–]) ([^:]+): (.+)$", body, re.MULTILINE)
        out[family] = [(sign, tuple(names.split(", ")), why) for sign, names, why in lines]
    return out


def reason(family: str, method: str) -> str:
    """What docs/support.md says of a pair, ``""`` for one that works as it is."""
    return next((why for _, names, why in reasons()[family] if method in names), "")


def plain(docstring: str) -> str:
    """A docstring as Markdown: double backticks and roles become code; what Markdown takes for markup is escaped."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", docstring)
    parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    return "".join(_code(p) if i % 2 else re.sub(r"([*_<\[\]])", r"\\\1", p) for i, p in enumerate(parts))


def _code(quoted: str) -> str:
    return f"`{' '.join(quoted.strip('`').split())}`"


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
