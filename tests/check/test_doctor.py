"""``vtprune doctor`` and the tested ranges behind it."""

from __future__ import annotations

import json

import pytest

import canary
import vtprune
from vtprune.check import doctor, versions
from vtprune.check.contract import CHECKS
from vtprune.check.outcome import Fail
from vtprune.cli import main


def pretend(monkeypatch, **releases: str | None) -> None:
    """As if these releases were installed; ``_`` stands for ``-``."""
    real = versions.installed
    given = {name.replace("_", "-"): release for name, release in releases.items()}
    monkeypatch.setattr(versions, "installed", lambda package: given[package] if package in given else real(package))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("5.24.0", (5, 24)),
        ("2.14.1+cpu", (2, 14, 1)),
        ("5.25.0.dev0", (5, 25)),
        ("4", (4,)),
        ("2.15.0rc1", (2, 15)),
        ("1.0.31.post1", (1, 0, 31)),
        ("0", (0,)),
    ],
)
def test_releases_are_read(text, numbers):
    assert versions.release(text) == numbers


def test_what_is_no_release_is_told():
    with pytest.raises(ValueError, match="no release number"):
        versions.release("main")


@pytest.mark.parametrize(
    ("release", "status"),
    [
        ("5.17.0", "tested"),
        ("5.24.0", "tested"),
        ("5.24.1", "newer"),
        ("5.25.0.dev0", "newer"),
        ("10.0", "newer"),
        ("5.9.0", "older"),
        (None, "missing"),
    ],
)
def test_a_release_is_placed(monkeypatch, release, status):
    pretend(monkeypatch, transformers=release)
    assert versions.find("transformers").status == status


def test_an_optional_package_may_be_absent(monkeypatch):
    pretend(monkeypatch, gradio=None, triton=None)
    assert versions.find("gradio").status == versions.find("triton").status == "absent"


@pytest.mark.parametrize(
    ("lmms", "there", "told"),
    [
        ("0.7.3", False, True),
        ("0.7.1", False, True),
        ("0.7.3", True, False),
        ("0.7", False, False),
        (None, False, False),
    ],
)
def test_filelock_4_is_a_conflict_only_with_the_lmms_eval_that_needs_it(monkeypatch, lmms, there, told):
    pretend(monkeypatch, lmms_eval=lmms, filelock="4.3.1")
    monkeypatch.setattr(versions, "find_spec", lambda name: object() if there else None)
    assert versions.conflicts() == (
        [f"lmms-eval {lmms} imports filelock._api, which filelock 4.3.1 does not have: pip install 'filelock<4'"]
        if told
        else []
    )


@pytest.mark.ci
@pytest.mark.parametrize(
    "families", [("generic", "llava", "timm-vit"), pytest.param((), marks=pytest.mark.slow)], ids=["three", "all"]
)
def test_families_are_proved(families):
    """By the contract, with what each takes: a cut in the language model, merging in the tower, or random tokens."""
    found = doctor.families(families or vtprune.adapters())
    assert {f["family"]: f["detail"] for f in found if not f["passed"]} == {}


def test_a_family_that_computes_otherwise_is_told(monkeypatch, capsys):
    def wrong(case):
        raise Fail("relative error 1.0e+00 is above 1e-05")

    def raw(case):
        raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")

    monkeypatch.setitem(CHECKS, "restored", wrong)
    (found,) = doctor.families(["timm-vit"])
    assert found["passed"] is False and found["detail"] == "tome: restored: relative error 1.0e+00 is above 1e-05"
    monkeypatch.setitem(CHECKS, "restored", raw)
    assert main.main(["doctor", "--family", "timm-vit"]) == 1  # no traceback
    out = capsys.readouterr().out
    assert "TypeError: forward() got an unexpected keyword argument" in out and "NOT sound" in out


def test_another_proof_can_be_given():
    found = doctor.families(["llava", "timm-vit"], {"llava": "the cache did not come back", "timm-vit": None}.get)
    assert [(f["passed"], f["detail"]) for f in found] == [(False, "the cache did not come back"), (True, "")]


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "verified", lambda family: None)
    monkeypatch.setattr(versions, "conflicts", lambda: [])
    assert main.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["package"] for p in found["packages"]] == [t.package for t in versions.TESTED]
    assert {f["family"] for f in found["families"]} == {*vtprune.adapters()}
    pretend(monkeypatch, transformers="6.0.0")
    assert main.main(["doctor", "--family", "llava"]) == 0  # newer is said, not refused: the families decide
    out = capsys.readouterr().out
    assert "newer than tested" in out and "timm-vit" not in out
    pretend(monkeypatch, transformers="5.0.0")
    assert main.main(["doctor", "--family", "llava"]) == 1 and "OLDER" in capsys.readouterr().out
    pretend(monkeypatch, transformers="5.24.0")
    monkeypatch.setattr(versions, "conflicts", lambda: ["a and b quarrel"])
    assert main.main(["doctor", "--family", "llava"]) == 1 and "conflict: a and b quarrel" in capsys.readouterr().out
    assert main.main(["doctor", "--family", "lava"]) == 1 and "did you mean llava" in capsys.readouterr().err


def test_adapters_that_cannot_be_imported_are_told(monkeypatch):
    from vtprune.models.base import ADAPTERS

    def gone():
        raise ImportError("cannot import name 'ALL_ATTENTION_FUNCTIONS' from 'transformers.modeling_utils'")

    monkeypatch.setattr(ADAPTERS, "_ready", gone)
    found = doctor.diagnose()
    assert not found["passed"] and "ALL_ATTENTION_FUNCTIONS" in found["families"][0]["detail"]


def test_the_canary_names_the_first_release_that_breaks(monkeypatch, capsys):
    monkeypatch.setattr(canary, "releases", lambda package, first, last: ["5.22.0", "5.23.0", "5.24.0", "5.25.0"])
    monkeypatch.setattr(canary, "overlay", lambda package, release, folder: (folder / "release").write_text(release))
    tried = []

    def broken(env):
        with open(env["PYTHONPATH"].split(":")[0] + "/release") as file:
            tried.append(file.read())
        return "python -m vtprune doctor: code 1" if tried[-1] >= "5.24" else None

    monkeypatch.setattr(canary, "broken", broken)
    monkeypatch.setattr("sys.argv", ["canary"])
    assert canary.main() == 1 and tried == ["5.22.0", "5.23.0", "5.24.0"]
    out = capsys.readouterr().out
    assert "transformers 5.24.0: BREAKS" in out and "transformers 5.23.0: passes" in out and "5.25" not in out


def test_the_canary_does_not_take_a_failure_for_a_pass(monkeypatch):
    monkeypatch.setattr(canary, "SUBSET", (("-c", "print('fine')"), ("-c", "import sys; print('not so'); sys.exit(3)")))
    told = canary.broken({})
    assert "code 3" in told and "not so" in told
    monkeypatch.setattr(canary, "SUBSET", (("-c", "pass"),))
    assert canary.broken({}) is None
