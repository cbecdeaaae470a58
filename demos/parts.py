"""Parts of the page that several tabs use: fields whose values are checked where they can be refused with a message, a
line of status, downloads, buttons that stop."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ListFiles
from gradio_client.utils import is_valid_file

from vtprune.core.ledger import UndoLedger

from .messages import refusal, stopped
from .worker import Worker

# of the tokens kept behind the last cut; of effective tokens, averaged over layers and solved
BUDGETS = [("its own", "own"), ("tokens kept", "keep"), ("effective tokens", "effective")]
AT_ONCE = 30  # questions that are served or wait at the desk; gradio has 40 threads
Files = dict[str, gr.DownloadButton]


def status_html(text: str, done: int | None = None, of: int | None = None, *, headline: bool = False) -> str:
    """A line that screen readers tell, with a bar if something can be counted; a large one where it is the outcome."""
    bar = "" if done is None else f'<progress value="{done}" max="{of}">{done} of {of}</progress> {done} of {of}: '
    large = " vtp-headline" if headline else ""
    return f'<div class="vtp-status{large}" role="status">{bar}{html.escape(text)}</div>'


def html_part(value: str = "", **how: Any) -> gr.HTML:
    """HTML with its own style alone."""
    return gr.HTML(value, apply_default_css=False, padding=False, **how)


def own_upload(component: Any, payload: Any) -> Any:
    """What arrived in a picture's or file's field, as paths. Raises :class:`gradio.Error` for one outside the folder of
    uploads or with the wrong ending: a request made by hand can name any file, and gradio looks only at those that
    carry its mark."""
    if payload is None:
        return None
    if isinstance(payload, ListFiles):
        return [own_upload(component, one) for one in payload]
    if payload.path is None:
        return None
    if not Path(payload.path).resolve().is_relative_to(Path(component.GRADIO_CACHE).resolve()):
        raise refusal("this file was not uploaded here")
    kinds = getattr(component, "file_types", None)
    if kinds and not is_valid_file(payload.path, kinds):
        raise refusal(f"this field takes {' and '.join(k.removeprefix('.') for k in kinds)} files")
    return payload.path


def upload(make: Any, **how: Any) -> Any:
    """A field for a picture or for files. What arrives is opened where it can be refused with a message; gradio would
    open it on the way."""
    field = make(**how)
    UndoLedger().replace(field, "preprocess", partial(own_upload, field))
    return field


def choice(make: Any, *args: Any, **how: Any) -> Any:
    """A field with a choice. Whether there is such a choice is told by what takes it: gradio's own message would hold
    what was asked for as HTML."""
    field = make(*args, **how)
    UndoLedger().replace(field, "preprocess", lambda value: value)
    return field


def downloads(named: Mapping[str, str], prefix: str) -> Files:
    """A row of buttons, by file name; ``named``: their labels."""
    with gr.Row(elem_classes="vtp-downloads"):
        return {
            name: gr.DownloadButton(
                label, interactive=False, size="sm", min_width=120, elem_id=f"{prefix}-{name.replace('.', '-')}"
            )
            for name, label in named.items()
        }


def handed_out(buttons: Files, files: Mapping[str, bytes], folder: str) -> dict[Any, Any]:
    """The download buttons with what there is to download."""
    out = {}
    for name, button in buttons.items():
        path = Path(folder) / name
        if name in files:
            path.write_bytes(files[name])
        out[button] = (
            gr.DownloadButton(value=str(path), interactive=True)
            if name in files
            else gr.DownloadButton(value=None, interactive=False)
        )
    return out


@dataclass(frozen=True)
class Buttons:
    """One that begins, and one that stops what it has begun, which is there while that runs."""

    go: gr.Button
    stop: gr.Button

    def running(self, runs: bool) -> dict[Any, Any]:
        """Both as they are while something runs, or not."""
        return {self.go: gr.Button(interactive=not runs), self.stop: gr.Button(visible=runs)}

    def served(self, updates: Iterator[dict[Any, Any]]) -> Iterator[dict[Any, Any]]:
        """``updates`` of the page, with both buttons as they should be meanwhile and behind."""
        yield self.running(True)
        yield from updates
        yield self.running(False)

    def watch(self, worker: Worker, status: gr.HTML, events: list[Any]) -> None:
        """Makes the second one stop ``events``, which then say so themselves: gradio must not cancel them, or they
        count as failed. ``status`` tells of those that do fail."""

        def stop(request: gr.Request) -> str:
            return status_html(stopped(worker, request))

        quick: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        self.stop.click(stop, None, status, show_progress="hidden", **quick)

        def failed() -> dict[Any, Any]:
            return {status: status_html("this failed; the terminal that runs the demo says why"), **self.running(False)}

        for event in events:
            event.failure(failed, None, [status, self.go, self.stop], **quick)


def buttons(what: str, name: str) -> Buttons:
    """``what`` the first one says; ``name``: its id."""
    go = gr.Button(what, variant="primary", elem_id=name, min_width=100)
    return Buttons(go, gr.Button("Stop", variant="stop", elem_id=f"{name}-stop", visible=False, min_width=80))


def long_running(status: gr.HTML) -> dict[str, Any]:
    """How gradio is to listen to what asks the model: nobody waits in its queue, where no desk could find them."""
    return {
        "concurrency_id": "model",
        "concurrency_limit": AT_ONCE,
        "show_progress": "minimal",
        "show_progress_on": status,
        "api_visibility": "private",
    }
