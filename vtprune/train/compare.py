"""What a trained part is worth: accuracy and cost beside the unpruned model and controls that cost no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..check.attach import attach
from ..core import backbone
from ..core.planning import bind
from ..core.solve import solve
from ..core.types import VtpruneError
from ..measure.runs import read
from ..measure.statistics import average_interval
from .base import EQUAL, Say, Training, tell
from .data import Data
from .frozen import arithmetic
from .lora import loaded, read_size
from .questions import KINDS


class Asked(NamedTuple):
    """As the intervals see a row: rows of one source are drawn together."""

    source: str
    ability: str


@torch.no_grad()
def evaluate(
    model: Any,
    data: Data,
    recipe: str | None = None,
    *,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """One pass over ``data`` under ``recipe`` (``None``: unpruned).

    Returns:
        ``accuracy`` per kind, the share of questions whose answer tokens are all the arg-max, which is when greedy
        decoding gives exactly that answer (of pictures whose class has the highest logit); ``mean`` over kinds;
        ``hits`` row by row; ``tokens`` the share of visual tokens per layer and ``flops`` that of the dense prefill,
        tower included (:class:`vtprune.Report`); ``parameters`` of the recipe's own modules.
    """
    device = next(model.parameters()).device
    hits: list[bool] = []
    spent = dense = parameters = 0
    processed = visual = 0.0
    with nullcontext() if recipe is None else attach(model, recipe, **options) as handle:
        for lo in range(0, len(data.rows), batch):
            rows = list(data.rows[lo : lo + batch])
            inputs = data.batch(rows, device)  # the model sees labels too: what ranks stands in front of the answer
            with arithmetic(model, dtype):
                output = data.call(model, inputs, {})
            hits += data.right(output, inputs).tolist()
            if handle is not None:
                report = handle.report()
                spent, dense = spent + report.flops, dense + report.dense_flops
                processed, visual = processed + report.effective_tokens * len(rows), visual + sum(report.visual_tokens)
        if handle is not None:
            parameters = sum(p.numel() for module in handle.modules.values() for p in module.parameters())
    shares = (
        {"tokens": processed / visual, "flops": spent / dense} if recipe is not None else {"tokens": 1.0, "flops": 1.0}
    )
    return {**_accuracy(data, hits), "hits": hits, **shares, "parameters": parameters}


def _accuracy(data: Data, hits: Sequence[bool]) -> dict[str, Any]:
    by_kind: dict[str, list[bool]] = {}
    for row, ok in zip(data.rows, hits, strict=True):
        by_kind.setdefault(row.kind, []).append(ok)
    order = sorted(by_kind, key=lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind))
    accuracy = {kind: sum(by_kind[kind]) / len(by_kind[kind]) for kind in order}
    return {"accuracy": accuracy, "mean": sum(accuracy.values()) / len(accuracy)}


def compare(
    model: Any,
    data: Data,
    training: Training,
    options: Mapping[str, Any],
    weights: Path | None = None,
    *,
    lora: Path | None = None,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    say: Say = tell,
) -> dict[str, Any]:
    """One table: the unpruned model, the method's controls, which cost no training, the method with ``weights``, and
    the controls that are to spend as much as that (:func:`~vtprune.train.base.rivals`), which are left out, with a
    word, without it and where they cannot. With ``lora``, the folder of adapters that were trained with the weights,
    also the unpruned model with these.

    Each row has the 95 % intervals of its mean and of its difference to the unpruned model (bootstraps over images,
    texts or pictures: of the test questions, not of other seeds; see :func:`joined`).
    """
    whole = sum(p.numel() for p in model.parameters())
    extra = 0 if lora is None else read_size(lora)
    samples: Any = [Asked(str(row.source), row.kind) for row in data.rows]
    rows: list[dict[str, Any]] = []
    base: list[bool] = []

    def run(name: str, recipe: str | None, own: Mapping[str, Any], adapted: bool = False) -> None:
        with loaded(model, lora if adapted else None):
            if getattr(data, "projected", False) and adapted and backbone.tuners(_tower(model)):
                raise VtpruneError(
                    "the adapters are in the tower, which has seen these images without them: encode pixels"
                )
            result = evaluate(model, data, recipe, batch=batch, dtype=dtype, **own)
        hits, parameters = result.pop("hits"), result.pop("parameters")
        base.extend([] if base else hits)
        trained = (parameters if "weights" in own else 0) + (extra if adapted else 0)
        rows.append({"name": name, **result, "trained_share": trained / whole})
        rows[-1]["interval"] = average_interval(hits, samples)
        rows[-1]["difference"] = result["mean"] - rows[0]["mean"]
        gap = [a - b for a, b in zip(hits, base, strict=True)]
        rows[-1]["difference_interval"] = average_interval(gap, samples)
        say(f"{name}: mean accuracy {result['mean']:.3f}")

    controls = training.controls(options)
    for control in (("unpruned", None, {}), *(c for c in controls if EQUAL not in c[2].values())):
        run(*control)
    mine = {k: v for k, v in options.items() if k != "init"}
    if lora is not None:
        run("unpruned, with the adapters", None, {}, adapted=True)
    if weights is not None and training.part:
        mine["weights"] = str(weights)
    if "weights" in mine or lora is not None:
        run(f"{training.method}, trained", training.method, mine, adapted=lora is not None)
        spent = {"effective_tokens": rows[-1]["tokens"], "flops": rows[-1]["flops"]}
        for name, recipe, own in (c for c in controls if EQUAL in c[2].values()):
            given = {k: min(1.0, spent[k]) if v == EQUAL else v for k, v in own.items()}
            try:
                solve(model, recipe, **given)
            except VtpruneError as e:
                say(f"{name}: left out, {e}")
                continue
            run(name, recipe, given)
    counts: dict[str, int] = {}
    for r in data.rows:
        counts[r.kind] = counts.get(r.kind, 0) + 1
    return {"options": dict(options), data.noun: counts, "rows": rows, "noun": data.noun}


def _tower(model: Any) -> nn.Module:
    return nn.ModuleList(bind(model).tower_blocks())


def markdown(table: dict[str, Any]) -> str:
    """The result of :func:`compare` as a markdown table; accuracies in percent, the number of questions under each
    name, 95 % intervals in brackets."""
    counts = table[table.get("noun", "questions")]
    kinds = list(counts)
    head = ["", *(f"{k} ({counts[k]})" for k in kinds), "mean", "against unpruned"]
    head += ["trained parameters", "visual tokens", "prefill FLOPs"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row in table["rows"]:
        cells = [row["name"], *(f"{100 * row['accuracy'][k]:.1f}" for k in kinds)]
        cells.append(f"{100 * row['mean']:.1f} {_range(row['interval'])}")
        cells.append(
            f"{100 * row['difference']:+.1f} {_range(row['difference_interval'])}" if row["name"] != "unpruned" else ""
        )
        cells += [f"{100 * row['trained_share']:.2f} %", f"{100 * row['tokens']:.1f} %", f"{100 * row['flops']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _range(pair: Sequence[float]) -> str:
    low, high = pair
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


# ------------------------------------------------------------------------------------------------------- several seeds


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """The comparisons in ``paths``, of runs that differ in their seed, as one table: per row the ``mean`` of the means
    and the ``least`` and ``most`` of them, the same of the ``difference`` to the unpruned model, and the means of
    ``tokens`` and ``flops``.

    Raises :class:`VtpruneError` for less than two files, one given twice, a file that is no comparison, and comparisons
    of other methods, options or numbers of questions.
    """
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise VtpruneError("give two or more comparisons (OUT.compare.json), each once")
    tables = [_comparison(path) for path in paths]
    first = tables[0]
    for path, table in zip(paths, tables, strict=True):
        for what in ("options", "noun", first["noun"]):
            if table.get(what) != first[what]:
                raise VtpruneError(f"{path} is no other seed of {paths[0]}: its {what} differ")
        if [row["name"] for row in table["rows"]] != [row["name"] for row in first["rows"]]:
            raise VtpruneError(f"{path} is no other seed of {paths[0]}: it compares something else")
    rows = []
    for same in zip(*(table["rows"] for table in tables), strict=True):
        out: dict[str, Any] = {"name": same[0]["name"]}
        for what in ("mean", "difference", "tokens", "flops"):
            values = [row[what] for row in same]
            out[what] = {"mean": sum(values) / len(values), "least": min(values), "most": max(values)}
        rows.append(out)
    return {"seeds": len(paths), "options": first["options"], "noun": first["noun"], "rows": rows}


def _comparison(path: Path) -> dict[str, Any]:
    table = read(path)
    wanted = {"name", "mean", "difference", "tokens", "flops"}
    rows = table.get("rows")
    good = isinstance(rows, list) and rows and all(isinstance(row, dict) and wanted <= row.keys() for row in rows)
    if not good or not {"options", "noun"} <= table.keys() or table["noun"] not in table:
        raise VtpruneError(f"{path} is no comparison of this release: vtprune train METHOD --compare-only writes one")
    return table


def joined_markdown(table: dict[str, Any]) -> str:
    """The result of :func:`joined`; percent, from the least to the most of the seeds in brackets."""
    head = ["", f"mean of {table['seeds']} seeds", "against unpruned", "visual tokens", "prefill FLOPs"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row in table["rows"]:
        m, d, n, f = (row[what] for what in ("mean", "difference", "tokens", "flops"))
        cells = [row["name"], f"{100 * m['mean']:.1f} {_range((m['least'], m['most']))}"]
        cells += [f"{100 * d['mean']:+.1f} {_range((d['least'], d['most']))}" if row["name"] != "unpruned" else ""]
        cells += [f"{100 * n['mean']:.1f} %", f"{100 * f['mean']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
