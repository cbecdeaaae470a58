"""The report: what the page says and what the figures show is what the result files hold."""

from __future__ import annotations

import base64
import copy
import errno
import itertools
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

import vtprune
from vtprune.cli import main
from vtprune.show import drawings, inline, results, sections
from vtprune.show import page as report
from vtprune.show.figures import accuracy, places, reading, staircase, style
from vtprune.show.figures import bars as bar_figures

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["colour", "count"]
NASTY = '<b>split</b> & "2"'


def row(method: str, budget: float | None, level: float, tokens: float, **more) -> dict:
    """A row of a table of version 2; ``level`` is the accuracy of the first ability, the second is 0.1 lower."""
    abilities = {"colour": level, "count": level - 0.1}
    spans = {k: [v - 0.05, v + 0.04] for k, v in abilities.items()}
    gap = {"difference": level - 0.95, "difference_interval": [level - 1, level - 0.9]}
    return {
        "method": method,
        "budget": budget,
        "note": "",
        "abilities": abilities,
        "ability_intervals": spans,
        "average": level - 0.05,
        "worst": level - 0.1,
        "worst_ability": "count",
        "sets": {"toys": {"accuracy": level, "samples": 40, "interval": [0.1, 0.9], **gap}},
        "effective_tokens": tokens,
        "visual_tokens": 16.0,
        "flops_share": 0.1 + tokens / 20,
        "kv_share": tokens / 16,
        "relative_average": level / 0.97,
        "relative_worst": level / 0.99,
        "nominal_tokens": tokens - 1,
        "prefill_ratio": 1.2 - level / 2,
        "rows": [tokens, 0.0, 2.0, 3.0],
        "columns": [1.0, 1.0, tokens, 5.0],
        "layer_tokens": [16.0, tokens, tokens - 1],
        "group_a": {"accuracy": level / 2, "samples": 13, "interval": [level / 3, level]},
        "recipe": {"name": method, "stages": [{"method": method.split()[0], "keep": 4, "options": {}}]},
        **more,
    }


def bench() -> dict:
    dense = row("dense", 1.0, 0.97, 16.0, rows=None, columns=None, group_a=None, recipe=None, layer_tokens=[16.0] * 3)
    rows = [
        dense,
        row("tome", 0.5, 0.81, 8.0),
        row("tome", 0.25, 0.62, 4.0),
        row("fastv", 0.5, 0.84, 7.5, note=NASTY),
        row("fastv", 0.25, 0.55, 4.0),
        row("uniform", 0.5, 0.7, 8.0),
        row("uniform", 0.25, 0.66, 4.0),
        *({"method": "flowcut", "budget": b, "note": "", "error": "no <class> token"} for b in (0.5, 0.25)),
        row("dpvr-lf (trained)", None, 0.77, 9.0, rows=None, columns=None, group_a=None),
    ]
    about = {
        "command": "vtprune bench --x '<y>'",
        "device": {"name": "a <CPU>", "threads": 2, "dtype": "float32"},
        "versions": {"torch": "9.9"},
    }
    return {
        "type": "vtprune.Bench",
        "version": 2,
        **about,
        "abilities": KINDS,
        "sets": ["toys"],
        "samples": 40,
        "budgets": [0.5, 0.25],
        "rows": rows,
    }


def times() -> dict:
    rows = []
    for method, batch in itertools.product(("tome", "uniform"), (1, 8)):
        dense = {
            "e2e_ms": 91.5,
            "ttft_ms": 50.0 * batch,
            "vision_ms": 20.0 * batch,
            "prefill_ms": 30.0 * batch,
            "decode_ms": 4.25,
            "peak_bytes": 3 * 2**20,
        }
        pruned = {
            **dense,
            "ttft_ms": 31.5 * batch,
            "vision_ms": 15.0 * batch,
            "scorer_ms": 2.5 if method == "tome" else None,
            "peak_bytes": None,
        }
        rows.append(
            {
                "method": method,
                "budget": 0.25,
                "batch": batch,
                "images": 1,
                "tokens": 576,
                "dense": dense,
                "pruned": pruned,
            }
        )
    even = [
        {"method": "tome", "batch": 1, "images": 1, "budgets": [0.5, 0.25], "ratios": [1.02, 0.63], "pays_below": 0.47}
    ]
    even += [
        {"method": "uniform", "batch": 1, "images": 1, "budgets": [0.5, 0.25], "ratios": [1.3, 1.1], "pays_below": None}
    ]
    return {
        "type": "vtprune.Times",
        "version": 1,
        "command": "c",
        "versions": {},
        "device": {},
        "rows": rows,
        "break_even": even,
    }


def vit() -> dict:
    rows = [
        {"method": "tome", "budget": 0.5, "tokens": 98.53219, "top1": 0.8125, "skipped": [1]},
        {"method": "pitome", "budget": 0.5, "images": 1234567, "why": "<i>"},
    ]
    return {"type": "vtprune.Vit", "version": 1, "rows": rows}


def overhead() -> dict:
    ratio = {"median": 1.017, "p20": 1.006, "p80": 1.052}
    prefill = [
        {"method": m, "dense_ms": 100.0 + i, "limit_ms": 40.0 + i, "pruned_ms": 44.0 + i, "overhead": ratio}
        for i, m in enumerate(("tome", "fastv"))
    ]
    decode = [{"method": "fastv", "limit_ms": 5.0, "pruned_ms": 5.5, "overhead": ratio}]
    return {"prefill": prefill, "decode": decode, "hooks": decode, "command": "overhead"}


def put(folder: Path, **files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / f"{name}.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and tables by caption: a list of rows of cell texts, the header first; ``best``:
    texts of marked cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.best: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "table":
            self.rows, self.caption = [], ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(
                "best" if attrs.get("class") == "best" else "aside" if attrs.get("class") in ("tag", "hidden") else tag
            )

    def handle_endtag(self, tag):
        self.open.pop()
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if "caption" in self.open:
            self.caption += data
        elif {"td", "th", "best"} & set(self.open) and "aside" not in self.open:
            self.rows[-1][-1] += data
            if "best" in self.open:
                self.best.append(data)

    def column(self, caption: str, name: str) -> dict[str, str]:
        """Row name -> cell."""
        (rows,) = (v for k, v in self.tables.items() if k.startswith(caption))
        i = [h.replace("\u00a0", " ") for h in rows[0]].index(name)
        return {r[0]: r[i] for r in rows[1:]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One report of everything, by the command line: ``(folder, what it printed)``."""
    folder = put(
        tmp_path_factory.mktemp("results"),
        accuracy=bench(),
        speed=times(),
        vits=vit(),
        engine=overhead(),
        other={"a": 1},
        tables="[1, 2]",
    )
    capture = pytest.MonkeyPatch()
    printed: list[str] = []
    capture.setattr("builtins.print", lambda *a, **k: printed.append(" ".join(map(str, a))))
    try:
        assert main.main(["report", str(folder), "--out", str(folder / "new" / "site"), "--json"]) == 0
    finally:
        capture.undo()
    return folder / "new" / "site", json.loads(printed[0])


@pytest.fixture(scope="module")
def page(made) -> Page:
    return Page((made[0] / "report.html").read_text())


def refused(capsys, *words: str, code: int = 1) -> str:
    assert main.main(["report", *words]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vtprune: error: "), lines
    return lines[0]


# ------------------------------------------------------------------------------------------------------------------
# page


def test_files_are_named_and_written(made):
    out, told = made
    drawn = {f"accuracy-{n}" for n in ("overview", "pareto", "kept", "layers")} | {"speed-latency", "engine-bars"}
    assert {p.name for p in out.iterdir()} == {
        "report.html",
        *(f"{n}.{kind}" for n in drawn for kind in ("png", "svg")),
    }
    assert told["page"] == str(out / "report.html") and {Path(p) for p in told["files"]} == set(out.iterdir())
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in out.glob("*.png")) and all(
        b"<svg" in p.read_bytes() for p in out.glob("*.svg")
    )


def test_the_page_needs_nothing_from_elsewhere(made, page):
    text = (made[0] / "report.html").read_text()
    drawings = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(drawings) == 6 and all(d.startswith("data:image/svg+xml;base64,") for d in drawings)
    inside = [base64.b64decode(d.partition(",")[2]).decode() for d in drawings]
    for words in (text, *inside):
        assert "://" not in re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"', "", words)
        assert "url(" not in re.sub(r"url\(#\w+\)", "", words) and "@import" not in words
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(v.startswith(("#", "data:")) for _, attrs in page.tags for k, v in attrs.items() if k in ("href", "src"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"} == set(ids)


def test_it_reads_in_the_dark_on_a_phone_and_from_the_keyboard(made, page):
    text = (made[0] / "report.html").read_text()
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text and "overflow-x: auto" in text
    assert all(len(attrs["alt"]) > 30 for tag, attrs in page.tags if tag == "img")
    regions = [attrs for _, attrs in page.tags if attrs.get("class") == "wide"]
    assert len(regions) == len(page.tables) + 6 and all(r["tabindex"] == "0" and r["aria-label"] for r in regions)
    for tag, attrs in page.tags:
        if tag == "img":
            svg = base64.b64decode(attrs["src"].partition(",")[2]).decode()
            style, rest = re.search(r"<style>.*?</style>", svg).group(), re.sub(r"<style>.*?</style>", "", svg, count=1)
            assert "prefers-color-scheme: dark" in style and not any(c in rest for c in inline.DARK)


@pytest.mark.ci
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_it_fits_a_phone_and_a_small_screen(chromium, width):
    """The committed results: the page never scrolls sideways, figures fit, on 1280 pixels tables as well."""
    tab = chromium.new_page(viewport={"width": width, "height": 800})
    tab.set_content(report.page(ROOT / "benchmarks" / "results"))
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("figure img").count() > 5
    wide = "(some) => [...document.querySelectorAll(some)].filter((n) => n.scrollWidth > n.clientWidth + 1).length"
    assert tab.evaluate("() => [...document.images].every((i) => i.clientWidth <= innerWidth)")
    assert tab.evaluate(wide, "figure .wide") == 0
    if width == 1280:
        assert tab.evaluate(wide, ".wide") == 0
    tab.close()


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_every_row_and_value_of_a_budget(page, budget):
    caption, table = (
        f"At {100 * budget:g} %",
        [r for r in bench()["rows"] if r["budget"] == budget and "error" not in r],
    )
    average = page.column(caption, "average %")
    assert list(average) == ["dense", *(r["method"] for r in sorted(table, key=lambda r: -r["average"]))]
    for r in table:
        group, m = r["group_a"], r["method"]
        low, high = group["interval"]
        shown = {
            "average %": f"{100 * r['average']:.1f}",
            "of dense %": f"{100 * r['relative_average']:.1f}",
            "worst ability %": f"{100 * r['worst']:.1f} count",
            "group A %": f"{100 * group['accuracy']:.1f} [{100 * low:.0f}, {100 * high:.0f}]",
            "tokens left": f"{r['nominal_tokens']:.1f}".removesuffix(".0"),
            "effective tokens": f"{r['effective_tokens']:.1f}".removesuffix(".0"),
            "FLOPs %": f"{100 * r['flops_share']:.0f}",
            "KV %": f"{100 * r['kv_share']:.0f}",
            "prefill x": f"{r['prefill_ratio']:.2f}",
            "note": r["note"],
        }
        assert {name: page.column(caption, name)[m] for name in shown} == shown
        lower, upper = r["ability_intervals"]["count"]
        detail = page.column(f"Accuracy in percent per ability, {100 * budget:g} %", "count")[m]
        assert detail == f"{100 * r['abilities']['count']:.0f} [{100 * lower:.0f}, {100 * upper:.0f}]"
        gap = r["sets"]["toys"]
        told = page.column(f"Accuracy in percent per ability, {100 * budget:g} %", "toys: points from dense")[m]
        assert told == "{:+.1f} [{:+.0f}, {:+.0f}]".format(
            *(100 * v for v in (gap["difference"], *gap["difference_interval"]))
        )


def test_own_schedules_and_refusals_have_their_places(page):
    assert page.column("Recipes on their own schedule", "average %") == {"dense": "92.0", "dpvr-lf (trained)": "72.0"}
    assert page.tables["Refused"] == [["method", "budgets", "reason"], ["flowcut", "50 %, 25 %", "no <class> token"]]


def test_the_best_of_a_column_is_marked_and_baselines_are_told_apart(made, page):
    assert page.best[:7] == [
        "79.0",
        "86.6",
        "74.0 count",
        "42.0",
        " [28, 84]",
        "48",
        "47",
    ]  # 50 %: fastv everywhere
    text = (made[0] / "report.html").read_text()
    lines = [line for line in text.splitlines() if line.startswith('<tr class="baseline">')]
    assert len(lines) == 2 and all('uniform<span class="tag">baseline</span>' in line for line in lines)


def test_times_break_even_vits_and_overhead(page):
    head, *rows = page.tables["Medians in milliseconds"]
    tome = dict(zip((h.replace("\u00a0", " ") for h in head), rows[1], strict=True))
    assert len(rows) == 4 and [tome[k] for k in ("method", "budget", "batch", "tokens", "first token x")] == [
        "tome",
        "25 %",
        "8",
        "576",
        "0.63",
    ]
    assert [tome[k] for k in ("first token: dense", "first token: pruned", "own code", "peak MiB: dense")] == [
        "400",
        "252",
        "2.5",
        "3",
    ]
    assert "peak MiB: pruned" not in tome  # nobody measured it
    (even,) = (v for k, v in page.tables.items() if k.startswith("Pruned time over dense"))
    assert even[1:] == [
        ["tome", "1", "1", "1.02", "0.63", "47 %"],
        ["uniform", "1", "1", "1.30", "1.10", "at none of them"],
    ]
    assert page.tables["Vision transformers, vits"] == [
        ["method", "budget", "tokens", "top1", "images", "why"],
        ["tome", "0.5", "98.5", "0.812", "–", "–"],
        ["pitome", "0.5", "–", "–", "1234567", "<i>"],
    ]
    (bars,) = (v for k, v in page.tables.items() if k.startswith("Milliseconds;"))
    assert bars[1] == ["tome", "Prefill", "100.00", "40.00", "44.00", "1.02 [1.01, 1.05]"] and len(bars) == 5


def test_what_users_wrote_is_escaped_and_strangers_are_named(made, page):
    text = (made[0] / "report.html").read_text()
    assert not {"b", "i", "y", "class", "cpu"} & {tag for tag, _ in page.tags}
    for words in (
        "&lt;b&gt;split&lt;/b&gt; &amp; &quot;2&quot;",
        "&lt;y&gt;",
        "a &lt;CPU&gt;, 2 threads, float32",
        "torch 9.9",
    ):
        assert words in text
    assert "Not shown, of another type: other.json, tables.json" in text


# ---------------------------------------------------------------------------------------------------------------
# figures


def lines(ax, label: str):
    """The line of that label, as points in percent."""
    (line,) = (x for x in ax.lines if x.get_label() == label)
    return line.get_xydata()


def percent(rows, x, y) -> np.ndarray:
    return 100 * np.array([[x(r), y(r)] for r in sorted(rows, key=x)])


@pytest.mark.parametrize("cost", ["tokens", "flops"])
def test_accuracy_figures_show_the_table(cost):
    data = bench()
    x = {"tokens": lambda r: r["effective_tokens"] / 16, "flops": lambda r: r["flops_share"]}[cost]
    values = {
        "average of abilities": lambda r: r["average"],
        "worst ability": lambda r: r["worst"],
        "group A": lambda r: r["group_a"]["accuracy"],
        "colour": lambda r: r["abilities"]["colour"],
        "count": lambda r: r["abilities"]["count"],
    }
    figure = accuracy.pareto(data, cost)
    axes = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title("left") or ax.get_title() for ax in axes] == list(values)
    for ax, y in zip(
        [*axes, accuracy.overview(data, 0.25, cost).axes[0]],
        [*values.values(), values["average of abilities"]],
        strict=True,
    ):
        for name in ("tome", "fastv", "uniform", "dpvr-lf (trained)"):
            mine = [r for r in data["rows"] if r["method"] == name and (r.get("group_a") or y is not values["group A"])]
            if mine:
                np.testing.assert_allclose(lines(ax, name), percent(mine, x, y))
        assert lines(ax, "_dense")[0][1] == pytest.approx(100 * (1 if y is values["group A"] else y(data["rows"][0])))
    best = [r for r in data["rows"] if (r["method"], r["budget"]) in (("uniform", 0.25), ("fastv", 0.5))]
    np.testing.assert_allclose(lines(axes[0], "_best"), percent(best, x, values["average of abilities"]))
    np.testing.assert_allclose(lines(axes[0], "_front")[:2], lines(axes[0], "_best"))
    (band,) = (c for c in axes[3].collections if c.get_label() == "_interval")
    corners = {round(v, 6) for v in band.get_paths()[0].vertices[:, 1]}
    assert corners >= {round(100 * v, 6) for r in best for v in r["ability_intervals"]["colour"]}
    assert not axes[0].collections  # the table has no interval of the average


def test_the_front_is_what_nothing_else_beats():
    points = [
        {"c": c, "v": v} for c, v in ((3, 0.5), (1, 0.2), (2, 0.5), (2, 0.4), (4, 0.9), (5, 0.9), (1, 0.1), (0.5, None))
    ]
    assert [(p["c"], p["v"]) for p in reading.front(points, lambda r: r["c"], lambda r: r["v"])] == [
        (1, 0.2),
        (2, 0.5),
        (4, 0.9),
    ]


def test_heat_maps_show_shares_of_kept_tokens():
    figure = places.kept(bench(), 0.25)
    for ax, counts in zip(figure.axes, ([4.0, 0.0, 2.0, 3.0], [1.0, 1.0, 4.0, 5.0]), strict=False):
        assert [t.get_text() for t in ax.get_yticklabels()] == ["tome", "fastv", "uniform", "even spread"]
        ratios = 4 * np.array(counts) / sum(counts)
        np.testing.assert_allclose(np.ma.getdata(ax.collections[0].get_array()), [ratios, ratios, ratios, [1.0] * 4])
        assert [t.get_text() for t in ax.texts[:4]] == [f"{25 * r:.0f}" for r in ratios]
    assert places.kept({**bench(), "rows": [r for r in bench()["rows"] if not r.get("rows")]}, 0.25) is None


def test_staircases_show_the_tokens_of_each_layer():
    figure = staircase.staircase(bench(), 0.5)
    found = {ax.get_title("left") or ax.get_title(): ax for ax in figure.axes if ax.get_visible()}
    assert list(found) == ["tome", "fastv", "uniform"]
    for name, tokens in (("tome", 8.0), ("fastv", 7.5), ("uniform", 8.0)):
        values, edges, _ = found[name].patches[0].get_data()
        assert values.tolist() == [16.0, tokens, tokens - 1] and list(edges) == [0, 1, 2, 3]
        assert lines(found[name], "_effective")[0][1] == tokens and lines(found[name], "_dense")[0][1] == 16


def bars(ax, label: str) -> list[tuple[float, float]]:
    """(start, width) of the bars of that label, from top to bottom."""
    found = [p for c in ax.containers if c.get_label() == label for p in c.patches]
    return [(p.get_x(), p.get_width()) for p in found]


def test_latency_bars_and_the_limit():
    figure = bar_figures.latency(times(), 0.25)
    assert [ax.get_title("left") or ax.get_title() for ax in figure.axes] == ["batch 1, 1 image", "batch 8, 1 image"]
    ax = figure.axes[1]
    assert bars(ax, "vision") == [(0, 160), (0, 120)] * 2  # dense, pruned, for each method
    assert bars(ax, "language model") == [(160, 240), (120, 132)] * 2
    assert bars(ax, "scorer") == [(249.5, 2.5)]
    assert [line.get_xdata()[0] for line in ax.lines if line.get_label() == "limit"] == [249.5]
    assert bar_figures.latency({**times(), "rows": []}, 0.25) is None


def test_overhead_bars_and_the_limit():
    prefill, decode, _ = bar_figures.overhead(overhead()).axes
    assert bars(prefill, "dense") == [(0, 100), (0, 101)] and bars(prefill, "pruned") == [(0, 44), (0, 45)]
    assert [line.get_xdata()[0] for line in prefill.lines] == [40, 41] and bars(decode, "dense") == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "make",
    [
        accuracy.pareto,
        lambda d: places.kept(d, 0.25),
        lambda d: staircase.staircase(d, 0.5),
        lambda d: accuracy.overview(d, 0.25),
    ],
)
def test_nothing_is_cut_off(make):
    data = bench()
    data["rows"] += [{**r, "method": f"a-long-name-{i}", "recipe": None} for i in range(12) for r in data["rows"][1:3]]
    inside(make(data))


def inside(figure) -> None:
    """Whether everything drawn lies on the figure's paper; inches, one pixel of tolerance."""
    figure.draw_without_rendering()
    (left, bottom), (right, top) = figure.get_tightbbox().get_points()
    width, height = figure.get_size_inches()
    assert left > -0.01 and bottom > -0.01 and right < width + 0.01 and top < height + 0.01, (
        left,
        bottom,
        right,
        top,
        width,
        height,
    )


@pytest.mark.ci
def test_no_bar_label_is_cut_off():
    inside(bar_figures.latency(times(), 0.25))
    inside(bar_figures.latency({"rows": times()["rows"][:1]}, 0.25))
    inside(bar_figures.overhead(json.loads((ROOT / "benchmarks/results/overhead-cpu.json").read_text())))


def test_methods_stay_tellable_apart():
    names = [f"m{i}" for i in range(30)]
    look = style.styles(names, names[24:])
    assert len({(s["color"], s["marker"], s["linestyle"], s["markerfacecolor"]) for s in look.values()}) == 30
    for color in (*style.PALETTE, *style.GREYS):
        for paper in (style.PAPER, inline.DARK[style.PAPER]):
            a, b = sorted(
                np.dot(
                    [0.2126, 0.7152, 0.0722],
                    [((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in to_rgb(c)],
                )
                for c in (color, paper)
            )
            assert (b + 0.05) / (a + 0.05) >= 3, (color, paper)


def test_of_many_methods_those_on_the_front_and_baselines_have_looks_of_their_own():
    """The last of them is the best at the smaller budget, the first at the larger one."""
    small = [row(f"m{i}", 0.25, 0.4 + i / 100, 4.0) for i in range(14)]
    large = [row(f"m{i}", 0.5, 0.9 - i / 100, 8.0) for i in range(14)]
    table = {**bench(), "rows": [bench()["rows"][0], *small, *large, row("uniform", 0.25, 0.3, 4.0)]}
    look = reading.highlights(table)
    assert {name for name, own in look.items() if own is not reading.OTHERS} == {"m0", "m13", "uniform"}
    figure = accuracy.pareto(table)
    shown = {line.get_label(): to_hex(line.get_color()) for line in figure.axes[0].lines}
    assert {name for name, color in shown.items() if color == style.LINE} == {f"m{i}" for i in range(1, 13)}
    (legend,) = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said[:4] == ["m0", "m13", "uniform", "12 other methods"]
    assert reading.highlights(bench()) == reading.looks(bench())


def test_hollow_markers_belong_to_baselines_only():
    ax = accuracy.pareto(bench()).axes[0]
    hollow = {
        line.get_label()
        for line in ax.lines
        if to_hex(line.get_markerfacecolor()) == style.PAPER and not line.get_label().startswith("_")
    }
    assert hollow == {"uniform"}


def test_the_same_result_gives_the_same_drawing():
    one, two = (style.encode(places.kept(bench(), 0.25), "svg") for _ in range(2))
    assert one == two


# -------------------------------------------------------------------------------------------------------- files and
# errors


def test_a_table_of_version_1(tmp_path):
    """The checked-in one, without what came with version 2: what it does not have is left out, what it has is there."""
    data = json.loads((ROOT / "benchmarks/results/bench.json").read_text())
    strip = (
        "columns",
        "layer_tokens",
        "nominal_tokens",
        "ability_intervals",
        "relative_average",
        "relative_worst",
        "group_a",
        "average_interval",
    )
    data = {**data, "version": 1, "rows": [{k: v for k, v in r.items() if k not in strip} for r in data["rows"]]}
    found, unknown = results.load(put(tmp_path, demo=data))
    planned = drawings.drawings(found[0], 0.25, "tokens")
    assert (
        unknown == []
        and [d.name for d in planned] == ["demo-overview", "demo-pareto", "demo-kept"]
        and all(d.draw() is not None for d in planned)
    )
    page = Page(report.page_html(found, unknown, {}, "t"))
    heads = page.tables["At 25 % of the dense model's effective tokens"][0]
    assert "group\u00a0A" not in " ".join(heads) and "tokens left" not in heads and "effective tokens" in heads
    for budget in data["budgets"]:
        shown = page.column(f"At {100 * budget:g} %", "average %")
        rows = [r for r in data["rows"] if r["method"] == "dense" or (r["budget"] == budget and "error" not in r)]
        assert shown == {r["method"]: f"{100 * r['average']:.1f}" for r in rows}


def test_the_committed_vit_table_shows_its_figures(tmp_path):
    data = json.loads((ROOT / "benchmarks/results/vit-cpu.json").read_text())
    found, _ = results.load(put(tmp_path, vit=data))
    page = Page(report.page_html(found, [], {}, "t"))
    heads, *lines = next(table for name, table in page.tables.items() if "Vision" in name)
    assert len(lines) == len(data["rows"]) and {
        "class token, cosine",
        "probe, digits",
        "images/s x dense, batch 64",
    } <= {h.replace("\u00a0", " ") for h in heads}
    for row, line in zip(data["rows"], lines, strict=True):
        mean = (row["photographs"].get("cls") or {}).get("mean")
        assert line[0] == row["method"] and (row["photographs"]["error"] if mean is None else f"{mean:.3g}") in line


def test_a_table_of_own_schedules_only(tmp_path):
    data = bench()
    data["rows"] = [r for r in data["rows"] if r["budget"] in (None, 1.0)]
    (found,), _ = results.load(put(tmp_path, own=data))
    assert [d.name for d in drawings.drawings(found, 0.25, "tokens")] == ["own-pareto"]
    data["rows"] = data["rows"][:1]
    (found,), _ = results.load(put(tmp_path, own=data))
    assert drawings.drawings(found, 0.25, "tokens") == [] and "a &lt;CPU&gt;" in report.page_html([found], [], {}, "t")


def test_another_report_takes_the_place_of_the_first(tmp_path, capsys):
    folder = put(tmp_path / "in", vits=vit())
    assert main.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"
    put(folder, vits={**vit(), "rows": [{"method": "second"}]})
    assert main.main(["report", str(folder), "--title", "mine & yours"]) == 0
    text = (folder / "report.html").read_text()
    assert "second" in text and "pitome" not in text and "<h1>mine &amp; yours</h1>" in text


def broken(**changes) -> dict:
    """The table with changes in its second row; ``...`` takes a key away."""
    out = copy.deepcopy(bench())
    out["rows"][1] |= changes
    out["rows"][1] = {k: v for k, v in out["rows"][1].items() if v is not ...}
    return out


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{", "not JSON"),
        ("\ud800", "not JSON"),
        ({**bench(), "version": 3}, "version 3"),
        ({**bench(), "rows": None}, "'rows' should be a list"),
        ({**bench(), "rows": [1]}, "row 0 should be a JSON object"),
        ({**bench(), "rows": bench()["rows"][1:]}, "no row of the dense model"),
        ({**bench(), "abilities": ["colour", "smell"]}, "no accuracy for smell"),
        (broken(average=...), "row 1: 'average' should be a number, it is missing"),
        (broken(average=float("nan")), "'average' should be a number"),
        (broken(average=10**400), "'average' should be a number"),
        (broken(average=1e308), "'average' should be a number"),
        (broken(method="x" * 101), "'method' should be a name"),
        (broken(method="a\nb"), "'method' should be a name"),
        (broken(note="\ud800"), "not JSON"),
        ("[" * 100_000, "not JSON"),
        (broken(budget="half"), "'budget' should be a number"),
        (broken(rows="many"), "'rows' should be a list of numbers"),
        (broken(group_a={"samples": 3}), "'group_a'"),
        (broken(ability_intervals={"count": [1]}), "'ability_intervals'"),
        (
            {**times(), "rows": [{"method": "a", "dense": {"ttft_ms": "fast"}, "pruned": {}}]},
            "dense: 'ttft_ms' should be a number",
        ),
        ({**vit(), "rows": [3]}, "row 0 should be a JSON object"),
        ({**overhead(), "decode": [{"method": "a"}]}, "decode 0: 'limit_ms'"),
    ],
)
def test_a_broken_file_is_named(tmp_path, capsys, data, says):
    path = tmp_path / "bad.json"
    path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else json.dumps(data).encode())
    line = refused(capsys, str(tmp_path))
    assert says in line and "bad.json" in line and list(tmp_path.iterdir()) == [path]


def test_names_with_dollars_are_names(tmp_path):
    table = bench()
    for entry in table["rows"]:
        entry["method"] += "" if entry["method"] == "dense" else " $\\frac$ $$"
    (tmp_path / "bench.json").write_text(json.dumps(table))
    (tmp_path / "times.json").write_text(
        json.dumps({**times(), "rows": [{**r, "method": "$$"} for r in times()["rows"]]})
    )
    assert len(report.write(tmp_path, tmp_path / "out")) > 5


def test_a_budget_may_be_left_out(tmp_path):
    table = bench()
    del table["rows"][-1]["budget"]
    (tmp_path / "bench.json").write_text(json.dumps(table))
    assert "Own schedule" in report.page(tmp_path)


def test_times_that_tell_nothing_are_not_printed_as_ratios(tmp_path):
    table = bench()
    table["rows"][1] |= {"prefill_ratio": 1.83, "prefill_range": [0.9, 1.95], "prefill_verdict": "noise"}
    table["rows"][3] |= {"prefill_ratio": 0.71, "prefill_range": [0.7, 0.75], "prefill_verdict": ""}
    (tmp_path / "bench.json").write_text(json.dumps(table))
    page = report.page(tmp_path)
    assert "1.83" not in page and "noise [0.90, 1.95]" in page and "0.71 [0.70, 0.75]" in page


def test_figures_show_what_can_be_told_apart():
    rows = [row(f"m{i}", j / 100, 0.3 + i / 400, 8.0) for i in range(80) for j in range(1, 51)]
    table = {**bench(), "rows": [bench()["rows"][0], *rows]}
    fewer, left_out = reading.fewer(table)
    names = dict.fromkeys(r["method"] for r in reading.measured(fewer))
    assert (
        list(names) == [f"m{i}" for i in range(20, 80)]
        and len(fewer["rows"]) == 1 + 60 * 25
        and left_out == 80 * 50 - 60 * 25
    )
    assert len(staircase.stairs(fewer, reading.nearest(reading.measured(fewer), 0.25))) == staircase.MOST_STAIRS
    assert reading.fewer(bench()) == (bench(), 0)


def test_tables_take_linear_time():
    """Doubling the rows at most triples the looks at them."""
    looks: list[int] = []
    for n in (200, 400):
        count = 0

        class Row(dict):
            def get(self, key, default=None):
                nonlocal count
                count += 1
                return super().get(key, default)

        rows = [Row(row("tome", (i + 1) / n, 0.5, 8.0)) for i in range(n)]
        sections.bench_html(
            results.ResultFile("x", "vtprune.Bench", {**bench(), "rows": [bench()["rows"][0], *rows]}), []
        )
        looks.append(count)
    assert looks[1] < 3 * looks[0], looks


def test_nothing_to_report(tmp_path, capsys):
    assert "no such folder" in refused(capsys, str(tmp_path / "gone"))
    assert "expected .json files" in refused(capsys, str(tmp_path))
    put(tmp_path, other={"type": "x"})
    assert "something else is in other.json" in refused(capsys, str(tmp_path))
    assert "is not a folder" in refused(capsys, str(tmp_path / "other.json"))
    assert "not one fraction" in refused(capsys, str(tmp_path), "--budget", "0.5,0.2", code=2)
    assert "(0, 1]" in refused(capsys, str(tmp_path), "--budget", "7", code=2)
    assert "invalid choice" in refused(capsys, str(tmp_path), "--cost", "money", code=2)


def test_what_cannot_be_written_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(style, "encode", lambda *a: pytest.fail("drawn in vain"))
    folder = put(tmp_path / "in", accuracy=bench())
    assert "cannot write" in refused(capsys, str(folder), "--out", str(folder / "accuracy.json" / "below"))
    for name in ("report.html", "accuracy-layers.svg"):
        (tmp_path / "out" / name).mkdir(parents=True)
        assert f"{name}: it is a folder" in refused(capsys, str(folder), "--out", str(tmp_path / "out"))
        (tmp_path / "out" / name).rmdir()
    monkeypatch.setattr(os, "access", lambda *a: False)
    assert "cannot be written" in refused(capsys, str(folder))


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "cannot write" in (line := refused(capsys, str(put(tmp_path, vits=vit())))) and "No space left" in line


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'vtprune[report]'" in refused(capsys, str(put(tmp_path, vits=vit())))
    with pytest.raises(vtprune.VtpruneError, match="matplotlib"):
        accuracy.pareto(bench())
