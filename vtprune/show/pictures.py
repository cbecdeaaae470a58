"""Pictures of what was kept: drawing with Pillow only, no plotting library, no model.

Indices are a sample's original visual tokens, raster order on ``grid`` (rows, columns), as :class:`vtprune.Report`
gives them.
"""

from __future__ import annotations

import bisect
import colorsys
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..core.types import VtpruneError
from .heat import tint, warmth
from .token_states import check_sample, owners, starts

if TYPE_CHECKING:
    from ..core.report import Report, StageReport

PANEL = 264  # side of a panel, pixels
FRAME, MANY = 132, 16  # side of a video's frame, pixels; of more frames than that they are half as large
GAP = 10
TITLE = 36
PAPER, INK, MUTED, SHADE = (255, 255, 255), (25, 28, 33), (104, 110, 120), (46, 50, 58)


def font(size: int) -> Any:
    """Pillow's own typeface."""
    return ImageFont.load_default(size)


def _shown(stages: Sequence[StageReport], sample: int, limit: int) -> list[int]:
    """Stages worth a panel: those that changed something and the last; at most ``limit``, evenly spaced."""
    last = len(stages) - 1
    acting = [i for i, s in enumerate(stages) if s.tokens_in[sample] != s.tokens_out[sample] or i == last]
    if len(acting) <= limit:
        return acting
    step = (len(acting) - 1) / max(limit - 1, 1)
    return sorted({acting[round(k * step)] for k in range(limit)} | {acting[-1]})


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
    dot where the group stands; hatched: patches that are part of a token of another raster.

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
    tokens, many = grid[0] * grid[1], len(report.grids[sample]) > 1
    start = starts(report, sample)[number % len(report.grids[sample])]
    share = f"{tokens} of " if many else ""
    titles = [(caption or "image", f"{share}{report.visual_tokens[sample]} visual tokens")]
    panels = [_outlined(plain, boxes, plain.width / image.width, plain.height / image.height)]
    owner = owners(report, sample)
    for i in _shown(report.stages, sample, limit):
        stage = report.stages[i]
        left = int((owner[i][start : start + tokens] == start + np.arange(tokens)).sum())
        counts = f"{stage.tokens_in[sample]} -> {stage.tokens_out[sample]} tokens"
        counts = f"{left} of {tokens} here, {counts} in all" if many else counts
        titles.append((f"{stage.site}  {stage.method}", counts))
        warm = warmth(report, sample, i) if heat else None
        warm = None if warm is None else warm[start : start + tokens]
        panels.append(_panel(plain, owner[i], grid, cell, start, warm))
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
    return _panel(plain, owners(report, sample)[changed[-1]], grid, cell, start, None) if changed else plain


def film_picture(
    images: Sequence[Image.Image],
    report: Report,
    sample: int = 0,
    *,
    first: int = 0,
    limit: int = 5,
    caption: str = "",
    heat: bool = False,
) -> Image.Image:
    """The frames of a video in rows, and again for each stage, as :func:`token_picture` draws one; below each frame how
    many of its tokens are left.

    Args:
        images: of its frames, ``info["label"]`` what to call them. first: the raster of the first one.
        limit, caption, heat: of :func:`token_picture`.

    Raises:
        VtpruneError: as :func:`token_picture`, or there are no frames.
    """
    if not images:
        raise VtpruneError("a picture of a video needs at least one frame")
    side = FRAME if len(images) <= MANY else FRAME // 2
    parts = [_plain(image, report, sample, first + i, side) for i, image in enumerate(images)]
    if heat and all(s.scores is None for s in report.stages):
        raise VtpruneError("heat=True: no stage of this report ranks tokens by a score")
    begin = starts(report, sample)[first:]
    own = [np.arange(start, start + grid[0] * grid[1]) for start, (grid, _, _) in zip(begin, parts, strict=False)]
    total = sum(map(len, own))
    names = [image.info.get("label", f"frame {i} of {len(images)}") for i, image in enumerate(images, 1)]
    names = [name.replace("frame pair", "pair").partition(" of ")[0] for name in names]
    share = "" if total == report.visual_tokens[sample] else f"{total} of "
    head = (caption or "video", f"{len(images)} pictures, {share}{report.visual_tokens[sample]} visual tokens")
    blocks = [_frames(head, [(f"{n}: {len(t)}", p) for n, t, (_, _, p) in zip(names, own, parts, strict=True)])]
    owner = owners(report, sample)
    for i in _shown(report.stages, sample, limit):
        stage, warm = report.stages[i], warmth(report, sample, i) if heat else None
        left = [int((owner[i][tokens] == tokens).sum()) for tokens in own]
        drawn = [
            (
                f"{name}: {n} of {len(tokens)}",
                _panel(plain, owner[i], grid, cell, int(tokens[0]), None if warm is None else warm[tokens]),
            )
            for name, n, tokens, (grid, cell, plain) in zip(names, left, own, parts, strict=True)
        ]
        counts = f"{stage.tokens_in[sample]} -> {stage.tokens_out[sample]} tokens"
        counts = f"{sum(left)} of {total} here, {counts} in all" if share else counts
        blocks.append(_frames((f"{stage.site}  {stage.method}", counts), drawn))
    return _stacked(blocks)


def _frames(title: tuple[str, str], frames: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Labelled frames in rows below two lines."""
    w, h = (max(size) for size in zip(*(f.size for _, f in frames), strict=True))
    small = len(frames) > MANY
    columns, line, size = min(len(frames), MANY if small else MANY // 2), 16, 10 if small else 12
    rows = -(-len(frames) // columns)
    width = max(columns * (w + GAP), PANEL) + GAP
    out = Image.new("RGB", (width, TITLE + GAP + rows * (h + line + GAP)), PAPER)
    draw = ImageDraw.Draw(out)
    draw.text((GAP, GAP - 3), fit(draw, title[0], width - 2 * GAP, 15), fill=INK, font=font(15))
    draw.text((GAP, GAP + 16), fit(draw, title[1], width - 2 * GAP, 13), fill=MUTED, font=font(13))
    for i, (label, picture) in enumerate(frames):
        x, y = GAP + i % columns * (w + GAP), GAP + TITLE + i // columns * (h + line + GAP)
        out.paste(picture, (x, y))
        label = label if draw.textlength(label, font=font(size)) <= w + GAP else label.removeprefix("frame ")
        draw.text((x, y + h + 2), fit(draw, label, w + GAP - 2, size), fill=MUTED, font=font(size))
    return out


def _stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Below each other."""
    out = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER)
    for i, picture in enumerate(pictures):
        out.paste(picture, (0, sum(p.height for p in pictures[:i])))
    return out


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


def _outlined(
    plain: Image.Image, boxes: Sequence[tuple[float, float, float, float]], x: float, y: float
) -> Image.Image:
    """A copy with ``boxes`` in red, stretched by ``x`` and ``y``."""
    out = plain.copy()
    draw = ImageDraw.Draw(out)
    for left, top, right, bottom in boxes:
        draw.rectangle((left * x, top * y, right * x, bottom * y), outline=(255, 60, 60), width=2)
    return out


def _strip(titles: Sequence[tuple[str, str]], panels: Sequence[Image.Image]) -> Image.Image:
    """Panels beside each other, each with two lines above it."""
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

    def long(letters: int) -> float:
        return draw.textlength(words[:letters] + "...", font=face)

    letters = bisect.bisect_right(range(len(words)), width, key=long) - 1
    return words[: max(letters, 0)].rstrip() + "..."


def _panel(
    image: Image.Image, owner: np.ndarray, grid: tuple[int, int], cell: int, start: int, heat: np.ndarray | None
) -> Image.Image:
    """The image behind a stage: ``owner`` of each token of the sample, ``heat`` of the raster's own tokens as
    :func:`.heat.warmth` gives it; the raster begins with token ``start``."""
    rows, columns = grid
    mine = owner[start : start + rows * columns]
    pixels = np.asarray(image).astype(float)
    grey = pixels.mean(2, keepdims=True)
    dim = 0.78 * np.array(SHADE) + 0.22 * grey
    away = (mine >= 0) & ((mine < start) | (mine >= start + len(mine)))
    shown = np.where(_cells(mine < 0, grid, cell), dim, pixels)
    shown = np.where(_cells(away, grid, cell), 0.55 * np.array(SHADE) + 0.45 * shown, shown)
    if heat is not None:
        tinted = (0.3 * grey + 0.7 * _cells(tint(heat), grid, cell)) * np.where(_cells(mine < 0, grid, cell), 0.55, 1)
        shown = np.where(_cells(np.isnan(heat), grid, cell), shown, tinted)
    out = Image.fromarray(shown.astype(np.uint8))
    draw = ImageDraw.Draw(out)
    groups = set(owner[(owner >= 0) & (owner != np.arange(len(owner)))].tolist())
    field = mine.reshape(grid)
    for r in range(rows):
        for c in range(columns):
            _cell(draw, field, r, c, cell, groups, start)
    for place in np.flatnonzero(away).tolist():
        x, y, e = place % columns * cell, place // columns * cell, cell - 1
        draw.line((x, y + e, x + e, y), fill=color(int(mine[place])))
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
        k, x, y = max(2, cell // 7), x + cell // 2, y + cell // 2
        draw.ellipse((x - k, y - k, x + k, y + k), fill=color(mine), outline=INK)


def sheet(
    pictures: Sequence[Image.Image], report: Report, sample: int = 0, *, heat: bool = False, caption: str = ""
) -> Image.Image:
    """:func:`token_picture` of every raster of a sample below each other, :func:`film_picture` of every video, on
    ``pictures`` as :mod:`.views` gives them."""
    many = len(pictures) > 1
    titles = [p.info.get("label", f"raster {i} of {len(pictures)}" if many else "") for i, p in enumerate(pictures, 1)]
    strips, at = [], 0
    for film, frames in itertools.groupby(pictures, lambda p: p.info.get("film")):
        shown = list(frames)
        mine = titles[at : at + len(shown)] if film is None else ["video"]
        if caption and at == 0:
            mine[0] = f"{mine[0]}: {caption}" if many else caption
        if film is None:
            strips += [
                token_picture(p, report, sample, number=i, heat=heat, caption=title)
                for i, (p, title) in enumerate(zip(shown, mine, strict=True), at)
            ]
        else:
            strips.append(film_picture(shown, report, sample, first=at, heat=heat, caption=mine[0]))
        at += len(shown)
    return _stacked(strips)


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
