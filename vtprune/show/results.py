"""Reading the result files of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..core.types import VtpruneError
from . import fields
from .figures import reading

READS = {"vtprune.Bench": (1, 2), "vtprune.Times": (1,), "vtprune.Vit": (1,)}
OVERHEAD = "overhead"  # what benchmarks/overhead.py writes, which has no type
CHECKS = {
    "vtprune.Bench": fields.check_bench,
    "vtprune.Times": fields.check_times,
    "vtprune.Vit": fields.check_vit,
    OVERHEAD: fields.check_overhead,
}


class ResultFile(NamedTuple):
    """A result file that can be shown."""

    stem: str  # its name without ``.json``
    kind: str  # one of :data:`READS`, or :data:`OVERHEAD`
    data: dict[str, Any]


def load(folder: Path) -> tuple[list[ResultFile], list[str]]:
    """The results in ``folder`` (not below it), by name, and the names of the JSON files that are something else.

    Raises:
        VtpruneError: no such folder, a broken file, a newer version, or nothing that can be shown.
    """
    if not folder.is_dir():
        raise VtpruneError(f"no such folder: {folder}" if not folder.exists() else f"{folder} is not a folder")
    results: list[ResultFile] = []
    unknown: list[str] = []
    for path in sorted(p for p in folder.glob("*.json") if p.is_file()):
        data = read(path)
        kind = kind_of(data)
        if kind is None:
            unknown.append(path.name)
        else:
            results.append(ResultFile(path.stem, kind, checked(data, kind, path)))
    if not results:
        others = f"; something else is in {', '.join(unknown)}" if unknown else ""
        raise VtpruneError(
            f"nothing to report in {folder}: expected .json files of 'vtprune bench --out', of the time, ViT or "
            f"overhead benchmarks{others}"
        )
    return results, unknown


def read(path: Path) -> Any:
    """What the JSON file ``path`` holds, if a page can hold it. Raises :class:`VtpruneError` if it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(data, ensure_ascii=False).encode()  # halves of surrogate pairs, which no page can hold
    except OSError as e:
        raise VtpruneError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise VtpruneError(f"{path} is not JSON: {e}") from e
    return data


def kind_of(data: Any) -> str | None:
    """Which kind of result ``data`` is; ``None`` for something else."""
    if not isinstance(data, dict):
        return None
    kind = data.get("type")
    if kind is None and data.keys() >= reading.PARTS.keys():
        return OVERHEAD
    return kind if kind in (*READS, OVERHEAD) else None


def checked(data: dict[str, Any], kind: str, path: Path) -> dict[str, Any]:
    """``data`` in the form that tables and figures take, once it holds what they need. Raises :class:`VtpruneError`
    for another version, and for what is missing."""
    if kind in READS and data.get("version") not in READS[kind]:
        raise VtpruneError(
            f"{path}: {kind} of version {data.get('version')!r}; this vtprune reads "
            f"{' and '.join(map(str, READS[kind]))}"
        )
    if kind == "vtprune.Times":
        data = medians(data)
    if kind == "vtprune.Vit" and isinstance(data.get("rows"), list):
        data = {**data, "rows": [vit_row(r) for r in data["rows"]]}
    CHECKS[kind](data, str(path))
    return data


def medians(times: dict[str, Any]) -> dict[str, Any]:
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
    if not isinstance(rows, list):
        return times
    return {**times, "rows": [row(r) for r in rows if not (isinstance(r, dict) and r.get("error"))]}


VIT = {
    "effective tokens": ("photographs", "effective"),
    "tokens left": ("photographs", "final"),
    "class token, cosine": ("photographs", "cls", "mean"),
    "mean of patches, cosine": ("photographs", "patches", "mean"),
    "k-NN, digits": ("digits", "knn", "accuracy"),
    "probe, digits": ("digits", "probe", "accuracy"),
    "probe of dense, digits": ("digits", "swapped", "accuracy"),
}  # columns of benchmarks/vit.py's results


def vit_row(row: Any) -> Any:
    """A row of the ViT table as scalars; others stay as they are."""
    if not isinstance(row, dict) or "photographs" not in row:
        return row

    def leaf(*path: str) -> Any:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    scalars = {name: leaf(*path) for name, path in VIT.items()}
    out = {"method": row.get("method"), "budget": row.get("budget"), **scalars}
    out |= {f"images/s x dense, batch {b}": leaf("speed", b, "speedup", "median") for b in row.get("speed") or {}}
    return out | {"note": leaf("photographs", "error")}
