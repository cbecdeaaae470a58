"""Parts of the page that several tabs use: fields whose values are checked where they can be refused with a message, a
line of status, downloads, buttons that stop."""

from __future__ import annotations

import html
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ListFiles
from gradio_client.utils import is_valid_file

from vtprune.core.ledger import UndoLedger

from .messages import stopped
from .worker import Worker

# of the tokens kept behind the last cut; of effective tokens, averaged over layers and solved
BUDGETS = [("its own", "own"), ("tokens kept", "keep"), ("effective tokens", "effective")]
Files = dict[str, gr.DownloadButton]


def status_html(text: str, done: int | None = None, of: int | None = None) -> str:
    """A line that screen readers tell, with a bar if something can be counted."""
    bar = "" if done is None else f'<progress value="{done}" max="{of}">{done} of {of}</progress> {done} of {of}: '
    return f'<div class="vtp-status" role="status">{bar}{html.escape(text)}</div>'


def html_part(value: str = "", **how: Any) -> gr.HTML:
    """HTML with its own style alone."""
    return gr.HTML(value, apply_default_css=False, **how)


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
        raise gr.Error("this file was not uploaded here", print_exception=False)
    kinds = getattr(component, "file_types", None)
    if kinds and not is_valid_file(payload.path, kinds):
        raise gr.Error(
            f"this field takes {' and '.join(k.removeprefix('.') for k in kinds)} files", print_exception=False
        )
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


def stops(worker: Worker, button: gr.Button, status: gr.HTML, events: list[Any]) -> None:
    """``button`` ends ``events``, and ``status`` says so; it also says when one of them fails."""

    def stop(request: gr.Request) -> str:
        return status_html(stopped(worker, request))

    button.click(stop, None, status, cancels=events, queue=False, api_visibility="private")
    for event in events:
        event.failure(
            lambda: status_html("this failed; the terminal that runs the demo says why"),
            None,
            status,
            queue=False,
            api_visibility="private",
        )
