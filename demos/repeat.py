"""What repeats a run: a recipe file, and a program with the public interface."""

from __future__ import annotations

import json
import pprint
import textwrap
from collections.abc import Sequence
from pathlib import Path

from vtprune.core.planning import FILES
from vtprune.core.recipe import Recipe
from vtprune.core.recipes import offered
from vtprune.core.types import VtpruneError
from vtprune.inputs import demo_model
from vtprune.methods.base import METHODS

from . import TRAINED
from .checks import LARGEST_SIDE
from .results import Result
from .sides import Side


def recipe_json(result: Result) -> str:
    """A recipe file of exactly what ran, the solver's schedule in it, for :meth:`vtprune.Recipe.load` and ``vtprune run
    --recipe FILE``. A seed that matters is named in ``source``, for ``--seed``; a trained branch is named by its path
    on this machine. Raises :class:`VtpruneError` for the dense model."""
    if result.recipe is None:
        raise VtpruneError("the dense model has no recipe to save")
    recipe = result.recipe
    seed = f"--seed {result.side.seed}" if any(METHODS.get(stage.method).draws for stage in recipe.stages) else ""
    source = "; ".join(part for part in (recipe.source, seed) if part)
    return Recipe(name=recipe.name, stages=recipe.stages, source=source).to_json() + "\n"


def snippet(
    sides: Sequence[Side],
    question: str,
    model_path: str | None,
    image_name: str,
    *,
    sample: int | None = None,
    trained: Recipe | None = None,
    max_new_tokens: int = 32,
    device: str = "cpu",
    dtype: str = "float32",
) -> str:
    """A program that repeats ``sides`` with the public interface; run, it leaves ``results``, a list of ``(answer,
    report)``.

    Args:
        model_path: folder or hub id, ``None`` for the bundled model. image_name: of a picture file, which lies where
            the program is run.
        sample: the picture is that of the demo's :func:`~vtprune.demos.samples.samples`, from 1 on, and needs no file.
        trained: what ``"dpvr-lf (trained)"`` stands for (:attr:`vtprune.demos.engine.Engine.trained`).

    Raises :class:`VtpruneError` for the trained branch without ``trained`` and for a recipe file that cannot be read.
    """
    load, runs = _loading(model_path, device, dtype), "\n".join(_run(side, trained) for side in sides)
    used = [
        *(["from pathlib import Path", ""] if "str(Path(" in runs else []),
        *(["import torch"] if "torch." in load[0] else []),
        "import vtprune",
        *(["from transformers import AutoModelForImageTextToText, AutoProcessor"] if model_path is not None else []),
        "from vtprune.inputs.images import open_image"
        if sample is None
        else "from vtprune.demos.samples import samples",
        *(["from vtprune.measure.run import dense_report"] if any(side.recipe is None for side in sides) else []),
    ]
    before, loaded = "\n".join(used), "\n".join(load)
    return f"""{before}

{loaded}

image = {f"open_image({_quoted(image_name)})" if sample is None else f"samples({sample})[-1].picture()"}
image.thumbnail(({LARGEST_SIDE}, {LARGEST_SIDE}))  # leaves smaller ones as they are
question = {_quoted(question)}
message = [{{"role": "user", "content": [{{"type": "image", "image": image}}, {{"type": "text", "text": question}}]}}]
inputs = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)


def ask():
    output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False, num_beams=1)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


results = []
{runs}

for answer, report in results:
    print(answer, f"({{report.effective_tokens:.1f}} effective tokens, {{report.flops / 1e9:.3f}} GFLOPs)")
"""  # noqa: E501


def _loading(model_path: str | None, device: str, dtype: str) -> list[str]:
    """The lines that load the model and its processor."""
    if model_path is None:
        kind = "" if dtype == "float32" else f", torch.{dtype}"
        return [f"model, processor = vtprune.load_demo_model({_quoted(device)}{kind})"]
    return [
        f"model = AutoModelForImageTextToText.from_pretrained({_quoted(model_path)}, "
        f"dtype=torch.{dtype}).to({_quoted(device)}).eval()",
        f"processor = AutoProcessor.from_pretrained({_quoted(model_path)})",
    ]


def _quoted(text: str) -> str:
    """A Python literal: JSON's strings are, too, and have the usual quotes."""
    return json.dumps(text, ensure_ascii=False)


def _run(side: Side, trained: Recipe | None) -> str:
    """The lines that run ``side``: by name where the recipe is registered, else with the recipe written out."""
    recipe = side.recipe
    if recipe is None:
        return "results.append((ask(), dense_report(model, inputs)))"
    if recipe == TRAINED:
        if trained is None:
            raise VtpruneError("the trained branch belongs to the bundled model")
        recipe = trained
    recipe = offered(recipe) or recipe if isinstance(recipe, str) else recipe
    if not isinstance(recipe, Recipe) and Path(recipe).suffix in FILES:
        recipe = Recipe.load(Path(recipe))
    before = f"recipe = {_written(recipe)}\n" if isinstance(recipe, Recipe) else ""
    options = "".join(f", {name}={value!r}" for name, value in side.attach_options().items())
    return f"""{before}with vtprune.attach(model, {"recipe" if before else _quoted(str(recipe))}{options}) as handle:
    results.append((ask(), handle.report()))"""


def _written(recipe: Recipe) -> str:
    """``recipe`` as an expression; a bundled branch is found beside the model, wherever that lies."""
    data = recipe.to_dict()
    marks = {}
    for i, stage in enumerate(data["stages"]):
        weights = stage["options"].get("weights")
        if weights and Path(weights).parent == demo_model.FOLDER:
            stage["options"]["weights"] = f"<weights-{i}>"
            marks[repr(f"<weights-{i}>")] = f"str(Path(model.name_or_path) / {Path(weights).name!r})"
    text = pprint.pformat(data, width=120, sort_dicts=False)
    for mark, code in marks.items():
        text = text.replace(mark, code)
    return f"vtprune.Recipe.from_dict(\n{textwrap.indent(text, '    ')}\n)"
