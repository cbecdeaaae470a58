"""What a DPVR-LF branch is worth: accuracy and cost beside the unpruned model and controls that cost no training."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..check.attach import attach
from ..core.planning import bind
from ..core.types import VtpruneError
from .dpvr_lf import METHOD, Say, tell
from .dpvr_questions import KINDS, Questions, easy_items, encode, scene_items
from .frozen import arithmetic


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


def withdrawal_curve(
    model: Any, data: Questions, *, batch: int = 32, dtype: torch.dtype = torch.float32, say: Say = tell
) -> list[dict[str, Any]]:
    """What taking the image away before layer 0, 1, … costs without training (the last entry: never): ``layer``,
    ``accuracy`` per kind, ``mean``."""
    depth = bind(model).geometry.llm_layers
    curve = []
    for layer in range(depth + 1):
        result = (
            evaluate(model, data, batch=batch, dtype=dtype)
            if layer == depth
            else evaluate(model, data, "drop-all", batch=batch, dtype=dtype, layer=layer)
        )
        curve.append({"layer": layer, "mean": result["mean"], "accuracy": result["accuracy"]})
        say(
            f"image withdrawn before layer {layer:2d}: mean accuracy {result['mean']:.3f}"
            + " (never)" * (layer == depth)
        )
    return curve


def choose_split(curve: list[dict[str, Any]], fusion: int) -> int:
    """The deepest layer where withdrawal costs at least half of what the image is worth (unpruned minus blind): later,
    little is left to recover.

    At least one layer stays without visual tokens. The paper's own rule (four layers before the 50 % transition of a
    logit-lens curve) is made for 32 layers.
    """
    blind, whole = curve[0]["mean"], curve[-1]["mean"]
    if whole - blind < 0.02:
        raise VtpruneError(
            f"the image makes no difference to this model's answers ({blind:.3f} without, {whole:.3f} with it); give "
            "--split a number"
        )
    last = max(1, len(curve) - 1 - fusion - 1)
    return max((p["layer"] for p in curve[1 : last + 1] if whole - p["mean"] >= 0.5 * (whole - blind)), default=1)


def compare(
    model: Any,
    processor: Any,
    weights: Path | None = None,
    *,
    split: int,
    eval_scenes: int = 100,
    eval_easy: int = 30,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    say: Say = tell,
    **options: Any,
) -> dict[str, Any]:
    """The table of :func:`compare_on` over the scenes test split (two questions of each ability per image) and easy-VQA
    test."""
    items = chain(scene_items("test", 0, eval_scenes, 2), easy_items("test", eval_easy))
    return compare_on(
        model,
        encode(model, processor, items, dtype=dtype),
        weights,
        split=split,
        batch=batch,
        dtype=dtype,
        say=say,
        **options,
    )


def compare_on(
    model: Any,
    data: Questions,
    weights: Path | None = None,
    *,
    split: int,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    say: Say = tell,
    **options: Any,
) -> dict[str, Any]:
    """One table: the unpruned model, the image withdrawn at ``split`` without training, DPVR-LF with an untrained
    branch (identity, copy) and with ``weights``.

    A second withdrawal, later, spends as many effective tokens as late fusion. The paper's tables have none of these
    controls, so a trained branch is not told apart from what late fusion gives by itself.
    """
    options = {"split": split, **{k: v for k, v in options.items() if k != "init"}}
    fusion = options.get("fusion", 1)
    runs: list[tuple[str, str | None, dict[str, Any]]] = [
        ("unpruned", None, {}),
        (f"withdrawn at layer {split}", "drop-all", {"layer": split}),
        (
            f"withdrawn at layer {split + fusion}: as many visual tokens as {METHOD}",
            "drop-all",
            {"layer": split + fusion},
        ),
        (f"{METHOD}, identity branch, untrained", METHOD, {**options, "init": "identity"}),
        (f"{METHOD}, copied branch, untrained", METHOD, {**options, "init": "copy"}),
    ]
    if weights is not None:
        runs.append((f"{METHOD}, trained", METHOD, {**options, "weights": str(weights)}))
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
    return {"options": options, "questions": counts, "rows": rows}


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
