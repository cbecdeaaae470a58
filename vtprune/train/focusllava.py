"""FocusLLaVA's gate (arXiv 2411.14228; a reconstruction): how coarsely each block of an image may be pooled.

The gate alone is trained, straight through, by the answers' cross-entropy and one of two prices, or both: on the share
of the tokens that is left behind the projector, ``budget_weight * |left / tokens - target|``, in which blocks count as
they were pooled and the gradient is that of the expected number; and Switch Transformer's balance (arXiv 2101.03961,
eq. 4), ``balance_weight * R sum_r f_r p_r`` with the share of the blocks f_r that chose scale r and their mean gate
p_r. Of the paper it is known that it balances, and that the text-guided sampler is trained with a stochastic technique:
here its share is drawn anew at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Control, Step, Training, register, rivals


def losses(step: Step) -> dict[str, Tensor]:
    """The price on tokens that are left, and the balance."""
    gate, settings = step.handle.modules["focusllava"], step.settings
    names = [f"{what}.{r}" for what in ("chosen", "gate") for r in gate.scales]
    said = step.handle.told().get("projector")
    if said is None:  # a batch without images
        own = gate.c.new_zeros(2 + len(names))
    else:
        own = torch.stack([said[name].sum().to(gate.c) for name in ("tokens", "left", *names)])
    if torch.distributed.is_initialized():  # of all processes' images
        every = own.detach().clone()
        torch.distributed.all_reduce(every)
        own = own + (every / torch.distributed.get_world_size() - own).detach()
    tokens, left, numbers = own[0].detach(), own[1], own[2:].view(2, -1)
    if not bool(tokens > 0):
        return {}
    share, mean = numbers[0].detach() / numbers[0].sum().detach(), numbers[1] / numbers[0].sum().detach()
    return {
        "budget": settings["budget_weight"] * (left / tokens - settings["target"]).abs(),
        "balance": settings["balance_weight"] * len(share) * (share * mean).sum(),
    }


def controls(options: Mapping[str, Any]) -> list[Control]:
    """The text-guided sampler alone, and behind blocks that are all one token."""
    alone = "focusllava, untrained: no block pooled"
    coarse = "focusllava, untrained: every block at its coarsest"
    own = [(name, "focusllava", {**options, "init": init}) for name, init in ((alone, "finest"), (coarse, "coarsest"))]
    return own + rivals("pool", "divprune", "pyramiddrop")


register(
    Training(
        method="focusllava",
        what="the gate of FocusLLaVA's vision-guided sampler (a reconstruction)",
        options={"scales": (1, 2, 4), "text": True, "layers": None, "ratio": 0.7, "ratio_min": 0.5},
        settings={"target": 0.6, "budget_weight": 1.0, "balance_weight": 0.0},
        help={
            "target": "share of an image's tokens that is to be left behind the projector",
            "budget_weight": "price of a share that is another, in nats",
            "balance_weight": "of the balance between the scales (0.01 with --budget-weight 0: balance instead of a "
            "target)",
        },
        lr=1e-2,
        losses=losses,
        tells=lambda part, options: {"scales": ",".join(map(str, part.scales))},
        controls=controls,
        case={
            "options": {"scales": (1, 2)},
            "settings": {"target": 0.25, "budget_weight": 3.0},
            "lr": 0.1,
            "shared": {
                "init": "random",
                "settings": {"target": 0.3, "budget_weight": 0.5, "balance_weight": 0.1},
            },
        },
    )
)
