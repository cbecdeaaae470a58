"""How many visual tokens each layer of the language model sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .reading import at, baselines, dense_row, looks, measured
from .style import INK, WIDTH, legend_below, new_figure, panel_grid, styled, without_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_STAIRS = 36  # panels of one figure


def stairs(bench: Mapping[str, Any], budget: float) -> list[Mapping[str, Any]]:
    """The rows of :func:`staircase`: one per method, at most :data:`MOST_STAIRS` of them, the most accurate."""
    mine = {r["method"]: r for r in at(measured(bench), budget) if r.get("layer_tokens")}
    best = sorted(mine, key=lambda name: -mine[name]["average"])[:MOST_STAIRS]
    return [mine[name] for name in looks(bench) if name in {*best}]


@styled
def staircase(bench: Mapping[str, Any], budget: float) -> Figure | None:
    """Visual tokens that each language-model layer processes at ``budget``, a panel per method; the area is what equal
    effective tokens hold equal. ``None`` if no row has ``layer_tokens``."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    look, rows = looks(bench), stairs(bench, budget)
    if not rows:
        return None
    base = dense_row(bench)["visual_tokens"]
    columns = len(rows) if len(rows) < 4 else min((6, 5, 4), key=lambda c: -len(rows) % c)  # the fewest gaps
    figure = new_figure(WIDTH if columns > 3 else WIDTH * columns / 4, 1.55 * math.ceil(len(rows) / columns) + 0.5)
    axes = panel_grid(figure, len(rows), columns)
    plain = baselines(bench)
    for ax, row in zip(axes, rows, strict=True):
        _draw_stairs(ax, row, base, look[row["method"]]["color"])
        ax.set_title(row["method"], fontstyle="italic" if row["method"] in plain else "normal", fontsize=9.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        without_ticks(ax)
    for ax in axes[::columns]:
        ax.set_ylabel("visual tokens")
    for ax in axes[-columns:]:
        ax.set_xlabel("layer")
    handles = [
        Line2D([], [], color=INK, lw=1, ls=ls, label=name)
        for name, ls in (("dense", (0, (5, 3))), ("mean over layers: effective tokens", ":"))
    ]
    legend_below(figure, handles)
    return figure


def _draw_stairs(ax: Axes, row: Mapping[str, Any], base: float, color: str) -> None:
    """The tokens of each layer, those of the dense model dashed, their mean dotted."""
    layers = row["layer_tokens"]
    ax.stairs(layers, range(len(layers) + 1), fill=True, color=color, alpha=0.8, label=row["method"])
    ax.axhline(base, color=INK, lw=1, ls=(0, (5, 3)), label="_dense")
    ax.axhline(row["effective_tokens"], color=INK, lw=1, ls=":", label="_effective")
    ends = dict.fromkeys(f"{n:.0f}" for n in (layers[0], layers[-1]))
    ax.text(0.97, 0.84, " → ".join(ends), transform=ax.transAxes, ha="right", va="top")
    ax.set(xlim=(0, len(layers)), ylim=(0, 1.08 * base))
