"""The rooms of the house: who may import whom, no circles, nothing hidden in functions, no file that does too much."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BELOW = ("vtprune", "vtprune.c[oh]*", "vtprune.methods.*", "vtprune.models.*", "vtprune.inputs.*")  # core, check
# A room -> the rooms it may import from, itself aside. What stands first and matches decides.
MAY = {
    "vtprune.version": (),
    "vtprune.moved": (),
    "vtprune.core.errors": (),
    "vtprune.core.log": (),
    "vtprune.core.shown": (),
    "vtprune.core.sources": (),
    "vtprune.core.types": ("vtprune.core.errors", "vtprune.core.sources"),
    "vtprune.core.registry": ("vtprune.core.*",),
    "vtprune.core.select": ("vtprune.core.types", "vtprune.kernels", "vtprune.kernels.base"),
    "vtprune.core.recipe": ("vtprune.core.types",),
    "vtprune.core.resources": ("vtprune.core.types",),
    "vtprune.core.ledger": ("vtprune.core.types", "vtprune.core.stopwatch"),
    "vtprune.core.cost": ("vtprune.core.types",),
    "vtprune.core.*": (
        "vtprune.core.*",
        "vtprune.methods.*",
        "vtprune.models.base",
        "vtprune.models.engine.*",
        "vtprune.kernels",
    ),
    "vtprune.kernels*": ("vtprune.core.types", "vtprune.core.registry"),
    "vtprune.methods*": (
        "vtprune.core.shown",
        "vtprune.core.types",
        "vtprune.core.select",
        "vtprune.core.recipe",
        "vtprune.core.registry",
        "vtprune.core.resources",
        "vtprune.kernels",
        "vtprune.kernels.base",
        "vtprune.kernels.density",
    ),
    "vtprune.models.base": ("vtprune.core.types", "vtprune.core.registry", "vtprune.core.ledger", "vtprune.models"),
    "vtprune.models.engine*": ("vtprune.core.*", "vtprune.kernels*", "vtprune.models.base"),
    "vtprune.models.parts*": ("vtprune.core.*", "vtprune.models.base", "vtprune.models.engine.*"),
    "vtprune.models*": ("vtprune.core.*", "vtprune.models.*"),
    "vtprune.check*": ("vtprune.core.*", "vtprune.methods.*", "vtprune.models.*", "vtprune.version"),
    "vtprune.inputs*": ("vtprune.core.*", "vtprune.models"),
    "vtprune.data*": (),
    "vtprune.measure*": (*BELOW, "vtprune.version", "vtprune.data.*"),
    "vtprune.serving*": (*BELOW, "vtprune.version"),
    "vtprune.show*": (
        "vtprune.version",
        "vtprune.core.*",
        "vtprune.methods.*",
        "vtprune.models.*",
        "vtprune.measure.text",
    ),
    "vtprune.lmms*": (*BELOW, "vtprune.version", "vtprune.measure.*", "vtprune.show.*"),
    "vtprune.train*": (*BELOW, "vtprune.version", "vtprune.measure.*", "vtprune.data.*"),
    "vtprune.demos*": (
        *BELOW,
        "vtprune.measure.*",
        "vtprune.data.*",
        "vtprune.show.*",
        "vtprune.lmms.*",
        "vtprune.serving.guard",
    ),
    "vtprune.testing": ("vtprune", "vtprune.core.*", "vtprune.check.*", "vtprune.models.*"),
    "vtprune.cli*": ("vtprune*",),
    "vtprune.__main__": ("vtprune.cli.main",),
    "vtprune": ("vtprune*",),
}
# A module -> modules it imports inside a function, and why.
LAZY = {
    "vtprune.cli.demo": "the two processes of the demo start before gradio is imported",
    "vtprune.cli.serve": "the server needs packages of an extra",
    "vtprune.core.report": "Report.show draws, which the core does not know how to",
}
# Files of more than LONGEST lines, and why they stay whole.
LONGEST = 400
LONG: dict[str, str] = {}


def modules() -> dict[str, Path]:
    found = {}
    for top in ("vtprune", "models", "kernels", "demos"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            parts = parts if top == "vtprune" else ["vtprune", *parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Our modules that ``name`` imports, and whether inside a function; for type checkers only: not at all."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            return
        base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        whole = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            yield f"{whole}.{alias.name}" if f"{whole}.{alias.name}" in MODULES else whole

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield from ((t, inside) for t in targets(child) if t in MODULES and t != name)
            yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


@functools.cache
def graph() -> dict[str, list[tuple[str, bool]]]:
    return {name: list(imports(name, path)) for name, path in MODULES.items()}


def room(name: str) -> str:
    return next(pattern for pattern in MAY if fnmatch(name, pattern))


def allowed(name: str, target: str) -> bool:
    mine = room(name)
    return (fnmatch(target, mine) and "*" in mine) or any(fnmatch(target, pattern) for pattern in MAY[mine])


def test_dependencies_point_one_way():
    wrong = [
        f"{name} -> {target}"
        for name, found in graph().items()
        for target, inside in found
        if not (inside and name in LAZY) and not allowed(name, target)
    ]
    assert wrong == []


def test_every_room_of_the_table_is_there():
    assert [pattern for pattern in MAY if not any(fnmatch(name, pattern) for name in MODULES)] == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A circle, if there is one: the modules on it, sorted."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return [sorted({*e.args[1]})]
    return []


@pytest.mark.parametrize("also_inside", [False, True])
def test_there_is_no_circle(also_inside):
    edges = {name: {t for t, inside in found if also_inside or not inside} for name, found in graph().items()}
    assert circles(edges) == []


def test_nothing_of_ours_is_imported_inside_a_function():
    hidden = {name for name, found in graph().items() if any(inside for _, inside in found)}
    assert hidden == set(LAZY)


def test_no_file_does_too_much():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in MODULES.values()
    }
    assert {name for name, lines in lengths.items() if lines > LONGEST} == set(LONG)
    assert sorted(lengths.values())[len(lengths) // 2] < 150


def test_the_rules_see_what_they_forbid():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert not allowed("vtprune.core.types", "vtprune.core.ledger") and not allowed(
        "vtprune.methods.tome", "vtprune.models.base"
    )
    assert not allowed("vtprune.measure.run", "vtprune.cli.options") and not allowed(
        "vtprune.models.llava", "vtprune.methods.base"
    )
    assert allowed("vtprune.models.llava_next", "vtprune.models.llava") and allowed(
        "vtprune.cli.main", "vtprune.demos.command"
    )
