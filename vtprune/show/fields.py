"""What a result file must hold to be shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from ..core.types import VtpruneError
from .figures import reading

LONGEST = 100  # characters of a name in tables and figures
LARGEST = 1e30  # of any number in a result: far beyond every count, and far from where floats end


def is_number(value: Any) -> bool:
    """A number that can be drawn: finite, and its percentage as well."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def by_name(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(test, value.values()))


def is_pair(value: Any) -> bool:
    return are_numbers(value) and len(value) == 2


def is_set(value: Any) -> bool:
    """The accuracy of a question set; an interval of the difference to dense needs the difference."""
    if not isinstance(value, dict) or not is_number(value.get("accuracy")):
        return False
    if not all(is_pair(value[k]) for k in ("interval", "difference_interval") if k in value):
        return False
    return "difference_interval" not in value or is_number(value.get("difference"))


def is_recipe(value: Any) -> bool:
    stages = value.get("stages") if isinstance(value, dict) else None
    return isinstance(stages, list) and all(isinstance(s, dict) and isinstance(s.get("method"), str) for s in stages)


def is_group(value: Any) -> bool:
    good = isinstance(value, dict) and is_number(value.get("accuracy")) and is_number(value.get("samples", 0))
    return good and (value.get("interval") is None or is_pair(value["interval"]))


def is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST and not any(unicodedata.category(c) == "Cc" for c in value)


KINDS: dict[str, Callable[[Any], bool]] = {
    "a name": is_name,
    "a list of names": lambda value: isinstance(value, list) and all(map(is_name, value)),
    "a text": lambda value: isinstance(value, str),
    "a number": is_number,
    "a list": lambda value: isinstance(value, list),
    "a table": lambda value: isinstance(value, dict),
    "a list of numbers": are_numbers,
    "two numbers": is_pair,
    "numbers by name": by_name(is_number),
    "intervals by name": by_name(is_pair),
    "accuracies by name": by_name(is_set),
    "an accuracy with its interval": is_group,
    "a recipe": is_recipe,
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


def check_entry(entry: Any, where: str, needed: Mapping[str, str], extra: Mapping[str, str] | None = None) -> None:
    """Whether ``entry`` is a dict with the ``needed`` keys, and with ``extra`` ones of their kinds where they are there
    and not null."""
    if not isinstance(entry, dict):
        raise VtpruneError(f"{where} should be a JSON object")
    for key, kind in {**(extra or {}), **needed}.items():
        if key not in needed and entry.get(key) is None:
            continue
        if not KINDS[kind](entry.get(key)):
            raise VtpruneError(f"{where}: {key!r} should be {kind}" + ("" if key in entry else ", it is missing"))


def check_bench(bench: Mapping[str, Any], where: str) -> None:
    check_entry(bench, where, BENCH)
    for i, row in enumerate(bench["rows"]):
        here = f"{where}: row {i}"
        check_entry(row, here, {"method": "a name"}, {"budget": "a number", "error": "a text"})
        if row.get("error") is None:
            check_entry(row, here, BENCH_ROW, BENCH_EXTRA)
            if missing := [a for a in bench["abilities"] if a not in row["abilities"]]:
                raise VtpruneError(f"{here}: no accuracy for {', '.join(missing)}")
    if not any(r["method"] == "dense" and r.get("error") is None and r["effective_tokens"] > 0 for r in bench["rows"]):
        raise VtpruneError(f"{where} has no row of the dense model")


def check_times(times: Mapping[str, Any], where: str) -> None:
    check_entry(times, where, {"rows": "a list"}, {"break_even": "a list"})
    for i, row in enumerate(times["rows"]):
        check_entry(
            row, f"{where}: row {i}", {"method": "a name", "dense": "a table", "pruned": "a table"}, TIMES_EXTRA
        )
        for kind in ("dense", "pruned"):
            check_entry(
                row[kind], f"{where}: row {i}: {kind}", {}, dict.fromkeys((*reading.TIMED, "scorer_ms"), "a number")
            )
    for i, row in enumerate(times.get("break_even") or []):
        check_entry(row, f"{where}: break-even {i}", {"method": "a name"}, EVEN_EXTRA)


def check_vit(result: Mapping[str, Any], where: str) -> None:
    check_entry(result, where, {"rows": "a list"})
    for i, row in enumerate(result["rows"]):
        check_entry(row, f"{where}: row {i}", {})


def check_overhead(result: Mapping[str, Any], where: str) -> None:
    for key in reading.PARTS:
        check_entry(result, where, {key: "a list"})
        for i, row in enumerate(result[key]):
            check_entry(
                row, f"{where}: {key} {i}", OVERHEAD_ROW, {"dense_ms": "a number", "overhead": "numbers by name"}
            )
