"""Router-Tuning's gates (arXiv 2410.13184): which attentions a prompt can do without.

Gates alone are trained, through a straight-through estimator, by the answers' cross-entropy and a price on attentions
that run: ``weight * relu(mean(m) - target)``, the mean over samples and layers (the newer official code; the paper's
first code has a price of 0, with which nothing says how much is to be left out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Control, Step, Training, register


def price(step: Step) -> dict[str, Tensor]:
    """By how much more attentions ran than ``target`` of them."""
    gates, settings = list(step.handle.gates().values()), step.settings
    if not gates:  # a batch without anything to prune
        return {}
    ran = torch.stack(gates).mean()
    if torch.distributed.is_initialized():  # of all processes' samples, which are as many in each
        every = ran.detach().clone()
        torch.distributed.all_reduce(every)
        ran = ran + (every / torch.distributed.get_world_size() - ran).detach()
    return {"price": settings["budget_weight"] * torch.relu(ran - settings["target"])}


def controls(options: Mapping[str, Any]) -> list[Control]:
    """Gates that nobody trained."""
    return [("mindskip, random gates, untrained", "mindskip", {**options, "init": "random"})]


register(
    Training(
        method="mindskip",
        what="the gates of Router-Tuning",
        options={"layers": None, "threshold": 0.5},
        settings={"target": 0.5, "budget_weight": 1.0},
        help={
            "target": "share of the routed attentions that may run for nothing",
            "budget_weight": "price of what runs beyond it, in nats",
        },
        lr=1e-2,
        losses=price,
        tells=lambda part, options: {"layers": ",".join(map(str, part.routed))},
        controls=controls,
        case={
            "options": {"layers": (1, 3, 4)},
            "settings": {"target": 0.0},
            "lr": 0.5,
            "shared": {"init": "random", "settings": {"target": 0.2}},
        },
    )
)
