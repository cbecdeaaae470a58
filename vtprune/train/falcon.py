"""FALCON's registers (arXiv 2501.16297): what a tower writes into them, and what the rest of the model reads.

The answers' cross-entropy alone. The paper trains the projector with the registers first, then everything, on millions
of samples; beside a frozen model the registers have to learn what that model reads in patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Control, Training, register, rivals


def controls(options: Mapping[str, Any]) -> list[Control]:
    """Registers that nobody trained, and what needs no training."""
    untrained: list[Control] = [("falcon, untrained", "falcon", {k: v for k, v in options.items() if k != "init"})]
    return untrained + rivals("pool", "divprune", "tome", "flowcut")


register(
    Training(
        method="falcon",
        what="the registers of FALCON",
        options={"registers": None, "reatten": True, "init": "random"},
        lr=1e-2,
        tells=lambda part, options: {"registers": str(len(part.registers))},
        controls=controls,
        case={"options": {"registers": 4, "reatten": False}, "lr": 0.1},
    )
)
