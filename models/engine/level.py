"""The lengths of a pruned sequence and the masks that serve them, in the form of the model's attention backend."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...core.types import UnsupportedError
from . import host


@dataclass(eq=False)
class SequenceLength:
    """One sequence length.

    Attributes:
        first: the layer it begins with.
        rows: positions in the caller's sequence, ascending among ``valid``, ``[B, M]``.
        valid: which of them are no padding, ``[B, M]``.
        visual: which of them are visual tokens, ``[B, M]``.
        shift: by how much compact positions fall behind at the end of the prompt, ``[B]``.
        dense: nothing was dropped, so that the model's own masks and positions serve.
        elsewhere: the same on other devices.
    """

    first: int
    rows: Tensor
    valid: Tensor
    visual: Tensor
    shift: Tensor
    dense: bool = False
    elsewhere: dict[torch.device, SequenceLength] = field(default_factory=dict)

    def on(self, device: torch.device) -> SequenceLength:
        """The same on a layer's device (models spread over several)."""
        if self.rows.device == device:
            return self
        if device not in self.elsewhere:
            tensors = {
                f.name: getattr(self, f.name).to(device)
                for f in fields(self)
                if isinstance(getattr(self, f.name), Tensor)
            }
            self.elsewhere[device] = replace(self, elsewhere={}, **tensors)
        return self.elsewhere[device]

    def move(self, index: Tensor) -> None:
        """The samples ``index`` ``[B']`` of this level take the places of all."""
        index = index.to(self.rows.device)
        self.rows, self.valid, self.visual = self.rows[index], self.valid[index], self.visual[index]
        self.shift = self.shift[index]
        self.elsewhere.clear()
        for name in ("counts", "whole"):
            self.__dict__.pop(name, None)

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    @cached_property
    def counts(self) -> list[int]:
        """Visual tokens per sample."""
        return (self.visual & self.valid).sum(1).tolist()

    @cached_property
    def whole(self) -> bool:
        """Whether there is no padding."""
        return bool(self.valid.all())


def dense_level(real: Tensor, visual: Tensor) -> SequenceLength:
    """The caller's own sequence; real, visual ``[B, T]``."""
    b, t = real.shape
    rows = torch.arange(t, device=real.device).repeat(b, 1)
    return SequenceLength(
        0, rows, real, visual & real, torch.zeros(b, dtype=torch.long, device=real.device), dense=True
    )


def pack(first: int, mask: Tensor, parent: SequenceLength) -> tuple[SequenceLength, Tensor]:
    """The level that keeps ``mask`` ``[B, M]`` of ``parent``, padded in front, and the columns ``[B, K]`` it takes. (A
    sliding layer's cache keeps its last columns: there must be no padding.)"""
    width, m = max(int(mask.sum(1).max()), 1), mask.shape[1]
    order = torch.where(mask, torch.arange(m, device=mask.device), -1).sort(dim=1).values[:, m - width :]
    valid = order >= 0
    order = order.clamp_min(0)
    marks = parent.visual.gather(1, order) & valid
    return SequenceLength(first, parent.rows.gather(1, order), valid, marks, torch.zeros_like(parent.shift)), order


def within(level: SequenceLength, fresh: SequenceLength) -> Tensor:
    """Columns of ``level`` that hold the rows of ``fresh`` (0 for padding)."""
    size = int(max(level.rows.max(), fresh.rows.max())) + 1
    at = torch.zeros((level.rows.shape[0], size + 1), dtype=torch.long, device=level.rows.device)
    place = torch.where(level.valid, level.rows, size)
    at.scatter_(1, place, torch.arange(level.width, device=place.device).expand_as(place))
    return torch.where(fresh.valid, at.gather(1, fresh.rows), 0)


def backend(config: Any) -> str:
    """``"eager"``, ``"sdpa"`` or ``"flash"``. Raises :class:`UnsupportedError` for backends whose masks cannot be
    shortened."""
    name = host.backend(config)
    if name in ("eager", "sdpa"):
        return name
    if name.startswith("flash"):
        return "flash"
    raise UnsupportedError(
        f"attention backend {name!r} takes masks that cannot be shortened; load the model with sdpa, eager or flash "
        "attention"
    )


def shaped(seen: Tensor, how: str, dtype: torch.dtype, added: Tensor | None = None) -> Tensor:
    """``seen`` ``[B, Q, K]`` bool as the backend wants it; padding rows must see something. ``added`` ``[B, K]`` to the
    logits of what is seen."""
    if added is not None:
        return torch.where(seen, added.to(dtype)[:, None], torch.finfo(dtype).min)[:, None]
    if how == "sdpa":
        return seen[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def packed(segments: Tensor) -> dict[str, Any]:
    """What flash attention needs to know of several prompts in one row. ``segments`` ``[1, M]``: which of them each
    token belongs to."""
    if len(segments) != 1:
        raise UnsupportedError("sequences packed into one row are known to flash attention; these are several rows")
    counts = segments[0].unique_consecutive(return_counts=True)[1]
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(counts.max())
    return {"attention_mask": None, **dict(zip(host.PACKED, (starts, starts, longest, longest), strict=True))}


def allowed(mask: Any, rows: Tensor, keys: Tensor) -> Tensor | None:
    """Entries ``rows`` ``[B, Q]`` x ``keys`` ``[B, K]`` of the model's own mask (4-D, bool or additive): ``[B, Q, K]``
    bool; ``None``: it is plain causal."""
    if mask is None or mask.ndim == 2:
        return None
    if mask.ndim != 4:
        raise UnsupportedError(f"an attention mask of shape {list(mask.shape)} cannot be shortened")
    mask = mask.to(rows.device).expand(len(rows), -1, -1, -1)[:, 0]
    mask = mask if mask.dtype == torch.bool else mask == 0
    short = mask.gather(1, rows[..., None].expand(-1, -1, mask.shape[2]))
    return short.gather(2, keys[:, None].expand(-1, rows.shape[1], -1))


def prefill_mask(
    own: Any,
    level: SequenceLength,
    keys: SequenceLength,
    x: Tensor,
    cached: int,
    how: str,
    sliding: bool,
    retained: Tensor | None = None,
) -> Any:
    """The mask of ``level``'s rows over those of ``keys``, made from the dense model's ``own`` mask of that layer;
    ``cached`` columns if the cache has a fixed size; ``retained`` ``[B, T]`` is added to the logits of the caller's
    columns."""
    if own is not None and not isinstance(own, Tensor):
        raise UnsupportedError(
            f"attention masks of type {type(own).__name__} cannot be shortened; use sdpa, eager or flash attention"
        )
    m, k = level.width, keys.width
    if how == "flash":
        if retained is not None:
            raise UnsupportedError(
                "tokens that are retained softly need a mask that flash attention does not take; train with sdpa or "
                "eager attention"
            )
        if keys is not level:
            raise UnsupportedError(
                "visual tokens that give only keys and values need a mask that flash attention does not take; use sdpa "
                "or eager attention"
            )
        if sliding:
            raise UnsupportedError(
                "flash attention counts its sliding window in rows, of which pruning leaves fewer; use sdpa or eager "
                "attention"
            )
        # always a mask: without one the gaps in the positions look like the seams of packed sequences
        return level.valid.long()
    seen = allowed(own, level.rows, keys.rows)
    if seen is None:
        if keys is level and cached <= m and level.whole and how == "sdpa" and retained is None:
            return None
        seen = keys.rows[:, None] <= level.rows[..., None]
    own_column = torch.nn.functional.pad(torch.eye(m, dtype=torch.bool, device=x.device), (k - m, 0))
    # a padding row sees itself, so no row is empty
    seen = seen & keys.valid[:, None] | own_column & ~level.valid[..., None]
    added = None if retained is None else retained.to(x.device).gather(1, keys.rows)
    return shaped(torch.nn.functional.pad(seen, (0, max(cached - k, 0))), how, x.dtype, added)


def decode_mask(
    level: SequenceLength,
    tail: Tensor,
    length: int,
    q: int,
    columns: tuple[int, int],
    window: int | None,
    x: Tensor,
    how: str,
) -> Any:
    """The mask of ``q`` new tokens. ``tail`` ``[B, new]``: which tokens behind the prompt of ``length`` are real, these
    included; ``columns`` number of the cache's and the first one's place in what the layer has seen; ``window`` tokens
    that a sliding layer looks back on, in the caller's positions."""
    b, new = tail.shape
    # what each column of the cache holds: level rows, then new tokens, then nothing
    place = torch.arange(columns[0], device=x.device) + columns[1]
    width = level.width
    rows = torch.cat([level.rows, torch.arange(length, length + new, device=x.device).expand(b, -1)], dim=1)
    real = torch.cat([level.valid, tail], dim=1)
    inside = (place < width + new) & (place >= 0)
    place = place.clamp(0, width + new - 1)
    rows, real = rows[:, place], real[:, place] & inside
    query = torch.arange(length + new - q, length + new, device=x.device)
    seen = real[:, None] & (rows[:, None] <= query[:, None])
    if window is not None:
        if how == "flash" and not level.dense:
            raise UnsupportedError(
                "flash attention counts its sliding window in rows, of which pruning leaves fewer; use sdpa or eager "
                "attention"
            )
        seen = seen & (rows[:, None] > query[:, None] - window)
    if how == "flash":
        return real.long()
    if how == "sdpa" and q == 1 and bool(seen.all()):
        return None
    return shaped(seen, how, x.dtype)
