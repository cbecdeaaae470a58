"""The tab that draws result files."""

from __future__ import annotations

import html
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.core.types import VtpruneError
from vtprune.show import page as report
from vtprune.show.figures import accuracy

from .messages import warn, why
from .parts import choice, html_part, status_html, upload

FOLDERS = re.compile(r"(?<![\w.~/+-])(?:/[\w.@~+-]+)+/(?=[\w.@~+-])")


def without_folders(page: str) -> str:
    """A page that leaves out of its text where on the server files lie (commands hold paths)."""
    return re.sub(r">[^<]+<", lambda m: FOLDERS.sub("", m[0]), page)


def results_tab(folder: Path | None, tab: gr.Tab) -> None:
    """What the ``tab`` holds; it draws ``folder``'s files as soon as it is opened."""
    files = upload(
        gr.File,
        label="Result files (.json of vtprune bench, ...)",
        file_types=[".json"],
        file_count="multiple",
        height=110,
        elem_id="results-files",
    )
    with gr.Row():
        budget = gr.Slider(
            1, 100, value=25, step=1, label="Budget of the figures that show one, % (the nearest is taken)"
        )
        cost = choice(gr.Radio, [("effective tokens", "tokens"), ("FLOPs", "flops")], value="tokens", label="Cost")
        draw = gr.Button("Draw", variant="primary", elem_id="draw")
    status = html_part(
        status_html("upload result files" if folder is None else f"draws {folder.name}, or what is uploaded"),
        elem_id="results-status",
    )
    shown = html_part(elem_id="results")

    def run(files: list[str] | None, budget: int, cost: str) -> list[str]:
        with tempfile.TemporaryDirectory() as mine:
            for i, path in enumerate(files or ()):
                name = Path(path).name
                shutil.copy(path, Path(mine) / (f"{i}-{name}" if (Path(mine) / name).exists() else name))
            source = Path(mine) if files else folder
            if source is None:
                return [status_html("upload result files first"), ""]
            try:
                if cost not in [*accuracy.COST]:
                    raise VtpruneError(f"no such cost: {cost!r}; there are {', '.join(accuracy.COST)}")
                drawn = report.page(
                    source,
                    budget=budget / 100,
                    cost=cost,
                    title=f"Results: {'uploaded files' if files else source.resolve().name}",
                )
            except VtpruneError as e:
                warn(message := why(e, source, source.resolve()))
                return [status_html(message), ""]
            drawn = drawn if files else without_folders(drawn)
        frame = f'<iframe class="vtp-report" title="accuracy, cost and kept rows" sandbox srcdoc="{html.escape(drawn)}"></iframe>'  # noqa: E501
        return [status_html("done"), frame]

    how: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": status, "api_visibility": "private"}
    draw.click(run, [files, budget, cost], [status, shown], **how)
    if folder is not None:

        def once(files: list[str] | None, budget: int, cost: str, there: str) -> list[Any]:
            return [gr.skip(), gr.skip()] if there else run(files, budget, cost)

        tab.select(once, [files, budget, cost, shown], [status, shown], **how)
