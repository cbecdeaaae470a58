"""A frozen model beside what is trained: its parameters get no gradient, its arithmetic may be short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def arithmetic(model: Any, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """bfloat16 arithmetic over float32 weights (two to three times as fast on recent CPUs); weights of another type are
    used as they are."""
    p = next(model.parameters())
    return (
        torch.autocast(p.device.type, dtype) if p.dtype == torch.float32 and dtype != torch.float32 else nullcontext()
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` gets a gradient inside; afterwards each has its flag back."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
