"""Pictures and pages of what was kept: drawing with Pillow only, no plotting library, no model.

Indices are a sample's original visual tokens, raster order on ``grid`` (rows, columns), as :class:`vtprune.Report`
gives them.
"""

from __future__ import annotations

import base64
import bisect
import colorsys
import html
import io
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..core.types import VtpruneError
from ..models.engine import pixels as _pixels

if TYPE_CHECKING:
    from ..core.report import Report, StageReport

PANEL = 264  # side of a panel, pixels
GAP = 10
TITLE = 36
PAPER, INK, MUTED, SHADE = (255, 255, 255), (25, 28, 33), (104, 110, 120), (46, 50, 58)
PLAIN = (217, 220, 225)  # under patches without a picture


def font(size: int) -> Any:
    """Pillow's own typeface."""
    return ImageFont.load_default(size)


# --------------------------------------------------------------------------------------------------------- token
# pictures


def model_view(processor: Any, image: Image.Image, overview: int = 0) -> Image.Image:
    """``image`` as the vision tower sees it (resized and cropped by the processor), so that patches lie where they
    should; of several tiles the one that shows all of it, ``overview``. Processors that cut the whole image into
    patches leave it as it is."""
    part = processor.image_processor
    pixels = _pixels.numbers(part(images=[image], return_tensors="np")["pixel_values"])
    if pixels.ndim < 4:
        return image.convert("RGB")
    return _pixels.picture(part, (pixels[0] if pixels.ndim == 5 else pixels)[overview])


def views(processor: Any, inputs: Mapping[str, Any], report: Report, sample: int = 0) -> list[Image.Image]:
    """What lies under each raster of a sample, as the vision tower saw it: an image, each of its tiles, LLaVA-NeXT's
    tiles put together (with a blank column where its new-line tokens are), the frames of a video (Qwen: the first of
    each pair). Their ``info["label"]`` says which: ``"tile 2 of 5"``.

    Args:
        inputs: what ``processor`` returned and the model was given, the whole batch of ``report``; any device and type.

    Raises:
        VtpruneError: there is no such sample, or the rasters cannot be matched with the pixels.
    """
    check_sample(report, sample)
    pieces = _pixels.rasters(processor, inputs, report)[sample]
    nouns = [p.noun for p in pieces]
    for i, (noun, piece) in enumerate(zip(nouns, pieces, strict=True)):
        of = f" {nouns[: i + 1].count(noun)} of {nouns.count(noun)}" if nouns.count(noun) > 1 else ""
        piece.picture.info["label"] = noun + of
    return [p.picture for p in pieces]


def check_sample(report: Report, sample: int) -> None:
    if not 0 <= sample < len(report.visual_tokens):
        raise VtpruneError(f"the report has {len(report.visual_tokens)} samples, there is no sample {sample}")


def starts(report: Report, sample: int) -> list[int]:
    """Where the tokens of each raster of a sample start, and, last, their number."""
    return [0, *accumulate(rows * columns for rows, columns in report.grids[sample])]


def owners(report: Report, sample: int, number: int | None = None) -> list[np.ndarray]:
    """Per stage, for every original token of the sample (of its raster ``number``), ``[tokens]``, the token of the
    sample that stands for it: itself if kept, another if merged, -1 if dropped. A routed token comes back with those
    that were merged into it before."""
    bounds = starts(report, sample)
    stood, out = np.arange(bounds[-1]), []
    for stage in report.stages:
        kept = stage.kept[sample].cpu().numpy()
        if stage.assignment is not None:
            slot = stage.assignment[sample].cpu().numpy()
            now = np.where(slot >= 0, kept[slot], -1) if len(kept) else np.full(len(stood), -1)
            stood = np.where(now >= 0, now, stood)
        else:
            now = np.where(np.isin(stood, kept), stood, -1)
        out.append(now)
    if number is None:
        return out
    number %= len(bounds) - 1
    return [now[bounds[number] : bounds[number + 1]] for now in out]


def ranks(stage: StageReport, sample: int) -> tuple[np.ndarray, np.ndarray] | None:
    """``rank`` ``[tokens]`` of every original token among those it shared a budget with: 1 has the best score, ties go
    to the lower index, 0 is not ranked; and how many were ``ranked`` there, ``[tokens]``. ``None`` for a stage without
    scores."""
    if stage.scores is None or stage.units is None:
        return None
    scores, units = stage.scores[sample].cpu().numpy(), stage.units[sample].cpu().numpy()
    rank, ranked = np.zeros(len(scores), dtype=int), np.zeros(len(scores), dtype=int)
    for unit in np.unique(units[units >= 0]):
        mine = np.flatnonzero((units == unit) & ~np.isnan(scores))
        rank[mine[np.argsort(-scores[mine], kind="stable")]] = np.arange(len(mine)) + 1
        ranked[mine] = len(mine)
    return rank, ranked


HEAT = (
    (13, 8, 135),
    (126, 3, 168),
    (204, 71, 120),
    (248, 149, 64),
    (240, 249, 33),
)  # dark blue: ranked last, yellow: first


def _heat(report: Report, sample: int, stage: int) -> np.ndarray | None:
    """``[tokens]`` from 0 (ranked last) to 1 (first) by the nearest scores at or before ``stage``, NaN where not
    ranked; ``None`` if there are none."""
    found = [r for s in report.stages[: stage + 1] if (r := ranks(s, sample)) is not None]
    if not found:
        return None
    rank, ranked = found[-1]
    return np.where(rank > 0, 1 - (rank - 1) / np.maximum(ranked - 1, 1), np.nan)


def _shown(stages: Sequence[StageReport], sample: int, limit: int) -> list[int]:
    """Stages worth a panel: those that changed something and the last; at most ``limit``, evenly spaced."""
    last = len(stages) - 1
    found = [i for i, s in enumerate(stages) if s.tokens_in[sample] != s.tokens_out[sample] or i == last]
    if len(found) <= limit:
        return found
    return sorted({found[round(k * (len(found) - 1) / max(limit - 1, 1))] for k in range(limit)} | {found[-1]})


def token_picture(
    image: Image.Image,
    report: Report,
    sample: int,
    *,
    number: int = 0,
    panel: int = PANEL,
    limit: int = 5,
    boxes: Sequence[tuple[float, float, float, float]] = (),
    caption: str = "",
    heat: bool = False,
) -> Image.Image:
    """The image and one panel per stage: dropped patches are dimmed, merged groups outlined in one colour each, with a
    dot where the group stands.

    Args:
        image: as the model sees it (:func:`model_view`).
        report, sample: whose tokens; ``number`` is the raster within the sample (an image, or one of its tiles).
        panel: longer side of a panel in pixels; at most ``limit`` stages are drawn.
        boxes: rectangles in pixels of ``image`` to outline in the first panel. caption: its title.
        heat: patches are coloured by their rank in the nearest stage so far that has scores, from dark blue (last) to
            yellow (first).

    Raises:
        VtpruneError: the report has no such sample or raster; with ``heat``, none of its stages has scores.
    """
    grid, cell, plain = _plain(image, report, sample, number, panel)
    if heat and all(s.scores is None for s in report.stages):
        raise VtpruneError("heat=True: no stage of this report ranks tokens by a score")
    (rows, columns), size = grid, plain.size
    start = starts(report, sample)[number % len(report.grids[sample])]
    first = plain.copy()
    draw = ImageDraw.Draw(first)
    for left, top, right, bottom in boxes:
        x, y = size[0] / image.width, size[1] / image.height
        draw.rectangle((left * x, top * y, right * x, bottom * y), outline=(255, 60, 60), width=2)
    many = len(report.grids[sample]) > 1
    share = f"{rows * columns} of " if many else ""
    titles, panels = [(caption or "image", f"{share}{report.visual_tokens[sample]} visual tokens")], [first]
    owner = owners(report, sample, number)
    for i in _shown(report.stages, sample, limit):
        stage = report.stages[i]
        here = (
            f"{int((owner[i] == start + np.arange(rows * columns)).sum())} of {rows * columns} here, " if many else ""
        )
        titles.append(
            (
                f"{stage.site}  {stage.method}",
                f"{here}{stage.tokens_in[sample]} -> {stage.tokens_out[sample]} tokens{' in all' if many else ''}",
            )
        )
        warm = _heat(report, sample, i) if heat else None
        panels.append(
            _panel(plain, owner[i], grid, cell, start, None if warm is None else warm[start : start + rows * columns])
        )
    return _strip(titles, panels)


def kept_picture(
    image: Image.Image, report: Report, sample: int = 0, *, number: int = 0, panel: int = PANEL
) -> Image.Image:
    """The tokens left by the last stage that changed something, as one panel of :func:`token_picture` without titles;
    without such a stage the image as it is.

    Raises :class:`VtpruneError` as :func:`token_picture` does.
    """
    grid, cell, plain = _plain(image, report, sample, number, panel)
    changed = [i for i, s in enumerate(report.stages) if s.tokens_in[sample] != s.tokens_out[sample]]
    start = starts(report, sample)[number % len(report.grids[sample])]
    return _panel(plain, owners(report, sample, number)[changed[-1]], grid, cell, start, None) if changed else plain


def _plain(
    image: Image.Image, report: Report, sample: int, number: int, panel: int
) -> tuple[tuple[int, int], int, Image.Image]:
    """The raster's rows and columns, pixels per patch in a panel, and the image in that size."""
    check_sample(report, sample)
    if not -len(report.grids[sample]) <= number < len(report.grids[sample]):
        raise VtpruneError(f"sample {sample} has {len(report.grids[sample])} rasters, there is no raster {number}")
    rows, columns = grid = report.grids[sample][number]
    cell = max(4, panel // max(rows, columns))
    return grid, cell, image.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)


def _strip(titles: Sequence[tuple[str, str]], panels: Sequence[Image.Image]) -> Image.Image:
    w, h = panels[0].size
    out = Image.new("RGB", (len(panels) * (w + GAP) + GAP, h + TITLE + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(out)
    for i, (title, picture) in enumerate(zip(titles, panels, strict=True)):
        x = GAP + i * (w + GAP)
        draw.text((x, GAP - 3), fit(draw, title[0], w, 15), fill=INK, font=font(15))
        draw.text((x, GAP + 16), fit(draw, title[1], w, 13), fill=MUTED, font=font(13))
        out.paste(picture, (x, GAP + TITLE))
    return out


def fit(draw: ImageDraw.ImageDraw, words: str, width: float, size: int) -> str:
    """``words``, shortened with dots to at most ``width`` pixels."""
    face = font(size)
    if draw.textlength(words, font=face) <= width:
        return words
    letters = (
        bisect.bisect_right(range(len(words)), width, key=lambda n: draw.textlength(words[:n] + "...", font=face)) - 1
    )
    return words[: max(letters, 0)].rstrip() + "..."


def _panel(
    image: Image.Image, owner: np.ndarray, grid: tuple[int, int], cell: int, start: int, heat: np.ndarray | None
) -> Image.Image:
    rows, columns = grid
    pixels = np.asarray(image).astype(float)
    grey = pixels.mean(2, keepdims=True)
    dim = 0.78 * np.array(SHADE) + 0.22 * grey
    gone = _cells(owner < 0, grid, cell)
    shown = np.where(gone, dim, pixels)
    if heat is not None:
        stops = np.linspace(0, 1, len(HEAT))
        tint = np.stack([np.interp(np.nan_to_num(heat), stops, channel) for channel in np.array(HEAT).T], 1)
        tinted = (0.3 * grey + 0.7 * _cells(tint, grid, cell)) * np.where(gone, 0.55, 1)
        shown = np.where(_cells(np.isnan(heat), grid, cell), shown, tinted)
    out = Image.fromarray(shown.astype(np.uint8))
    draw = ImageDraw.Draw(out)
    groups = set(owner[(owner >= 0) & (owner != start + np.arange(len(owner)))].tolist())
    field = owner.reshape(grid)
    for r in range(rows):
        for c in range(columns):
            _cell(draw, field, r, c, cell, groups, start)
    return out


def _cells(values: np.ndarray, grid: tuple[int, int], cell: int) -> np.ndarray:
    """``values`` of each patch, ``[tokens]`` or ``[tokens, C]``, for each pixel: ``[H, W, C]``."""
    return values.reshape(*grid, -1).repeat(cell, 0).repeat(cell, 1)


def color(slot: int) -> tuple[int, int, int]:
    """A bright colour per slot; neighbours get hues far apart (golden ratio)."""
    r, g, b = colorsys.hsv_to_rgb(slot * 0.61803398875 % 1, 0.85, 1.0)
    return round(255 * r), round(255 * g), round(255 * b)


def _cell(
    draw: ImageDraw.ImageDraw, field: np.ndarray, r: int, c: int, cell: int, groups: set[int], start: int
) -> None:
    """Lines where this patch's neighbour belongs to another token; coloured and with a dot for a merged group, thin for
    a kept patch beside a dropped one."""
    mine = int(field[r, c])
    if mine < 0:
        return
    x, y = c * cell, r * cell
    e = cell - 1
    sides = (
        ((-1, 0), (x, y, x + e, y)),
        ((1, 0), (x, y + e, x + e, y + e)),
        ((0, -1), (x, y, x, y + e)),
        ((0, 1), (x + e, y, x + e, y + e)),
    )
    for (dr, dc), line in sides:
        inside = 0 <= r + dr < field.shape[0] and 0 <= c + dc < field.shape[1]
        other = int(field[r + dr, c + dc]) if inside else -1
        if mine in groups and other != mine:
            draw.line(line, fill=color(mine), width=2 if cell >= 12 else 1)
        elif mine not in groups and inside and other < 0:
            draw.line(line, fill=(250, 250, 250))
    if mine in groups and mine == start + r * field.shape[1] + c and cell >= 8:
        k = max(2, cell // 7)
        draw.ellipse(
            (x + cell // 2 - k, y + cell // 2 - k, x + cell // 2 + k, y + cell // 2 + k), fill=color(mine), outline=INK
        )


def views_or_blank(processor: Any, inputs: Mapping[str, Any], report: Report) -> tuple[list[Image.Image], str]:
    """The :func:`views` of the first sample; or plain light grey, and why."""
    try:
        return views(processor, inputs, report), ""
    except VtpruneError as e:
        return blank(report, 0), str(e)


def blank(report: Report, sample: int) -> list[Image.Image]:
    """Plain light grey in the place of :func:`views`."""
    return [Image.new("RGB", (16 * columns, 16 * rows), PLAIN) for rows, columns in report.grids[sample]]


def sheet(
    pictures: Sequence[Image.Image], report: Report, sample: int = 0, *, heat: bool = False, caption: str = ""
) -> Image.Image:
    """:func:`token_picture` of every raster of a sample below each other, on ``pictures`` as :func:`views` or
    :func:`blank` give them."""
    many = len(pictures) > 1
    titles = [p.info.get("label", f"raster {i} of {len(pictures)}" if many else "") for i, p in enumerate(pictures, 1)]
    if caption:
        titles[0] = f"{titles[0]}: {caption}" if many else caption
    strips = [
        token_picture(p, report, sample, number=i, heat=heat, caption=title)
        for i, (p, title) in enumerate(zip(pictures, titles, strict=True))
    ]
    out = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), PAPER)
    for i, strip in enumerate(strips):
        out.paste(strip, (0, sum(s.height for s in strips[:i])))
    return out


def contact_sheet(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Labelled pictures below each other. Raises :class:`VtpruneError` if there are none."""
    if not pictures:
        raise VtpruneError("a contact sheet needs at least one picture")
    width = max(p.width for _, p in pictures)
    out = Image.new("RGB", (width, sum(p.height + 30 for _, p in pictures) + GAP), PAPER)
    draw, y = ImageDraw.Draw(out), GAP
    for label, picture in pictures:
        draw.text((GAP, y), fit(draw, label, width - 2 * GAP, 17), fill=INK, font=font(17))
        out.paste(picture, (0, y + 24))
        y += picture.height + 30
    return out


# ----------------------------------------------------------------------------------------------------------- heat map


def row_bias_figure(
    counts: Mapping[str, Sequence[float]], *, title: str = "Share of kept tokens per image row"
) -> Image.Image:
    """Methods below each other, image rows (top first) from left to right. Blue: fewer tokens than an even spread
    gives, orange: more.

    ``counts``: label -> tokens kept in each image row. Raises :class:`VtpruneError` if there are none or they have
        unequal lengths.
    """
    if not counts or len({len(v) for v in counts.values()}) != 1:
        raise VtpruneError("the row figure needs at least one method and the same number of rows for all")
    n, size, left = len(next(iter(counts.values()))), 34, 20
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left += round(max(measure.textlength(label, font=font(14)) for label in counts))
    wide = left + max(n * size, round(measure.textlength(title, font=font(16)) - left + GAP), 250) + GAP
    out = Image.new("RGB", (wide, 72 + len(counts) * size + GAP), PAPER)
    draw = ImageDraw.Draw(out)
    draw.text((GAP, 8), title, fill=INK, font=font(16))
    draw.text((GAP, 28), f"% of kept tokens; an even spread gives {100 / n:.1f}", fill=MUTED, font=font(13))
    for c in range(n):
        draw.text((left + c * size + size / 2, 60), str(c), fill=MUTED, font=font(12), anchor="mm")
    draw.text((left - GAP, 60), "row (0 = top)", fill=MUTED, font=font(12), anchor="rm")
    for r, (label, values) in enumerate(counts.items()):
        y, total = 72 + r * size, max(sum(values), 1e-9)
        draw.text((left - GAP, y + size / 2), label, fill=INK, font=font(14), anchor="rm")
        for c, v in enumerate(values):
            shade = _diverging(v / total * n)
            draw.rectangle((left + c * size, y, left + (c + 1) * size - 2, y + size - 2), fill=shade)
            ink = INK if sum(shade) > 360 else PAPER
            draw.text(
                (left + c * size + size / 2 - 1, y + size / 2),
                f"{100 * v / total:.0f}",
                fill=ink,
                font=font(13),
                anchor="mm",
            )
    return out


def _diverging(ratio: float) -> tuple[int, int, int]:
    """Light grey at 1 (an even share), blue towards a quarter of it, orange towards four times."""
    t = max(-1.0, min(1.0, math.log2(max(ratio, 1e-6)) / 2))
    end, mid = np.array((199, 84, 0) if t > 0 else (32, 86, 166)), np.array((240, 240, 238))
    r, g, b = (int(v) for v in np.rint(mid + abs(t) * (end - mid)))
    return r, g, b


# ----------------------------------------------------------------------------------------------------------------
# report

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #191c21; --muted: #666d78; --line: #dfe2e7; --head: #f4f5f7; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e7e9ec; --muted: #9aa1ac; --line: #2d323a; --head: #1d2026; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 1rem; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, figcaption, footer { color: var(--muted); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th { background: var(--head); } th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
td:last-child { white-space: normal; min-width: 12rem; color: var(--muted); }
figure { margin: 1.2rem 0; } figcaption { margin-bottom: .3rem; }
figure img { max-width: none; height: auto; border: 1px solid var(--line); border-radius: 4px; }
footer { margin-top: 2rem; font-size: .85rem; overflow-wrap: anywhere; }
""".strip()  # noqa: E501


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
    write(path, document(title, CSS, body_html).encode())


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
