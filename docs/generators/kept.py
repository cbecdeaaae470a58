"""Pictures of what each method keeps of one sample, and the token theatre, made by the bundled model while the site is
built."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import facts
import torch
from PIL import Image

import vtprune
from vtprune.cli import main
from vtprune.core.report import Report
from vtprune.core.types import VtpruneError
from vtprune.data import clips, scenes
from vtprune.inputs.chats import image_part, prepare, prepare_chats, text_part
from vtprune.inputs.demo_model import FOLDER
from vtprune.methods.base import MethodInfo
from vtprune.show import pictures, views

SCENE, CLIP = 3, 5  # which sample of the test splits
PANEL = 312
BUDGET = 0.25
SIDES = {"quality": 88, "method": 6}
THEATRE = ("pyramiddrop", "0.125")


@dataclass(frozen=True)
class Kept:
    """What a method did to the sample: the picture's file, a sentence for those who do not see it, and its stages."""

    file: bytes
    words: str
    stages: tuple[tuple[str, int, int], ...]  # site, tokens in, tokens out
    recipe: str


@functools.cache
def _model(video: bool) -> tuple[Any, Any]:
    return vtprune.load_demo_model(clips=video)


@functools.cache
def scene() -> tuple[Image.Image, str]:
    """The picture and a question about it."""
    sample = scenes.scene(SCENE, "test")
    question = next(q for q in sample.questions if q.ability == "attribute")
    return Image.fromarray(sample.image), question.text


@functools.cache
def clip() -> tuple[tuple[Image.Image, ...], str]:
    sample = clips.clip(CLIP, "test")
    return tuple(Image.fromarray(frame) for frame in sample.frames), sample.questions[0].text


@functools.cache
def _inputs(video: bool) -> Any:
    _, processor = _model(video)
    if video:
        frames, question = clip()
        return prepare_chats(
            processor, [[{"role": "user", "content": [*map(image_part, frames), text_part(question)]}]]
        )
    image, question = scene()
    return prepare(processor, [image], [question])


def _recipe(info: MethodInfo) -> tuple[Any, dict[str, Any]]:
    """What to attach: the recipe that was measured at a quarter of the tokens, or else the defaults."""
    rows = [r for file in ("bench.json", "clips.json") for r in facts.bench_rows(file, info.name)]
    for row in rows:
        if row["budget"] == BUDGET and "recipe" in row:
            return vtprune.Recipe.from_dict(row["recipe"]), {}
    if (weights := FOLDER / f"{info.name}.safetensors").is_file():  # a part that was trained for this model
        return info.name, {"keep": BUDGET, "weights": str(weights)}
    return info.name, {"keep": BUDGET} if info.keep is not None and not info.trained else dict(info.elsewhere)


def run(info: MethodInfo) -> Report | None:
    """One prefill of the bundled model under a method; ``None`` where that says nothing of it: what it drops follows
    from a trained part, or it drops no visual tokens."""
    trained = info.trained and (info.routes or not (FOLDER / f"{info.name}.safetensors").is_file())
    if trained or info.skips or info.fitted or info.of_text or info.classifies:
        return None
    model, _ = _model(info.video)
    recipe, options = _recipe(info)
    try:
        with vtprune.attach(model, recipe, **options) as handle, torch.no_grad():
            model(**_inputs(info.video))
            return handle.report()
    except VtpruneError:  # its family page says why
        return None


@functools.cache
def of(name: str) -> Kept | None:
    """What a method keeps of the sample; ``None`` where there is nothing to draw."""
    info = vtprune.describe(name)
    report = run(info)
    if report is None or all(s.tokens_in[0] == s.tokens_out[0] for s in report.stages):
        return None
    _, processor = _model(info.video)
    seen = views.views(processor, _inputs(info.video), report)
    if info.video:
        shown = [pictures.kept_picture(v, report, number=i, panel=PANEL // 2) for i, v in enumerate(seen)]
        picture = Image.new("RGB", (sum(p.width for p in shown) + 6 * (len(shown) - 1), shown[0].height), "white")
        for i, part in enumerate(shown):
            picture.paste(part, (i * (part.width + 6), 0))
    else:
        picture = pictures.kept_picture(seen[0], report, panel=PANEL)
    file = io.BytesIO()
    picture.save(file, "WEBP", **SIDES)
    last = report.stages[-1]
    stages = tuple((s.site, s.tokens_in[0], s.tokens_out[0]) for s in report.stages)
    what = "four frames of a video" if info.video else "a picture of coloured shapes"
    words = f"{what} under {name}: {last.tokens_out[0]} of {report.visual_tokens[0]} patches stay bright, the others "
    words += "are merged into them or dimmed" if info.merges else "are dimmed"
    return Kept(file.getvalue(), words, stages, report.recipe)


def original() -> bytes:
    """The sample without any method."""
    file = io.BytesIO()
    scene()[0].resize((PANEL, PANEL), Image.Resampling.BICUBIC).save(file, "WEBP", **SIDES)
    return file.getvalue()


def theatre() -> str:
    """``vtprune run --picture OUT.html`` about the sample: one self-contained page."""
    image, question = scene()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        shown, page = Path(folder) / "scene.png", Path(folder) / "theatre.html"
        image.save(shown)
        words = ["run", "--image", str(shown), "--question", question, "--recipe", THEATRE[0], "--keep", THEATRE[1]]
        if main.main([*words, "--picture", str(page)]) != 0:
            raise RuntimeError("vtprune run --picture failed")
        return page.read_text(encoding="utf-8")
