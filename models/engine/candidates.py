"""The visual tokens that a cut in the language model chooses from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .level import SequenceLength
from .request import Request


@dataclass(frozen=True, eq=False)
class Candidates:
    """The visual tokens that are left, one row for each of the G units that a budget applies to, padded with -1.

    Attributes:
        where: ``[G, N]`` columns of the present level.
        index: ``[G, N]`` places among the unit's original tokens.
        owner: ``[G]`` the sample of each unit.
        valid: ``[G, N]`` which of them are no padding.
    """

    where: Tensor
    index: Tensor
    owner: Tensor
    valid: Tensor

    @staticmethod
    def of(request: Request, level: SequenceLength, device: torch.device) -> Candidates:
        where, index = _remaining(request, level, device)
        return Candidates(where, index, request.owner.to(device), where >= 0)

    def rows(self, x: Tensor) -> Tensor:
        """Their rows of ``x`` ``[B, M, ...]``: ``[G, N, ...]``; padding has those of column 0."""
        return x[self.owner[:, None], self.where.clamp_min(0)]

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        """``x`` ``[B, M, C]`` with the ``rows`` ``[G, N, C]`` in their places."""
        where = torch.where(self.valid, self.where, x.shape[1])  # the extra row takes the padding
        owner = self.owner[:, None].expand_as(where)
        return torch.nn.functional.pad(x, (0, 0, 0, 1)).index_put((owner, where), rows)[:, :-1]

    def marked(self, column: Tensor, level: SequenceLength) -> Tensor:
        """``[G, N]``: those of the columns of the whole sequence that are marked, ``column`` ``[B, T]``."""
        marks = column.to(self.where.device).gather(1, level.rows) & level.valid
        return self.rows(marks) & self.valid


def _remaining(request: Request, level: SequenceLength, device: torch.device) -> tuple[Tensor, Tensor]:
    place = torch.where(level.valid, level.rows, request.length)
    column = torch.arange(level.width, device=device).expand_as(place)
    at = torch.full((len(place), request.length + 1), -1, device=device).scatter_(1, place, column)[:, :-1]
    table = request.table.to(device)
    left = torch.where(table >= 0, at[request.owner.to(device)[:, None], table.clamp_min(0)], -1)
    n = left.shape[1]
    order = torch.where(left >= 0, torch.arange(n, device=device), n).sort(1).values
    order = order[:, : int((order < n).sum(1).max())] if len(order) else order
    there = order < n
    return torch.where(there, left.gather(1, order.clamp_max(n - 1)), -1), torch.where(there, order, -1)
