"""What the page tells its user. Every message in its corner goes through here: :func:`warn` and :func:`refusal`."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.core.types import VtpruneError

from .desk import STOPPED
from .worker import Worker

LONGEST_MESSAGE = 1000  # characters
# what the user can put right; the last two: the model's process has ended
EXPECTED = (VtpruneError, EOFError, ConnectionError)
GONE = "the model's process has ended and is being started again; ask again in a moment"


def why(e: Exception, *folders: str | Path) -> str:
    """What to tell of one of :data:`EXPECTED`: without ``folders``, which are the server's affair, not too long, and
    with nothing that a stream cannot carry."""
    text = str(e) if isinstance(e, VtpruneError) else GONE
    for folder in folders:
        text = text.replace(f"{folder}/", "").replace(str(folder), "the folder")
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."


def as_text(message: str) -> str:
    """``message`` for a place that takes HTML."""
    return html.escape(message)


def warn(message: str) -> None:
    """A message in the corner of the page."""
    gr.Warning(as_text(message))


def refusal(message: str) -> gr.Error:
    """A message in the corner of the page, to be raised."""
    return gr.Error(as_text(message), print_exception=False)


def served(
    worker: Worker, token: str, updates: Callable[[], Any], shown: str | None = None
) -> Iterator[dict[str, Any]]:
    """``updates()``, an iterator that can be closed, for the page ``token`` until it is told to stop; what the user can
    put right as a last one with ``message``, in which the file ``shown`` has no folder."""
    with worker.asking.registered(token) as stop:
        try:
            with closing(updates()) as coming:
                for update in coming:
                    if stop.is_set() and not update.get("stopped"):
                        yield STOPPED
                        return
                    yield update
        except EXPECTED as e:
            yield {"message": why(e, Path(shown).parent) if shown else why(e)}


def stopped(worker: Worker, request: gr.Request) -> str:
    """Ends what the asking page has running: what to tell about it."""
    try:
        worker.stop(str(request.session_hash))
    except EXPECTED as e:
        return why(e)
    return "stopped"
