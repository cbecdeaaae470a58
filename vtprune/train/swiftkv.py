"""SwiftKV's distillation (arXiv 2410.03960): the model with ``norm^swift``, ``W_Q^swift``, ``W_K^swift`` and
``W_V^swift`` learns from the same model without them.

``temperature**2 * KL(teacher || student)`` of the logits that predict answer tokens, and the squared distance of what
enters the last layer, ``hidden_states[-2]``, of all tokens; both are means within a sample, and then over the samples
(the official code reads one sample at a time). The mask of the answers is the labels' one place earlier, where a
token's logits stand; the official code's is not shifted in one of its modes, so that it leaves out the answer's first
token and adds one behind its last.

All tokens run through all layers in training, as in the paper: what the answers hold is what they hold in use, where
the prunable tokens stop at layer n.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.types import VtpruneError
from .base import Control, Step, Training, register, rivals


def check(options: Mapping[str, Any]) -> None:
    """Raises :class:`VtpruneError` where the student lacks rows that the teacher has."""
    if options.get("rows", "all") != "all":
        raise VtpruneError(f"rows={options['rows']!r}: distilling compares all tokens, so all run through all layers")


def distil(step: Step) -> dict[str, Tensor]:
    """What tells the student from its teacher: ``kl`` and ``states``."""
    settings = step.settings
    if settings["temperature"] == 0:
        raise VtpruneError("temperature=0 divides by nothing: give a number above 0")
    inputs = {k: v for k, v in step.inputs.items() if k != "labels"}
    with torch.no_grad(), step.handle.unpruned():
        teacher = step.model(**inputs, use_cache=False, output_hidden_states=True)
    kl = divergence(teacher.logits, step.output.logits, step.inputs["labels"], settings["temperature"])
    rows = step.inputs.get("attention_mask")
    rows = torch.ones_like(step.inputs["labels"]) if rows is None else rows
    states = distance(teacher.hidden_states[-2], step.output.hidden_states[-2], rows.bool())
    return {"kl": kl, "states": settings["states_weight"] * states}


def divergence(teacher: Tensor, student: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """``temperature**2 * KL(teacher || student)`` in nats where ``logits[:, t]`` ``[B, T, V]`` predict ``labels[:, t +
    1]`` ``[B, T]`` that are not -100: the mean over a sample's such places, and over the samples."""
    asked = labels[:, 1:] != -100
    p, q = (torch.log_softmax(_long(x[:, :-1][asked]) / temperature, -1) for x in (teacher, student))
    return temperature**2 * _mean((p.exp() * (p - q)).sum(-1), asked)


def distance(teacher: Tensor, student: Tensor, rows: Tensor) -> Tensor:
    """The mean squared difference of the ``rows`` ``[B, T]`` of two ``[B, T, C]``: over a sample's, and over the
    samples."""
    return _mean((_long(teacher[rows]) - _long(student[rows])).square().mean(-1), rows)


def _long(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Of ``values``, one for each True of ``where`` ``[B, T]``."""
    weight = 1 / (where.sum(1, keepdim=True).clamp_min(1) * len(where)).to(values.dtype)
    return (values * weight.expand_as(where)[where]).sum()


def controls(options: Mapping[str, Any]) -> list[Control]:
    """The mechanism without training, visual tokens that leave at layer n and lend nothing, and methods that spend as
    many FLOPs without any training."""
    layer, norms = options["layer"], options["norms"]
    out: list[Control] = [("swiftkv, the model's own projections", "swiftkv", {"layer": layer})]
    if norms == "one":
        out.append(("swiftkv, one norm, untrained", "swiftkv", {"layer": layer, "norms": norms}))
    if layer is not None:
        out.append((f"withdrawn at layer {layer}", "drop-all", {"layer": layer}))
    return out + rivals("pyramiddrop", "divprune", "fastv", by="flops")


register(
    Training(
        method="swiftkv",
        what="SwiftKV's norm and projections, distilled from the model itself",
        options={"layer": None, "norms": "one"},
        settings={"temperature": 2.0, "states_weight": 1.0},
        help={
            "temperature": "of the softmax of teacher and student",
            "states_weight": "weight of the squared distance of what enters the last layer",
        },
        lr=2e-4,
        losses=distil,
        answers=False,
        asks={"output_hidden_states": True},
        during={"rows": "all"},
        check=check,
        tells=lambda part, options: {"layer": str(part.first), "norms": part.norms},
        controls=controls,
        case={"options": {"layer": 3, "norms": "one"}, "lr": 1e-2},
    )
)
