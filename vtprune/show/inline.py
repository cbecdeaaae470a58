"""A figure inside the page, also on dark paper."""

from __future__ import annotations

import base64
from typing import Any

from .drawings import Drawing
from .figures import style
from .tables import esc

# The neutral colours of figures on a dark page.
DARK = {
    style.PAPER: "#14161a",
    style.INK: "#e7e9ec",
    style.MUTED: "#a3a9b3",
    style.LINE: "#59606b",
    style.GRID: "#262a31",
}


def themed(svg: bytes) -> bytes:
    """The drawing for the page: without prologue, and with :data:`DARK` in place of its neutral colours where the
    reader prefers dark."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    for i, light in enumerate(DARK):
        text = text.replace(light, f"var(--c{i})")
    rules = [";".join(f"--c{i}:{c}" for i, c in enumerate(colors)) for colors in (DARK.keys(), DARK.values())]
    end = text.index(">") + 1
    return f"{text[:end]}<style>:root{{{rules[0]}}}@media (prefers-color-scheme: dark){{:root{{{rules[1]}}}}}</style>{text[end:]}".encode()  # noqa: E501


def figure_html(drawing: Drawing, svg: bytes, width: int) -> str:
    """The drawing inline, ``width`` pixels wide; it scrolls sideways where that is too much."""
    source = "data:image/svg+xml;base64," + base64.b64encode(themed(svg)).decode()
    image = f'<img alt="{esc(drawing.alt)}" width="{width}" src="{source}">'
    scroll = f'<div class="wide" tabindex="0" role="region" aria-label="figure {esc(drawing.name)}">{image}</div>'
    files = f'<div class="files">{esc(drawing.name)}.png, {esc(drawing.name)}.svg</div>'
    return f"<figure><figcaption>{esc(drawing.caption)}</figcaption>{scroll}{files}</figure>"


def inline(drawing: Drawing, figure: Any, svg: bytes) -> str:
    """The drawing as wide as it was made, 96 pixels to an inch."""
    return figure_html(drawing, svg, round(96 * figure.get_figwidth()))
