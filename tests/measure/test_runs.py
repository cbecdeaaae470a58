"""Runs that break off: killed, a bad picture, a full disk, a model that raises. What was done is kept, and the end is
the same as without the break."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import vtprune
from choice import budget_of
from fake import picture, tiny
from vtprune.measure import bench, statistics
from vtprune.measure import run as run_module
from vtprune.measure import samples as samples_module
from vtprune.measure.runs import Journal, RunError, fingerprint, write
from vtprune.measure.samples import Sample

NAMES = ["random", "downsample", "fastv"]


@pytest.fixture
def vlm():
    return tiny()


def samples(n: int = 7) -> list[Sample]:
    return [Sample(picture(i), f"what is {i}", "w5", ("one", "two")[i % 2], source=f"set/{i // 2}") for i in range(n)]


def table(vlm, folder: Path | None, part=None, **more):
    folder and folder.mkdir(exist_ok=True)
    return bench.table(
        *vlm, part or samples(), NAMES, [0.5], seeds=2, batch=2, timing=0, folder=folder, command="c", **more
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The table of a run that nothing broke off, and its files."""
    folder = tmp_path_factory.mktemp("unbroken")
    return table(tiny(), folder), files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@contextmanager
def failing_after(model, calls: int, error: Exception):
    """``model.generate`` raises at its ``calls``-th call from now on."""
    inner, seen = model.generate, [0]

    def generate(*args, **kwargs):
        seen[0] += 1
        if seen[0] >= calls:
            raise error
        return inner(*args, **kwargs)

    model.generate = generate
    try:
        yield
    finally:
        del model.generate


# ------------------------------------------------------------------------------------------------------------ the
# journal


def test_a_journal_keeps_whole_lines_only(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, {"a": 1}) as j:
        j.add([{"x": 1}], flops=2)
        j.add([{"x": 2}], flops=3)
    path.write_bytes(path.read_bytes() + b'{"records": [{"x": 3}], "fl')
    with Journal(path, {"a": 1}) as j:
        assert j.records == [{"x": 1}, {"x": 2}] and sum(b["flops"] for b in j.batches) == 5
        j.add([{"x": 3}], flops=4)
    assert [json.loads(line) for line in path.read_text().splitlines()][-1] == {"records": [{"x": 3}], "flops": 4}
    with pytest.raises(vtprune.VtpruneError, match="made with a 1, this run has 2"):
        Journal(path, {"a": 2})


def test_a_journal_has_one_writer(tmp_path):
    with Journal(tmp_path / "j", {}), pytest.raises(vtprune.VtpruneError, match="another process"):
        Journal(tmp_path / "j", {})
    Journal(tmp_path / "j", {}).close()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "r.json"
    write(target, "old")
    (tmp_path / "r.json.draft").symlink_to("/dev/full")
    with pytest.raises(RunError, match="No space left"):
        write(target, "new")
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_models_are_told_apart(vlm):
    other, _ = tiny()
    assert fingerprint(vlm[0]) == fingerprint(other)
    next(other.parameters()).data.flatten()[0] += 1
    assert fingerprint(vlm[0]) != fingerprint(other)


# --------------------------------------------------------------------------------------------------------- broken off


@pytest.mark.ci
def test_a_model_that_raises_leaves_what_was_done(vlm, tmp_path, unbroken):
    whole, written = unbroken
    with failing_after(vlm[0], 7, RuntimeError("CUDA error: device-side assert")), pytest.raises(RunError) as caught:
        table(vlm, tmp_path / "broken")
    assert "questions 4 to 5: RuntimeError: CUDA error" in str(caught.value) and "4 samples are kept in" in str(
        caught.value
    )
    vtprune.attach(vlm[0], "random").remove()  # left as it was
    assert {p.name for p in (tmp_path / "broken").iterdir()} == {"dense.json", "random-0.5-0.jsonl"}
    calls = []
    again = table(vlm, tmp_path / "broken", progress=calls.append)
    assert files(tmp_path / "broken") == written and again == whole
    assert sum(calls) == 7 * bench.runs(NAMES, [0.5], 2)
    with failing_after(vlm[0], 1, RuntimeError("never called")):
        assert table(vlm, tmp_path / "broken") == whole


@pytest.mark.ci
def test_a_missing_or_corrupted_picture_is_named(vlm, tmp_path):
    part = samples()
    path = tmp_path / "p.png"
    part[4] = Sample(path, part[4].question, part[4].answer, part[4].ability, source=part[4].source)
    for content, reason in ((None, "no such image file"), (b"words", "not an image"), (None, "no such")):
        if content:
            path.write_bytes(content)
        with pytest.raises(RunError, match=reason) as caught:
            table(vlm, tmp_path / "r", part)
        assert (
            "questions 4 to 5" in str(caught.value)
            and "p.png" in str(caught.value)
            and "4 samples are kept" in str(caught.value)
        )
        path.unlink(missing_ok=True)
    picture(4).save(path)
    assert table(vlm, tmp_path / "r", part) == table(vlm, None, part)


@pytest.mark.ci
def test_a_full_disk_leaves_what_was_done(vlm, tmp_path, unbroken):
    whole, written = unbroken
    size = len(written["dense.json"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (size // 3, size - 40):  # in the journal, in the result
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(RunError, match="cannot write"):
                table(vlm, tmp_path / "r")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list((tmp_path / "r").glob("*.draft"))
    assert table(vlm, tmp_path / "r") == whole and files(tmp_path / "r") == written


@pytest.mark.ci
def test_runs_of_another_kind_are_not_mixed_in(vlm, tmp_path):
    table(vlm, tmp_path / "r")
    with pytest.raises(vtprune.VtpruneError, match=r"dense\.json was made with protocol .* choose another folder"):
        table(vlm, tmp_path / "r", samples(5))
    for name in ("dense.json", "fastv-0.5-0.json"):  # a damaged file is no refusal of a method
        kept = (tmp_path / "r" / name).read_text()
        (tmp_path / "r" / name).write_text("{")
        with pytest.raises(RunError, match=f"{name} is not a result"):
            table(vlm, tmp_path / "r")
        (tmp_path / "r" / name).write_text(kept)
    with pytest.raises(RunError, match=r"fastv-0.5-0\.json was made with overrides"):
        table(vlm, tmp_path / "r", options={"fastv": {"layer": 2}})


@pytest.mark.ci
def test_a_journal_outlives_another_run_in_its_place(vlm, tmp_path, unbroken):
    with failing_after(vlm[0], 19, RuntimeError("stop")), pytest.raises(RunError):
        table(vlm, tmp_path / "r")
    journal = tmp_path / "r" / "fastv-0.5-0.jsonl"
    before = journal.read_bytes()
    assert before.count(b"\n") > 1
    with pytest.raises(RunError, match="was made with overrides"):
        table(vlm, tmp_path / "r", options={"fastv": {"layer": 2}})
    with journal.open("a+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process"):
            table(vlm, tmp_path / "r")
    assert journal.read_bytes() == before
    lines = before.splitlines(keepends=True)
    journal.write_bytes(lines[0] + b"broken\n" + b"".join(lines[1:]))
    with pytest.raises(RunError, match="line 2 of .* is damaged"):
        table(vlm, tmp_path / "r")
    journal.write_bytes(before)
    assert table(vlm, tmp_path / "r") == unbroken[0]


def test_a_refusal_is_a_row_and_leaves_no_journal(vlm, tmp_path):
    out = bench.table(*vlm, samples(), ["fastv"], [0.01], timing=0, folder=tmp_path)
    assert "cannot reach" in out["rows"][1]["error"] and [p.name for p in tmp_path.iterdir()] == ["dense.json"]


def test_times_are_kept_apart_from_results(vlm, tmp_path):
    (tmp_path / "timed").mkdir()
    (tmp_path / "plain").mkdir()
    for name, timing in (("timed", 1), ("plain", 0)):
        bench.table(*vlm, samples(3), ["fastv"], [0.5], timing=timing, folder=tmp_path / name)
    timed = files(tmp_path / "timed")
    assert "prefill_ms" in json.loads(timed.pop("fastv-0.5-0.time.json")) and timed == files(tmp_path / "plain")


@pytest.mark.slow  # in one process: test_a_model_that_raises_leaves_what_was_done
def test_a_killed_run_ends_with_the_same_files(tmp_path):
    """The command itself, killed between two batches and started again."""
    command = [
        sys.executable,
        "-m",
        "vtprune",
        "bench",
        "--abilities",
        "scenes",
        "--samples",
        "1",
        "--methods",
        "fastv,random",
        "--no-baselines",
    ]
    command += ["--budgets", "0.5", "--seeds", "1", "--batch", "2", "--timing", "0", "--results"]

    def run(name: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, name], cwd=tmp_path, env=one_thread, capture_output=True, text=True)

    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "killed"], cwd=tmp_path, env=one_thread, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    journal, deadline = tmp_path / "killed" / "runs" / "fastv-0.5-0.jsonl", time.monotonic() + 300
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert journal.exists()
    for name in ("killed", "whole"):
        done = run(name)
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "killed" / "runs") == files(tmp_path / "whole" / "runs")
    first, second = (json.loads((tmp_path / n / "bench.json").read_text()) for n in ("killed", "whole"))
    assert {**first, "command": ""} == {**second, "command": ""}


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def bundled():
    model, processor = vtprune.load_demo_model()
    return model, processor, [*samples_module.easy_vqa_samples(2), *samples_module.scenes_samples(1)[:3]]


@pytest.mark.ci
def test_batches_do_not_change_an_answer(bundled, some_method):
    model, processor, part = bundled
    budget = budget_of(model, some_method)
    runs = [run_module.evaluate(model, processor, part, some_method, batch=b, **budget) for b in (1, 3)]
    for name in ("answers", "correct", "effective_tokens", "nominal_tokens", "flops", "kv_bytes", "key"):
        assert runs[0][name] == runs[1][name], name


def test_samples_draw_on_their_own(vlm):
    part = [samples()[0]] * 6
    one = run_module.evaluate(*vlm, part, "random", keep=5, batch=1)
    assert one["rows"] == run_module.evaluate(*vlm, part, "random", keep=5, batch=4)["rows"]
    with vtprune.attach(vlm[0], "random", keep=5) as handle:
        from vtprune.inputs.chats import prepare

        inputs = prepare(vlm[1], [picture()] * 3, ["a b"] * 3)
        handle.reseed([1, 2, 1])
        vlm[0](**inputs)
        kept = [k.tolist() for k in handle.report().stages[0].kept]
        assert kept[0] == kept[2] != kept[1]
        handle.reseed(2)
        vlm[0](**inputs)
        assert [k.tolist() for k in handle.report().stages[0].kept] == [kept[1]] * 3
        handle.reseed([1, 2])
        with pytest.raises(vtprune.VtpruneError, match="2 seeds were given for a batch of 3"):
            vlm[0](**inputs)
    with vtprune.attach(vlm[0], "random", keep=5, site="vision.0") as handle:
        handle.reseed([1, 2, 1])
        vlm[0](**inputs)
        kept = [k.tolist() for k in handle.report().stages[0].kept]
        assert kept[0] == kept[2] != kept[1]
        handle.reseed([1, 2])
        with pytest.raises(vtprune.VtpruneError, match="2 seeds"):
            vlm[0](**inputs)


# -------------------------------------------------------------------------------------------------------------- group
# A


def test_group_a_is_what_down_sampling_loses(vlm):
    part = samples(6)
    rows = [
        {"method": "dense", "budget": 1.0, "correct": [1.0, 1, 1, 1, 0, 0]},
        {"method": "downsample", "budget": 0.5, "correct": [1.0, 0, 0, 0, 0, 1]},
        {"method": "x", "budget": 0.5, "correct": [0.0, 1, 1, 0, 1, 1]},
        {"method": "x", "budget": 0.25, "correct": [1.0] * 6},
        {"method": "y", "budget": 0.5, "error": "no"},
    ]
    statistics.add_group_a(rows, part)
    assert [r["group_a"] and (r["group_a"]["accuracy"], r["group_a"]["samples"]) for r in rows] == [
        None,
        (0, 3),
        (pytest.approx(2 / 3), 3),
        None,
        None,
    ]
    low, high = rows[2]["group_a"]["interval"]
    assert 0 <= low < 2 / 3 < high <= 1


def test_every_name_has_files_of_its_own():
    from vtprune.core.recipes import RECIPES
    from vtprune.measure.runs import slug

    names = {*vtprune.methods(), *RECIPES}
    assert len({slug(name) for name in names}) == len(names) > 30
