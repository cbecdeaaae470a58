"""The cards in docs/reproductions, docs/datasets.md and the suites name only what exists: recipes, options, plans,
tasks, data sets, numbers of tokens."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import vtprune
from vtprune.cli import main
from vtprune.cli import options as options_module
from vtprune.core.planning import ATTACH_OPTIONS, TARGETS, bind, load_recipe, plan
from vtprune.core.recipe import Recipe
from vtprune.core.solve import _predict
from vtprune.lmms.suites import JUDGED, NOTES, SUITES
from vtprune.measure import samples

DOCS = Path(__file__).resolve().parents[1] / "docs"
CARDS = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((DOCS / "reproductions").glob("*.md"))
    if path.stem != "README"
}
README = (DOCS / "reproductions" / "README.md").read_text(encoding="utf-8")
DATASETS = (DOCS / "datasets.md").read_text(encoding="utf-8")
PUBLISHED = [name for name in vtprune.methods() if vtprune.describe(name).paper.startswith("arXiv")]
HEADINGS = [
    "Paper",
    "What the budget means",
    "Checkpoint",
    "Prompt and decoding",
    "Benchmarks",
    "Published rows",
    "Paper and code",
    "Commands",
    "Status",
]
PLUGIN = {
    "pretrained",
    "recipe",
    "keep",
    *TARGETS,
    *ATTACH_OPTIONS,
    "dtype",
    "attn_implementation",
    "device",
    "max_new_tokens",
    "system_prompt",
}


# ---------------------------------------------------------------------------------------------------------------
# reading


def rows(text: str, first: str) -> list[dict[str, str]]:
    """The rows of every table whose first column is called ``first``."""
    found, names = [], None
    for line in text.splitlines():
        cells = (
            [cell.strip() for cell in line.strip().strip("|").split(" | ")] if line.lstrip().startswith("|") else None
        )
        if cells is None:
            names = None
        elif names is None:
            names = cells
        elif names[0] == first and set(line) - set("|-: "):
            found.append(dict(zip(names, cells, strict=True)))
    return found


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> list[list[str]]:
    """The words of every command in the bash blocks; ``NAME="..."`` assignments are put in where ``$NAME`` stands."""
    found = []
    for block in blocks(text, "bash"):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$([A-Z]+)", lambda m: variables[m[1]].replace('"', '\\"'), line)  # noqa: B023 (used at once)
            words = shlex.split(line, comments=True)
            if len(words) == 1 and (assigned := re.fullmatch(r"([A-Z]+)=(.*)", words[0])):
                variables[assigned[1]] = assigned[2]
            elif words:
                found.append(words)
    return found


def plain(value: Any) -> Any:
    """A value of ``--model_args``: ``8+16`` is a list, quotes around a text with commas go."""
    if isinstance(value, str) and re.fullmatch(r"[\d.]+(\+[\d.]+)+", value):
        return tuple(float(v) if "." in v else int(v) for v in value.split("+"))
    return value[1:-1] if isinstance(value, str) and value[:1] == value[-1:] == '"' else value


def recipe_of(name: str, options: dict[str, Any]) -> Recipe | None:
    if name == "dense":
        assert not options
        return None
    return load_recipe(name).override(**options)


def lmms_arguments(text: str) -> dict[str, Any]:
    pytest.importorskip("lmms_eval")
    from lmms_eval.utils import simple_parse_args_string

    return {key: plain(value) for key, value in simple_parse_args_string(text).items()}


@dataclasses.dataclass
class Run:
    """One command: what runs, on what, with what."""

    model: str
    recipe: Recipe | None
    tasks: tuple[str, ...]
    rest: dict[str, Any]


def from_lmms(words: list[str]) -> Run:
    assert words[:5] == ["python", "-m", "lmms_eval", "--model", "vtprune"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    for name in ("model", "model_args", "tasks", "batch_size", "output_path", "include_path"):
        parser.add_argument("--" + name)
    parser.add_argument("--log_samples", action="store_true")
    args = parser.parse_args(words[3:])
    given = lmms_arguments(args.model_args)
    options = {key: value for key, value in given.items() if key not in PLUGIN or key == "keep"}
    assert args.batch_size == "1"
    rest = {key: value for key, value in given.items() if key in PLUGIN - {"keep", "pretrained", "recipe"}}
    return Run(given["pretrained"], recipe_of(given["recipe"], options), tuple(args.tasks.split(",")), rest)


def from_cli(words: list[str]) -> Run:
    assert words[:2] == ["vtprune", "eval"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    options_module.model_options(parser)
    options_module.recipe_options(parser)
    parser.add_argument("--tasks", type=options_module.words)
    parser.add_argument("--system-prompt")
    args = parser.parse_args(words[2:])
    given = options_module.overrides(args)
    own = {key: given.pop(key) for key in ATTACH_OPTIONS if key in given}
    rest = {key: value for key, value in own.items() if (key, value) != ("seed", 0)} | {
        "dtype": args.dtype,
        "device": args.device,
    }
    rest |= {} if args.system_prompt is None else {"system_prompt": args.system_prompt}
    return Run(args.model, recipe_of(args.recipe, given), tuple(args.tasks), rest)


# ----------------------------------------------------------------------------------------------------------------
# models


@cache
def model(name: str) -> Any:
    """The adapter of a model of the real shape, without weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    with torch.device("meta"):
        if not name.startswith("LLaVA"):
            import timm

            return bind(timm.create_model(name))
        layers, width, inner = {"LLaVA-1.5-7B": (32, 4096, 11008), "LLaVA-1.5-13B": (40, 5120, 13824)}[name]
        tower = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
        text = LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=width // 128,
            vocab_size=32064,
        )
        return bind(
            LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text, image_token_index=32000))
        )


def geometry(name: str) -> tuple[Any, Any]:
    """``(geometry, widths)``; a LLaVA-NeXT image without unpadding is one flat unit of 2880 tokens."""
    if name == "2880 tokens, 32 layers":
        adapter = model("LLaVA-1.5-7B")
        return dataclasses.replace(adapter.geometry, tokens=2880, grid=(2880, 1), variable=True), adapter.cost
    return model(name).geometry, model(name).cost


def shape_of(checkpoint: str) -> str:
    return (
        "LLaVA-1.5-13B" if "13b" in checkpoint else "2880 tokens, 32 layers" if "next" in checkpoint else "LLaVA-1.5-7B"
    )


# ------------------------------------------------------------------------------------------------------- lmms-eval's
# tasks


class Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """lmms-eval's dialect without running its functions."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def task_file(path: Path) -> dict[str, Any]:
    found = yaml.load(path.read_bytes(), Loader=Loader) or {}
    parents = found.pop("include", [])
    out: dict[str, Any] = {}
    for parent in reversed([parents] if isinstance(parents, str) else parents):
        out.update(task_file(path.parent / parent))
    return {**out, **found}


@cache
def tasks() -> dict[str, dict[str, Any]]:
    """Every name that ``--tasks`` takes, with its configuration, read as lmms-eval's TaskManager indexes them (seconds
    instead of half a minute)."""
    spec = find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs lmms-eval")
    found: dict[str, dict[str, Any]] = {}
    for path in (Path(spec.submodule_search_locations[0]) / "tasks").rglob("*.yaml"):
        config = task_file(path)
        if isinstance(config.get("task"), list):
            found[config["group"]] = config
        elif isinstance(config.get("task"), str):
            found[config["task"]] = config
            for kind in ("tag", "group"):
                names = config.get(kind) or []
                for name in [names] if isinstance(names, str) else names:
                    found.setdefault(name, {})
    return found


# -----------------------------------------------------------------------------------------------------------------
# cards


def test_every_card_is_of_a_published_method_and_the_overview_lists_it():
    assert len(CARDS) > 5 and set(CARDS) <= set(PUBLISHED)
    listed = rows(README, "card")
    assert {row["card"].split("]")[0][1:] for row in listed} == set(CARDS)
    assert all(row["status"].startswith("not run here") for row in listed)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_every_part_and_says_that_it_was_not_run(name):
    text = CARDS[name]
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS
    assert text.partition("## Status")[2].strip().startswith("**Status: not run here.**")
    assert vtprune.describe(name).paper.split()[1] in text.partition("## What the budget means")[0]
    assert "python -m lmms_eval --model vtprune" in text and "vtprune eval" in text


@pytest.mark.parametrize("name", CARDS)
def test_links_inside_the_docs_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+\.md)[^)]*\)", CARDS[name] + README):
        assert (DOCS / "reproductions" / target).is_file(), target


@pytest.mark.parametrize("name", CARDS)
def test_effective_tokens_are_what_the_planner_gives(name):
    table = rows(CARDS[name], "setting")
    assert table
    for row in table:
        given = lmms_arguments(row["here"].strip("`"))
        recipe = recipe_of(given.pop("recipe"), given)
        sizes, widths = geometry(row["model"].strip("`"))
        sum_ = row["arithmetic"].translate(str.maketrans({"·": "*", "−": "-"}))
        assert re.fullmatch(r"[\d+\-*/(). ]+", sum_), sum_
        printed = float(row["effective tokens"])
        assert eval(sum_) == pytest.approx(printed, abs=6e-4), row["setting"]
        assert _predict(sizes, widths, recipe, 0)[0] == pytest.approx(printed, abs=6e-4), row["setting"]


@pytest.mark.parametrize("name", CARDS)
def test_both_forms_of_every_command_are_one_recipe_that_can_be_planned(name):
    found = commands(CARDS[name])
    assert found and len(found) % 2 == 0
    for words, same in zip(found[::2], found[1::2], strict=True):
        run, other = from_lmms(words), from_cli(same)
        assert (run.model, run.tasks, run.rest) == (other.model, other.tasks, other.rest)
        assert (run.recipe is None) == (other.recipe is None)
        if run.recipe is not None and other.recipe is not None:
            assert run.recipe.key() == other.recipe.key()
            assert plan(geometry(shape_of(run.model))[0], run.recipe)
        assert run.rest.get("positions", "original") in ("original", "compact")
        assert run.rest.get("system_prompt", "A chat").endswith(("questions.", "A chat"))


@pytest.mark.parametrize("name", CARDS)
def test_every_task_in_the_commands_exists(name):
    named = {
        task
        for words in commands(CARDS[name])
        for task in (from_lmms(words) if words[0] == "python" else from_cli(words)).tasks
    }
    assert named and named <= set(tasks())


def test_the_eval_command_takes_what_the_cards_write():
    parser = main.parser()
    choices = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    if "eval" not in choices:
        pytest.skip("vtprune has no eval command yet")
    for text in CARDS.values():
        for words in commands(text):
            if words[0] == "vtprune":
                parser.parse_args(words[1:])


@pytest.mark.parametrize("name", [name for name in CARDS if blocks(CARDS[name], "python")])
def test_the_snippet_builds_the_paper_model_and_its_blocks_see_the_printed_numbers(name, monkeypatch):
    timm = pytest.importorskip("timm")
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: original(name, pretrained=False))
    build, measure = blocks(CARDS[name], "python")
    scope: dict[str, Any] = {}
    exec(build, scope)
    compile(measure, name, "exec")
    data, handle = scope["model"].pretrained_cfg, scope["handle"]
    with handle, torch.inference_mode():
        assert scope["model"](torch.randn(1, *data["input_size"])).shape == (1, 1000)
        seen = handle.report().effective_tokens
    same = [
        row
        for row in rows(CARDS[name], "setting")
        if row["model"].strip("`") == f"{data['architecture']}.{data['tag']}"
    ]
    given = [lmms_arguments(row["here"].strip("`")) for row in same]
    printed = [
        float(row["effective tokens"])
        for row, g in zip(same, given, strict=True)
        if recipe_of(g.pop("recipe"), g).key() == handle.recipe.key()
    ]
    assert [seen] == pytest.approx(printed, abs=6e-4)


# ------------------------------------------------------------------------------------------------------ suites, data
# sets


def test_suites_name_tasks_that_exist_once():
    assert set(SUITES) == {"standard", "hard", "local"}
    for suite in ("standard", "hard"):
        assert len(set(SUITES[suite])) == len(SUITES[suite]) and set(SUITES[suite]) <= set(tasks())
    # clips, of several pictures each, are asked by vtprune bench alone
    assert {name.replace("_", "-") for name in SUITES["local"]} == set(samples.SETS) - {"clips"}
    everything = {name for suite in SUITES.values() for name in suite}
    assert set(NOTES) <= everything and set(JUDGED) <= set(NOTES)


def test_judged_tasks_are_those_whose_notes_say_so():
    assert set(JUDGED) == {name for name, note in NOTES.items() if "LLM judge" in note}


@pytest.mark.parametrize("suite", ["standard", "hard"])
def test_the_data_set_tables_say_what_the_task_files_say(suite):
    table = rows(DATASETS.partition(f"## {suite}\n")[2].partition("\n## ")[0], "task")
    assert [row["task"].strip("`") for row in table] == list(SUITES[suite])
    for row in table:
        config = tasks()[row["task"].strip("`")]
        metrics = [m["metric"] for m in config["metric_list"] if m["metric"] != "submission"]
        assert row["data set"] == f"`{config['dataset_path']}`"
        assert row["configuration"] == (f"`{config['dataset_name']}`" if config.get("dataset_name") else "–")
        assert row["split"] == f"`{config['test_split']}`"
        assert re.findall("`(.*?)`", row["metrics"]) == metrics


def test_every_task_named_in_the_data_sets_page_exists():
    named = {word for row in re.findall(r"^\| (`.*?) \|", DATASETS, re.M) for word in re.findall("`(.*?)`", row)}
    assert named and named <= set(tasks())


@pytest.mark.slow
def test_the_local_task_files_of_the_data_sets_page_load(tmp_path):
    """In a process of its own: offline, with a cache of its own."""
    spec = find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs lmms-eval")
    (tmp_path / "tasks").mkdir()
    for number, text in enumerate(blocks(DATASETS, "yaml")):
        text = re.sub(r"LMMS_EVAL(?=/)", spec.submodule_search_locations[0], text).replace(" /data/", f" {tmp_path}/")
        (tmp_path / "tasks" / f"{number}.yaml").write_text(text, encoding="utf-8")
    code = f"""
import io, os
from pathlib import Path
home = Path({str(tmp_path)!r})
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(home / "hf"), LMMS_EVAL_DATASETS_CACHE=str(home / "cache"))
import datasets
from PIL import Image
data = io.BytesIO()
Image.new("RGB", (8, 8)).save(data, "PNG")
row = {{"question": "Is there a cat?", "answer": "yes", "question_id": "0", "image": {{"bytes": data.getvalue(), "path": None}}}}
text = datasets.Value("string")
features = datasets.Features({{"question": text, "answer": text, "question_id": text, "image": datasets.Image()}})
made = datasets.Dataset.from_list([row] * 3, features=features)
(home / "POPE" / "data").mkdir(parents=True)
made.to_parquet(home / "POPE" / "data" / "test-0.parquet")
datasets.DatasetDict({{"test": made}}).save_to_disk(home / "POPE.disk")
from lmms_eval.tasks import TaskManager
manager = TaskManager(include_path=str(home / "tasks"), include_defaults=False)
assert manager.all_tasks == ["pope_disk", "pope_parquet"], manager.all_tasks
for name in manager.all_tasks:
    task = manager.load_task_or_group(name)[name]
    docs = task.test_docs()
    assert len(docs) == 3 and task.doc_to_visual(docs[0])[0].size == (8, 8) and "cat" in task.doc_to_text(docs[0])
"""  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
