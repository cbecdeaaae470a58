"""The page of ``vtprune demo``, put together and served. The model lives in :mod:`vtprune.demos.worker`'s process."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Sequence
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
from .opening import Opening
from .options import labelled
from .parts import html_part, status_html, upload
from .samples import saved
from .tab_methods import all_methods
from .tab_results import results_tab
from .tab_watch import Watch, side_by_side
from .worker import Worker

SAMPLES = 6
LARGEST_FILE = "20mb"
WAITING = 16  # questions in the queue
LINGER = 3 * POLL  # seconds that the page is served after its end


class Page(gr.Blocks):
    """The page, and what it opens with."""

    opening: Opening


def build(
    worker: Worker, folder: Path, *, recipe: str | None = None, seed: int = 0, results: Path | None = None
) -> Page:
    """The page. ``folder`` takes the sample pictures; ``recipe``: side B's to begin with, ``None``: what suits the
    model; ``results``: a folder of result files for the third tab."""
    rows = saved(SAMPLES, folder)
    with Page(title="vtprune", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        page.opening = Opening(worker, rows[0], recipe, seed)
        about = html_part(head_html(status_html("the model is being loaded")), elem_id="about")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image, video, question, truth = _question(rows[0])
                _samples(rows, [image, question, truth])
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                asked = [image, video, question, truth]
                with gr.Tab("Watch"):
                    watch = side_by_side(worker, asked, recipe, seed, page.opening)
                with gr.Tab("All methods"):
                    all_methods(worker, asked, seed)
                with gr.Tab("Results") as tab:
                    results_tab(results, tab)
        _opens(page, worker, watch, [about, video], recipe)
    return page


def _opens(page: Page, worker: Worker, watch: Watch, told: list[Any], recipe: str | None) -> None:
    """What happens when a browser opens the page, and when it leaves."""
    how: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}

    def answered(request: gr.Request) -> Iterator[dict[Any, Any]]:
        update = page.opening.start().result()
        if not worker.asking.has(str(request.session_hash)):  # who has asked already gets that alone
            yield from watch.out.opened(update)

    welcome = page.load(lambda: _welcome(worker, recipe), None, [*told, *watch.recipes], **how)
    welcome.then(answered, None, watch.out.all(), **how)

    def leave(request: gr.Request) -> None:
        stopped(worker, request)

    page.unload(leave)


def head_html(about: str) -> str:
    """The page's first line; ``about`` the model as HTML."""
    what = "Ask about a picture and watch which visual tokens the model keeps, layer by layer."
    return f'<header class="vtp-head"><h1>vtprune</h1><p>{what}</p><div class="vtp-about">{about}</div></header>'


def _question(sample: list[str]) -> tuple[Any, ...]:
    """The fields of picture, video, question and right answer, with a ``sample`` in them."""
    path, question, answer = sample
    image = upload(
        gr.Image,
        value=path,
        label="Picture: drop, paste or choose one",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=280,
        buttons=[],
        elem_id="picture",
    )
    video = upload(gr.File, label="or a video", file_types=["video"], visible=False, height=110, elem_id="video")
    with gr.Row():
        asked = gr.Textbox(question, label="Question", max_lines=4, min_width=150, scale=3, elem_id="question")
        truth = gr.Textbox(answer, label="Right answer, if known", min_width=110, scale=2, elem_id="truth")
    # the right answer of another picture or question is none
    for changed in (image.upload, image.clear, video.upload, asked.input):
        changed(None, None, truth, js="() => ''", show_progress="hidden", api_visibility="private")
    return image, video, asked, truth


def _samples(rows: list[list[str]], inputs: list[Any]) -> None:
    gallery = gr.Dataset(
        components=["image"],
        samples=[[path] for path, *_ in rows],
        type="index",
        layout="gallery",
        label="Samples",
        elem_id="samples",
    )
    gallery.click(lambda number: rows[number], gallery, inputs, show_progress="hidden", api_visibility="private")


def _welcome(worker: Worker, recipe: str | None) -> list[Any]:
    """What the page shows once the model is there."""
    try:
        about = worker.desk.about()
    except EXPECTED as e:
        return [head_html(status_html(why(e))), gr.skip(), gr.skip(), gr.skip()]
    refused = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in about["refused"])
    more = f"<p>Not for this model: {len(about['refused'])}</p><ul>{refused}</ul>" if refused else ""
    choices = [("dense · the whole model, no token dropped", "dense"), *labelled(about["recipes"])]
    facts = f"<summary>{html.escape(about['model'])}</summary><p>{html.escape(about['more'])}</p>{more}"
    return [
        head_html(f"<details>{facts}</details>"),
        gr.File(visible=about["videos"]),
        gr.Dropdown(choices),
        gr.Dropdown(choices, value=recipe or about["start"]),
    ]


def launch(page: Page, worker: Worker, host: str, port: int | None, allowed: Sequence[str] = ()) -> str:
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
    page.opening.start()
    return url
