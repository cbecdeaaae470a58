"""How copies of decoder layers begin, before they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

STARTS = ("copy", "identity", "random")


def started(copies: Sequence[Any], how: str) -> None:
    """Changes ``copies`` of decoder layers: ``"copy"`` nothing, ``"identity"`` the last projections of both halves
    become zeros, so that each layer gives back what it is given, ``"random"`` matrices are drawn with a standard
    deviation of 0.02, the same each time, norms become ones and biases zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in copies:
            if how == "identity":
                for name, p in layer.named_parameters():
                    # the last: all experts in one
                    if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                        p.zero_()
            elif how == "random":
                for name, p in layer.named_parameters():
                    if p.ndim >= 2:
                        p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
                    else:
                        p.fill_(0.0 if name.endswith("bias") else 1.0)
