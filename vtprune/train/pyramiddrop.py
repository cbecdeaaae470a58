"""PyramidDrop in training (arXiv 2410.17247, section 3 and table 1): the model learns to answer under its own pruning.

The method has no part of its own: adapters of the language model are trained while the stages are attached. With labels
the query rows are all tokens in front of an answer, their mean ranks, the selection is hard and gradients flow through
what is kept; nothing is added to the cross-entropy. The paper trains whole models with it; through LoRA is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Control, Training, register


def controls(options: Mapping[str, Any]) -> list[Control]:
    """The same stages on the model as it was."""
    return [("pyramiddrop, untrained", "pyramiddrop", dict(options))]


register(
    Training(
        method="pyramiddrop",
        what="adapters of the model under PyramidDrop's stages (--lora RANK)",
        options={"keep": None, "layers": None, "ratios": None},
        help={"keep": "visual tokens that are left after the last stage: a fraction or a number (default 0.125)"},
        lr=2e-4,
        controls=controls,
        part=False,
        case={"options": {"keep": 0.25}, "lr": 1e-2},
    )
)
