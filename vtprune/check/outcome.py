"""What a check comes to: passed, failed, not applicable; and when two tensors count as equal."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-5  # float32, relative to the largest reference value (at least 1)


class Skip(Exception):
    """The check does not apply; says why."""


class Fail(Exception):
    """The check has failed; says where."""


def close(got: Tensor, want: Tensor, what: str) -> str:
    """Raises unless equal to the tolerance of the dtype; returns the error as text."""
    if got.shape != want.shape:
        raise Fail(f"{what}: shapes {tuple(got.shape)} and {tuple(want.shape)}")
    limit = TOLERANCE if got.dtype in (torch.float32, torch.float64) else 3e-2
    error = (
        float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1))
        if got.numel()
        else 0.0
    )
    if not error <= limit:
        raise Fail(f"{what}: relative error {error:.1e} is above {limit:.0e}")
    return f"{error:.1e}"
