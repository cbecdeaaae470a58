"""Where information flows through a language model (:mod:`vtprune.measure.flow`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .style import PALETTE, WIDTH, new_figure, styled, without_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BESIDE = {
    "lens": ("logit lens, last token:", "probability of the answer"),
    "visual_lens": ("logit lens, visual rows:", "probability of the answer"),
    "to_image": ("attention of the text", "to the image"),
    "row_bias": ("how far below the middle", "it lies, in heights"),
    "cosine": ("visual rows: cosine of", "the layer's in- and output"),
    "withdrawn": ("image withdrawn from", "here on: KL, nats"),
}


@styled
def flow_figure(told: Mapping[str, Any]) -> Figure:
    """Above one panel per ability: what knocking a flow out around each layer costs, with 95 % intervals; below the
    numbers of :data:`BESIDE` over all questions, those that ``told`` has."""
    abilities = told["abilities"]
    figure = new_figure(WIDTH, 5.6)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    above, below = halves
    axes = above.subplots(1, len(abilities), sharey=True, squeeze=False)[0]
    for ax, (name, one) in zip(axes, abilities.items(), strict=True):
        for i, flow in enumerate(told["flows"]):
            _line(ax, one[flow], PALETTE[i], flow.replace("->", " → "))
        ax.set_title(f"{name}\n{one['correct']} of {one['asked']}", fontsize=8.5)
        ax.set_ylim(bottom=-105)  # no more can be lost than all
        _layers(ax)
    axes[0].set_ylabel(f"answer's probability: change in %\n(windows of {told['window']} layers)")
    above.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(told["flows"]))
    beside = {name: words for name, words in BESIDE.items() if name in abilities["all"]}
    for ax, (name, words) in zip(below.subplots(1, len(beside)), beside.items(), strict=True):
        _line(ax, abilities["all"][name], PALETTE[4], "")
        ax.set_title("\n".join(words), fontsize=8)
        _layers(ax)
    return figure


def _line(ax: Axes, told: Mapping[str, Sequence[Any]], color: str, label: str) -> None:
    mean, half = told["mean"], [h or 0.0 for h in told["half"]]
    x = range(len(mean))
    ax.plot(x, mean, color=color, label=label, marker="o", ms=3, lw=1.6)
    ax.fill_between(
        x,
        [m - h for m, h in zip(mean, half, strict=True)],
        [m + h for m, h in zip(mean, half, strict=True)],
        color=color,
        alpha=0.18,
        lw=0,
    )


def _layers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    without_ticks(ax)
