"""What goes into the blocks of a vision tower and comes out of them, for methods that are written out there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def run(model: Any, inputs: Any) -> Any:
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


@contextmanager
def watched(tower: Any) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What is given to the first block meanwhile, and what the last one gives."""
    entered: list[Tensor] = []
    left: list[Tensor] = []
    hooks = [
        tower.blocks[0].register_forward_pre_hook(
            lambda m, a, k: entered.append(a[0] if a else k["hidden_states"]), with_kwargs=True, prepend=True
        ),
        tower.blocks[-1].register_forward_hook(lambda m, a, o: left.append(o[0] if isinstance(o, tuple) else o)),
    ]
    try:
        yield entered, left
    finally:
        for hook in hooks:
            hook.remove()
