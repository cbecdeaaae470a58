"""Positions, rotary tables and masks for the layers of a pruned sequence, in prefill and behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import kernels
from . import host
from .description import Decoder
from .level import SequenceLength, backend, decode_mask, packed, prefill_mask
from .request import Call


class Serving:
    """Makes what a layer is given beside its hidden states, once per level and attention type. ``compact``: positions
    are counted among the tokens that are left."""

    def __init__(self, decoder: Decoder, *, compact: bool):
        self.decoder, self.compact = decoder, compact

    def prefill(
        self,
        call: Call,
        level: SequenceLength,
        number: int,
        kwargs: dict,
        x: Tensor,
        keys: SequenceLength | None = None,
    ) -> dict[str, Any]:
        """Rotary table, position ids and mask for ``level`` at layer ``number``; ``keys`` the level whose keys its rows
        see, if it is another. ``x`` tells dtype and device."""
        kind = self.decoder.kinds[number]
        key = (level, kind, keys)  # which it keeps alive
        if key in call.served:
            return call.served[key]
        dense = call.dense.get(kind, kwargs)
        if level.dense and keys is None and call.retained is None:
            return {name: dense.get(name) for name in ("position_embeddings", "position_ids", "attention_mask")}
        out = self._positions(level, kind, dense, x)
        cached = self._columns(call, number, x.shape[1])[0]
        sliding, how = self.decoder.window_of(number) is not None, backend(self.decoder.lm.config)
        out["attention_mask"] = prefill_mask(
            dense.get("attention_mask"),
            level,
            level if keys is None else keys,
            x,
            cached,
            how,
            sliding,
            call.retained,
        )
        if how == "flash" and call.segments is not None:
            out |= packed(call.segments.to(level.rows.device).gather(1, level.rows))
        call.served[key] = out
        return out

    def decode(self, call: Call, level: SequenceLength, number: int, kwargs: dict, x: Tensor) -> dict[str, Any]:
        """Mask, and compact positions, for new tokens ``x`` behind a prompt of which layer ``number`` holds
        ``level``."""
        kind = self.decoder.kinds[number]
        key = (level, kind)
        if key in call.served:
            return call.served[key]
        request = call.request
        assert request is not None and call.tail is not None
        out: dict[str, Any] = {}
        if self.compact:
            ids = call.ids if call.ids is not None else kwargs["position_ids"]
            ids = ids.to(x.device) - level.shift[:, None]
            out = {"position_ids": ids, "position_embeddings": self.decoder.rotary(x, ids, kind)}
        tail, columns = call.tail.to(x.device), self._columns(call, number, x.shape[1])
        how, window = backend(self.decoder.lm.config), self.decoder.window_of(number)
        out["attention_mask"] = decode_mask(level, tail, request.length, x.shape[1], columns, window, x, how)
        call.served[key] = out
        return out

    def _positions(self, level: SequenceLength, kind: str, dense: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """Rotary table and position ids of the level's rows, from those that the model made for the whole sequence."""
        rope, ids = dense["position_embeddings"], dense.get("position_ids")
        if self.compact and not level.dense:
            full = torch.arange(rope[0].shape[1], device=x.device)[None] if ids is None else ids
            ids = self._compact(level, full.to(x.device).expand(len(level.rows), -1).gather(1, level.rows))
            return {"position_embeddings": self.decoder.rotary(x, ids, kind), "position_ids": ids}
        # three axes each for themselves (GLM-4.5V)
        flat = () if ids is None else tuple(ids) if ids.ndim == 3 else (ids,)
        cos, sin, *more = kernels.gather(level.rows, *(t.to(level.rows.device) for t in (*rope, *flat)))
        if ids is not None:
            ids = torch.stack(more) if ids.ndim == 3 else more[0]
        return {"position_embeddings": (cos, sin), "position_ids": ids}

    def _compact(self, level: SequenceLength, ids: Tensor) -> Tensor:
        """Positions 0, 1, 2 … among the real tokens (padding takes 0), as PyramidDrop's official code renumbers;
        remembers the distance for decoding."""
        compact = (level.valid.long().cumsum(1) - 1).clamp_min(0)
        last = torch.where(level.valid, torch.arange(ids.shape[1], device=ids.device), -1).argmax(1, keepdim=True)
        level.shift = (ids.gather(1, last) - compact.gather(1, last))[:, 0]
        return compact

    @staticmethod
    def _columns(call: Call, number: int, q: int) -> tuple[int, int]:
        """Columns that the cache of layer ``number`` will show for ``q`` more tokens, and the first one's place in all
        it has seen."""
        if call.cache is None:
            return q, 0
        if call.again and call.request is not None:  # the layers in front hold the conversation, which is read anew
            number = max(number, call.request.front)
        return host.columns(call.cache, q, number)
