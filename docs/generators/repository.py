"""Files of the repository outside of docs/ that pages link to: they become pages and pictures of the site, so that it
is whole without a network."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from facts import ROOT

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^(```|~~~)", re.MULTILINE)
PICTURES = (".png", ".svg", ".webp")
PLACE = "repository"  # the folder of the site that they go to


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """``text`` with everything but its blocks of code changed."""
    out, inside, chunk = [], False, []
    for line in text.splitlines(keepends=True):
        if re.match(r"\s*(```|~~~)", line):
            out.append("".join(chunk) if inside else change("".join(chunk)))
            out.append(line)
            chunk, inside = [], not inside
        else:
            chunk.append(line)
    out.append("".join(chunk) if inside else change("".join(chunk)))
    return "".join(out)


def site_uri(path: Path) -> str:
    """Where a file of the repository stands in the site, as a source of mkdocs."""
    inside = path.relative_to(ROOT)
    return inside.relative_to("docs").as_posix() if inside.parts[0] == "docs" else f"{PLACE}/{inside.as_posix()}"


def source_of(uri: str) -> Path:
    """The file that a page is made from, or would be: links in it count from there."""
    return ROOT / uri.removeprefix(f"{PLACE}/") if uri.startswith(f"{PLACE}/") else ROOT / "docs" / uri


def linked(path: Path, text: str) -> set[Path]:
    """Files of the repository outside of docs/ that ``text``, which stands at ``path``, links to and that can be
    shown."""
    found: set[Path] = set()
    outside_fences(text, lambda part: found.update(_targets(path, part)) or part)
    return found


def _targets(path: Path, text: str) -> set[Path]:
    targets = (_target(path, link) for _, _, link in LINK.findall(text))
    return {t for t in targets if t is not None and not t.is_relative_to(ROOT / "docs") and _shown(t)}


def _target(path: Path, link: str) -> Path | None:
    """The file that a relative link means."""
    if re.match(r"[a-z]+:", link) or link.startswith("#"):
        return None
    return Path(os.path.normpath(path.parent / link.partition("#")[0]))


def _shown(target: Path) -> bool:
    return target.suffix in (".md", *PICTURES) and target.is_file() and target.is_relative_to(ROOT)


def rewritten(uri: str, text: str) -> str:
    """``text`` of the page ``uri`` with links that hold in the site: files that it shows, and names without a link for
    sources, folders and data, which are in the repository alone."""
    path = source_of(uri)

    def one(match: re.Match[str]) -> str:
        picture, words, link = match.groups()
        target = _target(path, link)
        if target is None:
            return match[0]
        ours = target.is_relative_to(ROOT / "docs") and target.suffix != ""
        if not ours and not _shown(target):
            return words if target.exists() else match[0]  # mkdocs says that the latter leads nowhere
        _, sign, anchor = link.partition("#")
        relative = posixpath.relpath(site_uri(target), posixpath.dirname(uri) or ".")
        return f"{picture}[{words}]({relative}{sign}{anchor})"

    return outside_fences(text, lambda part: LINK.sub(one, part))


def closure(pages: dict[str, str]) -> set[Path]:
    """Every file outside of docs/ that the pages (uri -> text) link to, directly or through one another."""
    found: set[Path] = set()
    new = set().union(*(linked(source_of(uri), text) for uri, text in pages.items()))
    while new - found:
        found |= new
        new = {
            target
            for path in found
            if path.suffix == ".md"
            for target in linked(path, path.read_text(encoding="utf-8"))
        }
    return found


def spaced(text: str) -> str:
    """Lists as GitHub reads them: one may follow a paragraph without an empty line, which Python-Markdown wants."""

    def change(part: str) -> str:
        lines = part.split("\n")
        out: list[str] = []
        for line in lines:
            begins = re.match(r"(\*|-|\d+\.) ", line)
            if begins and out and out[-1].strip() and not re.match(r"\s*(\*|-|\d+\.) |\s", out[-1]):
                before = out[-1]
                if not before.startswith(("|", "#", ">")) and not _continues(out):
                    out.append("")
            out.append(line)
        return "\n".join(out)

    return outside_fences(text, change)


def _continues(lines: list[str]) -> bool:
    """Whether the paragraph that ends ``lines`` is an entry of a list."""
    for line in reversed(lines):
        if not line.strip():
            return False
        if re.match(r"(\*|-|\d+\.) ", line):
            return True
    return False
