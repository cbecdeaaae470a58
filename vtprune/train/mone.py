"""MoNE's router (arXiv 2407.19985): which tokens of an image run on which part of the tower's width.

The router and its weight alpha in each block are trained by the cross-entropy of the task alone, which reaches the
router through ``(alpha r_j + 1) MLP_j``: in the first step, where alpha is 0, only alpha moves. The capacity is fixed,
or drawn anew in every step (adaptive training). The paper trains the backbone's nested weights with it from the start;
beside a frozen one that was trained at full width alone the router can only choose what is lost.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from ..core.handle import Handle
from .base import Control, Training, register

DRAWN = tuple((15 + 10 * i) / 100 for i in range(9))  # .15 to .95


def prepare(handle: Handle, settings: Mapping[str, float], done: float) -> None:
    """The capacity of the next forward: the same in all processes, and in a run that goes on where it broke off."""
    drawn = random.Random(f"{handle.seed} {done:.12f}").choice(DRAWN)  # the seed is the step's own
    handle.modules["mone"].drawn = drawn if settings["adaptive"] else None


def controls(options: Mapping[str, Any]) -> list[Control]:
    """The router as it begins, and what merges and drops tokens in the tower instead of narrowing them; the table says
    what each costs."""
    share = options["capacity"]
    return [
        ("mone, untrained router", "mone", dict(options)),
        (f"tome, keep={share:g}", "tome", {"keep": share}),
        (f"flowcut, keep={share:g}", "flowcut", {"keep": share}),
    ]


register(
    Training(
        method="mone",
        what="the router of MoNE",
        options={"capacity": 0.5},
        settings={"adaptive": 0.0},
        help={"adaptive": "1: the capacity is drawn in every step from .15, .25 ... .95; 0: as --capacity says"},
        lr=1e-2,
        prepare=prepare,
        controls=controls,
        case={"options": {"capacity": 0.5}, "lr": 0.1, "falls": 0.99},
    )
)
