"""The tab that watches two sides answer one question."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.core.types import VtpruneError

from .desk import NAMES
from .messages import served, warn
from .parts import BUDGETS, Files, choice, downloads, handed_out, html_part, status_html, stops, upload
from .worker import Worker

SIDE = ("recipe", "file", "budget", "share", "options", "seed")  # what :meth:`Desk.side` takes
DOWNLOADS = {
    "vtprune.png": "Picture (PNG)",
    "theatre.html": "Theatre (HTML)",
    "repeat.py": "Program (Python)",
    "recipe-a.json": "Recipe A (JSON)",
    "recipe-b.json": "Recipe B (JSON)",
}


def side_fields(name: str, recipe: str, seed: int) -> dict[str, Any]:
    """The controls of one side, by the names in :data:`SIDE`."""
    low = name.lower()
    with gr.Column(min_width=260), gr.Group():
        with gr.Row():
            made: dict[str, Any] = {
                "recipe": choice(
                    gr.Dropdown, [recipe], value=recipe, label=f"{name}: recipe", min_width=140, elem_id=f"recipe-{low}"
                )
            }
            made["budget"] = choice(
                gr.Dropdown, BUDGETS, value="own", label="Budget", min_width=140, elem_id=f"budget-{low}"
            )
        made["share"] = gr.Slider(
            1, 100, value=25, step=1, label="Share of the tokens, %", visible=False, elem_id=f"share-{low}"
        )
        made["budget"].change(
            lambda kind: gr.Slider(visible=kind != "own"),
            made["budget"],
            made["share"],
            show_progress="hidden",
            api_visibility="private",
        )
        _more_fields(made, low, seed)
    return made


def _more_fields(made: dict[str, Any], low: str, seed: int) -> None:
    """What most leave as it is."""
    with gr.Accordion("Options, seed, recipe file", open=False):
        made["options"] = gr.Textbox(label="Options of the method, JSON", placeholder='{"layer": 3}', max_lines=3)
        made["seed"] = gr.Number(seed, precision=0, label="Seed, for methods that draw at random")
        made["file"] = upload(
            gr.File,
            label="Recipe file (JSON) instead of a name",
            file_types=[".json"],
            height=110,
            elem_id=f"file-{low}",
        )


def sent(values: Sequence[Any]) -> dict[str, Any]:
    """One side's values in the order of :data:`SIDE`, as :meth:`Desk.side` takes them. Raises :class:`VtpruneError` for
    a file that is no text."""
    fields = dict(zip(SIDE, values, strict=True))
    if fields["file"] is not None:
        path = Path(fields["file"])
        try:
            fields["file"] = path.read_text(encoding="utf-8-sig")  # some editors begin files with a mark
        except UnicodeDecodeError as e:
            raise VtpruneError(f"{path.name} is no recipe file: it is not text") from e
    return {**fields, "share": fields["share"] / 100, "seed": int(fields["seed"] or 0)}


@dataclass
class Outputs:
    """What answers change on the page.

    Attributes:
        status: a line on what goes on.
        answers: of both sides.
        theatre: the tokens that were left, layer by layer.
        metrics: figures of both sides.
        buttons: what can be downloaded.
    """

    status: gr.HTML
    answers: list[gr.Textbox]
    theatre: gr.HTML
    metrics: gr.HTML
    buttons: Files

    def all(self) -> list[Any]:
        """As Gradio wants to know them beforehand."""
        return [self.status, *self.answers, self.theatre, self.metrics, *self.buttons.values()]

    def emptied(self) -> dict[Any, Any]:
        """What a new question begins with."""
        empty: dict[Any, Any] = dict.fromkeys([*self.answers, self.theatre, self.metrics], "")
        return {self.status: status_html("waiting for the model"), **empty, **handed_out(self.buttons, {}, "")}

    def updated(self, update: dict[str, Any]) -> Iterator[dict[Any, Any]]:
        """One of the desk's updates, as new values."""
        if "message" in update:
            warn(update["message"])
            yield {self.status: status_html(update["message"])}
        elif "text" in update:
            yield {self.answers[update["side"]]: update["text"]}
        elif "files" in update:
            with tempfile.TemporaryDirectory() as folder:  # gradio takes copies before it asks for more
                done: dict[Any, Any] = {
                    self.theatre: update["theatre"],
                    self.metrics: update["metrics"],
                    **dict(zip(self.answers, update["answers"], strict=True)),
                }
                files = handed_out(self.buttons, update["files"], folder)
                yield {self.status: status_html(update["status"]), **done, **files}
        else:
            yield {self.status: status_html(update["status"])}


def _outputs() -> Outputs:
    status = html_part(status_html("choose a picture, type a question, ask"), elem_id="status")
    with gr.Row():
        answers = [
            gr.Textbox(label=f"Answer {name}", lines=2, interactive=False, elem_id=f"answer-{name.lower()}")
            for name in NAMES
        ]
    theatre = html_part(elem_id="theatre")
    metrics = html_part(elem_id="metrics")
    return Outputs(status, answers, theatre, metrics, downloads(DOWNLOADS, "get"))


def side_by_side(worker: Worker, asked: list[Any], recipe: str, seed: int) -> list[gr.Dropdown]:
    """Two sides answer one question: their controls, answers, figures and the theatre. ``asked``: the fields of
    picture, video and question. Returns the two fields with a choice of recipes."""
    with gr.Row():
        sides = [side_fields(name, start, seed) for name, start in zip(NAMES, ("dense", recipe), strict=True)]
    with gr.Row():
        ask = gr.Button("Ask both", variant="primary", elem_id="ask")
        stop = gr.Button("Stop", variant="stop", elem_id="stop")
    out = _outputs()
    length = gr.Slider(1, 256, value=32, step=1, label="Length of an answer, at most this many tokens")

    def run(
        request: gr.Request, image: str | None, video: str | None, question: str, length: int, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        def updates() -> Iterator[dict[str, Any]]:
            chosen = [sent(values[: len(SIDE)]), sent(values[len(SIDE) :])]
            return worker.desk.ask(str(request.session_hash), video or image, question, chosen, int(length))

        yield out.emptied()
        for update in served(updates, video or image):
            yield from out.updated(update)

    inputs = [*asked, length, *(side[name] for side in sides for name in SIDE)]
    events = [
        listen(
            run,
            inputs,
            out.all(),
            concurrency_id="model",
            concurrency_limit=4,
            show_progress="minimal",
            show_progress_on=out.status,
            api_visibility="private",
        )
        for listen in (ask.click, asked[-1].submit)
    ]
    stops(worker, stop, out.status, events)
    return [side["recipe"] for side in sides]
