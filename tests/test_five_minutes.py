"""What a newcomer does in the first five minutes, from an empty folder: a checkpoint answers pruned, with its time; a
method in a file of one's own stands in the tables."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoints

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what a user has: a checkpoint, a picture, and two pasted programs."""
    folder = tmp_path_factory.mktemp("desk")
    checkpoints.save("qwen2.5-vl", folder / "model")
    pixels = np.random.RandomState(0).randint(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    shutil.copy(ROOT / "examples" / "qwen2_5_vl_image.py", folder / "ask.py")
    shutil.copy(ROOT / "examples" / "own_method.py", folder / "my_method.py")
    return folder


def python(desk: Path, *command: str, path: tuple[Path, ...] = ()) -> str:
    """What a command in the folder prints; its errors are ours."""
    places = [ROOT, *path, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=desk, env=env, text=True, capture_output=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pruned_answer_and_its_time(desk):
    began = time.monotonic()
    asked = ["--model", "model", "--image", "photo.png", "--question", "what is it ?"]
    out = python(desk, "ask.py", *asked)
    assert re.search(r"(?m)^answer, dense: +\S.*\nanswer, pruned: \S.*\nvisual tokens: +28 -> 7$", out)
    assert 0 < float(re.search(r"first token: +after ([\d.]+) of the dense model's time", out)[1])
    told = python(desk, "-m", "vtprune", "run", *asked, "--recipe", "divprune", "--keep", "0.25")
    assert re.search(r"projector divprune +28 -> 7 visual tokens", told)
    dense, pruned = (re.search(rf"answer, {kind}: *(.*)", out)[1] for kind in ("dense", "pruned"))
    # the command writes shorter answers
    for kind, whole in (("dense", dense), ("pruned", pruned)):
        short = re.search(rf"(?m)^answer, {kind} +(\S.*)$", told)[1]
        assert whole.startswith(short)
    assert time.monotonic() - began < LIMIT


@pytest.mark.parametrize("way", ["entry point", "--import"])
def test_a_method_of_ones_own_in_the_tables(desk, way, tmp_path):
    more, path = [], (desk, tmp_path)
    if way == "--import":
        more = ["--import", "my_method.py"]
    else:
        about = tmp_path / "mine-0.1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 0.1\n", encoding="utf-8")
        (about / "entry_points.txt").write_text("[vtprune.plugins]\nmine = my_method\n", encoding="utf-8")
    assert re.search(r"(?m)^off-mean ", python(desk, "-m", "vtprune", "methods", *more, path=path))
    how = ["--model", "model", "--methods", "off-mean", "--no-baselines", "--budgets", "0.5", "--samples", "1"]
    table = python(desk, "-m", "vtprune", "bench", *how, "--seeds", "1", "--timing", "0", *more, path=path)
    rows = re.findall(r"(?m)^\|? *off-mean .*$", table)  # one in each block of a wide table
    assert rows and "50" in rows[0]


def test_nothing_of_it_is_there_without_being_asked_for(desk):
    assert "off-mean" not in python(desk, "-m", "vtprune", "methods")
