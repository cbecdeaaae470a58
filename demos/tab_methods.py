"""The tab that compares all methods at one budget."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import gradio as gr

from .messages import served, warn
from .parts import BUDGETS, buttons, choice, downloads, handed_out, html_part, long_running, status_html
from .worker import Worker

SHEET = {"methods.png": "Contact sheet (PNG)", "repeat.py": "Program (Python)"}


def all_methods(worker: Worker, asked: list[Any], seed: int) -> None:
    with gr.Row():
        budget = choice(
            gr.Dropdown, [b for b in BUDGETS if b[1] != "own"], value="effective", label="Budget", min_width=160
        )
        share = gr.Slider(
            1, 100, value=25, step=1, label="Budget in % of the tokens", min_width=160, elem_id="share-all"
        )
        chance = gr.Number(seed, precision=0, label="Seed", min_width=80)
    with gr.Row():
        both = buttons("Compare all methods", "compare")
    status = html_part(
        status_html("every method answers the same question at the same budget"), elem_id="compare-status"
    )
    cards = html_part(elem_id="cards")
    files = downloads(SHEET, "all")

    def run(
        request: gr.Request,
        image: str | None,
        video: str | None,
        question: str,
        truth: str,
        budget: str,
        share: int,
        seed: float | None,
    ) -> Iterator[dict[Any, Any]]:
        def updates() -> Iterator[dict[str, Any]]:
            return worker.desk.compare(
                str(request.session_hash), video or image, question, share / 100, budget, int(seed or 0), truth
            )

        yield {status: status_html("waiting for the model"), cards: "", **handed_out(files, {}, "")}
        for update in served(worker, str(request.session_hash), updates, video or image):
            if "message" in update:
                warn(update["message"])
                yield {status: status_html(update["message"])}
                continue
            if "done" not in update:
                yield {status: status_html(update["status"])}
                continue
            with tempfile.TemporaryDirectory() as folder:
                ready = handed_out(files, update["files"], folder) if "files" in update else {}
                yield {
                    status: status_html(update["status"], update["done"], update["of"]),
                    cards: update["cards"],
                    **ready,
                }

    def whole(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        yield from both.served(run(request, *values))

    inputs = [*asked, budget, share, chance]
    event = both.go.click(whole, inputs, [status, cards, both.go, both.stop, *files.values()], **long_running(status))
    both.watch(worker, status, [event])
