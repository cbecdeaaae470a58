"""What the command line does beside its commands: times of an answer, tables for people and programs, recipe files and
methods of the user's own."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys

import pytest
from vtprune.demos import repeat
from vtprune.demos.results import Side

import vtprune
from fake import picture, tiny
from vtprune.cli import demo, main, models, tables
from vtprune.core import plugins, recipes
from vtprune.core.planning import load_recipe
from vtprune.measure import turns


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a picture and a recipe file; the tiny model stands for the bundled one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda args: tiny())
    for name in (plugins.IMPORTS, recipes.FILES):
        monkeypatch.setenv(name, "")
    picture().save("p.png")
    vtprune.Recipe(name="my-own", stages=(vtprune.Stage(method="uniform", keep=9),), source="me").save("own.yaml")
    return tmp_path


def refused(capsys, code: int, *words: str) -> str:
    assert main.main(list(words)) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


ASK = ["run", "--image", "p.png", "--question", "what"]


def test_run_tells_times_dense_and_pruned(here, capsys):
    assert main.main([*ASK, "--keep", "4", "--timing", "2"]) == 0
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    told = r"[\d.]+ ms dense, [\d.]+ ms pruned \([\d.]+x, rounds [\d.]+ to [\d.]+(: within noise)?\)"
    assert re.fullmatch(told, lines["first token"]) and re.fullmatch(told, lines["whole answer"])
    assert lines["clock"].startswith("wall clock, 2 rounds in turns") and "cpu" in lines["clock"]
    assert main.main([*ASK, "--keep", "4", "--timing", "1", "--json"]) == 0
    times = json.loads(capsys.readouterr().out)["times"]
    assert times["rounds"] == 1 and 0 < times["first_token"]["pruned_ms"] <= times["answer"]["pruned_ms"] * 2
    assert main.main([*ASK, "--timing", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["times"] is None
    assert "at least 1" in refused(capsys, 2, *ASK, "--timing", "-1")


def test_turns_time_what_they_say(monkeypatch):
    """The clock is the number of tokens that were asked for, twice as many for a dense model."""
    model, _ = tiny()
    attached = []
    monkeypatch.setattr(turns, "attach", lambda *a, **k: attached.append(k) or vtprune.attach(*a, **k))
    asked = []
    monkeypatch.setattr(type(model), "generate", lambda self, max_new_tokens, do_sample: asked.append(max_new_tokens))

    def clock(call, device):
        call()
        return asked[-1] * (1.0 if vtprune.core.live.handle_of(vtprune.core.live.attached, model) else 2.0)

    monkeypatch.setattr(turns.timing, "clock", clock)
    told = turns.turns(model, {}, load_recipe("uniform"), {"keep": 4}, new_tokens=8, rounds=3)
    assert told["rounds"] == 3 and attached == [{"keep": 4}] * 3
    assert told["first_token"] == {"dense_ms": 2.0, "pruned_ms": 1.0, "ratio": 0.5, "range": [0.5, 0.5]}
    assert told["answer"] == {"dense_ms": 16.0, "pruned_ms": 8.0, "ratio": 0.5, "range": [0.5, 0.5]}
    monkeypatch.setattr(turns, "PATIENCE", 1)
    assert turns.turns(model, {}, load_recipe("uniform"), {"keep": 4}, new_tokens=8, rounds=3)["rounds"] == 1


# ---------------------------------------------------------------------------------------------------------- recipes


def test_recipes_shows_the_stages_of_a_name_and_of_a_file(here, capsys):
    assert main.main(["recipes", "flowcut-then-fastv"]) == 0
    rows = capsys.readouterr().out.split("\n\n")[1].splitlines()[2:]
    assert [row.split()[:3] for row in rows] == [["1", "flowcut", "0.5"], ["2", "fastv", "0.25"]]
    assert main.main(["recipes", "own.yaml"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("my-own", "uniform", "9", "me"))
    assert main.main(["recipes", "own.yaml", "--json"]) == 0
    assert vtprune.Recipe.from_dict(json.loads(capsys.readouterr().out)) == vtprune.Recipe.load("own.yaml")
    assert main.main(["recipes", "fastv-k2-r50", "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "1,fastv,0.5,layer=2"
    assert "gone.yaml" in refused(capsys, 1, "recipes", "gone.yaml")


def test_the_demo_offers_a_recipe_file(here):
    parser = main.parser()
    args = parser.parse_args(["demo", "--recipe", "own.yaml"])
    demo._check(args)
    assert args.recipe == "my-own" and "my-own" in vtprune.recipes() and load_recipe("my-own").stages[0].keep == 9
    code = "import vtprune; assert 'my-own' in vtprune.recipes()"  # processes that it starts know it as well
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "vtprune.Recipe.from_dict" in repeat._run(Side("my-own"), None)  # who repeats it elsewhere does not
    vtprune.Recipe(name="tome", stages=(vtprune.Stage(method="uniform"),)).save("taken.json")
    with pytest.raises(vtprune.VtpruneError, match="another recipe is named 'tome'"):
        demo._check(parser.parse_args(["demo", "--recipe", "taken.json"]))
    os.environ[recipes.FILES] = ""
    assert "my-own" not in vtprune.recipes()


@pytest.mark.parametrize("words", [["analyze", "--recipes"], ["search", "--recipes"], ["bench", "--methods"]])
def test_lists_of_recipes_take_files_and_refuse_nothing(here, capsys, words):
    assert "names nothing" in refused(capsys, 2, *words, " , ")
    assert "no-such.yaml" in refused(capsys, 1, *words, "own.yaml,no-such.yaml")


# ---------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("command", ["methods", "recipes", "adapters"])
def test_only_near_names_are_suggested(capsys, command):
    near = {
        "methods": ("visionzp", "visionzip"),
        "recipes": ("pyramid-drop", "pyramiddrop"),
        "adapters": ("lava", "llava"),
    }
    wrong, right = near[command]
    assert re.search(rf"did you mean .*\b{right}\b", refused(capsys, 1, command, wrong))
    for far in ("foo", "resnet50", "x"):
        told = refused(capsys, 1, command, far)
        assert "did you mean" not in told and "there are" in told
    assert "'vtprune " in refused(capsys, 1, command, "nothing*")


def test_near_words_are_suggested_for_commands_and_choices_too(here, capsys):
    assert "did you mean bench?" in refused(capsys, 2, "bnech")
    assert "did you mean adaskip?" in refused(capsys, 2, "fit", "adaskp")
    assert "did you mean bfloat16" in refused(capsys, 2, *ASK, "--dtype", "bfloat")
    for words in (["xyz"], [*ASK, "--dtype", "int"]):
        told = refused(capsys, 2, *words)
        assert "choose from" in told and "did you mean" not in told
    assert "did you mean pyramiddrop" in refused(capsys, 1, "demo", "--recipe", "pyramid-drop")
    told = refused(capsys, 1, "demo", "--recipe", "nothing-like-it")
    assert "there are dense, " in told and "did you mean" not in told


def test_a_file_of_another_kind_is_no_recipe(here, capsys):
    (here / "own.txt").write_text("x", encoding="utf-8")
    assert "own.txt is no recipe file: one ends in .json" in refused(capsys, 1, *ASK, "--recipe", "own.txt")


# ---------------------------------------------------------------------------------------------------------- tables

LONG = "a method with a long idea that does not fit beside the rest of the table and is wrapped at its words"
TABLE = [["name", "number", "idea"], ["one", "1.5", LONG], ["two", "-22", "short & 100 % _x"]]


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_tables_fit_and_lose_nothing(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    told = tables.fitted(TABLE)
    assert max(map(len, told.splitlines())) <= width and set(LONG.split()) <= set(told.split())
    assert re.search(r"^one +1\.5  a method", told, re.M) and re.search(r"^two +-22  short", told, re.M)


def test_columns_that_cannot_fit_stand_in_blocks(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    table = [["method", *(f"ability {i}" for i in range(12))], *([name, *["12.3"] * 12] for name in ("dense", "tome"))]
    told = tables.fitted(table)
    assert max(map(len, told.splitlines())) <= 50 and told.count("tome") == told.count("method") > 1
    assert told.split().count("12.3") == 24


def test_blocks_tell_rows_of_one_name_apart(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    head = ["method", "budget", *(f"ability {i}" for i in range(8))]
    told = tables.fitted([head, *(["tome", b, *["12.3"] * 8] for b in ("50%", "25%"))])
    assert told.count("25%") == told.count("50%") == told.count("method") > 1


def test_every_list_fits_a_hundred_columns(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    for words in (["methods"], ["recipes"], ["adapters"], ["methods", "tome"], ["recipes", "fastv-k2-r50"]):
        assert main.main(words) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 100, words


def test_csv_and_latex_hold_whole_cells(capsys):
    assert main.main(["methods", "--csv"]) == 0
    head, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert head[-1] == "idea" and {row[0]: row[-1] for row in rows} == {
        name: vtprune.describe(name).idea for name in vtprune.methods()
    }
    assert tables.latex(TABLE).splitlines()[0] == r"\begin{tabular}{lrl}"
    assert r"two & -22 & short \& 100 \% \_x \\" in tables.latex(TABLE).splitlines()
    assert main.main(["methods", "--csv", "--latex"]) == 2


def test_results_are_tables_for_programs_too(here, capsys):
    words = ["bench", "--samples", "1", "--budgets", "0.5", "--methods", "tome", "--no-baselines", "--timing", "0"]
    assert main.main([*words, "--csv"]) == 0
    head, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert head[0] == "method" and [row[0] for row in rows] == ["dense", "tome"]
    assert main.main(["verify", "--recipe", "uniform", "--keep", "4", "--latex"]) == 0
    assert capsys.readouterr().out.startswith(r"\begin{tabular}{lll}")


# ---------------------------------------------------------------------------------------------------------- code

OWN = """
from dataclasses import dataclass
from vtprune.core.select import top
from vtprune.methods.base import Cut, Method, MethodInfo, register

CASES = ({"keep": 0.5}, {"keep": 2})

@register(MethodInfo(name="norms", paper="none", idea="largest norms", kinds=("projector",), cases=CASES))
@dataclass(frozen=True, kw_only=True)
class Norms(Method):
    def plan(self, geometry, keep):
        return (Cut(site="projector", keep=keep),)

    def select(self, view, cut):
        return top(view.features.norm(dim=-1), cut.keep, view.valid, view.protected)
"""


def typed(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "vtprune", *words], capture_output=True, text=True)


def test_own_methods_work_in_commands_and_in_the_processes_of_eval(here):
    (here / "my_norms.py").write_text(OWN, encoding="utf-8")
    done = typed("run", "--import", "my_norms.py", "--recipe", "norms", "--keep", "4", "--timing", "0", *ASK[1:])
    assert done.returncode == 0 and "projector norms" in done.stdout, done.stderr
    done = typed("eval", "--import", "my_norms", "--recipe", "norms", "--no-baselines", "--dry-run", "--keep", "4")
    if "lmms-eval is not installed" in done.stderr:
        pytest.skip("lmms-eval is not installed")
    assert done.stdout.startswith(f"{plugins.IMPORTS}=my_norms ") and "recipe=norms" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("given", "text", "says"),
    [
        ("gone.py", None, "no such file"),
        ("no_such_module", None, "ModuleNotFoundError"),
        ("not a module", None, "neither a module"),
        ("broken.py", "1 / 0", "division by zero"),
        ("words.py", "is is", "SyntaxError"),
        ("json.py", "", "call the file otherwise"),
        ("taken.py", OWN.replace('"norms"', '"tome"'), "registered already"),
    ],
)
def test_code_that_cannot_be_imported_is_one_line(here, capsys, given, text, says):
    if text is not None:
        (here / given).write_text(text, encoding="utf-8")
    told = refused(capsys, 1, "methods", "--import", given)
    assert told.startswith("vtprune: error: ") and says in told and given.removesuffix(".py") in told
    assert os.environ[plugins.IMPORTS] == "" and given.removesuffix(".py") not in {*sys.modules} - {"json"}


def test_what_the_environment_names_is_not_skipped(here):
    done = subprocess.run(
        [sys.executable, "-m", "vtprune", "methods"],
        env={**os.environ, plugins.IMPORTS: "gone.py"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "cannot import gone.py" in done.stderr and len(done.stderr.splitlines()) == 1


def test_verbose_says_what_is_kept(here, capsys):
    assert main.main([*ASK, "--keep", "4", "--timing", "0", "-v"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("vtprune: attached pyramiddrop(keep=4) to Llava") and "16 -> 4 visual tokens" in lines[1]
    assert main.main([*ASK, "--keep", "4", "--timing", "0"]) == 0 and capsys.readouterr().err == ""
