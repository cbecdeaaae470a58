"""What the README tells a user to type, typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vtprune
from fake import picture
from vtprune.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(heading: str, language: str) -> str:
    """The first block of code under a heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return section.split(f"```{language}\n")[1].split("```")[0]


def test_the_program_runs(capsys):
    code = block("Use", "python")
    names = {"image": picture(0)}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert 0 < names["report"].effective_tokens < names["report"].visual_tokens[0]
    vtprune.attach(names["model"], "random").remove()  # the model is as it was


@pytest.mark.ci
def test_the_lmms_eval_commands_run(tmp_path):
    """In an empty folder, on fewer questions, with this environment first on the path as ``activate`` puts it."""
    lines = block("In lmms-eval", "bash").splitlines()
    assert lines[0].startswith(". .venv/bin/activate") and any("python -m lmms_eval" in line for line in lines)
    script, smaller = re.subn(r"--samples \d+", "--samples 2", "\n".join(lines[1:]))
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
    table = README.split("| on the command line | |")[1].split("\n\n")[0]
    named = {
        word
        for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
        for word in re.findall(r"`(?:vtprune )?([a-z]+)[^`]*`", cell)
    }
    assert {"run", "bench", "eval", "doctor", "recipes"} <= named
    for name in sorted(named):
        assert main.main([name, "--help"]) == 0, name
    capsys.readouterr()
