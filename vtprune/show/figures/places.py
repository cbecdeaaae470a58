"""Where in the image tokens are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .reading import at, looks, measured
from .style import MUTED, PAPER, WIDTH, new_figure, styled, without_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEWER, EVEN, MORE, ON_CELL = "#2056a6", "#f0f0ee", "#c75400", "#101216"


def heat_map(ax: Axes, counts: Mapping[str, Sequence[float]], label: str, *, size: float = 8.5) -> Any:
    """Methods from top to bottom, image rows or columns from left to right; each cell is the share of a method's kept
    tokens, coloured by its ratio to an even spread, which has a line of its own at the bottom."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    n = len(next(iter(counts.values())))
    shares = [[v / max(sum(values), 1e-9) for v in values] for values in counts.values()]
    shares.append([1 / n] * n)
    ratios = [[s * n for s in row] for row in shares]
    blend = LinearSegmentedColormap.from_list("spread", [FEWER, EVEN, MORE])
    colours = blend.with_extremes(bad=FEWER, under=FEWER, over=MORE)
    mesh = ax.pcolormesh(ratios, cmap=colours, norm=LogNorm(0.25, 4), edgecolors=PAPER, linewidth=1.4)
    if n <= 16:
        _write_shares(ax, shares, size)
    step = 1 if n <= 16 else math.ceil(n / 12)
    ax.set_xticks([i + 0.5 for i in range(0, n, step)], [str(i) for i in range(0, n, step)])
    ax.set_yticks([i + 0.5 for i in range(len(shares))], [*counts, "even spread"])
    ax.get_yticklabels()[-1].set_fontstyle("italic")
    ax.invert_yaxis()
    ax.axhline(len(counts), color=MUTED, lw=1)
    ax.set_xlabel(label)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    without_ticks(ax)
    return mesh


def _write_shares(ax: Axes, shares: Sequence[Sequence[float]], size: float) -> None:
    """In percent, in the middle of each cell, light on strong colours."""
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            ratio = share * len(row)
            ink = "#fefefe" if ratio < 0.36 or ratio > 3.2 else ON_CELL
            ax.text(x + 0.5, y + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=size, color=ink)


def spreads(bench: Mapping[str, Any], budget: float, key: str) -> dict[str, Sequence[float]]:
    """Method -> tokens kept per image row or column (``key``: ``"rows"``, ``"columns"``) at ``budget``; methods with
    another number of them than the first are left out, as are those that keep none or all."""
    mine = {r["method"]: r[key] for r in at(measured(bench), budget) if r.get(key)}
    counts = {name: mine[name] for name in looks(bench) if name in mine}
    return {name: v for name, v in counts.items() if len(v) == len(next(iter(counts.values())))}


@styled
def kept(bench: Mapping[str, Any], budget: float) -> Figure | None:
    """Where in the image tokens are kept at ``budget``: share per image row and, where known, per image column
    (FEATHER's question, arXiv 2412.13180). ``None`` if no method has rows."""
    rows, columns = spreads(bench, budget, "rows"), spreads(bench, budget, "columns")
    if not rows:
        return None
    parts = [(rows, "image row, 0 = top"), *([(columns, "image column, 0 = left")] if columns else [])]
    figure = new_figure(WIDTH if columns else WIDTH * 0.62, 1.5 + 0.27 * (len(rows) + 1))
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for ax, (counts, label) in zip(axes, parts, strict=True):
        mesh = heat_map(ax, counts, label)
        ax.set_title(f"% of kept tokens per {label.partition(',')[0]}, at {100 * budget:g} %")
    colour_scale(figure, mesh, list(axes))
    return figure


def colour_scale(figure: Any, mesh: Any, axes: Any, shrink: float = 0.45) -> None:
    """What the colours mean, below the heat maps."""
    bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", shrink=shrink, aspect=40, pad=0.03, extend="both")
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["x ¼", "x ½", "even", "x 2", "x 4"])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8.5)
