"""Where methods keep tokens, per image row, with Pillow only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..core.types import VtpruneError
from .pictures import GAP, INK, MUTED, PAPER, font


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
            shade = diverging(v / total * n)
            draw.rectangle((left + c * size, y, left + (c + 1) * size - 2, y + size - 2), fill=shade)
            ink, middle = INK if sum(shade) > 360 else PAPER, (left + c * size + size / 2 - 1, y + size / 2)
            draw.text(middle, f"{100 * v / total:.0f}", fill=ink, font=font(13), anchor="mm")
    return out


def diverging(ratio: float) -> tuple[int, int, int]:
    """Light grey at 1 (an even share), blue towards a quarter of it, orange towards four times."""
    t = max(-1.0, min(1.0, math.log2(max(ratio, 1e-6)) / 2))
    end, mid = np.array((199, 84, 0) if t > 0 else (32, 86, 166)), np.array((240, 240, 238))
    r, g, b = (int(v) for v in np.rint(mid + abs(t) * (end - mid)))
    return r, g, b
