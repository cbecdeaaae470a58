"""Rows of a vision tower that run on parts of its width: which, and what a matrix makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.types import Nesting


@dataclass(frozen=True)
class Widths:
    """On which part of the width each row of a pass runs, ``[G, T]`` rows.

    Attributes:
        shape: G and T.
        full: the width.
        groups: the parts that have rows: how many features they are, and the rows ``[n]`` that run on them, counted
            over all of the pass.
        back: ``[G * T]``, where among the rows of all groups, one behind the other, each row stands.
        gain: ``[layers, G, T]``, by what each block's MLP is multiplied; ``None``: by 1.
    """

    shape: tuple[int, int]
    full: int
    groups: tuple[tuple[int, Tensor], ...]
    back: Tensor
    gain: Tensor | None = None

    @staticmethod
    def of(nesting: Nesting, full: int, prefix: int, group: int) -> Widths:
        """Of a method's answer: the ``prefix`` rows run on everything, the ``group`` rows of a token on the same."""
        last = len(nesting.widths) - 1
        part = F.pad(nesting.part.repeat_interleave(group, 1), (prefix, 0), value=last)
        order = part.flatten().argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        sizes = [len(part) * (n * group + prefix * (i == last)) for i, (_, n) in enumerate(nesting.widths)]
        features = [round(share * full) for share, _ in nesting.widths]
        groups = tuple((d, rows) for d, rows in zip(features, order.split(sizes), strict=True) if len(rows))
        gain = nesting.gain
        if gain is not None:
            gain = F.pad(gain.repeat_interleave(group, 2), (prefix, 0), value=1.0)
        return Widths((part.shape[0], part.shape[1]), full, groups, back, gain)

    @property
    def whole(self) -> bool:
        """Whether every row runs on everything."""
        return all(d == self.full for d, _ in self.groups)

    def read(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a matrix ``weight`` ``[out, C]`` makes of the first features of each row of ``x`` ``[G, T, C]``."""
        flat = x.flatten(0, 1)
        made = [F.linear(flat[:, :d].index_select(0, rows), weight[:, :d], bias) for d, rows in self.groups]
        return torch.cat(made).index_select(0, self.back).unflatten(0, self.shape)

    def write(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The first features that a matrix ``weight`` ``[C, in]`` makes of each row of ``x`` ``[G, T, in]``; the others
        are zero."""
        flat, made = x.flatten(0, 1), []
        for d, rows in self.groups:
            y = F.linear(flat.index_select(0, rows), weight[:d], None if bias is None else bias[:d])
            made.append(F.pad(y, (0, self.full - d)))
        return torch.cat(made).index_select(0, self.back).unflatten(0, self.shape)

    @property
    def features(self) -> Tensor:
        """``[G, T]``: how many features each row's part has."""
        return torch.cat([torch.full_like(rows, d) for d, rows in self.groups])[self.back].view(self.shape)

    def narrowed(self, x: Tensor) -> Tensor:
        """``x`` ``[G, T, C]`` with zeros behind the first features of each row."""
        return x.masked_fill(torch.arange(self.full, device=x.device) >= self.features[..., None], 0)

    def spared(self, inputs: int, outputs: int) -> int:
        """Multiply-adds that a matrix is spared by all rows; of ``inputs`` and ``outputs`` one is the width."""
        return sum((self.full - d) * len(rows) for d, rows in self.groups) * inputs * outputs // self.full
