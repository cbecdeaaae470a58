"""A needle in a long prompt, depth by length (``benchmarks/needle.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .style import PAPER, WIDTH, new_figure, panel_grid, styled, without_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOST, FOUND, ON_CELL = "#e9ebef", "#2056a6", "#101216"


@styled
def heat_maps(rows: Sequence[Mapping[str, Any]], kind: str = "needle") -> Figure:
    """A panel per method: for each length (across) and depth (down) the share of the prompts of this ``kind`` whose
    answer was found, in percent."""
    from matplotlib.colors import LinearSegmentedColormap

    mine = [r for r in rows if r["kind"] == kind and "good" in r]
    methods = list(dict.fromkeys(r["method"] for r in mine))
    lengths, depths = (sorted({r[key] for r in mine}) for key in ("length", "depth"))
    columns = min(len(methods), 4)
    lines = -(-len(methods) // columns)
    figure = new_figure(WIDTH * columns / 4, 0.7 + lines * (0.9 + 0.3 * len(depths)))
    colours = LinearSegmentedColormap.from_list("found", [LOST, FOUND])
    for ax, method in zip(panel_grid(figure, len(methods), columns), methods, strict=True):
        shares = []
        for depth in depths:
            cells = [
                [r["good"] for r in mine if (r["method"], r["depth"], r["length"]) == (method, depth, n)]
                for n in lengths
            ]
            shares.append([sum(c) / len(c) if c else float("nan") for c in cells])
        ax.pcolormesh(shares, cmap=colours, vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.4)
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                ink = "#fefefe" if share > 0.5 else ON_CELL
                if share == share:
                    ax.text(x + 0.5, y + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=8.5, color=ink)
        ax.set_xticks([x + 0.5 for x in range(len(lengths))], [str(n) for n in lengths])
        ax.set_yticks([y + 0.5 for y in range(len(depths))], [f"{100 * d:g} %" for d in depths])
        ax.set_ylim(len(depths), 0)  # of shared axes inverting twice would be nothing
        ax.set_title(method)
        ax.set_xlabel("tokens in the prompt")
        ax.set_ylabel("depth of the needle")
        ax.grid(False)
        ax.spines[:].set_visible(False)
        without_ticks(ax)
    return figure
