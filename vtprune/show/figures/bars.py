"""Bars of times: latency of dense and pruned, overhead over the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .reading import PARTS, first_token, settings, speed
from .style import INK, PALETTE, WIDTH, legend_below, new_figure, styled, without_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VISION, LANGUAGE, SCORER = PALETTE[0], PALETTE[1], INK


@styled
def latency(times: Mapping[str, Any], budget: float) -> Figure | None:
    """Time to the first token at ``budget``: dense (pale) above pruned, tower and language model apart where known, the
    time inside the library's own hooks hatched at the end; the limit, which is pruned without it, is a line. A panel
    for each batch size and number of images; ``None`` if nothing was timed."""
    panels = settings(times, budget)
    if not panels:
        return None
    columns = min(2, len(panels))
    lines, most = math.ceil(len(panels) / columns), max(map(len, panels.values()))
    figure = new_figure(WIDTH if columns > 1 else WIDTH * 0.62, lines * (0.75 + 0.34 * most) + 0.2)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, rows) in zip(axes, panels.items(), strict=False):
        for y, row in enumerate(rows):
            _stack(ax, y - 0.2, row["dense"], 0.38)
            _stack(ax, y + 0.2, row["pruned"], 0.95)
            end = (first_token(row["pruned"]) or 0, y + 0.2)
            words: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": INK}
            ax.annotate(f"x {speed(row):.2f}", end, (4, 0), **words)
        _bars(ax, [r["method"] for r in rows], title, "time to the first token, ms")
    stacked = any(r["pruned"].get("vision_ms") for rows in panels.values() for r in rows)
    _bar_legend(figure, dense=True, stacked=stacked, scorer=True)
    return figure


@styled
def overhead(result: Mapping[str, Any]) -> Figure | None:
    """What ``benchmarks/overhead.py`` measured: pruned (and dense) milliseconds per method with the limit marked.
    ``None`` without rows."""
    panels = {title: result[key] for key, title in PARTS.items() if result.get(key)}
    if not panels:
        return None
    figure = new_figure(WIDTH, 0.75 + 0.32 * max(map(len, panels.values())))
    widths = [1.5 if i == 0 and len(panels) > 1 else 1 for i in range(len(panels))]
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        for y, row in enumerate(rows):
            both = row.get("dense_ms") is not None
            if both:
                ax.barh(y - 0.2, row["dense_ms"], 0.36, color=LANGUAGE, alpha=0.38, label="dense")
            ax.barh(y + 0.2 * both, row["pruned_ms"], 0.36, color=LANGUAGE, alpha=0.95, label="pruned")
            _limit(ax, y + 0.2 * both, row["limit_ms"])
        _bars(ax, [r["method"] for r in rows], title, "ms")
    dense = any("dense_ms" in r for rows in panels.values() for r in rows)
    _bar_legend(figure, dense=dense, stacked=False, scorer=False)
    return figure


def _stack(ax: Axes, y: float, entry: Mapping[str, Any], alpha: float) -> None:
    """One bar: the tower, then the language model; the library's own code hatched at the end."""
    total, vision, scorer = first_token(entry) or 0.0, entry.get("vision_ms") or 0.0, entry.get("scorer_ms")
    ax.barh(y, vision, 0.36, color=VISION, alpha=alpha, label="vision")
    ax.barh(y, total - vision, 0.36, left=vision, color=LANGUAGE, alpha=alpha, label="language model")
    if scorer is not None:
        hatched: dict[str, Any] = {"color": "none", "edgecolor": SCORER, "hatch": "//////", "linewidth": 0}
        ax.barh(y, scorer, 0.36, left=total - scorer, label="scorer", **hatched)
        _limit(ax, y, total - scorer)


def _limit(ax: Axes, y: float, value: float) -> None:
    """A line across a bar."""
    ax.plot([value, value], [y - 0.24, y + 0.24], color=INK, lw=1.8, solid_capstyle="butt", label="limit", zorder=4)


def _bars(ax: Axes, names: Sequence[str], title: str, label: str) -> None:
    """A panel of bars named on the left, the first at the top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.45, -0.55)
    ax.set(title=title, xlabel=label)
    ax.grid(False, axis="y")
    ax.margins(x=0.1)
    ax.set_xlim(left=0)
    without_ticks(ax)


def _bar_legend(figure: Any, *, dense: bool, stacked: bool, scorer: bool) -> None:
    """The legend of bars, with what they show."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    parts = [("vision tower", VISION), ("language model and the rest", LANGUAGE)] if stacked else [("pruned", LANGUAGE)]
    handles: list[Any] = [Patch(color=c, label=name, alpha=0.95, lw=0) for name, c in parts]
    handles += [Patch(color=LANGUAGE, alpha=0.38, lw=0, label="pale: dense")] if dense else []
    if scorer:
        handles.append(Patch(facecolor="none", edgecolor=SCORER, hatch="//////", lw=0, label="the library's own code"))
    limit: dict[str, Any] = {"color": INK, "lw": 1.8, "ls": "none", "marker": "|", "ms": 11, "mew": 1.8}
    handles.append(Line2D([], [], label="the limit: the same work, nobody choosing", **limit))
    legend_below(figure, handles, 1.6)
