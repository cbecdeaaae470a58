"""The page of ``vtprune demo``, put together and served. The model lives in :mod:`vtprune.demos.worker`'s process."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from vtprune.serving.guard import names
from vtprune.show import theatre

from . import styles
from .guard import Guard, hashes
from .liveness import POLL, WATCH, route
from .messages import EXPECTED, stopped, why
from .parts import html_part, status_html, upload
from .samples import saved
from .tab_methods import all_methods
from .tab_results import results_tab
from .tab_watch import side_by_side
from .worker import Worker

SAMPLES = 6
LARGEST_FILE = "20mb"
WAITING = 16  # questions in the queue
LINGER = 3 * POLL  # seconds that the page is served after its end


def build(
    worker: Worker, folder: Path, *, recipe: str = "pyramiddrop", seed: int = 0, results: Path | None = None
) -> gr.Blocks:
    """The page. ``folder`` takes the sample pictures; ``recipe``: side B's to begin with; ``results``: a folder of
    result files for the third tab."""
    with gr.Blocks(title="vtprune", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        html_part(
            '<header class="vtp-head"><h1>vtprune</h1><p>Ask about a picture and watch which visual tokens the model '
            "keeps, layer by layer.</p></header>"
        )
        about = html_part(status_html("the model is being loaded"), elem_id="about")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image, video, question, truth = _question()
                _samples(folder, [image, question, truth])
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Watch"):
                    sides = side_by_side(worker, [image, video, question], recipe, seed)
                with gr.Tab("All methods"):
                    all_methods(worker, [image, video, question, truth], seed)
                with gr.Tab("Results"):
                    results_tab(results)
        page.load(
            lambda: _welcome(worker), None, [about, video, *sides], show_progress="hidden", api_visibility="private"
        )

        def leave(request: gr.Request) -> None:
            stopped(worker, request)

        page.unload(leave)
    return page


def _question() -> tuple[Any, ...]:
    """The fields of picture, video, question and right answer."""
    image = upload(
        gr.Image,
        label="Picture: drop, paste or choose one",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=280,
        buttons=[],
        elem_id="picture",
    )
    video = upload(gr.File, label="or a video", file_types=["video"], visible=False, height=110, elem_id="video")
    question = gr.Textbox(label="Question", max_lines=4, elem_id="question")
    truth = gr.Textbox(label="Right answer, if you know it", elem_id="truth")
    return image, video, question, truth


def _samples(folder: Path, inputs: list[Any]) -> None:
    rows = saved(SAMPLES, folder)
    gallery = gr.Dataset(
        components=["image"],
        samples=[[path] for path, *_ in rows],
        type="index",
        layout="gallery",
        label="Samples",
        elem_id="samples",
    )
    gallery.click(lambda number: rows[number], gallery, inputs, show_progress="hidden", api_visibility="private")


def _welcome(worker: Worker) -> list[Any]:
    """What the page shows once the model is there."""
    try:
        about = worker.desk.about()
    except EXPECTED as e:
        return [status_html(why(e)), gr.skip(), gr.skip(), gr.skip()]
    refused = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in about["refused"])
    more = (
        f"<details><summary>not for this model: {len(about['refused'])}</summary><ul>{refused}</ul></details>"
        if refused
        else ""
    )
    choices = gr.Dropdown(["dense", *about["recipes"]])
    return [
        f'<div class="vtp-about">{html.escape(about["model"])}{more}</div>',
        gr.File(visible=about["videos"]),
        choices,
        choices,
    ]


def launch(page: gr.Blocks, worker: Worker, host: str, port: int | None, allowed: Sequence[str] = ()) -> str:
    """Serves the page in the background: its address. No telemetry, nothing from elsewhere, no public link.
    ``allowed``: further names of this server."""
    plain = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    theme = gr.themes.Base(
        font=plain, font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")], primary_hue="blue"
    )
    head = f"{theatre.head()}<script>{WATCH}</script>"
    guard = Middleware(Guard, names(host, allowed), Path(os.environ["GRADIO_TEMP_DIR"]), hashes(head.encode()))
    page.queue(max_size=WAITING, api_open=False)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=LARGEST_FILE,
        footer_links=[],
        theme=theme,
        css=styles.PAGE,
        head=head,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        inbrowser=False,
        app_kwargs={"middleware": [guard], "routes": [route(worker)]},
    )
    return url
