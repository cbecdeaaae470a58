"""Rotary tables of vision towers, and how they turn queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_rows(table: Any, rows: Tensor) -> Any:
    """Rows ``[G, n]`` of a rotary table, image by image: ``[N, d]`` becomes ``[G, 1, n, d]``, ``[H, N, d]`` and ``[G or
    1, H, N, d]`` become ``[G, H, n, d]``; a tuple of tables is taken one by one."""
    if isinstance(table, tuple):
        return tuple(rotary_rows(t, rows) for t in table)
    if table.ndim == 2:
        return table[rows][:, None]
    table = (table if table.ndim == 4 else table[None]).expand(len(rows), -1, -1, -1)
    return table.gather(2, rows[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, prefix: int, half: bool) -> Tensor:
    """``x`` ``[B, H, P + n, d]`` with its last n rows rotated by tables of n rows that broadcast over ``[B, H, n, d]``.
    ``half``: coordinate i pairs with i + d / 2, else 2i with 2i + 1."""
    front, x = x[:, :, :prefix], x[:, :, prefix:]
    if half:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([front, (x * cos + turned * sin).to(x.dtype)], dim=2)
