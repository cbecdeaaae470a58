"""HTML pages that need nothing from elsewhere, pictures inside them, and files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.types import VtpruneError


@cache
def source(name: str) -> str:
    """A style sheet or script that lies beside this module."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def style_sheet(name: str) -> str:
    """One of them without the line break at its end."""
    return source(name).rstrip("\n")


def data_url(picture: Image.Image, kind: str = "PNG", **options: Any) -> str:
    """The picture as a ``data:`` address; ``kind`` and ``options`` as Pillow takes them."""
    return f"data:image/{kind.lower()};base64," + base64.b64encode(encode(picture, kind, **options)).decode()


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, **options)
    return buffer.getvalue()


def html_report(
    table: Sequence[Sequence[str]],
    pictures: Sequence[tuple[str, Image.Image]],
    path: str | Path,
    *,
    title: str = "vtprune",
    intro: str = "",
    facts: str = "",
) -> None:
    """Writes one self-contained page: ``table`` (header first, all text) and ``pictures`` with captions; no script and
    nothing from elsewhere.

    Raises :class:`VtpruneError` if the file cannot be written.
    """
    esc = html.escape
    head = "".join(f"<th>{esc(c)}</th>" for c in table[0])
    body = "\n".join("<tr>" + "".join(f"<td>{esc(c)}</td>" for c in row) + "</tr>" for row in table[1:])
    frame = '<figure><figcaption>{0}</figcaption><div class="wide"><img alt="{0}" src="{1}"></div></figure>'
    figures = "\n".join(frame.format(esc(c), data_url(p)) for c, p in pictures)
    body_html = f"""<h1>{esc(title)}</h1>
<p>{esc(intro)}</p>
<div class="wide"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<h2>Pictures</h2>
{figures}
<footer>{esc(facts)}</footer>"""
    write(path, document(title, style_sheet("web.css"), body_html).encode())


def document(title: str, css: str, body: str) -> str:
    """An HTML page: ``title`` as text, ``css`` and ``body`` as they are."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{css}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write(path: str | Path, data: bytes | Image.Image) -> None:
    """Writes bytes, or a picture as PNG. Raises :class:`VtpruneError` if the file cannot be written."""
    try:
        if isinstance(data, bytes):
            Path(path).write_bytes(data)
        else:
            data.save(path, "PNG")
    except OSError as e:
        raise VtpruneError(f"cannot write {path}: {e.strerror or e}") from e
