"""What a cut in front of layer 0 does for methods that fuse: the prompt's text is read once more behind the visual
tokens, by layers of the method's own, and goes on as what these make of it (LLaVA-Mini, arXiv 2501.03895)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.ledger import UndoLedger
from ...core.types import Action, UnsupportedError
from ..base import PlannedCut
from . import host
from .beside import follow
from .description import Decoder
from .layout import RasterSpan
from .level import SequenceLength, backend, prefill_mask
from .request import Call
from .rows import rows_of, take
from .text import prompt_at


@dataclass(frozen=True)
class Reading:
    """What the method's layers read: L sequences of the samples ``owner`` ``[L]``, whose rows are the level ``alone``
    of its own; each stands at the position of the column ``where`` ``[L, S]``, or, counted anew (``recount``), at that
    number."""

    owner: Tensor
    alone: SequenceLength
    where: Tensor
    recount: bool


class Fusing:
    """Fuses text in front of layer 0. Raises :class:`UnsupportedError` for ``cuts`` that cannot."""

    def __init__(self, decoder: Decoder, cuts: Sequence[PlannedCut], ledger: UndoLedger):
        self.decoder = decoder
        self.fuse = ledger.timed(self._fuse, counts=False)
        cut = next((c.cut for c in cuts if c.cut.action is Action.FUSE), None)
        if cut is not None and host.takes_planes(decoder.lm):
            raise UnsupportedError(
                f"{type(decoder.lm).__name__} adds planes of the image behind its first layers (DeepStack), which a "
                "token made of many would get for one of them only: text is not fused there"
            )
        if cut is not None and cut.recount and decoder.mrope:
            raise UnsupportedError(
                f"{type(decoder.root).__name__} places tokens by time, row and column, where counting them anew is not "
                "defined: keep the original positions"
            )

    def _fuse(self, call: Call, planned: PlannedCut, number: int, x: Tensor) -> Tensor:
        """``x`` ``[B, M, C]`` of the present level with the text of prompts that have visual tokens changed: no
        padding, no answers. What the method's layers are given of the text carries no gradient."""
        request = call.request
        assert request is not None and call.level is not None
        if call.segments is not None:
            raise UnsupportedError(
                "several prompts packed into one row would be fused with each other's images; read each prompt in a "
                "row of its own"
            )
        level = call.level.on(x.device)
        owner, marks = looks(request.parts, request.length)
        if not len(owner):
            return x
        owner, marks = owner.to(x.device), marks.to(x.device)
        seen = marks.gather(1, level.rows[owner]) & (level.visual & level.valid)[owner]  # [L, M]
        text = (prompt_at(call, level) & ~level.visual)[owner]
        m = level.width
        column = torch.arange(m, device=x.device)
        order = torch.where(seen, column, torch.where(text, column + m, 2 * m)).sort(1).values
        order = order[:, : int((order < 2 * m).sum(1).max())]  # [L, S]: visual tokens, then text, then padding
        real, spoken = order < 2 * m, (order >= m) & (order < 2 * m)
        at = torch.where(real, order % m, 0)
        given = x[owner[:, None], at]
        given = torch.where(spoken[..., None], given.detach(), given)
        place = torch.arange(order.shape[1], device=x.device).expand_as(order)
        alone = SequenceLength(number, place, real, real & ~spoken, level.shift[owner])
        where = place if planned.cut.recount else level.rows[owner].gather(1, at)
        reading = Reading(owner, alone, where, planned.cut.recount)
        made = planned.fuse(given, lambda layer, hidden: self._run(call, reading, layer, hidden))
        request.rewritten = True
        if made is given:
            return x
        return _put(x, made, owner, torch.where(spoken, at, m))

    def _run(self, call: Call, reading: Reading, layer: Any, hidden: Tensor) -> Tensor:
        """One layer of the method's own, a copy of the decoder's. Each row sees all in front of it, whatever windows
        the model has."""
        assert call.request is not None
        alone = reading.alone
        number = layer.self_attn.layer_idx
        follow(layer, self.decoder.layers[0])
        call.request.fused.append((number, alone.valid.sum(1).tolist()))
        tables = self._tables(call, reading, self.decoder.kinds[number], hidden)
        sliding, how = self.decoder.window_of(number) is not None, backend(self.decoder.lm.config)
        if how == "flash" and not getattr(layer.self_attn, "is_causal", True):
            raise UnsupportedError(
                f"{type(layer.self_attn).__name__} sees both ways unless a mask says otherwise, which flash attention "
                "does not take: use sdpa or eager attention"
            )
        width = alone.width  # always a mask: without one such layers would see both ways
        causal = torch.ones(1, 1, width, width, dtype=torch.bool, device=hidden.device).tril()
        bias = prefill_mask(causal, alone, alone, hidden, 0, how, sliding)
        return rows_of(layer(hidden, attention_mask=bias, position_embeddings=tables)).to(hidden.dtype)

    def _tables(self, call: Call, reading: Reading, kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables of layers of this ``kind``."""
        owner, where = reading.owner, reading.where
        if reading.recount:
            return self.decoder.rotary(x, where + self.decoder.first_position, kind)
        dense = call.dense.get(kind)
        if dense is not None:
            cos, sin = (_of(t, owner, where) for t in dense["position_embeddings"])
            return cos, sin
        ids = next(iter(call.dense.values())).get("position_ids")
        if ids is None or ids.ndim != 2:
            raise UnsupportedError(
                f"text is fused by a copy of a layer of type {kind}, whose rotary table the model has not made yet: "
                "fewer layers, or positions counted anew"
            )
        return self.decoder.rotary(x, _of(ids, owner, where), kind)


def _of(table: Tensor, owner: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[L, S]`` of a table ``[B or 1, T, ...]`` of the samples ``owner`` ``[L]``."""
    table = table.to(rows.device)
    return take(table if len(table) == 1 else table[owner], rows)


def looks(samples: Sequence[Sequence[RasterSpan]], length: int) -> tuple[Tensor, Tensor]:
    """What the text of each prompt is read beside: all its images, and of its videos one frame after another. Answers
    with the sample of each, ``[L]``, and its columns, ``[L, T]`` bool; none of a prompt without visual tokens."""
    owner: list[int] = []
    marks: list[Tensor] = []
    for b, parts in enumerate(samples):
        if not parts:
            continue
        still = torch.zeros(length, dtype=torch.bool)
        frames: dict[int, Tensor] = {}
        for part in parts:
            mine = still if part.video < 0 else frames.setdefault(part.image, torch.zeros(length, dtype=torch.bool))
            mine[part.columns.cpu()] = True
        each = [still | frame for frame in frames.values()] or [still]
        owner += [b] * len(each)
        marks += each
    none = torch.zeros(0, length, dtype=torch.bool)
    return torch.tensor(owner, dtype=torch.long), torch.stack(marks) if marks else none


def _put(x: Tensor, made: Tensor, owner: Tensor, columns: Tensor) -> Tensor:
    """``x`` ``[B, M, C]`` with the rows ``made`` ``[L, S, C]`` in the ``columns`` ``[L, S]`` (M: nowhere) of the
    samples ``owner`` ``[L]``; where several come to one place, their mean, in at least 32 bits."""
    b, m, c = x.shape
    at = owner[:, None].expand_as(columns)
    count = torch.zeros(b, m + 1, device=x.device).index_put((at, columns), torch.ones((), device=x.device), True)
    wide = made.float() if made.dtype in (torch.float16, torch.bfloat16) else made
    total = wide.new_zeros(b, m + 1, c).index_put((at, columns), wide, True)[:, :m]
    count = count[:, :m, None]
    return torch.where(count > 0, (total / count.clamp_min(1)).to(x.dtype), x)
