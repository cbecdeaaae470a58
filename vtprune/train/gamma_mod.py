"""The router of γ-MoD (arXiv 2410.13859): which visual tokens a layer has to run.

The answers' cross-entropy reaches the router through the MLPs' factors of the tokens that run; to it is added the
router's own cross-entropy against membership in S, over each image's tokens, summed over the routed layers, times 0.01
(as in the official code, where the mean is over all tokens). The paper trains the whole language model as well; here
everything but the router is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Control, Step, Training, register, rivals


def routing(step: Step) -> dict[str, Tensor]:
    """How far the router is from its own choice; nothing for a batch without visual tokens."""
    told = [values["router"].mean() for values in step.handle.told().values() if "router" in values]
    return {"router": step.settings["router_weight"] * torch.stack(told).sum()} if told else {}


def controls(options: Mapping[str, Any]) -> list[Control]:
    """The same layers with a router that nobody trained, with tokens drawn at random and with next to none; methods
    without training that spend as many visual tokens."""
    options = {k: v for k, v in options.items() if k not in ("init", "weights")}
    own: list[Control] = [
        ("gamma-mod, random router, untrained", "gamma-mod", {**options, "init": "random"}),
        ("gamma-mod, tokens drawn at random", "gamma-mod", {**options, "rule": "random", "weigh": "unit"}),
        ("gamma-mod, one token in these layers", "gamma-mod", {**options, "keep": 1}),
    ]
    return own + rivals("pyramiddrop", "fastv", "divprune")


register(
    Training(
        method="gamma-mod",
        what="the router of γ-MoD",
        options={"layers": None, "keep": 0.5, "weigh": "unit", "init": "random"},
        settings={"router_weight": 0.01},
        help={
            "keep": "visual tokens that run in each routed layer, a number or a share",
            "router_weight": "weight of the router's cross-entropy against its own choice",
        },
        lr=1e-3,
        losses=routing,
        tells=lambda part, options: {"layers": ",".join(map(str, part.routed)), "weigh": options["weigh"]},
        controls=controls,
        case={
            "options": {"layers": (1, 3, 4), "keep": 0.25, "weigh": "p"},
            "settings": {"router_weight": 1.0},
            "lr": 0.1,
            "shared": {"settings": {"router_weight": 1.0}},
        },
    )
)
