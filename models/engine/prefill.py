"""The beginning and the end of a prefill: the stages behind the projector, and the final hidden states at the caller's
length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.select import combine
from ...core.types import NOTE, Seed, UnsupportedError
from ..base import PlannedCut
from . import host
from .assignment import arrived, assign
from .description import Decoder
from .layout import units
from .level import dense_level
from .origin import origin_at
from .prompt import ENDS, asking_rows, next_positions, real_tokens
from .request import Call, Request
from .retention import retain
from .rows import put
from .run import Run, noted_later
from .text import text_at


class Prefill:
    """Reads prompts with visual tokens.

    Attributes:
        decoder: the language model.
        per: what a budget applies to.
        tower: whether the tower may drop tokens.
        noting: whether notes are taken in the tower.
        entry: the stages behind the projector.
        seeds: the seed of each unit of a request.
        books: called before the entry stages, answers with their :class:`Run`.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        per: str,
        tower: bool,
        noting: bool,
        entry: list[PlannedCut],
        seeds: Callable[[Request], Seed],
        books: Callable[[Request], Run],
    ):
        self.decoder, self.per, self.tower, self.noting, self.entry = decoder, per, tower, noting, entry
        self.seeds, self.books = seeds, books

    def begin(self, call: Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What the decoder stack is called with."""
        assert call.visual is not None
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or embeds.ndim != 3 or embeds.shape[:2] != call.visual.shape:
            raise UnsupportedError(
                f"{type(self.decoder.root).__name__} hands its language model something else than one embedding per "
                "token of the prompt, so nothing can be pruned"
            )
        visual = call.visual.to(embeds.device)
        request = self.open(call, visual, kwargs.get("position_ids"))
        if self.noting:
            request.looked_at = assign(request, call.encoded)
        if not self.tower and not self.entry:
            return args, kwargs
        gone = torch.zeros_like(visual)
        if self.tower:
            request.vision = request.looked_at if self.noting else assign(request, call.encoded)
            request.arrived = arrived(request, visual)
            gone = visual & ~request.arrived
        if self.entry:
            embeds, gone, planes = self._project(call, request, embeds, visual, kwargs.get(host.PLANES))
            if planes is not None:
                kwargs = {**kwargs, host.PLANES: planes}
        call.gone = gone if bool(gone.any()) else None
        if call.held is not None and call.labels is None and bool((gone & call.held).any()):
            raise UnsupportedError(ENDS)
        return args, {**kwargs, "inputs_embeds": embeds}

    def open(self, call: Call, visual: Tensor, ids: Tensor | None = None) -> Request:
        """The books of a prompt whose placeholders are ``visual`` ``[B, T]``, at the positions ``ids``."""
        b, t = visual.shape
        real = real_tokens(call.mask, b, t).to(visual.device)
        level = dense_level(real, visual)
        request = Request(t, call.parts, units(call.parts, self.per, call.segments), real, next_positions(ids, level))
        request.text_tokens = (real & ~visual).sum(1).tolist()
        request.levels.append(level)
        request.pictures = call.pictures
        request.sources, request.blends, request.packed = call.sources, call.blends, call.segments is not None
        call.request, call.level = request, level
        call.question = asking_rows(call, level)
        held = call.question & level.visual
        request.held = held if bool(held.any()) else None
        return request

    def _project(
        self, call: Call, request: Request, embeds: Tensor, visual: Tensor, planes: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, list[Tensor] | None]:
        """The stages behind the projector. ``visual`` ``[B, T]`` marks the placeholders; answers with the sequence
        (merged tokens in the place of the kept one), the visual tokens gone and, merged alike, the ``planes`` that
        DeepStack adds later."""
        run, dense = self.books(request), embeds
        assert call.level is not None
        columns, owner = request.table.to(embeds.device).clamp_min(0), request.owner.to(embeds.device)[:, None]
        at = columns.gather(1, run.index.clamp_min(0))
        x = embeds[owner, at].masked_fill(~run.valid[..., None], 0)
        spread = [p.new_zeros(*visual.shape, p.shape[-1]).masked_scatter(visual[..., None], p) for p in planes or ()]
        extra = [p[owner, at] for p in spread]
        seeds, rasters = self.seeds(request), tuple(u.rasters for u in request.units)
        frames = tuple(u.frames for u in request.units)
        for planned in self.entry:
            grid = (x.shape[1], 1)
            notes = request.notes_of(planned.stage, visual)
            sources: dict[str, Callable] = {
                NOTE + site: partial(noted_later, tell, run.index) for site, tell in notes.items()
            }
            sources["origin"] = partial(origin_at, call, run.index)
            sources["text"] = partial(text_at, call, call.level.on(embeds.device), owner[:, 0], dense)
            view = run.view(
                x, planned, grid=grid, prefix=0, seed=seeds, sources=sources, rasters=rasters, frames=frames
            )
            if call.held is not None:
                at = columns.gather(1, run.index.clamp_min(0))
                view = replace(view, protected=call.held.to(embeds.device)[owner, at] & run.valid)
            selection = planned.select(view)
            if selection is None:
                run.note(planned, run.index)
                continue
            if selection.retention is not None:
                at = columns.gather(1, run.index.clamp_min(0))
                retain(call, selection, owner[:, 0], at, run.valid)
            request.note_work(selection)
            selection = replace(selection, retention=None, work=None)
            extra = [combine(p, selection, run.size)[0] for p in extra]
            x = run.apply(x, selection, planned)
        request.entry = run
        at = columns.gather(1, run.index.clamp_min(0))
        left = owner.expand_as(at)[run.valid], at[run.valid]
        embeds, gone = embeds.clone(), visual.clone()
        embeds[left], gone[left] = x[run.valid], False
        for p, e in zip(spread, extra, strict=True):
            p[left] = e[run.valid]
        return embeds, gone, None if planes is None else [p[visual] for p in spread]

    def end(self, call: Call, output: Any) -> Any:
        """Puts the final hidden states back to the caller's length (in a turn, of its new tokens), dropped positions
        zero, and takes their predictions out of the labels."""
        assert call.level is not None and call.request is not None
        hidden, length = output.last_hidden_state, call.request.length
        level = call.level.on(hidden.device)
        b, _, c = hidden.shape
        where = torch.where(level.valid, level.rows, length)
        full = put(hidden.new_zeros(b, length + 1, c), where, hidden)[:, call.request.resumed : length]
        if call.labels is not None:
            marks = torch.zeros(b, length + 1, dtype=torch.bool, device=hidden.device).scatter_(1, where, True)
            silent = ~marks[:, : length - 1].to(call.labels.device)
            call.labels[:, 1:].masked_fill_(silent, -100)
        output.last_hidden_state = full
        return output
