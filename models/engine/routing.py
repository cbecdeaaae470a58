"""What a cut does for routing methods: visual rows that were put aside come back through a side branch, as rows or as
keys and values (DPVR, arXiv 2606.09131)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from ..base import PlannedCut
from . import host
from .beside import follow, lent, projected
from .description import Decoder
from .layout import BudgetGroup
from .level import SequenceLength, backend, prefill_mask, within
from .record import Record
from .request import Call, Request, Stash
from .rows import put, rows_of, take
from .scores import heads, turn
from .serving import Serving


class Routing:
    """Brings back what cuts have put aside (:attr:`Call.stash`, by stage)."""

    def __init__(self, decoder: Decoder, serving: Serving, ledger: UndoLedger):
        self.decoder, self.serving = decoder, serving
        self.branch = ledger.timed(self._branch, counts=False)

    def restore(self, call: Call, planned: PlannedCut, number: int, x: Tensor) -> Tensor:
        """Phase 4: the stashed visual rows come back, changed by the method's side branch, into the positions they
        left."""
        request, level = call.request, call.level
        assert request is not None and level is not None
        if planned.stage not in call.stash:  # nothing was put aside
            _record_return(request, planned, level, level)
            return x
        stash = call.stash[planned.stage]
        made = self.branch(call, planned, stash).to(x.device)
        if level is stash.level:
            return torch.where(level.visual[..., None], made, x)
        del call.stash[planned.stage]
        place = torch.where(level.valid, within(stash.level, level), made.shape[1])
        padded = torch.cat([made, made[:, :1]], dim=1)  # the extra row takes the padding
        out = put(padded, place, x)[:, :-1]
        old = stash.level
        # what nothing is missing from has the model's own masks and positions again, also behind the prompt, where the
        # model makes them by what layer 0 has cached
        whole = old.dense and request.level_at(0).dense
        call.level = SequenceLength(number, old.rows, old.valid, old.visual, old.shift.clone(), dense=whole)
        call.done.pop(number, None)  # what was taken before counts other columns
        request.levels.append(call.level)
        _record_return(request, planned, old, level)
        return out

    def context(
        self, call: Call, planned: PlannedCut, number: int, module: Any, x: Tensor, kwargs: dict
    ) -> dict[str, Any]:
        """Variant KV: the stashed visual rows, changed by the side branch, give this layer keys and values and nothing
        else. Answers with what the layer is given.

        They are put into the layer's cache ahead of its own rows; without a cache, into one that lives for this layer
        only.
        """
        request, stash = call.request, call.stash[planned.stage]
        assert request is not None
        made = self.branch(call, planned, stash)
        if self.serving.compact:  # the text keeps the places it has among the visual tokens
            old = self.serving.prefill(call, stash.level, number, kwargs, stash.hidden)
            tables = tuple(take(t, stash.rows.clamp_min(0)) for t in old["position_embeddings"])
        else:
            old = {}
            tables = self.serving.prefill(call, stash.alone, number, kwargs, x)["position_embeddings"]
        if stash.joined is None:
            stash.joined = self._join(call, stash, number, x, kwargs, old)
            if not planned.cut.adaptive:  # which come when differs from sample to sample
                _record_return(request, planned, stash.level)
        request.cached[number], serving = stash.joined
        request.keys_only[number] = stash.alone.valid.sum(1).tolist()
        rows, lender = take(made, stash.rows.clamp_min(0)), planned.lender
        hidden = module.input_layernorm(rows) if lender is None else lent(lender, self.decoder.layers, rows)
        by = (None if lender is None else projected(lender, module, name, hidden) for name in ("k", "v"))
        key, value = (heads(module.self_attn, name, hidden, own) for name, own in zip(("k", "v"), by, strict=True))
        cache = host.cache_in(kwargs)
        cache = host.new_cache() if cache is None else cache
        if host.without_cache(module):
            raise UnsupportedError(
                f"layer {number} is given the visual rows' keys through a cache, which gradient checkpointing takes "
                "away: gradient_checkpointing_disable(), or choose another variant"
            )
        if host.rounds(cache, number):
            raise UnsupportedError(
                f"a quantised cache rounds the visual rows before layer {number} has read them, which the dense model "
                "does not: use another cache, or another variant"
            )
        size = host.columns(cache, 1, number)[0]
        if 1 < size < stash.joined[0].width:  # one that grows shows what it is given
            raise UnsupportedError(FULL.format(size))
        cache.update(turn(key, tables[0], tables[1], self.decoder.pairs), value, number)
        return {**serving, **host.cached(module, cache)}

    def _join(
        self, call: Call, stash: Stash, number: int, x: Tensor, kwargs: dict, old: dict[str, Any]
    ) -> tuple[SequenceLength, dict[str, Any]]:
        """What a layer caches that has the stashed rows' keys ahead of its own, and what its own rows are given.
        ``old``: the compact positions of everything."""
        level, alone = call.level, stash.alone
        assert level is not None
        rows, valid = (torch.cat([getattr(alone, n), getattr(level, n)], 1) for n in ("rows", "valid"))
        keys = SequenceLength(number, rows, valid, torch.cat([alone.valid, level.visual], 1), alone.shift)
        serving: dict[str, Any] = dict(self.serving.prefill(call, level, number, kwargs, x, keys))
        if self.serving.compact:
            here, ids = within(stash.level, level), old.get("position_ids")
            serving["position_embeddings"] = tuple(take(t, here) for t in old["position_embeddings"])
            serving["position_ids"] = None if ids is None else take(ids, here)
            keys.shift = stash.level.shift.clone()
        return keys, serving

    def _branch(self, call: Call, planned: PlannedCut, stash: Stash) -> Tensor:
        """The side branch over the visual rows alone, once: they see each other as in the dense model, at their own
        positions; no cache. ``[B, M, C]`` with the other rows unchanged."""
        if stash.out is not None:
            return stash.out
        x, rows = stash.hidden, stash.rows
        made = planned.bring_back(
            take(x, rows.clamp_min(0)), lambda layer, hidden: self._run(call, planned.stage, stash, layer, hidden)
        )
        place = torch.where(rows >= 0, rows, x.shape[1])
        stash.out = put(torch.cat([x, x[:, :1]], dim=1), place, made)[:, :-1]
        return stash.out

    def _run(self, call: Call, stage: int, stash: Stash, layer: Any, hidden: Tensor) -> Tensor:
        """One layer of the side branch, a copy of the decoder's."""
        assert call.request is not None
        call.request.branched[stage] = stash.alone.valid.sum(1).tolist()
        number = layer.self_attn.layer_idx
        follow(layer, self.decoder.layers[number])
        kind = self.decoder.kinds[number]
        if kind not in call.dense:
            raise UnsupportedError(
                f"the side branch copies a layer of type {kind}, of which none has run behind the split yet; "
                "choose another split"
            )
        dense, alone, x = call.dense[kind], stash.alone, stash.hidden
        tables = tuple(take(t, alone.rows) for t in dense["position_embeddings"])
        if self.serving.compact:
            served = self.serving.prefill(call, stash.level, number, dense, x)
            tables = tuple(take(t, stash.rows.clamp_min(0)) for t in served["position_embeddings"])
        sliding, how = kind == "sliding_attention", backend(self.decoder.lm.config)
        bias = prefill_mask(dense.get("attention_mask"), alone, alone, x, 0, how, sliding)
        out = layer(hidden, attention_mask=bias, position_embeddings=tables)
        return rows_of(out).to(x.dtype)


FULL = (
    "a cache of {} columns is too small: visual tokens that give only keys and values, and text, are padded each by "
    "itself, which for unequal prompts takes more columns than the prompts have; use a larger one, or a dynamic cache"
)


def _record_return(
    request: Request, planned: PlannedCut, level: SequenceLength, before: SequenceLength | None = None
) -> None:
    """Notes that the visual tokens of ``level`` are there again, of which those of ``before`` had stayed."""
    tables = [(each.rows, each.valid) for each in (level, before) if each is not None]  # as they are now
    request.notes.append(partial(_returned, planned.cut.site, planned.stage, request.units, tables))


def _returned(site: str, stage: int, units: list[BudgetGroup], tables: list[tuple[Tensor, Tensor]]) -> Record:
    back, *stayed = ([_places(unit, *table) for unit in units] for table in tables)
    before = [len(kept) for kept in stayed[0]] if stayed else [0] * len(back)
    return Record(site, stage, before, [len(kept) for kept in back], back, None)


def _places(unit: BudgetGroup, rows: Tensor, valid: Tensor) -> Tensor:
    """Those of the tokens of ``unit`` that are among ``rows`` ``[B, M]``."""
    there = set(rows[unit.sample][valid[unit.sample]].tolist())
    return torch.tensor([i for i, p in enumerate(unit.columns.tolist()) if p in there], dtype=torch.long)
