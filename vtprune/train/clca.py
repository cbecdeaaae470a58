"""CLCA's carriers and head (arXiv 2501.00243), beside a frozen classifier.

The labels' cross-entropy alone, as far as the official code was read; there the whole backbone is fine-tuned with them
(here: ``--lora``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.types import VtpruneError
from ..methods.clca import Clca
from .base import Control, Training, register, rivals


def controls(options: Mapping[str, Any]) -> list[Control]:
    """The model's own classifier behind the same reductions, with the cache and without it, and what needs no
    training."""
    mine = {**{k: v for k, v in options.items() if k != "weights"}, "head": "own"}
    own: list[Control] = [
        ("clca, the model's own head, untrained", "clca", mine),
        ("clca, the model's own head, no cache", "clca", {**mine, "cache": False, "carriers": 0}),
    ]
    return own + rivals("random", "tome")


def check(options: Mapping[str, Any]) -> None:
    """Raises :class:`VtpruneError` for options that leave nothing to train."""
    if options.get("head") == "own" and options.get("carriers") == 0:
        raise VtpruneError("head='own' without carriers leaves nothing to train")


def tells(part: Any, options: Mapping[str, Any]) -> dict[str, str]:
    known = {k: v for k, v in options.items() if k not in ("layers", "weights") and v is not None}
    return Clca(**known).belongs(part.blocks)


register(
    Training(
        method="clca",
        what="the carriers and the head of CLCA",
        options={"layers": None, "ratio": 0.25, "fused": False, "carriers": 1, "cache": True, "head": "cla"},
        lr=1e-3,
        least=2,  # BatchNorm
        check=check,
        tells=tells,
        controls=controls,
        case={"options": {"ratio": 0.5, "layers": (1, 2)}, "lr": 1e-2, "pictures": True},
    )
)
