"""How figures look: colours, settings, lines and markers, frames, legends; and a figure as a file.

The colours named first are turned into others for dark pages (``vtprune/show/inline.py``); data colours have a contrast
of at least 3 on both.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ...core.types import VtpruneError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK, MUTED, LINE, GRID = "#ffffff", "#191c21", "#5f6671", "#b9bec6", "#e6e8ec"
PALETTE = ("#3a7bd5", "#d9730d", "#2a9455", "#d9434f", "#9a62c7", "#a06a3a", "#d455a5", "#148fa8", "#8a8a14", "#6a6ee8")
GREYS = ("#7c828c", "#8b919b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "*", "h")
WIDTH = 12.0  # inches, 1152 px on a page

RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # a name with two $ is a name
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "svg.fonttype": "path",
    "svg.hashsalt": "vtprune",  # the same result gives the same file
}

F = TypeVar("F", bound=Callable[..., Any])


def library() -> Any:
    """matplotlib. Raises :class:`VtpruneError` if it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise VtpruneError("drawing needs matplotlib: pip install 'vtprune[report]'") from e
    return matplotlib


def styled(draw: F) -> F:
    """``draw`` under this module's settings, whatever the user's are."""

    @functools.wraps(draw)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with library().rc_context(RC):
            return draw(*args, **kwargs)

    return inner  # type: ignore[return-value]


NAMELESS = {"png": ("Software",), "svg": ("Date", "Creator", "Format", "Type")}  # what matplotlib would note down


@styled
def encode(figure: Figure, kind: str) -> bytes:
    """The figure as a file; ``kind``: ``"png"`` (170 dots per inch) or ``"svg"`` (text as outlines, no date)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=170, metadata=dict.fromkeys(NAMELESS[kind]))
    return buffer.getvalue()


def styles(names: Iterable[str], plain: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Line and marker per name, no two alike up to 60: a colour with a full marker, or for those in ``plain``
    (baselines) a grey with a hollow one."""
    out: dict[str, dict[str, Any]] = {}
    line: tuple[int, tuple[float, ...]]
    coloured = grey = 0
    for name in names:
        if name in plain:
            color, marker, line, face = GREYS[grey % 2], MARKERS[grey % len(MARKERS)], (0, (2, 1.4)), PAPER
            grey += 1
        else:
            color = face = PALETTE[coloured % len(PALETTE)]
            marker = MARKERS[coloured % len(MARKERS)]
            line = ((0, ()), (0, (6, 2)), (0, (6, 2, 1, 2)))[coloured // len(PALETTE) % 3]
            coloured += 1
        out[name] = {"color": color, "marker": marker, "linestyle": line, "markerfacecolor": face}
    return out


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, ``width`` times ``height`` inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03)
    return Figure(figsize=(width, height), layout=layout)


def panel_grid(figure: Any, count: int, columns: int) -> list[Axes]:
    """``count`` axes with common scales, ``columns`` in a row; the lowest of each column keep their labels."""
    lines = math.ceil(count / columns)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for i, ax in enumerate(axes):
        if i >= count:
            ax.set_visible(False)
        elif i + columns >= count:
            ax.xaxis.set_tick_params(labelbottom=True)
    return list(axes[:count])


def without_ticks(ax: Axes) -> None:
    ax.tick_params(length=0)


def legend_below(figure: Any, handles: Sequence[Any], handle: float = 2.8) -> None:
    """A legend below everything, in as many columns (up to 8) as the figure is wide enough for; the figure grows by its
    height."""
    for columns in range(min(len(handles), 8), 0, -1):
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, handlelength=handle, columnspacing=1.5
        )
        box = legend.get_window_extent()
        if box.width < 0.97 * figure.bbox.width or columns == 1:
            figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
            return
        legend.remove()
