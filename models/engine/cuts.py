"""Cuts inside the language model: what a method may look at there, and the sequence that its decision leaves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...core.select import combine, gated
from ...core.types import NOTE, Action, Seed, Selection, TokenView, UnsupportedError
from ..base import PlannedCut
from .books import carry
from .candidates import Candidates
from .description import Decoder
from .fusing import Fusing
from .level import SequenceLength, pack
from .origin import origin_at
from .prompt import ENDS
from .ranking import Ranking
from .record import Record
from .request import Call, Request, Stash
from .retention import retain
from .routing import Routing
from .rows import take
from .run import noted_later
from .weighing import weights_of


class Cuts:
    """Applies cuts to the hidden states in front of a layer. ``seeds(request)``: the seed of each unit."""

    def __init__(
        self,
        decoder: Decoder,
        ranking: Ranking,
        routing: Routing,
        fusing: Fusing,
        seeds: Callable[[Request], Seed],
    ):
        self.decoder, self.ranking, self.routing, self.fusing, self.seeds = decoder, ranking, routing, fusing, seeds

    def count(self, call: Call, upto: int) -> None:
        """Notes the visual tokens of the layers in front of ``upto``."""
        assert call.request is not None and call.level is not None
        while (number := len(call.request.layer_tokens)) < upto:
            counts = call.level.counts
            extra = call.request.keys_only.get(number, [0] * len(counts))
            call.request.layer_tokens.append([a + b for a, b in zip(counts, extra, strict=True)])

    def drop(self, call: Call, number: int, keep: Tensor, x: Tensor) -> Tensor:
        """Starts the level that keeps ``keep`` ``[B, M]`` of the present one."""
        assert call.request is not None and call.level is not None
        call.level, order = pack(number, keep, call.level)
        call.request.levels.append(call.level)
        before = call.done.get(number, (None, None))[0]
        call.done[number] = (order if before is None else before.gather(1, order), call.level)
        return take(x, order.to(x.device))

    def apply(self, call: Call, planned: PlannedCut, number: int, x: Tensor) -> Tensor:
        """What a cut that may change the sequence leaves of ``x`` ``[B, M, C]``."""
        request = call.request
        assert request is not None and call.level is not None
        if planned.cut.action is Action.RESTORE:
            return self.routing.restore(call, planned, number, x)
        if planned.cut.action is Action.FUSE:
            call.merged = True
            x = self.fusing.fuse(call, planned, number, x)
        if planned.cut.action is Action.STASH and planned.cut.keep is None:  # nothing leaves
            call.stash[planned.stage] = Stash(x, call.level)
        if planned.merges and request.entry is None and request.arrived is not None:
            request.entry = carry(request)  # what the tower merged
        level = call.level.on(x.device)
        candidates = Candidates.of(request, level, x.device)
        selection = planned.select(self._view(call, planned, level, candidates, x))
        if selection is None:
            return x
        request.note_work(selection)
        if selection.retention is not None:
            column = level.rows[candidates.owner[:, None], candidates.where.clamp_min(0)]
            retain(call, selection, candidates.owner, column, candidates.valid)
        elif call.retained is not None:
            raise UnsupportedError("behind tokens that are retained softly nothing else may choose: train it alone")
        merges = selection.target is not None or selection.mix is not None
        if merges:
            x = self._merge(call, selection, candidates, level, x)
        elif selection.gate is not None:
            x = candidates.put(x, gated(candidates.rows(x), selection))
        if selection.mlp is not None:
            if not planned.cut.passing:
                raise ValueError(f"the cut at {planned.cut.site} was not planned to weigh a layer's MLP")
            call.weights[number] = weights_of(candidates, level, request.length, selection.mlp)
        standing = None if request.standing is None else request.standing.stands
        request.notes.append(
            partial(
                _record, planned.cut.site, planned.stage, candidates.index, selection.kept, selection.score, standing
            )
        )
        if torch.equal(candidates.valid.sum(1), selection.counts):
            return x
        keep = _columns_kept(candidates, selection, level)
        if planned.cut.action is Action.STASH:
            self._put_aside(call, planned, x, ~keep)
        if call.held is not None:
            held = call.held.to(x.device).gather(1, level.rows) & level.visual & level.valid
            if bool((held & ~keep).any()):
                raise UnsupportedError(ENDS)
        call.level = level
        return self.drop(call, number, keep, x)

    @staticmethod
    def _put_aside(call: Call, planned: PlannedCut, x: Tensor, gone: Tensor) -> None:
        """The visual rows of ``x`` ``[B, M, C]`` that are ``gone`` ``[B, M]`` join those that the stage has put
        aside."""
        level = call.level
        assert level is not None
        gone = gone.to(level.rows.device) & level.visual & level.valid
        if planned.stage in call.stash:
            call.stash[planned.stage].put(x, level, gone)
        else:
            call.stash[planned.stage] = Stash(x, level, gone, passing=planned.cut.passing)

    @staticmethod
    def _merge(call: Call, selection: Selection, candidates: Candidates, level: SequenceLength, x: Tensor) -> Tensor:
        """``x`` ``[B, M, C]`` with the slots of ``selection`` in the rows of the tokens that they stand at."""
        request = call.request
        assert request is not None
        call.merged = True
        rows, _ = combine(candidates.rows(x), selection, request.standing_at(candidates.index)[1])
        where = torch.where(selection.kept >= 0, candidates.where.gather(1, selection.kept.clamp_min(0)), level.width)
        owner = candidates.owner[:, None].expand_as(where)
        x = nn.functional.pad(x, (0, 0, 0, 1)).index_put((owner, where), rows.to(x.dtype))[:, :-1]
        request.stand(candidates.index, selection)
        return x

    def _view(
        self, call: Call, planned: PlannedCut, level: SequenceLength, candidates: Candidates, x: Tensor
    ) -> TokenView:
        request, valid = call.request, candidates.valid
        assert request is not None
        ask = partial(self.ranking.query_attention, call, planned, x, candidates)
        return TokenView(
            features=candidates.rows(x.detach()),  # decisions carry no gradient
            valid=valid,
            index=candidates.index,
            size=request.standing_at(candidates.index)[1] * valid,
            protected=torch.zeros_like(valid) if call.held is None else candidates.marked(call.held, level),
            grid=(valid.shape[1], 1),
            seed=self.seeds(request),
            memory=request.memory.setdefault(planned.stage, {}),
            sources={
                "query_attention": ask,
                "queried": lambda: self.ranking.queried(call, candidates.owner),
                "states": partial(self.ranking.states, call, planned, x, candidates),
                "text": partial(self.ranking.text, call, planned, x, candidates),
                "products": partial(self.ranking.products, call, planned, x, candidates),
                "keys": partial(self.ranking.keys, call, planned, x, candidates),
                "origin": partial(origin_at, call, candidates.index),
                **self._notes(call, planned, candidates),
            },
            rasters=tuple(u.rasters for u in request.units),
            frames=tuple(u.frames for u in request.units),
        )

    @staticmethod
    def _notes(call: Call, planned: PlannedCut, candidates: Candidates) -> dict[str, Callable[[], Tensor]]:
        """What the stage noted of the candidates in the tower."""
        assert call.request is not None and call.visual is not None
        told = call.request.notes_of(planned.stage, call.visual)
        return {NOTE + site: partial(noted_later, tell, candidates.index) for site, tell in told.items()}


def _columns_kept(candidates: Candidates, selection: Selection, level: SequenceLength) -> Tensor:
    """``[B, M]`` bool: the level's text, and the candidates that the selection keeps."""
    where, owner = candidates.where, candidates.owner
    chosen = torch.where(selection.kept >= 0, where.gather(1, selection.kept.clamp_min(0)), level.width)
    text = nn.functional.pad(level.valid & ~level.visual, (0, 1))  # the extra column takes the padding
    marks = torch.ones((), dtype=torch.bool, device=where.device)
    return text.index_put((owner[:, None].expand_as(chosen), chosen), marks)[:, :-1]


def _record(
    site: str, stage: int, index: Tensor, kept: Tensor, score: Tensor | None, standing: Tensor | None
) -> Record:
    """``standing`` ``[G, N]``: the original index of the token that stands for each one now; ``None``: nothing was
    merged."""
    index, kept = index.cpu(), kept.cpu()
    left = [row[mine[mine >= 0]] for row, mine in zip(index, kept, strict=True)]
    ranked = None if score is None else (index, score)
    slots = None
    if standing is not None:
        slots = []
        for row, mine in zip(standing.cpu(), left, strict=True):
            place = torch.full((len(row) + 1,), -1).scatter_(0, mine, torch.arange(len(mine)))
            slots.append(place[row])  # the last entry, -1, is for what is gone
    return Record(site, stage, (index >= 0).sum(1).tolist(), [len(k) for k in left], left, slots, ranked)
