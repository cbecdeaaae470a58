"""The side branch of DPVR-LF (arXiv 2606.09131, section 3).

Every parameter of the model is frozen, so the gradient runs from the answers through the keys and values of the last
``fusion`` layers into the branch and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..core.planning import bind
from ..core.types import VtpruneError
from .base import Control, Say, Training, register, tell
from .compare import evaluate
from .questions import Questions, encode, scene_items


def check(options: Mapping[str, Any]) -> None:
    """Raises :class:`VtpruneError` where no answer reads what the branch makes, or for a split that is none."""
    split = options.get("split")
    if split != "auto" and (not isinstance(split, int) or isinstance(split, bool)):
        raise VtpruneError(f"--split {split} is neither 'auto' nor a layer number")
    if options.get("variant", "lf") == "lf" and options.get("fusion", 1) == 0:
        raise VtpruneError(
            "fusion=0 leaves nothing to train: no layer that sees the answers ever sees what the branch made (use "
            "fusion=1 or more)"
        )


def choose(
    model: Any,
    processor: Any,
    options: dict[str, Any],
    *,
    scenes: int,
    batch: int,
    dtype: torch.dtype,
    say: Say = tell,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The split where the model's own withdrawal curve puts it, and that curve."""
    if options["split"] != "auto":
        return options, {}
    val = encode(model, processor, scene_items("val", 0, scenes, 2), dtype=dtype)
    curve = withdrawal_curve(model, val, batch=batch, dtype=dtype, say=say)
    split = choose_split(curve, options["fusion"])
    say(f"split {split}")
    return {**options, "split": split}, {"withdrawal": curve}


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


def controls(options: Mapping[str, Any]) -> list[Control]:
    """The image withdrawn at the split without training, and later, where that spends as many effective tokens as late
    fusion; untrained branches. The paper's tables have none of these, so that a trained branch is not told apart from
    what late fusion gives by itself."""
    split, fusion = options["split"], options.get("fusion", 1)
    options = {k: v for k, v in options.items() if k != "init"}
    later = f"withdrawn at layer {split + fusion}: as many visual tokens as dpvr-lf"
    return [
        (f"withdrawn at layer {split}", "drop-all", {"layer": split}),
        (later, "drop-all", {"layer": split + fusion}),
        ("dpvr-lf, identity branch, untrained", "dpvr-lf", {**options, "init": "identity"}),
        ("dpvr-lf, copied branch, untrained", "dpvr-lf", {**options, "init": "copy"}),
    ]


register(
    Training(
        method="dpvr-lf",
        what="the side branch of DPVR-LF",
        options={"split": "auto", "fusion": 1, "branch_layers": 1, "init": "copy", "variant": "lf"},
        help={
            "split": "first layer without visual tokens; 'auto' measures where withdrawing the image still costs "
            "accuracy",
            "init": "the branch before training: 'copy' of layer SPLIT, 'identity' or 'random'",
        },
        check=check,
        choose=choose,
        tells=lambda part, options: {"split": str(options["split"]), "branch_layers": str(len(part))},
        controls=controls,
        case={"options": {"split": 3}, "lr": 1e-2},
    )
)
