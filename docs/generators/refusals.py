"""Every message with which the library refuses something, read from its source, and the topics of the troubleshooting
page that they belong to."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from facts import ROOT

FOLDERS = ("vtprune", "models", "kernels", "demos")
ERRORS = ("VtpruneError", "UnsupportedError", "RunError")
OPEN, CLOSE = "<!-- messages", "-->"


@dataclass(frozen=True)
class Refusal:
    """A message as the source has it, ``…`` for what is filled in."""

    text: str
    file: str
    line: int


def _resolved(node: ast.expr, scope: Scope) -> Iterator[str]:
    """The texts that an expression may give; ``…`` where that is not known before it runs."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(p.value if isinstance(p, ast.Constant) else _filled(p, scope) for p in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            yield from (a + b for a in _resolved(left, scope) for b in _resolved(right, scope))
        case ast.IfExp(body=body, orelse=orelse):
            yield from _resolved(body, scope)
            yield from _resolved(orelse, scope)
        case ast.Call(func=ast.Attribute(value=inner, attr="format")):
            yield from (re.sub(r"{[^}]*}", "…", text) for text in _resolved(inner, scope))
        case ast.Name(id=name) if name in scope.strings:
            yield from scope.strings[name]
        case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in scope.attributes:
            yield from scope.attributes[module, name]
        case _:
            yield "…"


def _filled(part: ast.expr, scope: Scope) -> str:
    """A hole of an f-string: a constant of the module is written out, everything else is ``…``."""
    match part:
        case ast.FormattedValue(value=ast.Name(id=name)) if name.isupper() and name in scope.strings:
            return scope.strings[name][0]
    return "…"


@dataclass
class Scope:
    """Names that stand for texts in a module or one of its functions."""

    strings: dict[str, list[str]]
    attributes: dict[tuple[str, str], list[str]]


@functools.cache
def _trees() -> dict[Path, ast.Module]:
    paths = (p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py")))
    return {p: ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def _own(tree: ast.Module) -> dict[str, list[str]]:
    """Constants of a module that are texts."""
    scope = Scope({}, {})
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            texts = list(_resolved(node.value, scope))
            if texts != ["…"]:
                scope.strings[node.targets[0].id] = texts
    return scope.strings


@functools.cache
def _constants() -> dict[str, dict[str, list[str]]]:
    """Module -> its constants that are texts; the first of several modules of a name."""
    return {path.stem: _own(tree) for path, tree in reversed(_trees().items())}


def _scope(tree: ast.Module) -> Scope:
    """Of a module: its own constants and those it imports, by name or through their module."""
    constants = _constants()
    strings, attributes = _own(tree), {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        source = (node.module or "").rpartition(".")[2]
        for alias in node.names:
            name = alias.asname or alias.name
            if alias.name in constants.get(source, {}):
                strings[name] = constants[source][alias.name]
            attributes |= {(name, k): v for k, v in constants.get(alias.name, {}).items()}
    return Scope(strings, attributes)


def _local(function: ast.AST, scope: Scope) -> Scope:
    """``scope`` with the names that a function gives texts."""
    strings = dict(scope.strings)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            texts = [t for t in _resolved(node.value, Scope(strings, scope.attributes)) if t != "…"]
            if texts:
                strings[node.targets[0].id] = [*strings.get(node.targets[0].id, []), *texts]
    return Scope(strings, scope.attributes)


def _calls(node: ast.AST, around: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.Call, tuple[ast.AST, ...]]]:
    """Calls that make one of :data:`ERRORS`, with the functions that they stand in, outermost first."""
    for child in ast.iter_child_nodes(node):
        inner = around
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = (*around, child)
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in ERRORS and child.args:
            yield child, inner
        yield from _calls(child, inner)


@functools.cache
def collect() -> tuple[Refusal, ...]:
    """Every message once, by file and line of its first place."""
    found: dict[str, Refusal] = {}
    for path, tree in _trees().items():
        own = _scope(tree) if (calls := list(_calls(tree))) else Scope({}, {})
        for call, around in calls:
            scope = functools.reduce(lambda known, function: _local(function, known), around, own)
            for text in _resolved(call.args[0], scope):
                shown = " ".join(re.sub(r"…+", "…", text).split())
                if re.search(r"\w", shown) and shown != "… is …":  # else it passes on what others say
                    found.setdefault(shown, Refusal(shown, path.relative_to(ROOT).as_posix(), call.lineno))
    return tuple(found.values())


@dataclass(frozen=True)
class Topic:
    """A section of the page: its heading and what a message, or its file, must match to belong there."""

    heading: str
    patterns: tuple[Pattern, ...]


@dataclass(frozen=True)
class Pattern:
    """A regular expression of messages; behind ``PLACE: `` of those in files whose path begins so."""

    written: str

    @functools.cached_property
    def place(self) -> str:
        place, colon, _ = self.written.partition(": ")
        return place if colon and re.fullmatch(r"[\w/]+/[\w/.]*", place) else ""

    def takes(self, refusal: Refusal) -> bool:
        expression = self.written.removeprefix(f"{self.place}: ") if self.place else self.written
        return refusal.file.startswith(self.place) and re.search(expression, refusal.text) is not None


def topics(page: str) -> list[Topic]:
    """The sections of the troubleshooting page's source, in order; a comment ``<!-- messages`` lists patterns, one a
    line."""
    out = []
    for section in page.split("\n## ")[1:]:
        if OPEN in section:
            lines = section.split(OPEN)[1].split(CLOSE)[0].strip().splitlines()
            patterns = tuple(Pattern(line.strip()) for line in lines if line.strip())
            out.append(Topic(section.partition("\n")[0], patterns))
    return out


def taken_by(refusal: Refusal, known: list[Topic]) -> tuple[Topic, Pattern] | None:
    """Where a message belongs: patterns that name a place go first, then the order of the page decides."""
    every = [(topic, pattern) for topic in known for pattern in topic.patterns]
    placed = [pair for pair in every if pair[1].place]
    plain = [pair for pair in every if not pair[1].place]
    return next((pair for pair in (*placed, *plain) if pair[1].takes(refusal)), None)


def sorted_into(page: str) -> tuple[dict[str, list[Refusal]], list[Refusal]]:
    """Heading -> its messages, and those that no topic takes."""
    known = topics(page)
    rooms: dict[str, list[Refusal]] = {t.heading: [] for t in known}
    homeless = []
    for refusal in collect():
        taken = taken_by(refusal, known)
        (rooms[taken[0].heading] if taken else homeless).append(refusal)
    return rooms, homeless


def page(source: str) -> str:
    """The page with each comment replaced by the messages of its section."""
    rooms, homeless = sorted_into(source)
    if homeless:
        first = homeless[0]
        raise ValueError(f"docs/troubleshooting.md has no entry for {first.text!r} ({first.file}:{first.line})")
    for topic in topics(source):
        before, _, rest = source.partition(OPEN)
        _, _, after = rest.partition(CLOSE)
        source = before + "\n".join(_listed(rooms[topic.heading])) + after
    return source


def _listed(refusals: list[Refusal]) -> list[str]:
    several = f"The {len(refusals)} messages" if len(refusals) > 1 else "The message"
    lines = [f'??? note "{several}"', ""]
    for r in sorted(refusals, key=lambda r: r.text.lower()):
        lines.append(f"    - {_as_code(r.text)}")
    return [*lines, ""]


def _as_code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
