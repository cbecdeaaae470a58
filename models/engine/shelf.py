"""The rows of a conversation that a later turn chooses from again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor, Tensor | None]  # cosines and sines [B or 1, T, r], position ids [..., B or 1, T]


@dataclass(eq=False)
class Shelf:
    """The rows of a conversation, in its caller's columns.

    Attributes:
        ids: its tokens, ``[B, T]``.
        visual: the placeholders of images among them, ``[B, T]`` bool.
        real: which of them were no padding when they were read, ``[B, T]``.
        rows: by layer, what it was given, ``[B, T, C]``.
        tables: rotary tables and position ids.
        lost: why no turn can choose again; empty: one can.
    """

    ids: Tensor
    visual: Tensor
    real: Tensor
    rows: dict[int, Tensor] = field(default_factory=dict)
    tables: Tables | None = None
    lost: str = ""

    @property
    def bytes(self) -> int:
        """Of rows and tables."""
        held = [*self.rows.values(), *(t for t in self.tables or () if t is not None)]
        return sum(t.numel() * t.element_size() for t in held)

    def crop(self, length: int) -> None:
        """Forgets the tokens from column ``length`` on."""
        if self.ids.shape[1] <= length:
            return
        self.ids, self.visual, self.real = (t[:, :length] for t in (self.ids, self.visual, self.real))
        self.rows = {number: x[:, :length] for number, x in self.rows.items()}
        if self.tables is not None:
            cos, sin, ids = self.tables
            self.tables = cos[:, :length], sin[:, :length], None if ids is None else ids[..., :length]

    def add(self, number: int, x: Tensor, kwargs: dict[str, Any]) -> None:
        """What layer ``number`` is given for the last tokens: ``x`` ``[B, q, C]``, with their tables."""
        old = self.rows.get(number)
        self.rows[number] = x.detach() if old is None else torch.cat([old, x.detach()], 1)
        (cos, sin), ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        if self.tables is None:
            self.tables = cos, sin, ids
        elif self.tables[0].shape[1] < self.ids.shape[1]:  # of several layers the first tells them
            known = self.tables[2]
            both = None if known is None or ids is None else _joined(known, ids, -2, -1)
            self.tables = _joined(self.tables[0], cos, 0, 1), _joined(self.tables[1], sin, 0, 1), both


def _joined(old: Tensor, new: Tensor, batch: int, tokens: int) -> Tensor:
    """One behind the other along ``tokens``; either may be told once for all samples (``batch``)."""
    b = max(old.shape[batch], new.shape[batch])
    old, new = (t if t.shape[batch] == b else t.repeat_interleave(b, batch) for t in (old, new))
    return torch.cat([old, new], tokens)
