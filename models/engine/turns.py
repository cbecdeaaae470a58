"""Later turns that choose again (``attach(..., shelve=True)``).

In front of the first cut everything is the dense model's, whatever was chosen behind it. The rows that come to that cut
are put on a shelf, of answers too. A later turn brings its new tokens through the layers in front, takes the others
from the shelf, empties the caches of the layers behind and has these read the whole conversation as if it were a new
prompt: the same tokens are kept and the same logits follow, while tower and first layers run over the new tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.types import Action, UnsupportedError
from ..base import PlannedCut
from . import host
from .description import Decoder
from .layout import RasterSpan, prompts
from .level import allowed
from .prefill import Prefill
from .prompt import prunable_tokens
from .request import Call, Request
from .shelf import Shelf


class Shelving:
    """Keeps the shelves of one attachment. ``elsewhere``: it has stages outside the language model.

    Raises:
        UnsupportedError: a turn that chose again would not be what a new prompt of the whole conversation is.
    """

    def __init__(self, decoder: Decoder, cuts: Sequence[PlannedCut], prefill: Prefill, *, elsewhere: bool):
        self.decoder, self.prefill = decoder, prefill
        self.first = min((c.cut.layer for c in cuts), default=0)
        self.watched = {self.first, *(i for c in cuts for i in c.cut.observe if i < self.first)}
        other = next((c.cut for c in cuts if c.cut.action is not Action.SELECT or c.cut.evict), None)
        if elsewhere or self.first == 0 or other is not None:
            raise UnsupportedError(
                "shelve=True: what stands in front of the first cut must be the dense model's, so every stage has to "
                "drop or merge tokens inside the language model, above layer 0, and evict nothing there"
            )
        kinds = {decoder.kinds[i] for i in (*self.watched, *range(self.first, len(decoder.layers)))}
        if len(kinds) > 1 or decoder.window_of(self.first) is not None:
            raise UnsupportedError(
                f"shelve=True: the layers from {min(self.watched)} on attend within windows or in several ways "
                f"({', '.join(sorted(kinds))}), which cannot be read anew"
            )
        if host.stretches(decoder.lm.config):
            raise UnsupportedError(
                "shelve=True: this model's rotary positions change with the length of the conversation, so that what "
                "is cached is not what a new prompt would give"
            )

    def begin(self, call: Call, kwargs: dict[str, Any]) -> None:
        """A prompt is read, by a decoder stack that is called with ``kwargs``."""
        assert call.request is not None and call.tokens is not None and call.visual is not None
        shelf = call.request.shelf = Shelf(call.tokens, call.visual, call.request.real)
        if call.labels is not None:
            shelf.lost = "it was read with labels"
        if len(kwargs.get(host.PLANES) or ()) > self.first:
            shelf.lost = f"planes of its images are added behind layer {self.first} (DeepStack)"

    def look(self, call: Call, inputs: dict[str, Any]) -> None:
        """A forward with these ``inputs`` goes on with a prompt."""
        assert call.request is not None
        shelf, call.tokens = call.request.shelf, inputs.get("input_ids")
        if shelf is None:
            return
        if call.tokens is None:
            shelf.lost = shelf.lost or "it went on with inputs_embeds"
        elif inputs.get("labels") is not None:
            shelf.lost = shelf.lost or "it went on with labels"
        elif self.decoder.text is None and call.tokens.shape[1] > 1:
            call.visual = self.decoder.visual(call.tokens)
            if bool(call.visual.any()):
                call.parts = self.decoder.parts(call.tokens, inputs)

    def go_on(self, call: Call, q: int) -> None:
        """``q`` tokens come behind a prompt: one goes on with what was chosen, several are a turn."""
        request = call.request
        assert request is not None
        shelf = request.shelf
        before = host.held(call.cache)
        if shelf is None:
            if q > 1:
                raise UnsupportedError(f"of this conversation nothing was shelved: {ANEW}")
            return
        if shelf.ids.shape[1] < before:
            shelf.lost = shelf.lost or "some of it was not read here"
        if q > 1:
            _check(call, shelf, places=self.decoder.mrope)
        if shelf.lost:
            return
        assert call.tokens is not None and call.tail is not None
        shelf.crop(before)
        ids = call.tokens.to(shelf.ids.device)
        visual = torch.zeros_like(ids, dtype=torch.bool) if call.visual is None else call.visual.to(ids.device)
        shelf.ids, shelf.visual = torch.cat([shelf.ids, ids], 1), torch.cat([shelf.visual, visual], 1)
        shelf.real = torch.cat([shelf.real, call.tail[:, -q:].to(shelf.real.device)], 1)
        if q > 1:
            self._turn(call, request, shelf, before)

    def keep(self, call: Call, number: int, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Shelves what layer ``number`` is given for a prompt, or for tokens behind one: ``x`` ``[B, q, C]``. In a turn
        that chooses again, up to the first cut, it answers with that of the whole conversation, ``[B, T, C]``."""
        assert call.request is not None
        shelf = call.request.shelf
        if shelf is None or shelf.lost or number not in self.watched:
            return None
        if x.requires_grad:
            shelf.lost = "it was read with gradients (use torch.no_grad())"
        elif kwargs.get("position_embeddings") is None:
            shelf.lost = "its layers are not given rotary tables"
        elif number == self.first and not _causal(kwargs.get("attention_mask"), call):
            shelf.lost = "tokens of its prompt see others that stand behind them"
        else:
            shelf.add(number, x, kwargs)
        if not call.again:
            return None
        if shelf.lost:
            raise UnsupportedError(f"this turn cannot choose again, {shelf.lost}: {ANEW}")
        assert shelf.tables is not None and call.level is not None
        rows, (cos, sin, ids) = shelf.rows[number], shelf.tables
        made = {"position_embeddings": (cos, sin), "position_ids": ids, "attention_mask": None}
        call.inputs[number], call.dense[self.decoder.kinds[number]] = (rows, call.level), made
        return rows

    def _turn(self, call: Call, old: Request, shelf: Shelf, before: int) -> None:
        """The call reads the whole conversation from the first cut on, of which ``before`` tokens are on the shelf."""
        host.empty(call.cache, self.first)
        call.tokens, call.visual = shelf.ids, shelf.visual
        new, call.parts = call.parts, old.parts
        if self.decoder.text is not None:
            call.visual = prunable_tokens(call, shelf.ids, *self.decoder.text)
            call.parts = prompts(call.visual, None)
        elif new:
            call.parts = [_behind(mine, more, before) for mine, more in zip(old.parts, new, strict=True)]
        request = self.prefill.open(call, call.visual)
        request.next, request.resumed, request.front = _next(call, old), before, self.first
        request.shelf, old.shelf = shelf, None
        old.broken = True
        base = request.levels[0]
        call.level = replace(base, first=self.first, dense=False, elsewhere={})
        request.levels.append(call.level)
        call.prefill = call.again = True


ANEW = "start a new prompt with the whole conversation"


def _check(call: Call, shelf: Shelf, *, places: bool) -> None:
    """Raises :class:`UnsupportedError` where a turn would not be what a new prompt is. ``places``: images are placed
    along three axes, which is not done for new ones, and padding counts as a place."""
    assert call.tail is not None
    if shelf.lost:
        raise UnsupportedError(f"this conversation cannot be chosen from again, {shelf.lost}: {ANEW}")
    if call.mask is not None and (not isinstance(call.mask, Tensor) or call.mask.ndim != 2):
        raise UnsupportedError("a turn that chooses again takes a 2-D attention_mask [batch, sequence]")
    new = call.visual is not None and bool(call.visual.any())
    if places and (new or not bool(call.tail.all())):
        raise UnsupportedError(
            f"a turn behind images with three position axes takes neither new images nor padding: {ANEW}"
        )
    before = shelf.ids.shape[1]
    now = torch.ones_like(shelf.real) if call.mask is None else call.mask[:, :before].bool().to(shelf.real.device)
    changed = now != shelf.real
    behind = (changed.cumsum(1) > 0) & now  # what has seen, or not seen, a token that is shown otherwise now
    if now.shape != shelf.real.shape or bool(behind.any()):
        raise UnsupportedError(
            "the attention_mask shows the conversation otherwise than it was read (tokens behind those that it hides "
            f"or shows have seen them, or not): {ANEW}"
        )


def _causal(mask: Any, call: Call) -> bool:
    """Whether the ``mask`` that a layer reads a prompt with lets every real token see all real ones up to itself, and
    no other."""
    if not call.prefill or call.again or mask is None or mask.ndim == 2:
        return True
    assert call.level is not None
    level = call.level.on(mask.device)
    seen, rows = allowed(mask, level.rows, level.rows), level.rows
    wanted = (rows[:, None] <= rows[..., None]) & level.valid[:, None]
    return seen is not None and bool((seen == wanted)[level.valid].all())


def _behind(mine: list[RasterSpan], more: list[RasterSpan], before: int) -> list[RasterSpan]:
    """A sample's rasters, and those of its new tokens, which stand behind ``before`` others."""
    images, videos = (1 + max((getattr(p, name) for p in mine), default=-1) for name in ("image", "video"))
    moved = [
        replace(
            p,
            columns=p.columns + before,
            image=p.image + images,
            video=p.video + videos if p.video >= 0 else -1,
        )
        for p in more
    ]
    return [*mine, *moved]


def _next(call: Call, old: Request) -> Tensor:
    """The position behind the turn, ``[B]``."""
    assert call.tail is not None and call.request is not None
    if call.ids is None:
        return old.next + call.tail.shape[1]
    ids = call.ids[-3:].amax(0) if call.ids.ndim == 3 else call.ids
    tail = call.tail[:, -ids.shape[-1] :].to(ids.device)
    return torch.where(tail, ids.expand_as(tail), -1).amax(1) + 1
