"""What the sources of a :class:`~vtprune.core.types.TokenView` answer with. Shapes: B images, N tokens, P prefix tokens
(of a prompt: all its tokens), C channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projections:
    """Queries, keys and values of one vision block, prefix tokens first.

    Attributes:
        q, k, v: ``[B, H, P + N * group, d]``.
        scale: of the logits.
        prefix: P.
        bias: what the block adds to its logits, ``[B, 1, 1, P + N * group]``.
        group: patches that each of the view's N tokens is made of (:attr:`Geometry.fold`); they stand together.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    prefix: int
    bias: Tensor | None = None
    group: int = 1

    def __getitem__(self, rows: Tensor) -> Projections:
        """Those of the images ``rows``."""
        bias = None if self.bias is None else self.bias[rows]
        return replace(self, q=self.q[rows], k=self.k[rows], v=self.v[rows], bias=bias)

    def first(self, tokens: int) -> Projections:
        """Those of the first ``tokens`` of each image."""
        n = self.prefix + tokens * self.group
        bias = None if self.bias is None else self.bias[..., :n]
        return replace(self, q=self.q[:, :, :n], k=self.k[:, :, :n], v=self.v[:, :, :n], bias=bias)

    def per_token(self, values: Tensor) -> Tensor:
        """``values`` ``[B, N * group]`` of patches as means over those of each token that are seen, ``[B, N]``; 0 where
        none is."""
        if self.group == 1:
            return values
        values = values.unflatten(1, (-1, self.group))
        if self.bias is None:
            return values.mean(2)
        seen = self._seen(self.bias).unflatten(1, (-1, self.group))
        return torch.where(seen, values, 0).sum(2) / seen.sum(2).clamp_min(1)

    def keys(self) -> Tensor:
        """``[B, H, N, d]``: the keys of the view's tokens; of one that is made of several patches their mean."""
        keys = self.k[:, :, self.prefix :]
        return keys if self.group == 1 else keys.unflatten(2, (-1, self.group)).mean(3)

    def real(self, valid: Tensor) -> Tensor:
        """``[B, P + N * group]`` bool: which rows are no padding, from the view's ``valid`` ``[B, N]``, and seen."""
        valid = valid.repeat_interleave(self.group, 1)
        if self.group > 1 and self.bias is not None:
            valid = valid & self._seen(self.bias)
        return torch.cat([valid.new_ones(len(valid), self.prefix), valid], 1)

    def _seen(self, bias: Tensor) -> Tensor:
        return bias[:, 0, 0, self.prefix :] > -torch.inf


@dataclass(frozen=True)
class Text:
    """The text of a prompt, up to what answers begin behind: the same for every unit of the prompt.

    Attributes:
        hidden: ``[B, T, C]``, at this site: input embeddings behind the projector.
        valid: ``[B, T]`` bool, False for padding.
        after: ``[B, T]`` bool, those behind the unit's last visual token.
        place: ``[B, T]``, columns in the caller's sequence.
        keys: ``[B, T, G, d]`` of the layer that was asked for, as its attention uses them.
        ids: ``[B, T]``, the tokens themselves; -1 for padding.
    """

    hidden: Tensor
    valid: Tensor
    after: Tensor
    place: Tensor
    keys: Tensor | None = None
    ids: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Text:
        """Those of the images ``rows``."""
        keys, ids = (None if t is None else t[rows] for t in (self.keys, self.ids))
        return Text(self.hidden[rows], self.valid[rows], self.after[rows], self.place[rows], keys, ids)


@dataclass(frozen=True)
class Products:
    """What the last token of a prompt gives to each of the prompt's tokens.

    Attributes:
        score: ``[B, P]``, in the prompt's order, -inf behind its last token.
        place: ``[B, N]``, the view's tokens among them, -1 for padding.
    """

    score: Tensor
    place: Tensor

    def __getitem__(self, rows: Tensor) -> Products:
        """Those of the images ``rows``."""
        return Products(self.score[rows], self.place[rows])

    def first(self, tokens: int) -> Products:
        """Those of the first ``tokens`` of each image."""
        return Products(self.score, self.place[:, :tokens])
