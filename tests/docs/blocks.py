"""Every block of code that a reader may paste: of the README, of the pages, and of the pages that are generated."""

from __future__ import annotations

import ast
import builtins
import functools
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Block:
    page: str
    number: int  # among the blocks of its page and language
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


@functools.cache
def pages() -> dict[str, str]:
    """Name -> Markdown. A method's page has the hand-written text of docs/methods/NAME.md in it."""
    import family_pages
    import method_pages
    from facts import every_method

    written = [p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent.name not in ("methods", "generators")]
    found = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *written]}
    found |= {method_pages.uri(i.name): method_pages.page(i, None) for i in every_method()}
    return found | {family_pages.uri(name): family_pages.page(name) for name in family_pages.families()}


@functools.cache
def blocks(language: str) -> list[Block]:
    return [
        Block(page, number, language, code)
        for page, text in pages().items()
        for number, code in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    ]


def unknown(code: str, known: set[str]) -> set[str]:
    """Names that a block reads before it gives them a value, other than ``known`` ones and Python's own."""
    given = known | set(dir(builtins))
    missing: set[str] = set()
    for statement in ast.parse(code).body:
        names = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
        own = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {
            n.arg for n in ast.walk(statement) if isinstance(n, ast.arg)
        }
        missing |= {n.id for n in names if isinstance(n.ctx, ast.Load)} - given - own
        given |= own
        for node in ast.walk(statement):
            if isinstance(node, ast.Import | ast.ImportFrom):
                given |= {(a.asname or a.name).partition(".")[0] for a in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                given.add(node.name)
    return missing
