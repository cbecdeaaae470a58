"""What a trained part is worth: accuracy and cost beside the unpruned model and controls that cost no training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..check.attach import attach
from .base import Control, Say, Training, tell
from .frozen import arithmetic
from .questions import KINDS, Questions


@torch.no_grad()
def evaluate(
    model: Any,
    data: Questions,
    recipe: str | None = None,
    *,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """One pass over ``data`` under ``recipe`` (``None``: unpruned).

    Returns:
        ``accuracy`` per kind, the share of questions whose answer tokens are all the arg-max, which is when greedy
        decoding gives exactly that answer; ``mean`` over kinds; ``tokens`` the share of visual tokens per layer and
        ``flops`` that of the dense prefill, tower included (:class:`vtprune.Report`); ``parameters`` of the recipe's
        own modules.
    """
    device = next(model.parameters()).device
    hits: dict[str, list[bool]] = {}
    spent = dense = parameters = 0
    processed = visual = 0.0
    with nullcontext() if recipe is None else attach(model, recipe, **options) as handle:
        for lo in range(0, len(data.rows), batch):
            rows = data.rows[lo : lo + batch]
            inputs = data.batch(rows, device)
            labels = inputs["labels"]  # the model sees them too: what ranks tokens stands in front of the answer
            with arithmetic(model, dtype):
                logits = model(**inputs, use_cache=False).logits
            right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
            for r, ok in zip(rows, right.all(1).tolist(), strict=True):
                hits.setdefault(r.kind, []).append(ok)
            if handle is not None:
                report = handle.report()
                spent, dense = spent + report.flops, dense + report.dense_flops
                processed, visual = processed + report.effective_tokens * len(rows), visual + sum(report.visual_tokens)
        if handle is not None:
            parameters = sum(p.numel() for module in handle.modules.values() for p in module.parameters())
    accuracy = {kind: sum(hits[kind]) / len(hits[kind]) for kind in KINDS if kind in hits}
    shares = (
        {"tokens": processed / visual, "flops": spent / dense} if recipe is not None else {"tokens": 1.0, "flops": 1.0}
    )
    return {"accuracy": accuracy, "mean": sum(accuracy.values()) / len(accuracy), **shares, "parameters": parameters}


def compare(
    model: Any,
    data: Questions,
    training: Training,
    options: Mapping[str, Any],
    weights: Path | None = None,
    *,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    say: Say = tell,
) -> dict[str, Any]:
    """One table: the unpruned model, the method's controls, which cost no training, and the method with ``weights``."""
    runs: list[Control] = [("unpruned", None, {}), *training.controls(options)]
    if weights is not None:
        mine = {k: v for k, v in options.items() if k != "init"}
        runs.append((f"{training.method}, trained", training.method, {**mine, "weights": str(weights)}))
    whole = sum(p.numel() for p in model.parameters())
    rows = []
    for name, recipe, extra in runs:
        result = evaluate(model, data, recipe, batch=batch, dtype=dtype, **extra)
        trained = result.pop("parameters") if "weights" in extra else 0
        rows.append({"name": name, **result, "trained_share": trained / whole})
        say(f"{name}: mean accuracy {result['mean']:.3f}")
    counts: dict[str, int] = {}
    for r in data.rows:
        counts[r.kind] = counts.get(r.kind, 0) + 1
    return {"options": dict(options), "questions": counts, "rows": rows}


def markdown(table: dict[str, Any]) -> str:
    """The result of :func:`compare` as a markdown table; accuracies in percent, the number of questions under each
    name."""
    kinds = list(table["questions"])
    head = [
        "",
        *(f"{k} ({table['questions'][k]})" for k in kinds),
        "mean",
        "trained parameters",
        "visual tokens",
        "prefill FLOPs",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row in table["rows"]:
        cells = [row["name"], *(f"{100 * row['accuracy'][k]:.1f}" for k in kinds), f"{100 * row['mean']:.1f}"]
        cells += [f"{100 * row['trained_share']:.2f} %", f"{100 * row['tokens']:.1f} %", f"{100 * row['flops']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
