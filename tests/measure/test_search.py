"""The search for a model's recipe: rounds, what is kept, what is refused."""

from __future__ import annotations

import json

import pytest

import vtprune
from vtprune.cli import main
from vtprune.core.recipe import Recipe, Stage
from vtprune.measure import search as module
from vtprune.measure.samples import scenes_samples


@pytest.fixture(scope="module")
def bundled():
    return vtprune.load_demo_model()


def recipe(name: str, *stages) -> Recipe:
    return Recipe(name=name, stages=tuple(Stage(method=m, keep=k, options=o) for m, k, o in stages))


@pytest.mark.ci
def test_rounds_leave_the_better_half(bundled, tmp_path):
    """Three candidates and one that cannot run: it goes at once, the last round asks everything, and the winner is the
    one of the most right answers there."""
    questions = scenes_samples(2, "train")
    asked = [
        recipe("a", ("pyramiddrop", None, {})),
        recipe("b", ("keep-last", None, {})),
        recipe("c", ("uniform", None, {})),
        recipe("d", ("fastv", None, {"layer": 99})),
    ]
    lines: list[str] = []
    found = module.search(*bundled, asked, questions, budgets=(0.25,), folder=tmp_path, told=lines.append)
    first, *_, last = found["rounds"]
    assert len(found["rounds"]) == 3
    assert [c["questions"] for c in first[:3]] == [round(len(questions) / 4)] * 3
    assert {c["recipe"]["name"] for c in last} < {"a", "b", "c"} and last[0]["questions"] == len(questions)
    (bad,) = [c for c in first if c["refused"]]
    assert bad["recipe"]["name"] == "d" and "layers [99]" in bad["refused"]
    assert last[0]["mean"] == max(c["mean"] for c in last) and found["recipe"] == last[0]["recipe"]
    # the same again is read, not run
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = module.search(*bundled, asked, questions, budgets=(0.25,), folder=tmp_path)
    assert again == found and {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_candidates_are_papers_and_stacks():
    names = [r.name for r in module.candidates()]
    assert {"pyramiddrop", "vispruner", "flowcut-then-fastv"} <= set(names)
    assert not {"random", "uniform", "dpvr-lf", "drop-all"} & set(names)
    shares = {r.stages[0].keep for r in module.candidates(["flowcut-then-fastv"])}
    assert shares == {0.5, 0.75}
    keys = [r.key() for r in module.candidates()]
    assert len(keys) == len(set(keys))


@pytest.mark.ci
def test_the_command_writes_a_recipe(tmp_path, capsys):
    out = tmp_path / "best.json"
    words = ["search", "--recipes", "fastv,uniform", "--abilities", "scenes", "--samples", "1", "--budgets", "0.25"]
    assert main.main([*words, "--recipe-out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert vtprune.Recipe.load(out).to_dict() == found["recipe"]
    assert main.main(["search", "--abilities", "nothing"]) == 1


def test_nothing_to_choose_from_is_said(bundled):
    with pytest.raises(vtprune.VtpruneError, match="nothing to search"):
        module.search(*bundled, [], scenes_samples(1, "train"))
    with pytest.raises(vtprune.VtpruneError, match="no candidate can run"):
        module.search(*bundled, [recipe("d", ("fastv", None, {"layer": 99}))], scenes_samples(1, "train"))
