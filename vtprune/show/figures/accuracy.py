"""Accuracy against cost: a panel for every accuracy, or the average beside where tokens are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .places import colour_scale, heat_map, spreads
from .reading import OTHERS, Panel, costs, front, highlights, measured, panels
from .style import INK, WIDTH, legend_below, new_figure, panel_grid, styled, without_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COST = {"tokens": "effective tokens, % of dense", "flops": "prefill FLOPs, % of dense"}
FRONT, BAND = 0.28, 0.08  # opacity


def _draw_accuracy(
    ax: Axes, bench: Mapping[str, Any], panel: Panel, look: Mapping[str, Mapping[str, Any]], cost: str
) -> None:
    """One panel: a line per method, dense dashed, the front as steps with intervals."""
    rows, x = measured(bench), costs(bench, cost)
    for name, style in look.items():
        mine = sorted((r for r in rows if r["method"] == name and panel.value(r) is not None), key=x)
        across, up = [100 * x(r) for r in mine], [100 * panel.value(r) for r in mine]
        if mine:
            ax.plot(across, up, label=name, **{"lw": 1.1, "ms": 5, "mew": 1.1, "alpha": 0.95, **style})
    if best := front(rows, x, panel.value):
        _draw_front(ax, panel, best, [100 * x(r) for r in best])
    ax.axhline(100 * panel.dense, color=INK, lw=1, ls=(0, (5, 3)), zorder=1.5, label="_dense")
    ax.set(xlim=(0, 102), ylim=(-3, 105), title=panel.title)
    without_ticks(ax)


def _draw_front(ax: Axes, panel: Panel, best: Sequence[Mapping[str, Any]], across: Sequence[float]) -> None:
    """The front, its rows ringed, and the band of their intervals where all have one."""
    up = [100 * panel.value(r) for r in best]
    look: dict[str, Any] = {"drawstyle": "steps-post", "lw": 5, "alpha": FRONT, "color": INK}
    look |= {"solid_joinstyle": "round", "zorder": 1.4}
    ax.plot([*across, 100], [*up, up[-1]], label="_front", **look)
    ax.plot(across, up, ls="none", marker="o", ms=10, mew=1, mfc="none", mec=INK, zorder=4, label="_best")
    if all(panel.interval(r) for r in best):
        low, high = ([100 * panel.interval(r)[i] for r in best] for i in (0, 1))
        band: dict[str, Any] = {"step": "post", "color": INK, "alpha": BAND, "lw": 0, "zorder": 1}
        ax.fill_between([*across, 100], [*low, low[-1]], [*high, high[-1]], label="_interval", **band)


def _legend(figure: Any, look: Mapping[str, Mapping[str, Any]], intervals: bool) -> None:
    """The legend of accuracy figures."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    own = {name: style for name, style in look.items() if style is not OTHERS}
    handles: list[Any] = [Line2D([], [], label=name, lw=1.3, ms=6, **style) for name, style in own.items()]
    if others := len(look) - len(own):
        handles.append(Line2D([], [], label=f"{others} other methods", **OTHERS))
    handles += [
        Line2D([], [], label="dense", color=INK, lw=1, ls=(0, (5, 3))),
        Line2D([], [], label="Pareto front", color=INK, alpha=FRONT, lw=5),
    ]
    handles += [Patch(color=INK, alpha=BAND, lw=0, label="its 95 % interval")] if intervals else []
    legend_below(figure, handles)


@styled
def pareto(bench: Mapping[str, Any], cost: str = "tokens") -> Figure:
    """Accuracy against cost, a panel for each of :func:`panels`.

    Args:
        bench: a ``vtprune.Bench`` result. cost: ``"tokens"`` (effective tokens) or ``"flops"``, in percent of dense.
    """
    shown, rows = panels(bench), measured(bench)
    look = highlights(bench, cost)
    columns = min(3, len(shown))
    figure = new_figure(WIDTH, 2.75 * math.ceil(len(shown) / columns) + 0.3)
    axes = panel_grid(figure, len(shown), columns)
    for ax, panel in zip(axes, shown, strict=True):
        _draw_accuracy(ax, bench, panel, look, cost)
    for ax in axes[::columns]:
        ax.set_ylabel("accuracy, %")
    for ax in axes[-columns:]:
        ax.set_xlabel(COST[cost])
    _legend(figure, look, any(p.interval(r) for p in shown for r in rows))
    return figure


@styled
def overview(bench: Mapping[str, Any], budget: float, cost: str = "tokens") -> Figure:
    """The picture for a README, made for 900 pixels: average accuracy against cost, beside where in the image tokens
    are kept at ``budget``."""
    rows = spreads(bench, budget, "rows")
    figure = new_figure(9.4 if rows else 5.6, max(3.4, 1.25 + 0.24 * len(rows)))
    axes = figure.subplots(1, 2 if rows else 1, width_ratios=[1, 1.02] if rows else None, squeeze=False)[0]
    panel, look = panels(bench)[0], highlights(bench, cost)
    _draw_accuracy(axes[0], bench, panel, look, cost)
    axes[0].set(title="Average accuracy, %", xlabel=COST[cost])
    if rows:
        mesh = heat_map(axes[1], rows, "image row, 0 = top", size=8)
        axes[1].set_title(f"% of kept tokens per image row, at {100 * budget:g} %")
        colour_scale(figure, mesh, axes[1], 0.8)
    _legend(figure, look, any(panel.interval(r) for r in measured(bench)))
    return figure
