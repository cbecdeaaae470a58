"""The tab that watches two sides answer one question."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.core.planning import FILES
from vtprune.core.recipe import Recipe
from vtprune.core.types import VtpruneError

from .cards import answer_html
from .desk import NAMES, START
from .messages import served, warn
from .opening import LENGTH, Opening
from .option_inputs import Inputs, option_inputs
from .parts import BUDGETS, Files, buttons, choice, downloads, handed_out, html_part, long_running, status_html, upload
from .worker import Worker

SIDE = ("recipe", "file", "budget", "share", "options", "seed")  # what :meth:`Desk.side` takes, beside the inputs
DOWNLOADS = {
    "vtprune.png": "Picture (PNG)",
    "theatre.html": "Theatre (HTML)",
    "repeat.py": "Program (Python)",
    "recipe-a.json": "Recipe A (JSON)",
    "recipe-b.json": "Recipe B (JSON)",
}


@dataclass(frozen=True)
class Controls:
    """Those of one side: by the names in :data:`SIDE`, and the inputs of its method's options."""

    fields: dict[str, Any]
    options: Inputs

    def all(self) -> list[Any]:
        """In the order that :func:`sent` takes their values in."""
        return [*(self.fields[name] for name in SIDE), *self.options.all()]


def _recipe_field(name: str, recipe: str) -> Any:
    how = {"label": f"{name}: recipe", "min_width": 150, "scale": 4, "elem_id": f"recipe-{name.lower()}"}
    return choice(gr.Dropdown, [(recipe, recipe)], value=recipe, **how)


def _more_fields(name: str, recipe: Any, start: str, seed: int) -> Controls:
    """What most leave as it is."""
    low = name.lower()
    made: dict[str, Any] = {"recipe": recipe}
    with gr.Column(min_width=260), gr.Group():
        made["budget"] = choice(
            gr.Dropdown,
            BUDGETS,
            value="own",
            label=f"{name}: budget",
            info="Effective tokens are averaged over the layers, so that methods that drop early or late compare.",
            elem_id=f"budget-{low}",
        )
        made["share"] = gr.Slider(
            1, 100, value=25, step=1, label=f"{name}: share of the tokens, %", visible=False, elem_id=f"share-{low}"
        )
        made["budget"].change(
            lambda kind: gr.Slider(visible=kind != "own"),
            made["budget"],
            made["share"],
            show_progress="hidden",
            api_visibility="private",
        )
        options = option_inputs(name, recipe, start)
        made["seed"] = gr.Number(seed, precision=0, label=f"{name}: seed, for methods that draw at random")
        made["file"] = upload(
            gr.File,
            label=f"{name}: recipe file (JSON, YAML) instead of a name",
            file_types=list(FILES),
            height=110,
            elem_id=f"file-{low}",
        )
        made["options"] = gr.Textbox(
            label=f"{name}: further options, JSON", placeholder='{"positions": "compact"}', max_lines=3
        )
    return Controls(made, options)


def _text(path: Path) -> str:
    """A recipe file as JSON. Raises :class:`VtpruneError` for one that is no text, or no recipe in YAML."""
    if path.suffix == ".json":
        try:
            return path.read_text(encoding="utf-8-sig")  # some editors begin files with a mark
        except UnicodeDecodeError as e:
            raise VtpruneError(f"{path.name} is no recipe file: it is not text") from e
    try:
        return json.dumps(Recipe.load(path).to_dict())
    except VtpruneError as e:
        raise VtpruneError(str(e).replace(str(path), path.name)) from e


def sent(values: Sequence[Any]) -> dict[str, Any]:
    """One side's values in the order of :meth:`Controls.all`, as :meth:`Desk.side` takes them. Raises
    :class:`VtpruneError` for a file that is no text."""
    fields = dict(zip(SIDE, values, strict=False))
    if fields["file"] is not None:
        fields["file"] = _text(Path(fields["file"]))
    chosen = Inputs.sent(fields["recipe"], values[len(SIDE) :])
    return {**fields, "chosen": chosen, "share": fields["share"] / 100, "seed": int(fields["seed"] or 0)}


@dataclass
class Outputs:
    """What answers change on the page.

    Attributes:
        status: a line on what goes on; in the end what B gains.
        answers: of both sides.
        theatre: the tokens that were left, layer by layer.
        metrics: figures of both sides.
        files: what can be downloaded.
    """

    status: gr.HTML
    answers: list[gr.HTML]
    theatre: gr.HTML
    metrics: gr.HTML
    files: Files

    def all(self) -> list[Any]:
        """As Gradio wants to know them beforehand."""
        return [self.status, *self.answers, self.theatre, self.metrics, *self.files.values()]

    def emptied(self) -> dict[Any, Any]:
        """What a new question begins with."""
        empty: dict[Any, Any] = dict.fromkeys([*self.answers, self.theatre, self.metrics], "")
        return {self.status: status_html("waiting for the model"), **empty, **handed_out(self.files, {}, "")}

    def opened(self, update: dict[str, Any]) -> Iterator[dict[Any, Any]]:
        """The desk's last update for a page that has just been opened: no message in the corner, no mark of a stop."""
        if "files" in update:
            yield from self.finished(update)
        else:
            yield {self.status: status_html(update.get("message", "choose a picture, type a question, ask"))}

    def updated(self, update: dict[str, Any]) -> Iterator[dict[Any, Any]]:
        """One of the desk's updates, as new values."""
        if "files" in update:
            yield from self.finished(update)
        elif "message" in update:
            warn(update["message"])
            yield {self.status: status_html(update["message"])}
        elif "text" in update:
            yield {self.answers[update["side"]]: answer_html(update["head"], update["text"])}
        else:
            yield {self.status: status_html(update["status"])}

    def finished(self, update: dict[str, Any]) -> Iterator[dict[Any, Any]]:
        """The last one."""
        told = zip(update["heads"], update["answers"], update["right"], strict=True)
        with tempfile.TemporaryDirectory() as folder:  # gradio takes copies before it asks for more
            yield {
                self.status: status_html(update["headline"], headline=True),
                **{box: answer_html(*one) for box, one in zip(self.answers, told, strict=True)},
                self.theatre: update["theatre"],
                self.metrics: update["metrics"],
                **handed_out(self.files, update["files"], folder),
            }


def _outputs() -> Outputs:
    status = html_part(status_html("the model answers the sample"), elem_id="status")
    with gr.Row(elem_id="answers"):
        answers = [
            html_part(answer_html(f"{name}:", ""), elem_id=f"answer-{name.lower()}", min_width=120) for name in NAMES
        ]
    theatre = html_part(elem_id="theatre")
    metrics = html_part(elem_id="metrics")
    return Outputs(status, answers, theatre, metrics, downloads(DOWNLOADS, "get"))


@dataclass(frozen=True)
class Watch:
    """What the page changes when it is opened: the two fields with a choice of ``recipes``, and ``out``."""

    recipes: list[gr.Dropdown]
    out: Outputs


def side_by_side(worker: Worker, asked: list[Any], recipe: str | None, seed: int, opening: Opening) -> Watch:
    """Two sides answer one question: their controls, answers, figures and the theatre. ``asked``: the fields of
    picture, video, question and right answer."""
    starts = ("dense", recipe or START[0])
    with gr.Row(elem_id="sides"):
        recipes = [_recipe_field(name, start) for name, start in zip(NAMES, starts, strict=True)]
        both = buttons("Ask both", "ask")
    out = _outputs()
    with gr.Accordion("Budgets, options, seed, recipe files, length", open=False, elem_id="more"):
        with gr.Row():
            sides = [_more_fields(*one, seed) for one in zip(NAMES, recipes, starts, strict=True)]
        length = gr.Slider(1, 256, value=LENGTH, step=1, label="Length of an answer, at most this many tokens")

    def run(
        request: gr.Request, image: str | None, video: str | None, question: str, truth: str, length: int, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        token, half = str(request.session_hash), len(values) // 2

        def updates() -> Iterator[dict[str, Any]]:
            chosen = [sent(values[:half]), sent(values[half:])]
            return worker.desk.ask(token, video or image, question, chosen, int(length), truth)

        opening.give_way()
        yield out.emptied()
        for update in served(worker, token, updates, video or image):
            yield from out.updated(update)

    def whole(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        yield from both.served(run(request, *values))

    inputs = [*asked, length, *(field for side in sides for field in side.all())]
    outputs = [*out.all(), both.go, both.stop]
    events = [listen(whole, inputs, outputs, **long_running(out.status)) for listen in (both.go.click, asked[2].submit)]
    both.watch(worker, out.status, events)
    return Watch(recipes, out)
