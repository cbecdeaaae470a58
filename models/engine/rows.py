"""Rows of a sequence, taken out and put back."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import kernels


def take(table: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[B, M]`` of a table ``[B or 1, T, ...]``."""
    return kernels.gather(rows, table.to(rows.device))[0]


def put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``x`` ``[B, T, C]`` with ``values`` ``[B, M, C]`` in its ``rows`` ``[B, M]``."""
    return x.index_put((torch.arange(len(x), device=x.device)[:, None], rows.to(x.device)), values)
