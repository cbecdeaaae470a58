"""Drawing result files: plain dicts in, matplotlib figures out. Nothing here reads or writes files.

Every function raises :class:`VtpruneError` without matplotlib, which is imported when the first figure is drawn. The
colours named first are turned into others for dark pages (``vtprune/show/page.py``); data colours have a contrast of at
least 3 on both.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..core.types import VtpruneError
from ..methods.base import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK, MUTED, LINE, GRID = "#ffffff", "#191c21", "#5f6671", "#b9bec6", "#e6e8ec"
PALETTE = ("#3a7bd5", "#d9730d", "#2a9455", "#d9434f", "#9a62c7", "#a06a3a", "#d455a5", "#148fa8", "#8a8a14", "#6a6ee8")
GREYS = ("#7c828c", "#8b919b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "*", "h")
FEWER, EVEN, MORE, ON_CELL = "#2056a6", "#f0f0ee", "#c75400", "#101216"
FRONT, BAND = 0.28, 0.08  # opacity
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


def _styled(draw: F) -> F:
    """``draw`` under this module's settings, whatever the user's are."""

    @functools.wraps(draw)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with library().rc_context(RC):
            return draw(*args, **kwargs)

    return inner  # type: ignore[return-value]


NAMELESS = {"png": ("Software",), "svg": ("Date", "Creator", "Format", "Type")}  # what matplotlib would note down


@_styled
def encode(figure: Figure, kind: str) -> bytes:
    """The figure as a file; ``kind``: ``"png"`` (170 dots per inch) or ``"svg"`` (text as outlines, no date)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=170, metadata=dict.fromkeys(NAMELESS[kind]))
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------- reading the
# table


def dense_row(bench: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the dense model."""
    return next(r for r in bench["rows"] if r["method"] == "dense")


def measured(bench: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows with numbers, without dense."""
    return [r for r in bench["rows"] if r.get("error") is None and r["method"] != "dense"]


def nearest(rows: Iterable[Mapping[str, Any]], budget: float) -> float | None:
    """The budget of ``rows`` that is nearest to ``budget``; ``None`` if no row has one."""
    return min({r["budget"] for r in rows if r.get("budget") is not None}, key=lambda b: abs(b - budget), default=None)


def at(rows: Iterable[Mapping[str, Any]], budget: float | None) -> list[Mapping[str, Any]]:
    """Rows at exactly ``budget``."""
    return [r for r in rows if r.get("budget") == budget]


def baselines(bench: Mapping[str, Any]) -> set[str]:
    """Names of rows whose stages are all registered as baselines."""

    def plain(row: Mapping[str, Any]) -> bool:
        names = [s["method"] for s in (row.get("recipe") or {}).get("stages", ())] or [row["method"]]
        return all(name in METHODS and METHODS.get(name).paper == "baseline" for name in names)

    return {r["method"] for r in bench["rows"] if plain(r)}


class Panel(NamedTuple):
    """One accuracy of a row, as a fraction: its ``title``, ``value(row)`` and 95 % ``interval(row)`` (``None`` where
    the row has none); ``dense``'s value."""

    title: str
    value: Callable[[Mapping[str, Any]], Any]
    interval: Callable[[Mapping[str, Any]], Any]
    dense: float


def panels(bench: Mapping[str, Any]) -> list[Panel]:
    """The average, the worst ability, group A (if some row has it; dense answers all of it by definition) and every
    ability."""
    base = dense_row(bench)

    def between(name: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda row: (row.get("ability_intervals") or {}).get(name)

    def reached(name: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda row: row["abilities"][name]

    def group(key: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda row: (row.get("group_a") or {}).get(key)

    out = [
        Panel(
            "average of abilities", lambda row: row["average"], lambda row: row.get("average_interval"), base["average"]
        ),
        Panel("worst ability", lambda row: row["worst"], lambda row: between(row["worst_ability"])(row), base["worst"]),
    ]
    if any(r.get("group_a") for r in measured(bench)):
        out.append(Panel("group A", group("accuracy"), group("interval"), 1.0))
    return out + [Panel(a, reached(a), between(a), base["abilities"][a]) for a in bench["abilities"]]


def costs(bench: Mapping[str, Any], cost: str = "tokens") -> Callable[[Mapping[str, Any]], float]:
    """A row's cost as a fraction of dense: effective ``"tokens"`` or ``"flops"``."""
    base = dense_row(bench)["effective_tokens"]
    return (lambda row: row["flops_share"]) if cost == "flops" else (lambda row: row["effective_tokens"] / base)


MOST_METHODS, MOST_POINTS, MOST_STAIRS = (
    60,
    40,
    36,
)  # what a figure can show: lines that look apart, points on one of them, panels


def fewer(bench: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """``bench`` with the rows that figures can show, the most accurate :data:`MOST_METHODS` methods at up to
    :data:`MOST_POINTS` budgets each, and how many rows that leaves out."""
    by: dict[str, list[Mapping[str, Any]]] = {}
    for row in measured(bench):
        by.setdefault(row["method"], []).append(row)
    if len(by) <= MOST_METHODS and all(len(rows) <= MOST_POINTS for rows in by.values()):
        return bench, 0
    best = sorted(by, key=lambda name: -max(r["average"] for r in by[name]))[:MOST_METHODS]
    shown = []
    for name in (n for n in by if n in {*best}):
        rows = sorted(by[name], key=lambda r: r["effective_tokens"])
        step = max(1, -(-len(rows) // MOST_POINTS))
        shown += rows[::step]
    return {**bench, "rows": [dense_row(bench), *shown]}, len(measured(bench)) - len(shown)


def stairs(bench: Mapping[str, Any], budget: float) -> list[Mapping[str, Any]]:
    """The rows of :func:`staircase`: one per method, at most :data:`MOST_STAIRS` of them, the most accurate."""
    mine = {r["method"]: r for r in at(measured(bench), budget) if r.get("layer_tokens")}
    best = sorted(mine, key=lambda name: -mine[name]["average"])[:MOST_STAIRS]
    return [mine[name] for name in looks(bench) if name in {*best}]


def prefill_text(row: Mapping[str, Any]) -> str:
    """The ratio of prefill times with its range; only the range, behind the verdict, where it tells nothing. Empty if
    there is none."""
    if row.get("prefill_ratio") is None:
        return ""
    told = row.get("prefill_verdict") or f"{row['prefill_ratio']:.2f}"
    return told + (
        f" [{row['prefill_range'][0]:.2f}, {row['prefill_range'][1]:.2f}]" if row.get("prefill_range") else ""
    )


def front(
    rows: Iterable[Mapping[str, Any]],
    cost: Callable[[Mapping[str, Any]], float],
    value: Callable[[Mapping[str, Any]], Any],
) -> list[Any]:
    """The Pareto front, cheapest first: rows than which no other is more accurate at the same or a smaller cost."""
    out: list[Mapping[str, Any]] = []
    best = -math.inf
    for row in sorted((r for r in rows if value(r) is not None), key=lambda r: (cost(r), -value(r))):
        if (reached := value(row)) is not None and reached > best:
            best = reached
            out.append(row)
    return out


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
            color, marker, face = (
                PALETTE[coloured % len(PALETTE)],
                MARKERS[coloured % len(MARKERS)],
                PALETTE[coloured % len(PALETTE)],
            )
            line = ((0, ()), (0, (6, 2)), (0, (6, 2, 1, 2)))[coloured // len(PALETTE) % 3]
            coloured += 1
        out[name] = {"color": color, "marker": marker, "linestyle": line, "markerfacecolor": face}
    return out


def looks(bench: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """:func:`styles` of the measured methods: in the table's order, baselines behind the others."""
    plain, names = baselines(bench), dict.fromkeys(r["method"] for r in measured(bench))
    return styles(sorted(names, key=lambda n: n in plain), plain)


# ---------------------------------------------------------------------------------------------------------------
# figures


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(
        figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03)
    )


def _grid(figure: Any, count: int, columns: int) -> list[Axes]:
    """``count`` axes with common scales, ``columns`` in a row; the lowest of each column keep their labels."""
    lines = math.ceil(count / columns)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for i, ax in enumerate(axes):
        if i >= count:
            ax.set_visible(False)
        elif i + columns >= count:
            ax.xaxis.set_tick_params(labelbottom=True)
    return list(axes[:count])


def _clean(ax: Axes) -> None:
    ax.tick_params(length=0)


def _accuracy(
    ax: Axes, bench: Mapping[str, Any], panel: Panel, look: Mapping[str, Mapping[str, Any]], cost: str
) -> None:
    """One panel: a line per method, dense dashed, the front as steps with intervals."""
    rows, x = measured(bench), costs(bench, cost)
    for name, style in look.items():
        mine = sorted((r for r in rows if r["method"] == name and panel.value(r) is not None), key=x)
        if mine:
            ax.plot(
                [100 * x(r) for r in mine],
                [100 * panel.value(r) for r in mine],
                label=name,
                lw=1.1,
                ms=5,
                mew=1.1,
                alpha=0.95,
                **style,
            )
    best = front(rows, x, panel.value)
    if best:
        across, up = [100 * x(r) for r in best], [100 * panel.value(r) for r in best]
        steps: dict[str, Any] = {
            "drawstyle": "steps-post",
            "lw": 5,
            "alpha": FRONT,
            "color": INK,
            "solid_joinstyle": "round",
            "zorder": 1.4,
        }
        ax.plot([*across, 100], [*up, up[-1]], label="_front", **steps)
        ax.plot(across, up, ls="none", marker="o", ms=10, mew=1, mfc="none", mec=INK, zorder=4, label="_best")
        if all(panel.interval(r) for r in best):
            low, high = ([100 * panel.interval(r)[i] for r in best] for i in (0, 1))
            ax.fill_between(
                [*across, 100],
                [*low, low[-1]],
                [*high, high[-1]],
                step="post",
                color=INK,
                alpha=BAND,
                lw=0,
                zorder=1,
                label="_interval",
            )
    ax.axhline(100 * panel.dense, color=INK, lw=1, ls=(0, (5, 3)), zorder=1.5, label="_dense")
    ax.set(xlim=(0, 102), ylim=(-3, 105), title=panel.title)
    _clean(ax)


def _below(figure: Any, handles: Sequence[Any], handle: float = 2.8) -> None:
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


def _key(figure: Any, look: Mapping[str, Mapping[str, Any]], intervals: bool) -> None:
    """The legend of accuracy figures."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], label=name, lw=1.3, ms=6, **style) for name, style in look.items()]
    handles += [
        Line2D([], [], label="dense", color=INK, lw=1, ls=(0, (5, 3))),
        Line2D([], [], label="Pareto front", color=INK, alpha=FRONT, lw=5),
    ]
    handles += [Patch(color=INK, alpha=BAND, lw=0, label="its 95 % interval")] if intervals else []
    _below(figure, handles)


COST = {"tokens": "effective tokens, % of dense", "flops": "prefill FLOPs, % of dense"}


@_styled
def pareto(bench: Mapping[str, Any], cost: str = "tokens") -> Figure:
    """Accuracy against cost, a panel for each of :func:`panels`.

    Args:
        bench: a ``vtprune.Bench`` result. cost: ``"tokens"`` (effective tokens) or ``"flops"``, in percent of dense.
    """
    shown, rows = panels(bench), measured(bench)
    look = looks(bench)
    columns = min(3, len(shown))
    figure = _figure(WIDTH, 2.75 * math.ceil(len(shown) / columns) + 0.3)
    axes = _grid(figure, len(shown), columns)
    for ax, panel in zip(axes, shown, strict=True):
        _accuracy(ax, bench, panel, look, cost)
    for ax in axes[::columns]:
        ax.set_ylabel("accuracy, %")
    for ax in axes[-columns:]:
        ax.set_xlabel(COST[cost])
    _key(figure, look, any(p.interval(r) for p in shown for r in rows))
    return figure


def _spread(ax: Axes, counts: Mapping[str, Sequence[float]], label: str, *, size: float = 8.5) -> Any:
    """Methods from top to bottom, image rows or columns from left to right; each cell is the share of a method's kept
    tokens, coloured by its ratio to an even spread, which has a line of its own at the bottom."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    n = len(next(iter(counts.values())))
    shares = [[v / max(sum(values), 1e-9) for v in values] for values in counts.values()] + [[1 / n] * n]
    colours = LinearSegmentedColormap.from_list("spread", [FEWER, EVEN, MORE]).with_extremes(
        bad=FEWER, under=FEWER, over=MORE
    )
    mesh = ax.pcolormesh(
        [[s * n for s in row] for row in shares], cmap=colours, norm=LogNorm(0.25, 4), edgecolors=PAPER, linewidth=1.4
    )
    for y, row in enumerate(shares):
        for x, share in enumerate(row if n <= 16 else ()):
            strong = share * n < 0.36 or share * n > 3.2
            ax.text(
                x + 0.5,
                y + 0.5,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                fontsize=size,
                color="#fefefe" if strong else ON_CELL,
            )
    step = 1 if n <= 16 else math.ceil(n / 12)
    ax.set_xticks([i + 0.5 for i in range(0, n, step)], [str(i) for i in range(0, n, step)])
    ax.set_yticks([i + 0.5 for i in range(len(shares))], [*counts, "even spread"])
    ax.get_yticklabels()[-1].set_fontstyle("italic")
    ax.invert_yaxis()
    ax.axhline(len(counts), color=MUTED, lw=1)
    ax.set_xlabel(label)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    _clean(ax)
    return mesh


def spreads(bench: Mapping[str, Any], budget: float, key: str) -> dict[str, Sequence[float]]:
    """Method -> tokens kept per image row or column (``key``: ``"rows"``, ``"columns"``) at ``budget``; methods with
    another number of them than the first are left out, as are those that keep none or all."""
    mine = {r["method"]: r[key] for r in at(measured(bench), budget) if r.get(key)}
    found = {name: mine[name] for name in looks(bench) if name in mine}
    return {name: v for name, v in found.items() if len(v) == len(next(iter(found.values())))}


@_styled
def kept(bench: Mapping[str, Any], budget: float) -> Figure | None:
    """Where in the image tokens are kept at ``budget``: share per image row and, where known, per image column
    (FEATHER's question, arXiv 2412.13180). ``None`` if no method has rows."""
    rows, columns = spreads(bench, budget, "rows"), spreads(bench, budget, "columns")
    if not rows:
        return None
    parts = [(rows, "image row, 0 = top"), *([(columns, "image column, 0 = left")] if columns else [])]
    figure = _figure(WIDTH if columns else WIDTH * 0.62, 1.5 + 0.27 * (len(rows) + 1))
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for ax, (counts, label) in zip(axes, parts, strict=True):
        mesh = _spread(ax, counts, label)
        ax.set_title(f"% of kept tokens per {label.partition(',')[0]}, at {100 * budget:g} %")
    _scale(figure, mesh, list(axes))
    return figure


def _scale(figure: Any, mesh: Any, axes: Any, shrink: float = 0.45) -> None:
    """What the colours mean, below the heat maps."""
    bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", shrink=shrink, aspect=40, pad=0.03, extend="both")
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["x ¼", "x ½", "even", "x 2", "x 4"])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8.5)


@_styled
def staircase(bench: Mapping[str, Any], budget: float) -> Figure | None:
    """Visual tokens that each language-model layer processes at ``budget``, a panel per method; the area is what equal
    effective tokens hold equal. ``None`` if no row has ``layer_tokens``."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    look, rows = looks(bench), stairs(bench, budget)
    if not rows:
        return None
    plain, base = baselines(bench), dense_row(bench)["visual_tokens"]
    columns = len(rows) if len(rows) < 4 else min((6, 5, 4), key=lambda c: -len(rows) % c)  # the fewest gaps
    figure = _figure(WIDTH if columns > 3 else WIDTH * columns / 4, 1.55 * math.ceil(len(rows) / columns) + 0.5)
    axes = _grid(figure, len(rows), columns)
    for ax, row in zip(axes, rows, strict=True):
        layers = row["layer_tokens"]
        ax.stairs(
            layers,
            range(len(layers) + 1),
            fill=True,
            color=look[row["method"]]["color"],
            alpha=0.8,
            label=row["method"],
        )
        ax.axhline(base, color=INK, lw=1, ls=(0, (5, 3)), label="_dense")
        ax.axhline(row["effective_tokens"], color=INK, lw=1, ls=":", label="_effective")
        ax.set_title(row["method"], fontstyle="italic" if row["method"] in plain else "normal", fontsize=9.5)
        ends = dict.fromkeys(f"{n:.0f}" for n in (layers[0], layers[-1]))
        ax.text(0.97, 0.84, " → ".join(ends), transform=ax.transAxes, ha="right", va="top")
        ax.set(xlim=(0, len(layers)), ylim=(0, 1.08 * base))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _clean(ax)
    for ax in axes[::columns]:
        ax.set_ylabel("visual tokens")
    for ax in axes[-columns:]:
        ax.set_xlabel("layer")
    handles = [
        Line2D([], [], color=INK, lw=1, ls=ls, label=name)
        for name, ls in (("dense", (0, (5, 3))), ("mean over layers: effective tokens", ":"))
    ]
    _below(figure, handles)
    return figure


@_styled
def overview(bench: Mapping[str, Any], budget: float, cost: str = "tokens") -> Figure:
    """The picture for a README, made for 900 pixels: average accuracy against cost, beside where in the image tokens
    are kept at ``budget``."""
    rows = spreads(bench, budget, "rows")
    figure = _figure(9.4 if rows else 5.6, max(3.4, 1.25 + 0.24 * len(rows)))
    axes = figure.subplots(1, 2 if rows else 1, width_ratios=[1, 1.02] if rows else None, squeeze=False)[0]
    panel = panels(bench)[0]
    _accuracy(axes[0], bench, panel, looks(bench), cost)
    axes[0].set(title="Average accuracy, %", xlabel=COST[cost])
    if rows:
        mesh = _spread(axes[1], rows, "image row, 0 = top", size=8)
        axes[1].set_title(f"% of kept tokens per image row, at {100 * budget:g} %")
        _scale(figure, mesh, axes[1], 0.8)
    _key(figure, looks(bench), any(panel.interval(r) for r in measured(bench)))
    return figure


VISION, LANGUAGE, SCORER = PALETTE[0], PALETTE[1], INK


def first_token(entry: Mapping[str, Any]) -> float | None:
    """Milliseconds to the first token: ``ttft_ms``, or else ``vision_ms`` and ``prefill_ms`` together (``None`` without
    either)."""
    if entry.get("ttft_ms") is not None:
        return entry["ttft_ms"]
    return None if entry.get("prefill_ms") is None else entry["prefill_ms"] + (entry.get("vision_ms") or 0.0)


def speed(row: Mapping[str, Any]) -> float:
    """Pruned over dense time to the first token, of a row that has both."""
    return (first_token(row["pruned"]) or math.nan) / (first_token(row["dense"]) or math.nan)


def settings(times: Mapping[str, Any], budget: float) -> dict[str, list[Mapping[str, Any]]]:
    """Rows at ``budget`` that have both times, under ``"batch 8, 1 image"``."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in at(times["rows"], budget):
        if first_token(row["dense"]) is not None and first_token(row["pruned"]) is not None:
            images = row.get("images", 1)
            out.setdefault(f"batch {row.get('batch', 1)}, {images} image{'s' if images != 1 else ''}", []).append(row)
    return out


@_styled
def latency(times: Mapping[str, Any], budget: float) -> Figure | None:
    """Time to the first token at ``budget``: dense (pale) above pruned, tower and language model apart where known, the
    time inside the library's own hooks hatched at the end; the limit, which is pruned without it, is a line. A panel
    for each batch size and number of images; ``None`` if nothing was timed."""
    found = settings(times, budget)
    if not found:
        return None
    columns = min(2, len(found))
    lines, most = math.ceil(len(found) / columns), max(map(len, found.values()))
    figure = _figure(WIDTH if columns > 1 else WIDTH * 0.62, lines * (0.75 + 0.34 * most) + 0.2)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(found) :]:
        ax.set_visible(False)
    for ax, (title, rows) in zip(axes, found.items(), strict=False):
        for y, row in enumerate(rows):
            _stack(ax, y - 0.2, row["dense"], 0.38)
            _stack(ax, y + 0.2, row["pruned"], 0.95)
            ax.annotate(
                f"x {speed(row):.2f}",
                (first_token(row["pruned"]) or 0, y + 0.2),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK,
            )
        _bars(ax, [r["method"] for r in rows], title, "time to the first token, ms")
    _bar_key(
        figure,
        dense=True,
        stacked=any(r["pruned"].get("vision_ms") for rows in found.values() for r in rows),
        scorer=True,
    )
    return figure


def _stack(ax: Axes, y: float, entry: Mapping[str, Any], alpha: float) -> None:
    total, vision, scorer = first_token(entry) or 0.0, entry.get("vision_ms") or 0.0, entry.get("scorer_ms")
    ax.barh(y, vision, 0.36, color=VISION, alpha=alpha, label="vision")
    ax.barh(y, total - vision, 0.36, left=vision, color=LANGUAGE, alpha=alpha, label="language model")
    if scorer is not None:
        ax.barh(
            y,
            scorer,
            0.36,
            left=total - scorer,
            color="none",
            edgecolor=SCORER,
            hatch="//////",
            linewidth=0,
            label="scorer",
        )
        _limit(ax, y, total - scorer)


def _limit(ax: Axes, y: float, value: float) -> None:
    ax.plot([value, value], [y - 0.24, y + 0.24], color=INK, lw=1.8, solid_capstyle="butt", label="limit", zorder=4)


def _bars(ax: Axes, names: Sequence[str], title: str, label: str) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.45, -0.55)
    ax.set(title=title, xlabel=label)
    ax.grid(False, axis="y")
    ax.margins(x=0.1)
    ax.set_xlim(left=0)
    _clean(ax)


def _bar_key(figure: Any, *, dense: bool, stacked: bool, scorer: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    parts = [("vision tower", VISION), ("language model and the rest", LANGUAGE)] if stacked else [("pruned", LANGUAGE)]
    handles: list[Any] = [Patch(color=c, label=name, alpha=0.95, lw=0) for name, c in parts]
    handles += [Patch(color=LANGUAGE, alpha=0.38, lw=0, label="pale: dense")] if dense else []
    handles += (
        [Patch(facecolor="none", edgecolor=SCORER, hatch="//////", lw=0, label="the library's own code")]
        if scorer
        else []
    )
    handles.append(
        Line2D(
            [],
            [],
            color=INK,
            lw=1.8,
            ls="none",
            marker="|",
            ms=11,
            mew=1.8,
            label="the limit: the same work, nobody choosing",
        )
    )
    _below(figure, handles, 1.6)


PARTS = {"prefill": "Prefill", "decode": "Decoding, per token", "hooks": "Decoding, tiny layers"}


@_styled
def overhead(result: Mapping[str, Any]) -> Figure | None:
    """What ``benchmarks/overhead.py`` measured: pruned (and dense) milliseconds per method with the limit marked.
    ``None`` without rows."""
    found = {title: result[key] for key, title in PARTS.items() if result.get(key)}
    if not found:
        return None
    figure = _figure(WIDTH, 0.75 + 0.32 * max(map(len, found.values())))
    axes = figure.subplots(
        1, len(found), width_ratios=[1.5 if i == 0 and len(found) > 1 else 1 for i in range(len(found))], squeeze=False
    )[0]
    for ax, (title, rows) in zip(axes, found.items(), strict=True):
        for y, row in enumerate(rows):
            both = row.get("dense_ms") is not None
            if both:
                ax.barh(y - 0.2, row["dense_ms"], 0.36, color=LANGUAGE, alpha=0.38, label="dense")
            ax.barh(y + 0.2 * both, row["pruned_ms"], 0.36, color=LANGUAGE, alpha=0.95, label="pruned")
            _limit(ax, y + 0.2 * both, row["limit_ms"])
        _bars(ax, [r["method"] for r in rows], title, "ms")
    _bar_key(figure, dense=any("dense_ms" in r for rows in found.values() for r in rows), stacked=False, scorer=False)
    return figure
