"""What tests watch while something runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that anything inside makes or looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return out


def spent(model: Any, inputs: dict[str, Any]) -> int:
    """FLOPs of a prompt as torch counts them, in some releases with the rotary angles; those of attention only where
    it is eager."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    return counter.get_total_flops()
