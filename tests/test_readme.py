"""What the README tells, and what the pages behind it tell a user to type, typed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vtprune.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_read_in_two_minutes():
    """Words outside of code."""
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert len(prose.split()) < 900


def test_what_it_shows_is_there():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_times_are_the_committed_ones():
    """pruned / dense of both shapes, and the accuracy at a quarter of the tokens."""
    quick = (ROOT / "benchmarks" / "results" / "overhead-cpu.md").read_text(encoding="utf-8")
    large = (ROOT / "benchmarks" / "results" / "overhead-cpu-2880.md").read_text(encoding="utf-8")
    bench = json.loads((ROOT / "benchmarks" / "results" / "bench.json").read_text())
    right = {
        r["method"]: 100 * r["sets"]["scenes"]["accuracy"]
        for r in bench["rows"]
        if r["budget"] == 0.25 and "error" not in r
    }
    lines = re.findall(r"^\| `(\S+)` \| [^|]+ \| ([\d.]+)× \| ([\d.]+)× \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(lines) >= 6
    for method, *told in lines:
        ratios = [float(re.search(rf"^\| {method} \|.* ([\d.]+) \|$", t, re.MULTILINE)[1]) for t in (quick, large)]
        assert [float(t) for t in told] == [*(round(1 / r, 1) for r in ratios), round(right[method], 1)], method


@pytest.mark.ci
def test_the_lmms_eval_commands_run(tmp_path):
    """In an empty folder, on fewer questions, with this environment first on the path."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    code = page.split("\n## In lmms-eval\n")[1].split("```bash\n")[1].split("```")[0]
    assert "python -m lmms_eval" in code
    script, smaller = re.subn(r"--samples \d+", "--samples 2", code)
    assert smaller == 1
    (tmp_path / "models").symlink_to(ROOT / "models")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len([*(tmp_path / "out" / "lmms").glob("*/*_results.json")]) == 1, done.stderr[
        -2000:
    ]  # lmms-eval ends with 0 also when it failed
    assert len([*(tmp_path / "out" / "lmms").glob("*/*_samples_*.jsonl")]) == 2


def test_the_commands_of_the_table_exist(capsys):
    table = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").split("| on the command line | |")[1]
    named = {
        word
        for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
        for word in re.findall(r"`(?:vtprune )?([a-z]+)[^`]*`", cell)
    }
    assert {"run", "bench", "eval", "doctor", "recipes"} <= named
    for name in sorted(named):
        assert main.main([name, "--help"]) == 0, name
    capsys.readouterr()
