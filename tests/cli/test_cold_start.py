"""Help and lists come at once: without torch, from a file that says what the registries say."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import vtprune
from vtprune.cli import catalogue, main, methods, registered
from vtprune.core import info, plugins

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--help", "--version", "methods", "methods tome", "recipes", "recipes flowcut-then-fastv", "adapters"]
SECONDS = 0.4  # CPU time, user and system
HEAVY = ("torch", "numpy", "PIL", "transformers")


def cold(words: list[str], cwd: Path, **env: str) -> tuple[dict, float]:
    """What a new process says that runs one command, and its CPU time."""
    code = (
        "import json, sys; from vtprune.cli.main import main; code = main(sys.argv[1:]); "
        f"print(json.dumps([code, [m for m in {HEAVY!r} if m in sys.modules]]), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"code": code, "loaded": loaded, "out": done.stdout}, spent


@pytest.mark.parametrize("words", QUICK)
def test_cold_start(tmp_path, words):
    runs = [cold(words.split(), tmp_path) for _ in range(3)]
    told = runs[0][0]
    assert told["code"] == 0 and told["loaded"] == [] and told["out"]
    assert min(spent for _, spent in runs) < SECONDS


def test_importing_the_package_imports_no_torch(tmp_path):
    code = """
import sys, vtprune
names = dir(vtprune)
assert "torch" not in sys.modules and {"attach", "methods", "Handle"} <= set(names)
import vtprune.attach, vtprune.recipes, vtprune.methods
assert "torch" not in sys.modules
from vtprune import *
assert all(callable(globals()[name]) for name in vtprune.__all__)
assert (attach.__module__, methods.__name__) == ("vtprune.check.attach", "methods")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "first", ["vtprune.methods.tome", "vtprune.core.info", "vtprune.methods.base", "vtprune.recipes"]
)
def test_public_functions_are_no_modules_whatever_is_imported_first(tmp_path, first):
    code = f"""
import {first}, inspect, vtprune
names = ("methods", "recipes", "adapters", "attach", "verify", "solve")
assert all(inspect.isroutine(getattr(vtprune, name)) for name in names)
assert "tome" in vtprune.methods() and vtprune.core.recipe.resolve(0.5, 8) == 4
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_catalogue_is_what_is_registered():
    assert catalogue.FILE.read_text(encoding="utf-8") == registered.catalogue(), "make support"


def test_groups_and_names_are_those_of_the_core():
    assert methods.GROUPS == tuple(info.GROUPS.values())
    assert (catalogue.GROUP, catalogue.IMPORTS) == (plugins.GROUP, plugins.IMPORTS)


@pytest.mark.parametrize("words", ["methods", "recipes", "adapters", "methods py* --json", "recipes fastv* --json"])
def test_both_ways_print_the_same(tmp_path, capsys, words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main.main(words.split()) == 0  # this process has the registries
    assert cold(words.split(), tmp_path)[0]["out"] == capsys.readouterr().out


OWN = """
from dataclasses import dataclass
from vtprune.methods.base import Cut, Method, MethodInfo, register
from vtprune.core.select import top

CASES = ({"keep": 0.5}, {"keep": 2})

@register(MethodInfo(name="mine", paper="none", idea="my idea", kinds=("projector",), cases=CASES))
@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    def plan(self, geometry, keep):
        return (Cut(site="projector", keep=keep),)

    def select(self, view, cut):
        return top(view.features.norm(dim=-1), cut.keep, view.valid, view.protected)
"""


@pytest.mark.parametrize("kind", ["file", "module", "environment"])
def test_what_is_imported_is_listed(tmp_path, kind):
    (tmp_path / "my_method.py").write_text(OWN, encoding="utf-8")
    given = {"file": ["--import", "my_method.py"], "module": ["--import", "my_method"]}.get(kind, [])
    env = {} if given else {plugins.IMPORTS: str(tmp_path / "my_method.py")}
    told, _ = cold(["methods", "--json", *given], tmp_path, **env)
    entries = {e["name"]: e for e in json.loads(told["out"])}
    assert entries["mine"]["distribution"] == ("my_method" if kind == "module" else "my_method.py")
    assert entries["tome"]["distribution"] is None


def test_changed_sources_are_asked_themselves(monkeypatch):
    monkeypatch.setitem(sys.modules, "vtprune.methods.base", None)
    monkeypatch.delitem(sys.modules, "vtprune.methods.base")
    assert catalogue._stored()["methods"][0]["name"] == vtprune.methods()[0]
    monkeypatch.setattr(catalogue, "fingerprint", lambda: "another")
    assert catalogue._stored() is None


def test_a_changed_method_changes_the_fingerprint(tmp_path, monkeypatch):
    for folder in ("methods", "core", "cli", "models"):
        (tmp_path / folder).mkdir()
    for name in ("methods/a.py", "core/recipes.py", "core/info.py", "cli/registered.py", "models/b.py"):
        (tmp_path / name).write_text("1\n")
    monkeypatch.setattr(vtprune, "__path__", [str(tmp_path)])
    first = catalogue.fingerprint()
    (tmp_path / "methods" / "a.py").write_bytes(b"1\r\n")
    assert catalogue.fingerprint() == first
    for name in ("methods/a.py", "core/recipes.py", "models/b.py", "methods/new.py"):
        (tmp_path / name).write_text("2\n")
        assert catalogue.fingerprint() != first
        first = catalogue.fingerprint()
