"""``vtprune.testing``: what outside methods are tested with."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from vtprune.models.base import ADAPTERS

import vtprune
from vtprune import testing
from vtprune.check import verify
from vtprune.check.verify import CHECKS, Check


def cases(*arguments, **options) -> list[testing.Case]:
    return [parameter.values[0] for parameter in testing.contract(*arguments, **options)]


def test_importing_it_loads_neither_pytest_nor_a_model_library(tmp_path):
    code = (
        "import json, sys; from vtprune import testing; "
        "print(json.dumps([m for m in ('pytest', 'transformers', 'timm') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_a_tiny_model_is_the_callers_own():
    model, inputs = testing.tiny("llava")
    other, same = testing.tiny("llava", next(iter(ADAPTERS.get("llava").tiny)))
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape and not model.training
    with torch.no_grad():
        want = other(**same).logits
        assert torch.equal(model(**inputs).logits, want)
        next(model.parameters()).zero_()
        inputs["input_ids"].zero_()
        again, fresh = testing.tiny("llava")
        assert torch.equal(again(**fresh).logits, want)


def test_a_tower_comes_with_images():
    model, inputs = testing.tiny("hf-vit", "clip")
    (images,) = inputs.values()
    assert images.ndim == 4 and images.shape[1] == 3 and not model.training


def test_what_there_is_not_is_said(monkeypatch):
    with pytest.raises(vtprune.VtpruneError, match="did you mean llava"):
        testing.tiny("lava")
    with pytest.raises(vtprune.VtpruneError, match="llava has no tiny model 'clip'; there are clip-llama"):
        testing.tiny("llava", "clip")
    with pytest.raises(vtprune.VtpruneError, match="did you mean fastv"):
        testing.contract("fast-v")
    with pytest.raises(vtprune.VtpruneError, match="unknown model family"):
        testing.contract("fastv", ["lava"])
    monkeypatch.setitem(ADAPTERS._entries, "llava", replace(ADAPTERS.get("llava"), package="not_there"))
    with pytest.raises(vtprune.UnsupportedError, match="tiny models of llava need the package not_there"):
        testing.tiny("llava")
    with pytest.raises(pytest.skip.Exception, match="not_there"):
        testing.check(cases("fastv", ["llava"])[0])


def test_the_contract_is_every_case_on_the_families():
    first = next(iter(ADAPTERS.get("llava").tiny))
    assert cases("fastv", ("llava", "gemma3")) == [
        testing.Case("fastv", family, next(iter(ADAPTERS.get(family).tiny)), number)
        for family in ("llava", "gemma3")
        for number in range(len(vtprune.describe("fastv").cases))
    ]
    assert {case.family for case in cases("fastv")} == set(vtprune.adapters())
    assert {case.variant for case in cases("fastv", ["llava"], variants=True)} == set(ADAPTERS.get("llava").tiny)
    assert cases("fastv-k2-r50", ["llava"]) == [testing.Case("fastv-k2-r50", "llava", first, 0)]
    assert [p.id for p in testing.contract("fastv-k2-r50", ["llava"])] == [f"llava-{first}-fastv-k2-r50-0"]


def test_case_options_count_per_tile_where_the_tower_sees_tiles():
    model, _ = testing.tiny("llava-next")
    assert testing.case_options(model, "tome", 1) == {**vtprune.describe("tome").cases[1], "per": "tile"}
    assert testing.case_options(model, "fastv", 1) == vtprune.describe("fastv").cases[1]


@pytest.fixture
def counted(monkeypatch):
    """The checks that run, by name; each gives what ``verdicts`` says."""
    ran: list[tuple[str, dict]] = []
    verdicts: dict[str, bool | None] = {}

    def run(name, model, recipe, inputs, **options):
        ran.append((name, options))
        return Check(name, verdicts.get(name, True), f"{name} says so")

    monkeypatch.setattr(testing, "run_check", run)
    return ran, verdicts


def test_all_of_the_contract_is_checked(counted):
    ran, _ = counted
    case = cases("fastv", ["llava"])[1]
    testing.check(case)
    assert [name for name, _ in ran] == list(CHECKS)
    assert all(options == vtprune.describe("fastv").cases[1] for _, options in ran)
    testing.check(case, ["restored"], keep=5)
    assert ran[len(CHECKS) :] == [("restored", {**vtprune.describe("fastv").cases[1], "keep": 5})]
    with pytest.raises(vtprune.VtpruneError, match="there is no check 'restore'; there are full_budget"):
        testing.check(case, ["restore"])


def test_every_check_that_fails_is_named(counted):
    counted[1].update(restored=False, deterministic=False)
    with pytest.raises(pytest.fail.Exception) as e:
        testing.check(cases("fastv", ["llava"])[0])
    assert "restored: restored says so\ndeterministic: deterministic says so" in str(e.value)


def test_a_case_to_which_nothing_applies_proves_nothing(counted):
    case = cases("fastv", ["llava"])[0]
    counted[1].update(dict.fromkeys(list(CHECKS)[2:]))
    with pytest.raises(pytest.fail.Exception, match=f"only 2 of {len(CHECKS)} checks apply"):
        testing.check(case)
    counted[1].pop(list(CHECKS)[-1])
    testing.check(case)
    testing.check(case, list(CHECKS)[:2])
    with pytest.raises(pytest.fail.Exception, match="only 0 of 1"):
        testing.check(case, list(CHECKS)[2:3])


def test_what_a_model_refuses_is_skipped(counted):
    with pytest.raises(pytest.skip.Exception, match="fastv works at llm"):
        testing.check(cases("fastv", ["hf-vit"])[0])
    assert counted[0] == []
    with pytest.raises(vtprune.VtpruneError, match="fastv has no option"):
        testing.check(cases("fastv", ["llava"])[0], nonsense=1)


def test_a_method_that_is_wrong_fails(monkeypatch):
    """The real checks, on a method of which one decides by what it saw before."""
    case = cases("random", ["llava"])[1]
    testing.check(case)
    turn = iter(range(1000))
    right = type(vtprune.describe("random").cls(**{})).select

    def drifting(self, view, cut):
        chosen = right(self, view, cut)
        return chosen if next(turn) % 2 else right(self, replace(view, features=-view.features), replace(cut, keep=1))

    monkeypatch.setattr(vtprune.describe("random").cls, "select", drifting)
    with pytest.raises(pytest.fail.Exception, match="deterministic: two runs differ"):
        testing.check(case)
    assert verify.check is testing.run_check
