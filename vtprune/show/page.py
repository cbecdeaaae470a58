"""``vtprune report FOLDER``: the result files of a folder as one self-contained page, with every figure beside it as
PNG and SVG."""

from __future__ import annotations

import base64
import functools
import html
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.paths import output
from ..core.types import VtpruneError
from ..version import __version__
from . import figures
from . import pictures as render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = {"vtprune.Bench": (1, 2), "vtprune.Times": (1,), "vtprune.Vit": (1,)}
OVERHEAD = "overhead"  # what benchmarks/overhead.py writes, which has no type
NONE = "–"
LONGEST = 100  # characters of a name in tables and figures
LARGEST = 1e30  # of any number in a result: far beyond every count, and far from where floats end

# ------------------------------------------------------------------------------------------------------------------
# data


def _number(value: Any) -> bool:
    """A number that can be drawn: finite, and its percentage as well."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _by_name(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(test, value.values()))


def _pair(value: Any) -> bool:
    return _numbers(value) and len(value) == 2


def _set(value: Any) -> bool:
    pairs = (
        all(_pair(value[k]) for k in ("interval", "difference_interval") if k in value)
        if isinstance(value, dict)
        else False
    )
    return (
        pairs
        and _number(value.get("accuracy"))
        and ("difference_interval" not in value or _number(value.get("difference")))
    )


def _recipe(value: Any) -> bool:
    stages = value.get("stages") if isinstance(value, dict) else None
    return isinstance(stages, list) and all(isinstance(s, dict) and isinstance(s.get("method"), str) for s in stages)


def _group(value: Any) -> bool:
    good = isinstance(value, dict) and _number(value.get("accuracy")) and _number(value.get("samples", 0))
    return good and (value.get("interval") is None or _pair(value["interval"]))


def _name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST and not any(unicodedata.category(c) == "Cc" for c in value)


KINDS: dict[str, Callable[[Any], bool]] = {
    "a name": _name,
    "a list of names": lambda value: isinstance(value, list) and all(map(_name, value)),
    "a text": lambda value: isinstance(value, str),
    "a number": _number,
    "a list": lambda value: isinstance(value, list),
    "a table": lambda value: isinstance(value, dict),
    "a list of numbers": _numbers,
    "two numbers": _pair,
    "numbers by name": _by_name(_number),
    "intervals by name": _by_name(_pair),
    "accuracies by name": _by_name(_set),
    "an accuracy with its interval": _group,
    "a recipe": _recipe,
}
BENCH = {"abilities": "a list of names", "sets": "a list of names", "rows": "a list"}
BENCH_ROW = {
    **{k: "a number" for k in ("average", "worst", "effective_tokens", "visual_tokens", "flops_share", "kv_share")},
    "worst_ability": "a text",
    "abilities": "numbers by name",
    "sets": "accuracies by name",
}
BENCH_EXTRA = {
    **{k: "a list of numbers" for k in ("rows", "columns", "layer_tokens")},
    **{k: "a number" for k in ("nominal_tokens", "relative_average", "relative_worst", "prefill_ratio")},
    "prefill_range": "two numbers",
    "prefill_verdict": "a text",
    "ability_intervals": "intervals by name",
    "average_interval": "two numbers",
    "group_a": "an accuracy with its interval",
    "note": "a text",
    "recipe": "a recipe",
}
TIMES_EXTRA = {"budget": "a number", "batch": "a number", "images": "a number", "tokens": "a number"}
EVEN_EXTRA = {
    "verdict": "a text",
    "batch": "a number",
    "images": "a number",
    "budgets": "a list of numbers",
    "ratios": "a list of numbers",
    "pays_below": "a number",
}
OVERHEAD_ROW = {"method": "a name", "limit_ms": "a number", "pruned_ms": "a number"}


def _check(entry: Any, where: str, needed: Mapping[str, str], extra: Mapping[str, str] | None = None) -> None:
    """Whether ``entry`` is a dict with the ``needed`` keys, and with ``extra`` ones of their kinds where they are there
    and not null."""
    if not isinstance(entry, dict):
        raise VtpruneError(f"{where} should be a JSON object")
    for key, kind in {**(extra or {}), **needed}.items():
        if key not in needed and entry.get(key) is None:
            continue
        if not KINDS[kind](entry.get(key)):
            raise VtpruneError(f"{where}: {key!r} should be {kind}" + ("" if key in entry else ", it is missing"))


def _check_bench(bench: Mapping[str, Any], where: str) -> None:
    _check(bench, where, BENCH)
    for i, row in enumerate(bench["rows"]):
        here = f"{where}: row {i}"
        _check(row, here, {"method": "a name"}, {"budget": "a number", "error": "a text"})
        if row.get("error") is None:
            _check(row, here, BENCH_ROW, BENCH_EXTRA)
            if missing := [a for a in bench["abilities"] if a not in row["abilities"]]:
                raise VtpruneError(f"{here}: no accuracy for {', '.join(missing)}")
    if not any(r["method"] == "dense" and r.get("error") is None and r["effective_tokens"] > 0 for r in bench["rows"]):
        raise VtpruneError(f"{where} has no row of the dense model")


def _medians(times: dict[str, Any]) -> dict[str, Any]:
    """The times as plain numbers: of medians with percentiles the median. Refused rows are left out."""

    def plain(value: Any) -> Any:
        return value["median"] if isinstance(value, dict) and "median" in value else value

    def row(entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        return {
            k: {name: plain(v) for name, v in e.items()} if k in ("dense", "pruned") and isinstance(e, dict) else e
            for k, e in entry.items()
        }

    rows = times.get("rows")
    return (
        {**times, "rows": [row(r) for r in rows if not (isinstance(r, dict) and r.get("error"))]}
        if isinstance(rows, list)
        else times
    )


VIT = {
    "effective tokens": ("photographs", "effective"),
    "tokens left": ("photographs", "final"),
    "class token, cosine": ("photographs", "cls", "mean"),
    "mean of patches, cosine": ("photographs", "patches", "mean"),
    "k-NN, digits": ("digits", "knn", "accuracy"),
    "probe, digits": ("digits", "probe", "accuracy"),
    "probe of dense, digits": ("digits", "swapped", "accuracy"),
}  # columns of benchmarks/vit.py's results


def _vit_row(row: Any) -> Any:
    """A row of the ViT table as scalars; others stay as they are."""
    if not isinstance(row, dict) or "photographs" not in row:
        return row

    def leaf(*path: str) -> Any:
        found: Any = row
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    out = {
        "method": row.get("method"),
        "budget": row.get("budget"),
        **{name: leaf(*path) for name, path in VIT.items()},
    }
    out |= {f"images/s x dense, batch {b}": leaf("speed", b, "speedup", "median") for b in row.get("speed") or {}}
    return out | {"note": leaf("photographs", "error")}


def _check_times(times: Mapping[str, Any], where: str) -> None:
    _check(times, where, {"rows": "a list"}, {"break_even": "a list"})
    for i, row in enumerate(times["rows"]):
        _check(row, f"{where}: row {i}", {"method": "a name", "dense": "a table", "pruned": "a table"}, TIMES_EXTRA)
        for kind in ("dense", "pruned"):
            _check(row[kind], f"{where}: row {i}: {kind}", {}, dict.fromkeys((*TIMED, "scorer_ms"), "a number"))
    for i, row in enumerate(times.get("break_even") or []):
        _check(row, f"{where}: break-even {i}", {"method": "a name"}, EVEN_EXTRA)


def _check_overhead(result: Mapping[str, Any], where: str) -> None:
    for key in figures.PARTS:
        _check(result, where, {key: "a list"})
        for i, row in enumerate(result[key]):
            _check(row, f"{where}: {key} {i}", OVERHEAD_ROW, {"dense_ms": "a number", "overhead": "numbers by name"})


class Found(NamedTuple):
    """A result file: its name without ``.json``, its type (:data:`READS`, or :data:`OVERHEAD`) and what it holds."""

    stem: str
    kind: str
    data: dict[str, Any]


def load(folder: Path) -> tuple[list[Found], list[str]]:
    """The results in ``folder`` (not below it), by name, and the names of the JSON files that are something else.

    Raises:
        VtpruneError: no such folder, a broken file, a newer version, or nothing that can be shown.
    """
    if not folder.is_dir():
        raise VtpruneError(f"no such folder: {folder}" if not folder.exists() else f"{folder} is not a folder")
    found: list[Found] = []
    unknown: list[str] = []
    for path in sorted(p for p in folder.glob("*.json") if p.is_file()):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            json.dumps(data, ensure_ascii=False).encode()  # halves of surrogate pairs, which no page can hold
        except OSError as e:
            raise VtpruneError(f"cannot read {path}: {e.strerror or e}") from e
        except (ValueError, RecursionError) as e:
            raise VtpruneError(f"{path} is not JSON: {e}") from e
        kind = data.get("type") if isinstance(data, dict) else None
        if kind is None and isinstance(data, dict) and data.keys() >= figures.PARTS.keys():
            kind = OVERHEAD
        if kind not in (*READS, OVERHEAD):
            unknown.append(path.name)
            continue
        if kind in READS and data.get("version") not in READS[kind]:
            raise VtpruneError(
                f"{path}: {kind} of version {data.get('version')!r}; this vtprune reads "
                f"{' and '.join(map(str, READS[kind]))}"
            )
        if kind == "vtprune.Times":
            data = _medians(data)
        if kind == "vtprune.Vit" and isinstance(data.get("rows"), list):
            data = {**data, "rows": [_vit_row(r) for r in data["rows"]]}
        if kind == "vtprune.Vit":
            _check(data, str(path), {"rows": "a list"})
            for i, row in enumerate(data["rows"]):
                _check(row, f"{path}: row {i}", {})
        else:
            {"vtprune.Bench": _check_bench, "vtprune.Times": _check_times, OVERHEAD: _check_overhead}[kind](
                data, str(path)
            )
        found.append(Found(path.stem, kind, data))
    if not found:
        others = f"; something else is in {', '.join(unknown)}" if unknown else ""
        raise VtpruneError(
            f"nothing to report in {folder}: expected .json files of 'vtprune bench --out', of the time, ViT or "
            f"overhead benchmarks{others}"
        )
    return found, unknown


# ------------------------------------------------------------------------------------------------------------------
# page

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #191c21; --muted: #5f6671; --line: #dfe2e7; --head: #f4f5f7; --best: #e3f2e6; --link: #1f5fbf; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161a; --ink: #e7e9ec; --muted: #a3a9b3; --line: #2d323a; --head: #1d2026; --best: #17391f; --link: #8ab4f8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1rem; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
a { color: var(--link); } code { font-size: .9em; overflow-wrap: anywhere; }
nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; font-size: .9rem; }
dt, .muted, figcaption, footer, caption { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; max-width: 100%; }
.wide:focus-visible, a:focus-visible, summary:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; white-space: nowrap; margin: .3rem 0; }
caption { text-align: left; padding-bottom: .3rem; white-space: normal; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 2rem); }
th, td { padding: .2rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }
thead th { background: var(--head); white-space: normal; vertical-align: bottom; }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 600; max-width: 12rem; overflow: hidden; text-overflow: ellipsis; }
th:first-child, .text { text-align: left; } td.text { white-space: normal; min-width: 13rem; max-width: 34rem; color: var(--muted); }
tr.baseline th, tr.baseline td { font-style: italic; } tr.baseline th { font-weight: 400; color: var(--muted); }
tr.dense th, tr.dense td { background: var(--head); }
.best { font-weight: 700; background: var(--best); } .tag { font-size: .75rem; font-style: normal; color: var(--muted); margin-left: .4rem; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
summary { cursor: pointer; margin-top: .5rem; }
figure { margin: 1.5rem 0; } figcaption { margin-bottom: .4rem; max-width: 60rem; }
figure img { max-width: none; display: block; } .files { font-size: .8rem; color: var(--muted); overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); font-size: .85rem; overflow-wrap: anywhere; }
""".strip()  # noqa: E501

# The colours of figures.py on a dark page.
DARK = {
    figures.PAPER: "#14161a",
    figures.INK: "#e7e9ec",
    figures.MUTED: "#a3a9b3",
    figures.LINE: "#59606b",
    figures.GRID: "#262a31",
}


class Cell(NamedTuple):
    """A table cell; ``best`` marks it within its column, ``tag`` is a small word behind it."""

    text: str
    best: bool = False
    tag: str = ""


class Table(NamedTuple):
    """Header, rows (the first cell names the row) and a CSS class per row. Columns headed by a name in :data:`WORDS`
    hold text, others numbers."""

    caption: str
    head: list[str]
    rows: list[list[Cell]]
    classes: list[str]


WORDS = {"method", "note", "reason", "budgets", "what"}


def esc(value: object) -> str:
    return html.escape(str(value))


def table_html(table: Table) -> str:
    """The table in a region that scrolls sideways, also from the keyboard."""
    side = [' class="text"' if name in WORDS else "" for name in table.head]
    head = "".join(f'<th scope="col"{s}>{esc(_unit(name))}</th>' for name, s in zip(table.head, side, strict=True))
    body = []
    for row, name in zip(table.rows, table.classes, strict=True):
        cells = [f'<th scope="row">{_cell(row[0])}</th>']
        for cell, s in zip(row[1:], side[1:], strict=True):
            cells.append(
                f'<td class="best">{_cell(cell)}<span class="hidden"> (best)</span></td>'
                if cell.best
                else f"<td{s}>{_cell(cell)}</td>"
            )
        body.append(f'<tr class="{name}">{"".join(cells)}</tr>')
    frame = f'<div class="wide" tabindex="0" role="region" aria-label="{esc(table.caption)}"><table>\n<caption><span>{esc(table.caption)}</span></caption>\n'  # noqa: E501
    return frame + f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table></div>"


def _unit(name: str) -> str:
    """``name`` with a unit at its end that does not come off on a line of its own."""
    return name[:-2] + "\u00a0" + name[-1] if name.endswith((" %", " x")) else name


def _cell(cell: Cell) -> str:
    return esc(cell.text) + (f'<span class="tag">{esc(cell.tag)}</span>' if cell.tag else "")


def plain_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without marks; columns in which every row has :data:`NONE` are left out."""
    listed = [list(row) for row in rows]
    shown = [i for i in range(len(head)) if i == 0 or any(row[i] != NONE for row in listed)]
    return Table(
        caption, [head[i] for i in shown], [[Cell(row[i]) for i in shown] for row in listed], [""] * len(listed)
    )


def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}"


def between(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f" [{100 * pair[0]:.1f}, {100 * pair[1]:.1f}]"


def share(budget: float | None) -> str:
    return "own schedule" if budget is None else f"{100 * budget:g} %"


class Column(NamedTuple):
    """A column of the main table: ``text(row)`` shown, ``value(row)`` compared (``None``: not known), ``better`` 1 if
    more is, -1 if less is, 0 if neither."""

    name: str
    text: Callable[[Mapping[str, Any]], str]
    value: Callable[[Mapping[str, Any]], float | None]
    better: int = 0


def _group_text(row: Mapping[str, Any]) -> str:
    group = row.get("group_a")
    return NONE if group is None else percent(group["accuracy"]) + between(group.get("interval"))


def _count(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: NONE if row.get(key) is None else f"{row[key]:.1f}"


def _get(key: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: row.get(key)


def _ratio(row: Mapping[str, Any]) -> str:
    return figures.prefill_text(row) or ("1.00" if row["method"] == "dense" else NONE)


def _told_ratio(row: Mapping[str, Any]) -> float | None:
    return None if row.get("prefill_verdict") else row.get("prefill_ratio")


COLUMNS = [
    Column("average %", lambda row: percent(row["average"]) + between(row.get("average_interval")), _get("average"), 1),
    Column("of dense %", lambda row: percent(row.get("relative_average")), _get("relative_average"), 1),
    Column("worst ability %", lambda row: f"{percent(row['worst'])} {row['worst_ability']}", _get("worst"), 1),
    Column("group A %", _group_text, lambda row: (row.get("group_a") or {}).get("accuracy"), 1),
    Column("tokens left", _count("nominal_tokens"), _get("nominal_tokens")),
    Column("effective tokens", _count("effective_tokens"), _get("effective_tokens")),
    Column("FLOPs %", lambda row: percent(row["flops_share"]), _get("flops_share"), -1),
    Column("KV %", lambda row: percent(row["kv_share"]), _get("kv_share"), -1),
    Column("prefill x", _ratio, _told_ratio, -1),
    Column("note", lambda row: row.get("note") or "", lambda row: None),
]


def known_columns(bench: Mapping[str, Any]) -> list[Column]:
    """The columns of the main tables, the same at every budget: those that some row has."""
    return [
        c
        for c in COLUMNS
        if c.name in ("note", "prefill x") or any(c.value(r) is not None for r in figures.measured(bench))
    ]


def main_table(bench: Mapping[str, Any], budget: float | None, columns: Sequence[Column]) -> Table:
    """The rows of ``bench``, all at ``budget``, by average, dense first; the best of each column is marked by its shown
    digits, so that equal looks are marked alike."""
    base, plain = figures.dense_row(bench), figures.baselines(bench)
    rows = sorted(figures.measured(bench), key=lambda r: -r["average"])
    first: dict[str, str] = {}
    for c in columns:
        if known := [r for r in rows if c.value(r) is not None] if c.better and len(rows) > 1 else []:
            best = max(known, key=lambda r, c=c: c.better * c.value(r))  # type: ignore[misc]
            first[c.name] = c.text(best).split(" ")[0]
    body = [[Cell("dense"), *(Cell(c.text(base)) for c in columns)]]
    for row in rows:
        cells = [Cell(c.text(row), c.text(row).split(" ")[0] == first.get(c.name)) for c in columns]
        body.append([Cell(row["method"], tag="baseline" if row["method"] in plain else ""), *cells])
    caption = (
        "Recipes on their own schedule"
        if budget is None
        else f"At {share(budget)} of the dense model's effective tokens"
    )
    if sizes := sorted({r["group_a"]["samples"] for r in rows if (r.get("group_a") or {}).get("samples") is not None}):
        caption += f"; group A holds {' to '.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))} questions"
    return Table(
        caption,
        ["method", *(c.name for c in columns)],
        body,
        ["dense", *("baseline" if r["method"] in plain else "" for r in rows)],
    )


def ability_table(bench: Mapping[str, Any], budget: float | None) -> Table:
    """The rows of ``bench``, all at ``budget``: accuracy per ability with its interval, per question set the difference
    to dense with its paired interval."""
    kinds, sets = bench["abilities"], bench["sets"]
    rows = [figures.dense_row(bench), *sorted(figures.measured(bench), key=lambda r: -r["average"])]

    def gap(entry: Mapping[str, Any] | None) -> str:
        if entry is None or "difference" not in entry:
            return NONE
        low, high = entry["difference_interval"]
        return f"{100 * entry['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"

    body = []
    for row in rows:
        spans = row.get("ability_intervals") or {}
        body.append(
            [
                row["method"],
                *(percent(row["abilities"][k]) + between(spans.get(k)) for k in kinds),
                *(gap(row["sets"].get(s)) for s in sets),
            ]
        )
    return plain_table(
        f"Accuracy in percent per ability, {share(budget)}",
        ["method", *kinds, *(f"{s}: points from dense" for s in sets)],
        body,
    )


def refusals(benches: Sequence[Found]) -> Table:
    """What could not be measured, and why; budgets with the same reason together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for found in benches:
        for row in found.data["rows"]:
            if row.get("error") is not None:
                groups.setdefault((row["method"], row["error"]), []).append(share(row.get("budget")))
    return plain_table(
        "Refused",
        ["method", "budgets", "reason"],
        ([method, ", ".join(budgets), reason] for (method, reason), budgets in groups.items()),
    )


TIMED = {
    "ttft_ms": "first token",
    "e2e_ms": "whole answer",
    "vision_ms": "tower",
    "prefill_ms": "prefill",
    "decode_ms": "per decoded token",
    "peak_bytes": "peak MiB",
}


def times_table(times: Mapping[str, Any]) -> Table:
    """All medians, dense and pruned beside each other."""

    def ms(entry: Mapping[str, Any], key: str) -> str:
        return (
            NONE
            if entry.get(key) is None
            else f"{entry[key] / 2**20:.0f}"
            if key == "peak_bytes"
            else f"{entry[key]:.1f}"
        )

    head = ["method", "budget", "batch", "images", "tokens", "first token x"]
    head += [f"{name}: {kind}" for name in TIMED.values() for kind in ("dense", "pruned")] + ["own code"]
    rows = []
    for row in times["rows"]:
        dense, pruned = row["dense"], row["pruned"]
        a, b = figures.first_token(dense), figures.first_token(pruned)
        start = [
            NONE if row.get("budget") is None else share(row["budget"]),
            *(plain_value(row.get(k)) for k in ("batch", "images", "tokens")),
        ]
        pairs = [ms(entry, key) for key in TIMED for entry in (dense, pruned)]
        rows.append(
            [row["method"], *start, f"{b / a:.2f}" if a and b is not None else NONE, *pairs, ms(pruned, "scorer_ms")]
        )
    return plain_table("Medians in milliseconds", head, rows)


def break_even_table(times: Mapping[str, Any]) -> Table:
    """Per method the ratio of times at each budget, and the budget below which pruning pays."""
    rows = []
    budgets = sorted({b for e in times["break_even"] for b in e.get("budgets") or []}, reverse=True)
    for e in times["break_even"]:
        at = dict(zip(e.get("budgets") or [], e.get("ratios") or [], strict=False))
        never = all(ratio >= 1 for ratio in at.values())
        pays = (
            share(e["pays_below"]) if e.get("pays_below") is not None else "at none of them" if never and at else NONE
        )
        values = [f"{at[b]:.2f}" if b in at else NONE for b in budgets]
        rows.append(
            [
                e["method"],
                plain_value(e.get("batch")),
                plain_value(e.get("images")),
                *values,
                pays,
                e.get("verdict") or NONE,
            ]
        )
    head = ["method", "batch", "images", *map(share, budgets), "pays below", "in words"]
    return plain_table(
        "Pruned time over dense time per budget; below 1 by more than the noise, pruning pays", head, rows
    )


def overhead_table(result: Mapping[str, Any]) -> Table:
    """Every method's milliseconds dense, at the limit and pruned, and the measured ratio of the last two."""
    rows = []
    for key, title in figures.PARTS.items():
        for r in result[key]:
            ratio = r.get("overhead") or {}
            text = (
                f"{ratio['median']:.3f} [{ratio['p20']:.3f}, {ratio['p80']:.3f}]"
                if {"median", "p20", "p80"} <= ratio.keys()
                else NONE
            )
            dense = NONE if r.get("dense_ms") is None else f"{r['dense_ms']:.2f}"
            rows.append([r["method"], title, dense, f"{r['limit_ms']:.2f}", f"{r['pruned_ms']:.2f}", text])
    return plain_table(
        "Milliseconds; 20th and 80th percentile in brackets",
        ["method", "what", "dense", "the limit", "pruned", "pruned / the limit"],
        rows,
    )


def plain_value(value: Any) -> str:
    """A scalar of a table of unknown columns: four significant digits, whole numbers as they are."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:.0f}" if value == round(value) and abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def generic_table(result: Mapping[str, Any], caption: str) -> Table:
    """Every scalar of every row, columns in the order in which they first appear."""
    rows = result["rows"]
    names = dict.fromkeys(k for r in rows for k, v in r.items() if v is None or isinstance(v, str | int | float))
    head = sorted(names, key=lambda k: k != "method")
    return plain_table(
        caption,
        head,
        ([plain_value(v if isinstance(v := r.get(k), str | int | float) else None) for k in head] for r in rows),
    )


def facts_html(result: Mapping[str, Any]) -> str:
    """Command, device and versions, as far as the file tells them."""
    device, versions = result.get("device"), result.get("versions")
    if isinstance(device, dict):
        parts = [
            device.get("name"),
            f"{device['threads']} threads" if "threads" in device else None,
            device.get("dtype"),
        ]
        device = ", ".join(str(p) for p in parts if p)
    if isinstance(versions, dict):
        versions = ", ".join(f"{k} {v}" for k, v in versions.items())
    command = f"<code>{esc(result['command'])}</code>" if result.get("command") else ""
    listed = [("command", command), ("device", esc(device or "")), ("versions", esc(versions or ""))]
    if _number(result.get("samples")):
        listed.append(("questions", esc(f"{result['samples']} ({', '.join(map(str, result.get('sets') or []))})")))
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in listed if text) + "</dl>"


# ---------------------------------------------------------------------------------------------------------------
# figures


class Drawing(NamedTuple):
    """A figure to be: name of its files without ending, caption, what it shows in words, and how to draw it (``None``:
    the data are not there)."""

    name: str
    caption: str
    alt: str
    draw: Callable[[], Figure | None]


def drawings(found: Found, budget: float, cost: str) -> list[Drawing]:
    """The figures of a result file, at the budget nearest to ``budget``."""
    data = found.data
    if found.kind == OVERHEAD:
        best = ", ".join(f"{r['method']} {r['pruned_ms']:.0f} of {r['limit_ms']:.0f} ms" for r in data["prefill"])
        text = "Pruned runs against the limit: the same model doing the work that is left, with nobody choosing."
        return [
            Drawing(
                f"{found.stem}-bars",
                text,
                f"Bars per method with the limit marked. Prefill: {best}.",
                functools.partial(figures.overhead, data),
            )
        ]
    if found.kind == "vtprune.Times":
        near = figures.nearest(data["rows"], budget)
        if near is None or not (groups := figures.settings(data, near)):
            return []
        ratios = [
            f"{name}: " + ", ".join(f"{r['method']} {figures.speed(r):.2f}" for r in rows)
            for name, rows in groups.items()
        ]
        text = (
            f"Time to the first token at {share(near)}: pruned below dense, and the limit, which is pruned without the "
            "time inside the library's own code."
        )
        alt = f"Bars per method at {share(near)}. Pruned over dense: {'; '.join(ratios)}."
        return [Drawing(f"{found.stem}-latency", text, alt, functools.partial(figures.latency, data, near))]
    return bench_drawings(found, budget, cost) if found.kind == "vtprune.Bench" else []


def bench_drawings(found: Found, budget: float, cost: str) -> list[Drawing]:
    """The overview, accuracy against cost, where tokens are kept and how many each layer sees, as far as the rows
    tell."""
    bench, left_out = figures.fewer(found.data)
    rows = figures.measured(bench)
    if not rows:
        return []
    less = (
        f" Drawn are {len(rows)} of {len(rows) + left_out} rows, those of the most accurate methods."
        if left_out
        else ""
    )
    x, axis, panels = figures.costs(bench, cost), figures.COST[cost], figures.panels(bench)
    best = figures.front(rows, x, lambda r: r["average"])
    reached = ", ".join(f"{r['method']} {percent(r['average'])} % at {100 * x(r):.0f} %" for r in best)
    line = (
        f"Average accuracy against {axis}, a line per method. Pareto front: {reached}; dense "
        f"{percent(figures.dense_row(bench)['average'])} %."
    )
    band = " The band is the front's 95 % interval." if any(p.interval(r) for p in panels for r in best) else ""
    text = (
        f"Accuracy against {axis}, at every budget. Baselines are grey. Ringed: no other is more accurate for as "
        f"little.{band}{less}"
    )
    alt = f"Panels: {', '.join(p.title for p in panels)}. {line}"
    pareto = Drawing(f"{found.stem}-pareto", text, alt, functools.partial(figures.pareto, bench, cost))
    near = figures.nearest(rows, budget)
    if near is None:
        return [pareto]
    at = share(near)
    kept = figures.spreads(bench, near, "rows")
    text = f"At a glance: average accuracy against {axis}" + (
        f", and where in the image tokens are kept at {at}." if kept else "."
    )
    out = [
        Drawing(f"{found.stem}-overview", text, line, functools.partial(figures.overview, bench, near, cost)),
        pareto,
    ]
    if kept:
        size = len(next(iter(kept.values())))
        low = max(1, size // 4)
        shares = ", ".join(f"{name} {100 * sum(v[-low:]) / max(sum(v), 1e-9):.0f} %" for name, v in kept.items())
        text = (
            f"Where tokens are kept at {at}: blue, fewer than an even spread gives; orange, more. FEATHER (arXiv "
            "2412.13180) found a bias to the bottom."
        )
        alt = (
            f"Heat map of kept tokens at {at}. Share in the bottom {low} of {size} image rows: {shares}; even: "
            f"{100 * low / size:.0f} %."
        )
        out.append(Drawing(f"{found.stem}-kept", text, alt, functools.partial(figures.kept, bench, near)))
    layered = figures.stairs(bench, near)
    if layered:
        ends = ", ".join(f"{r['method']} {r['layer_tokens'][0]:.0f} to {r['layer_tokens'][-1]:.0f}" for r in layered)
        text = (
            f"Visual tokens in each layer of the language model at {at}. The areas are alike: that is what equal "
            "effective tokens means."
        )
        out.append(
            Drawing(
                f"{found.stem}-layers",
                text,
                f"Staircases, first to last layer: {ends}.",
                functools.partial(figures.staircase, bench, near),
            )
        )
    return out


def themed(svg: bytes) -> bytes:
    """The drawing for the page: without prologue, and with :data:`DARK` in place of its neutral colours where the
    reader prefers dark."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    for i, light in enumerate(DARK):
        text = text.replace(light, f"var(--c{i})")
    rules = [";".join(f"--c{i}:{c}" for i, c in enumerate(colors)) for colors in (DARK.keys(), DARK.values())]
    end = text.index(">") + 1
    return f"{text[:end]}<style>:root{{{rules[0]}}}@media (prefers-color-scheme: dark){{:root{{{rules[1]}}}}}</style>{text[end:]}".encode()  # noqa: E501


def figure_html(drawing: Drawing, svg: bytes, width: int) -> str:
    """The drawing inline, ``width`` pixels wide; it scrolls sideways where that is too much."""
    source = "data:image/svg+xml;base64," + base64.b64encode(themed(svg)).decode()
    image = f'<img alt="{esc(drawing.alt)}" width="{width}" src="{source}">'
    scroll = f'<div class="wide" tabindex="0" role="region" aria-label="figure {esc(drawing.name)}">{image}</div>'
    files = f'<div class="files">{esc(drawing.name)}.png, {esc(drawing.name)}.svg</div>'
    return f"<figure><figcaption>{esc(drawing.caption)}</figcaption>{scroll}{files}</figure>"


# ------------------------------------------------------------------------------------------------------------------
# parts

HOW = {
    "tokens": "Budgets are equal effective tokens: visual tokens averaged over the layers of the language model, as a share "  # noqa: E501
    "of the dense model's. "
    "A method that cuts late has to cut more. Tokens left is what remains after the last cut.",
    "intervals": "Intervals hold 95 %. They come from bootstraps that draw images, not questions, so that questions about one "  # noqa: E501
    "image stay together; "
    "differences to dense are paired, question by question.",
    "relative": "Of dense %: each ability's accuracy over the dense model's, then averaged.",
    "group": "Group A (VTC-Bench, arXiv 2510.07143): the questions that the dense model answers and plain down-sampling at "  # noqa: E501
    "the same budget does not. "
    "Only they tell whether choosing tokens helps; dense has 100 % there and down-sampling 0 % by definition.",
    "prefill": "Prefill x: time of a prefill, tower included, over dense in turns, with the least and most of its rounds; "  # noqa: E501
    "noise: they tell nothing; "
    "?: slower for less work, which neither the library's own code nor the spread of dense runs explains. "
    "FLOPs and KV are shares of the dense prefill and its cache.",
    "marks": "Rows are sorted by average; the best of a column is bold on green, baselines are in italics.",
}


def how_html(found: Sequence[Found]) -> str:
    """What the columns mean, as far as some table has them; nothing without a table of accuracies."""
    rows = [r for f in found if f.kind == "vtprune.Bench" for r in f.data["rows"]]
    absent = {
        key
        for key, field in (("group", "group_a"), ("relative", "relative_average"))
        if not any(r.get(field) for r in rows)
    }
    lines = "".join(f"<li>{esc(text)}</li>" for key, text in HOW.items() if key not in absent)
    return f'<section id="how"><h2>How to read it</h2><ul>{lines}</ul></section>' if rows else ""


def bench_html(found: Found, pictures: Sequence[str]) -> str:
    """Tables per budget, then the figures; the first, the overview, comes before the tables."""
    bench, columns = found.data, known_columns(found.data)
    at: dict[float | None, list[Any]] = {}
    for row in figures.measured(bench):
        at.setdefault(row.get("budget"), []).append(row)
    out = [facts_html(bench), *pictures[:1]]
    for budget in sorted(at, key=lambda b: -1 if b is None else b, reverse=True):
        part = {**bench, "rows": [figures.dense_row(bench), *at[budget]]}
        out += [
            f"<h3>{esc('Own schedule' if budget is None else f'Budget {share(budget)}')}</h3>",
            table_html(main_table(part, budget, columns)),
        ]
        out.append(
            "<details><summary>Per ability, "
            f"{esc(share(budget))}</summary>{table_html(ability_table(part, budget))}</details>"
        )
    return "\n".join([*out, *pictures[1:]])


def times_html(found: Found, pictures: Sequence[str]) -> str:
    out = [facts_html(found.data), *pictures, table_html(times_table(found.data))]
    if found.data.get("break_even"):
        out += ["<h3>Where pruning pays</h3>", table_html(break_even_table(found.data))]
    return "\n".join(out)


def section(found: Found, pictures: Sequence[str]) -> str:
    if found.kind == "vtprune.Bench":
        return bench_html(found, pictures)
    if found.kind == "vtprune.Times":
        return times_html(found, pictures)
    table = (
        overhead_table(found.data)
        if found.kind == OVERHEAD
        else generic_table(found.data, f"Vision transformers, {found.stem}")
    )
    return "\n".join([facts_html(found.data), *pictures, table_html(table)])


HEADINGS = {
    "vtprune.Bench": "Accuracy and cost",
    "vtprune.Times": "Times",
    OVERHEAD: "Overhead",
    "vtprune.Vit": "Vision transformers",
}


def page_html(found: Sequence[Found], unknown: Sequence[str], pictures: Mapping[str, Sequence[str]], title: str) -> str:
    """The whole page. ``pictures``: stem -> figures, ready."""
    ordered = sorted(found, key=lambda f: list(HEADINGS).index(f.kind))
    parts = [
        (f"{f.kind.split('.')[-1].lower()}-{i}", f"{HEADINGS[f.kind]}: {f.stem}", section(f, pictures.get(f.stem, ())))
        for i, f in enumerate(ordered)
    ]
    refused = refusals([f for f in ordered if f.kind == "vtprune.Bench"])
    if refused.rows:
        parts.append(("refused", "What was refused, and why", table_html(refused)))
    how = how_html(found)
    links = [("how", "How to read it")] * bool(how) + [(name, text) for name, text, _ in parts]
    body = "\n".join(f'<section id="{name}"><h2>{esc(text)}</h2>\n{inside}\n</section>' for name, text, inside in parts)
    other = f" Not shown, of another type: {', '.join(unknown)}." if unknown else ""
    content = f"""<header><h1>{esc(title)}</h1></header>
<nav aria-label="Contents"><ul>{"".join(f'<li><a href="#{name}">{esc(text)}</a></li>' for name, text in links)}</ul></nav>
<main>
{how}
{body}
</main>
<footer><p>Made by vtprune {esc(__version__)} from {esc(", ".join(f.stem + ".json" for f in found))}.{esc(other)}</p></footer>"""  # noqa: E501
    return render.document(title, CSS, content)


# ---------------------------------------------------------------------------------------------------------------
# command


def page(folder: Path, *, budget: float = 0.25, cost: str = "tokens", title: str | None = None) -> str:
    """The page that :func:`write` writes, figures as SVG inside. Raises :class:`VtpruneError` for what :func:`load`
    refuses and without matplotlib."""
    found, unknown = load(folder)
    figures.library()
    pictures: dict[str, list[str]] = {}
    for f in found:
        for drawing in drawings(f, budget, cost):
            if (figure := drawing.draw()) is not None:
                pictures.setdefault(f.stem, []).append(_inline(drawing, figure, figures.encode(figure, "svg")))
    return page_html(found, unknown, pictures, title or _title(folder))


def _inline(drawing: Drawing, figure: Any, svg: bytes) -> str:
    return figure_html(drawing, svg, round(96 * figure.get_figwidth()))


def _title(folder: Path) -> str:
    return f"vtprune report: {folder.resolve().name}"


def write(
    folder: Path, out: Path, *, budget: float = 0.25, cost: str = "tokens", title: str | None = None
) -> list[Path]:
    """Reads ``folder``, writes ``report.html`` and the figures into ``out`` (made if it is not there) and gives all
    paths written, the page first.

    Args:
        budget: for the figures that show one; the nearest of each file is taken.
        cost: ``"tokens"`` or ``"flops"``, the horizontal axis of accuracy figures.

    Raises:
        VtpruneError: what :func:`load` refuses, no matplotlib, or a file that cannot be written (told before anything
            is drawn).
    """
    found, unknown = load(folder)
    figures.library()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise VtpruneError(f"cannot write {out}: {e.strerror}") from e
    planned = {f.stem: drawings(f, budget, cost) for f in found}
    whole = out / "report.html"
    files = [whole, *(out / f"{d.name}.{kind}" for drawn in planned.values() for d in drawn for kind in ("png", "svg"))]
    for path in files:
        output(path)
    written = [whole]
    pictures: dict[str, list[str]] = {}
    for stem, listed in planned.items():
        for drawing in listed:
            if (figure := drawing.draw()) is None:
                continue
            for kind in ("png", "svg"):
                written.append(out / f"{drawing.name}.{kind}")
                render.write(written[-1], data := figures.encode(figure, kind))
            pictures.setdefault(stem, []).append(_inline(drawing, figure, data))
    render.write(whole, page_html(found, unknown, pictures, title or _title(folder)).encode())
    return written
