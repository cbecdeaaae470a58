"""vLLM with the plug-in answers as the attached model does. Every engine is a process of its own: the plug-in reads its
environment once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from surroundings import ENVIRONMENT

HERE = Path(__file__).parent
SHORT = ["--engine-option", "max_model_len=512", "--engine-option", "gpu_memory_utilization=0.3"]  # of its memory
TIES = 2  # of a hundred answers, at most: rounding differs between two libraries


def run(*command: str, **more: str) -> subprocess.CompletedProcess:
    environment = {**ENVIRONMENT, **more}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=1200)


def verify(*options: str) -> dict:
    """What ``vtprune verify --engine vllm`` found."""
    done = run("-m", "vtprune", "verify", "--engine", "vllm", "--json", *SHORT, *options)
    assert "{" in done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout[done.stdout.index("{\n") :])


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    kinds = ("qwen2.5-vl", "qwen3-vl", "llava-onevision")
    made = {kind: tmp_path_factory.mktemp(kind) for kind in kinds}
    for kind, folder in made.items():
        tiny.save(kind, folder)
    return made


@pytest.mark.parametrize("recipe", ["uniform", "divprune", "tome"])
def test_a_hundred_questions_to_the_bundled_model(recipe):
    """At a quarter of the tokens, at their original positions, with prompts cut into chunks in the middle of images."""
    found = verify(
        "--recipe", recipe, "--keep", "36", "--samples", "100", "--engine-option", "max_num_batched_tokens=24"
    )
    assert found["questions"] == 100 and found["different"] == 0 and found["ties"] <= TIES
    assert found["largest_difference"] < 1e-3
    assert max(found["prompt_tokens"]) < 144  # no prompt as long as one whole image


def test_compact_positions_answer_as_compact_positions_do():
    """And otherwise than original ones: the same rows, other answers."""
    options = ("--recipe", "uniform", "--keep", "72", "--samples", "40", "--encoded")
    compact, original = verify(*options, "--compact"), verify(*options)
    for found in (compact, original):
        assert found["different"] == 0 and found["largest_difference"] < 1e-3
    assert compact["prompt_tokens"] == original["prompt_tokens"]
    answers = [[a["got"] for a in found["answers"]] for found in (compact, original)]
    assert sum(a != b for a, b in zip(*answers, strict=True)) >= 5


@pytest.mark.parametrize(
    "kind, encoded", [("qwen2.5-vl", False), ("qwen3-vl", False), ("qwen3-vl", True), ("llava-onevision", True)]
)
def test_other_families(folders, kind, encoded):
    """Positions with three axes, DeepStack, and rows that end in new lines."""
    found = verify(
        "--model",
        str(folders[kind]),
        "--recipe",
        "divprune",
        "--keep",
        "0.3",
        "--samples",
        "12",
        *["--encoded"] * encoded,
    )
    assert found["different"] == 0 and found["ties"] == 0 and found["largest_difference"] < 1e-3


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "qwen3-vl"])
def test_what_pixels_decide_is_counted_in_the_processor(folders, kind, tmp_path):
    """Every picture has a number of rows of its own, and a stage behind takes its share of what is left."""
    recipe = {"type": "vtprune.Recipe", "version": 1, "name": "flat", "stages": []}
    first = {"method": "pixelprune", "keep": None, "options": {"threshold": 0.1, "std": [0.27]}}
    for stages in ([first], [first, {"method": "divprune", "keep": 12, "options": {}}]):
        (tmp_path / "flat.json").write_text(json.dumps({**recipe, "stages": stages}))
        options = ("--model", str(folders[kind]), "--recipe", str(tmp_path / "flat.json"), "--samples", "12")
        found = verify(*options)
        assert found["different"] == 0 and found["ties"] == 0 and found["largest_difference"] < 1e-3
    assert max(found["prompt_tokens"]) < 40


def test_a_method_that_reads_the_question_is_encoded_outside():
    found = verify("--recipe", "mmtok", "--keep", "36", "--samples", "16", "--encoded")
    assert found["different"] == 0 and found["largest_difference"] < 1e-3


def test_half_precision_stays_near():
    found = verify("--recipe", "divprune", "--keep", "36", "--samples", "16", "--dtype", "bfloat16")
    assert found["different"] <= 2 and found["largest_difference"] < 0.2


@pytest.mark.parametrize(
    "recipe, words",
    [("pyramiddrop", "inside the language model"), ("mmtok", "reads the question"), ("prumerge", "not known before")],
)
def test_what_cannot_be_served_is_refused_before_an_answer(recipe, words):
    done = run("-m", "vtprune", "verify", "--engine", "vllm", *SHORT, "--recipe", recipe, "--samples", "1")
    said = [line for line in done.stderr.splitlines() if line.startswith("vtprune: error: ")]
    assert done.returncode == 1 and len(said) == 1 and words in said[0]


def test_one_engine_and_all_kinds_of_prompts(tmp_path):
    """Several images with and without text between them, none, the same one again, other budgets, and what is
    refused while the engine goes on (``prompts.py``)."""
    done = run(str(HERE / "prompts.py"), VTPRUNE_RECIPE="divprune", VTPRUNE_KEEP="36")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_positions_that_the_model_does_not_have():
    done = run(str(HERE / "prompts.py"), "room", VTPRUNE_RECIPE="divprune", VTPRUNE_KEEP="36")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
