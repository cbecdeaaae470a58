"""Pictures to keep: both sides below each other, and all methods on one sheet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from vtprune.core.types import VtpruneError
from vtprune.show import pictures
from vtprune.show.pictures import GAP

from .cards import THUMB, facts, thumb
from .metrics import figures_of
from .results import Entry, Result

COLUMNS = 4  # cards beside each other in the PNG
LINE = 20  # pixels
Line = tuple[str, int, Any]  # text, size, color
Block = tuple[list[Line], Image.Image | None]


def _lines(text: str, width: int, size: int, most: int) -> list[str]:
    """``text`` broken into at most ``most`` lines of ``width`` pixels; what is left over becomes dots."""
    draw, out, words = ImageDraw.Draw(Image.new("RGB", (1, 1))), [""], text.split()
    for number, word in enumerate(words):
        longer = f"{out[-1]} {word}".strip()
        if out[-1] and draw.textlength(longer, font=pictures.font(size)) > width:
            if len(out) == most:
                return [*out[:-1], pictures.fit(draw, " ".join([out[-1], *words[number:]]), width, size)]
            out.append(word)
        else:
            out[-1] = longer
    return [pictures.fit(draw, line, width, size) for line in out]


def sheet(entries: Sequence[Entry], question: str, *, truth: str | None = None) -> Image.Image:
    """The cards as one picture. Raises :class:`VtpruneError` if there are none."""
    if not entries:
        raise VtpruneError("a contact sheet needs at least one entry")
    thumbs = [None if e.result is None else thumb(e.result) for e in entries]
    width = max(THUMB, *(t.width for t in thumbs if t is not None), 0)
    high = max([t.height for t in thumbs if t is not None], default=0)
    texts = [_card_lines(e, width) for e in entries]
    tall = high + LINE * (1 + max(map(len, texts))) + 2 * GAP
    columns = min(COLUMNS, len(entries))
    whole = columns * (width + GAP) + GAP
    head = _lines(f"{question}{'' if truth is None else f'  (right: {truth})'}", whole - 2 * GAP, 17, 4)
    top = GAP + len(head) * 24
    out = Image.new("RGB", (whole, top + -(-len(entries) // columns) * tall), pictures.PAPER)
    draw = ImageDraw.Draw(out)
    for i, line in enumerate(head):
        draw.text((GAP, GAP + 24 * i), line, fill=pictures.INK, font=pictures.font(17))
    for i, (entry, picture_, lines) in enumerate(zip(entries, thumbs, texts, strict=True)):
        x, y = GAP + i % columns * (width + GAP), top + i // columns * tall
        draw.text((x, y), pictures.fit(draw, entry.name, width, 15), fill=pictures.INK, font=pictures.font(15))
        if picture_ is not None:
            out.paste(picture_, (x, y + LINE))
        below = y + LINE + (0 if picture_ is None else high + 4)
        for k, line in enumerate(lines):
            color = pictures.MUTED if k else pictures.INK
            draw.text((x, below + k * LINE), line, fill=color, font=pictures.font(13))
    return out


def _card_lines(entry: Entry, width: int) -> list[str]:
    """What stands below a card's picture; marks are words, since Pillow's typeface has no signs for them."""
    if entry.result is None:
        return ["not run", *_lines(entry.note, width, 13, 8)]
    mark = "" if entry.right is None else "  (right)" if entry.right else "  (wrong)"
    words = [*facts(entry), *([entry.note] if entry.note else [])]
    return [
        *_lines(entry.result.answer + mark, width, 13, 2),
        *itertools.chain.from_iterable(_lines(t, width, 13, 4) for t in words),
    ]


def picture(question: str, *results: Result) -> Image.Image:
    """The sides below each other: name, answer, key figures and the tokens of every stage. Raises :class:`VtpruneError`
    without sides."""
    if not results:
        raise VtpruneError("a picture needs at least one side")
    strips = [_strip(r) for r in results]
    width = max(640, *(s.width for s in strips))
    blocks: list[Block] = [([(line, 17, pictures.INK) for line in _lines(question, width - 2 * GAP, 17, 6)], None)]
    blocks += [(_side_lines(result, width - 2 * GAP), strip) for result, strip in zip(results, strips, strict=True)]
    height = sum(24 * len(lines) + (strip.height if strip else 0) + GAP for lines, strip in blocks) + GAP
    out = Image.new("RGB", (width, height), pictures.PAPER)
    draw, y = ImageDraw.Draw(out), GAP
    for lines, strip_ in blocks:
        for line, size, color in lines:
            draw.text((GAP, y), line, fill=color, font=pictures.font(size))
            y += 24
        if strip_ is not None:
            out.paste(strip_, (0, y))
            y += strip_.height
        y += GAP
    return out


def _strip(result: Result) -> Image.Image:
    """The tokens of every stage: of a picture where all of it is shown, of a video in each frame."""
    if any(view.info.get("film") is not None for view in result.views):
        return pictures.sheet(result.views, result.report)
    return pictures.token_picture(result.views[result.overview], result.report, 0, number=result.overview)


def _side_lines(result: Result, width: int) -> list[Line]:
    """Name, answer and key figures of a side."""
    n = figures_of(result)
    figures = (
        f"{n['effective_tokens']:.1f} of {n['visual_tokens']} effective tokens, {n['flops'] / 1e9:.3f} of "
        f"{n['dense_flops'] / 1e9:.3f} GFLOPs, {n['kv_bytes'] / 1024:.1f} of {n['dense_kv_bytes'] / 1024:.1f} KiB cache"
        f", first token after {n['ttft_ms']:.0f} ms"
    )
    answer = _lines(f"{result.name}: {result.answer}{' (stopped)' if result.stopped else ''}", width, 16, 8)
    small = _lines(figures, width, 13, 3)
    return [*((line, 16, pictures.INK) for line in answer), *((line, 13, pictures.MUTED) for line in small)]
