"""Which figures a result file gives, with their captions and what they show in words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .figures import accuracy, bars, places, reading, staircase
from .results import OVERHEAD, ResultFile
from .tables import percent, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Drawing(NamedTuple):
    """A figure to be."""

    name: str  # of its files, without ending
    caption: str
    alt: str  # what it shows, in words
    draw: Callable[[], Figure | None]  # ``None``: the data are not there


def drawings(result: ResultFile, budget: float, cost: str) -> list[Drawing]:
    """The figures of a result file, at the budget nearest to ``budget``."""
    if result.kind == OVERHEAD:
        return [overhead_drawing(result)]
    if result.kind == "vtprune.Times":
        return times_drawings(result, budget)
    return bench_drawings(result, budget, cost) if result.kind == "vtprune.Bench" else []


def overhead_drawing(result: ResultFile) -> Drawing:
    """Pruned runs beside the limit."""
    best = ", ".join(f"{r['method']} {r['pruned_ms']:.0f} of {r['limit_ms']:.0f} ms" for r in result.data["prefill"])
    text = "Pruned runs against the limit: the same model doing the work that is left, with nobody choosing."
    alt = f"Bars per method with the limit marked. Prefill: {best}."
    return Drawing(f"{result.stem}-bars", text, alt, functools.partial(bars.overhead, result.data))


def times_drawings(result: ResultFile, budget: float) -> list[Drawing]:
    """The latency at the nearest budget, if one was timed."""
    times, near = result.data, reading.nearest(result.data["rows"], budget)
    if near is None or not (groups := reading.settings(times, near)):
        return []
    ratios = [
        f"{name}: " + ", ".join(f"{r['method']} {reading.speed(r):.2f}" for r in rows) for name, rows in groups.items()
    ]
    text = (
        f"Time to the first token at {share(near)}: pruned below dense, and the limit, which is pruned without the "
        "time inside the library's own code."
    )
    alt = f"Bars per method at {share(near)}. Pruned over dense: {'; '.join(ratios)}."
    return [Drawing(f"{result.stem}-latency", text, alt, functools.partial(bars.latency, times, near))]


def bench_drawings(result: ResultFile, budget: float, cost: str) -> list[Drawing]:
    """The overview, accuracy against cost, where tokens are kept and how many each layer sees, as far as the rows
    tell."""
    bench, left_out = reading.fewer(result.data)
    rows = reading.measured(bench)
    if not rows:
        return []
    line = _front_line(bench, cost)
    pareto = _pareto_drawing(result.stem, bench, cost, line, left_out)
    near = reading.nearest(rows, budget)
    if near is None:
        return [pareto]
    kept = places.spreads(bench, near, "rows")
    text = f"At a glance: average accuracy against {accuracy.COST[cost]}" + (
        f", and where in the image tokens are kept at {share(near)}." if kept else "."
    )
    draw = functools.partial(accuracy.overview, bench, near, cost)
    out = [Drawing(f"{result.stem}-overview", text, line, draw), pareto]
    if kept:
        out.append(_kept_drawing(result.stem, bench, near, kept))
    if layered := staircase.stairs(bench, near):
        out.append(_layers_drawing(result.stem, bench, near, layered))
    return out


def _front_line(bench: Mapping[str, Any], cost: str) -> str:
    """The Pareto front of the average accuracy, in words."""
    x = reading.costs(bench, cost)
    best = reading.front(reading.measured(bench), x, lambda r: r["average"])
    points = ", ".join(f"{r['method']} {percent(r['average'])} % at {100 * x(r):.0f} %" for r in best)
    return (
        f"Average accuracy against {accuracy.COST[cost]}, a line per method. Pareto front: {points}; dense "
        f"{percent(reading.dense_row(bench)['average'])} %."
    )


def _pareto_drawing(stem: str, bench: Mapping[str, Any], cost: str, line: str, left_out: int) -> Drawing:
    rows, panels = reading.measured(bench), reading.panels(bench)
    best = reading.front(rows, reading.costs(bench, cost), lambda r: r["average"])
    band = " The band is the front's 95 % interval." if any(p.interval(r) for p in panels for r in best) else ""
    less = (
        f" Drawn are {len(rows)} of {len(rows) + left_out} rows, those of the most accurate methods."
        if left_out
        else ""
    )
    text = (
        f"Accuracy against {accuracy.COST[cost]}, at every budget. Baselines are grey. Ringed: no other is more "
        f"accurate for as little.{band}{less}"
    )
    alt = f"Panels: {', '.join(p.title for p in panels)}. {line}"
    return Drawing(f"{stem}-pareto", text, alt, functools.partial(accuracy.pareto, bench, cost))


def _kept_drawing(stem: str, bench: Mapping[str, Any], budget: float, kept: Mapping[str, Sequence[float]]) -> Drawing:
    size = len(next(iter(kept.values())))
    low = max(1, size // 4)
    shares = ", ".join(f"{name} {100 * sum(v[-low:]) / max(sum(v), 1e-9):.0f} %" for name, v in kept.items())
    text = (
        f"Where tokens are kept at {share(budget)}: blue, fewer than an even spread gives; orange, more. FEATHER "
        "(arXiv 2412.13180) found a bias to the bottom."
    )
    alt = (
        f"Heat map of kept tokens at {share(budget)}. Share in the bottom {low} of {size} image rows: {shares}; even: "
        f"{100 * low / size:.0f} %."
    )
    return Drawing(f"{stem}-kept", text, alt, functools.partial(places.kept, bench, budget))


def _layers_drawing(stem: str, bench: Mapping[str, Any], budget: float, rows: Sequence[Mapping[str, Any]]) -> Drawing:
    ends = ", ".join(f"{r['method']} {r['layer_tokens'][0]:.0f} to {r['layer_tokens'][-1]:.0f}" for r in rows)
    text = (
        f"Visual tokens in each layer of the language model at {share(budget)}. The areas are alike: that is what "
        "equal effective tokens means."
    )
    alt = f"Staircases, first to last layer: {ends}."
    return Drawing(f"{stem}-layers", text, alt, functools.partial(staircase.staircase, bench, budget))
