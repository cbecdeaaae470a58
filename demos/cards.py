"""One method's card: the tokens that were left, the answer, tokens and FLOPs."""

from __future__ import annotations

import html
from collections.abc import Sequence

from PIL import Image

from vtprune.show import pictures
from vtprune.show.web import data_url

from . import styles
from .metrics import layers_text
from .results import Entry, Result

FOLD = 160  # characters of an answer from which on it is folded
THUMB = 160  # longer side of a card's picture, pixels
MARKS = {True: "✓ right", False: "✗ wrong"}  # a sign and a word, so that no colour is needed


def answer_html(head: str, text: str, right: bool | None = None) -> str:
    """An answer of one side, with its mark where the right one is known; a long one is folded."""
    mark = "" if right is None else f' <strong class="vtp-mark">{MARKS[right]}</strong>'
    whole = f'<span class="vtp-said">{html.escape(text)}</span>{mark}'
    if len(text) > FOLD:
        begin = html.escape(text[: FOLD // 2].rsplit(" ", 1)[0])
        whole = f"<details><summary>{begin} …{mark}</summary>{html.escape(text)}</details>"
    return f'<div class="vtp-answer"><h2>{html.escape(head)}</h2><div>{whole}</div></div>'


def thumb(result: Result, panel: int = THUMB) -> Image.Image:
    """The tokens that were left, on the picture that shows all of the image; of a video on four of its frames."""
    frames = [i for i, view in enumerate(result.views) if view.info.get("film") is not None]
    if len(frames) > 1:
        return _quarters(result, [frames[i * (len(frames) - 1) // 3] for i in range(4)], panel // 2)
    return pictures.kept_picture(result.views[result.overview], result.report, number=result.overview, panel=panel)


def _quarters(result: Result, frames: Sequence[int], panel: int) -> Image.Image:
    """Four frames, two rows of two."""
    drawn = [pictures.kept_picture(result.views[i], result.report, number=i, panel=panel) for i in frames]
    w, h = (max(size) for size in zip(*(d.size for d in drawn), strict=True))
    out = Image.new("RGB", (2 * w + 2, 2 * h + 2), pictures.PAPER)
    for i, picture in enumerate(drawn):
        out.paste(picture, (i % 2 * (w + 2), i // 2 * (h + 2)))
    return out


def facts(entry: Entry) -> list[str]:
    """Effective tokens, tokens per layer where they differ, and FLOPs of a card, in words."""
    assert entry.report is not None and entry.flops_share is not None
    layers = entry.report.layer_tokens[0]
    differ = [f"layers: {layers_text(layers)}"] if len(set(layers)) > 1 else []
    return [
        f"{entry.effective_tokens:.1f} of {entry.report.visual_tokens[0]} tokens",
        *differ,
        f"{100 * entry.flops_share:.0f} % of dense FLOPs",
    ]


def cards_html(cards: Sequence[str]) -> str:
    """The :func:`card`s, as many beside each other as fit."""
    return f'<style>{styles.CARDS}</style>\n<ul class="vtp-cards">\n' + "\n".join(cards) + "\n</ul>"


def card(entry: Entry) -> str:
    """An entry as HTML: the tokens that were left, the answer, right or wrong, tokens and FLOPs; or why it cannot
    run."""
    esc = html.escape
    note = f'<p class="vtp-small">{esc(entry.note)}</p>' if entry.note else ""
    if entry.result is None:
        return f"<li><h2>{esc(entry.name)}</h2><p>not run</p>{note}</li>"
    words = facts(entry)
    alt = esc(f"visual tokens that {entry.name} kept: {words[0]}", quote=True)
    small = "<br>".join(map(esc, words))
    mark = "" if entry.right is None else f" <strong>{MARKS[entry.right]}</strong>"
    picture = f'<img alt="{alt}" src="{data_url(thumb(entry.result))}">'
    return f'<li><h2>{esc(entry.name)}</h2>{picture}<p>{esc(entry.result.answer)}{mark}</p><p class="vtp-small">{small}</p>{note}</li>'  # noqa: E501
