"""Rows of a sequence, taken out and put back; those that layers, and parts of them, give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import kernels


def take(table: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[B, M]`` of a table ``[B or 1, T, ...]``."""
    return kernels.gather(rows, table.to(rows.device))[0]


def put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``x`` ``[B, T, C]`` with ``values`` ``[B, M, C]`` in its ``rows`` ``[B, M]``."""
    return x.index_put((torch.arange(len(x), device=x.device)[:, None], rows.to(x.device)), values)


def rows_of(output: Any) -> Tensor:
    """The rows that a layer, or a part of one, gives."""
    return output[0] if isinstance(output, tuple) else output


def with_rows(output: Any, x: Tensor) -> Any:
    """The same output with the rows ``x``."""
    return (x, *output[1:]) if isinstance(output, tuple) else x


def same(x: Tensor, y: Tensor) -> bool:
    """Whether they are equal to the last bit, on whatever device; padding may be NaN in both."""
    return x.shape == y.shape and torch.allclose(x, y.to(x.device), rtol=0, atol=0, equal_nan=True)
