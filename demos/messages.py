"""What the page tells of errors that its user can put right."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.core.types import VtpruneError

from .worker import Worker

LONGEST_MESSAGE = 1000  # characters
# what the user can put right; the last two: the model's process has ended
EXPECTED = (VtpruneError, EOFError, ConnectionError)
GONE = "the model's process has ended; start vtprune demo again"


def why(e: Exception, *folders: str | Path) -> str:
    """What to tell of one of :data:`EXPECTED`: without ``folders``, which are the server's affair, not too long, and
    with nothing that a stream cannot carry."""
    text = str(e) if isinstance(e, VtpruneError) else GONE
    for folder in folders:
        text = text.replace(f"{folder}/", "").replace(str(folder), "the folder")
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."


def warn(message: str) -> None:
    """A message in the corner of the page, which takes HTML."""
    gr.Warning(html.escape(message))


def served(updates: Callable[[], Iterator[dict[str, Any]]], shown: str | None = None) -> Iterator[dict[str, Any]]:
    """``updates``, what the user can put right as a last one with ``message``, in which the file ``shown`` has no
    folder."""
    try:
        yield from updates()
    except EXPECTED as e:
        yield {"message": why(e, Path(shown).parent) if shown else why(e)}


def stopped(worker: Worker, request: gr.Request) -> str:
    """Ends what the asking page has running: what to tell about it."""
    try:
        worker.desk.stop(str(request.session_hash))
    except EXPECTED as e:
        return why(e)
    return "stopped"
