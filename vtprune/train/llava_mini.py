"""LLaVA-Mini's queries and pre-fusion layers (arXiv 2501.03895), by the answers' cross-entropy alone.

The paper trains the language model and the projector along (two stages, lr 1e-4, the projector's group 1e-5). Here the
model stays as it is, which is another experiment: what one token and fused text can tell a model that has never seen
any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..methods.llava_mini import LlavaMini
from .base import Control, Training, register


def controls(options: Mapping[str, Any]) -> list[Control]:
    """As many tokens by average pooling (the paper's own ablation) and by methods that need no training, of which
    fastv's first layers see more, and the part before it was trained."""
    grid = options.get("grid", 1)
    mine = {k: v for k, v in options.items() if k != "init"}
    few = {"keep": grid**2}
    return [
        (f"pool, {grid**2} tokens", "pool", few),
        (f"divprune, {grid**2} tokens", "divprune", few),
        (f"fastv, {grid**2} tokens behind its first layers", "fastv", few),
        ("llava-mini, copied layers, untrained", "llava-mini", {**mine, "init": "copy"}),
        ("llava-mini, identity layers, untrained", "llava-mini", {**mine, "init": "identity"}),
    ]


def tells(part: Any, options: Mapping[str, Any]) -> dict[str, str]:
    known = {k: v for k, v in options.items() if k not in ("init", "weights")}
    return {name: str(value) for name, value in LlavaMini(**known).belongs().items()}


register(
    Training(
        method="llava-mini",
        what="the queries and the pre-fusion of LLaVA-Mini",
        options={
            "grid": 1,
            "fusion": 4,
            "init": "copy",
            "pe": "grid",
            "scaled": False,
            "numbering": "original",
        },
        lr=1e-3,
        tells=tells,
        controls=controls,
        case={"options": {"grid": 2, "fusion": 1, "scaled": True}, "lr": 1e-2},
    )
)
