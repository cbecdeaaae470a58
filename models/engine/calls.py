"""Forwards of an attached model, opened and closed: which request a forward belongs to, and what its cache's next steps
need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from ...core.ledger import MARK, UndoLedger, bar, close, follow, mark
from ...core.types import UnsupportedError
from . import host
from .decoding import check_conversation, check_foreign
from .description import Decoder
from .entry import Entry
from .layout import prompts
from .level import SequenceLength, dense_level, within
from .prompt import prompts_in_rows, prunable_tokens, real_tokens
from .request import Call, Request
from .turns import Shelving


class Calls:
    """Every forward of the root.

    Attributes:
        decoder: the language model.
        tower: whether the tower may drop tokens.
        noting: whether notes are taken in the tower.
        done: called with the request after each prefill.
        evicting: layers in front of which cuts evict from the caches before them.
        requests: the request that each cache belongs to.
        whole: caches filled without this attachment that were looked at.
        shelving: keeps what later turns choose from again; ``None``: they go on with what was chosen.
        entrance: the ways into the model.
    """

    def __init__(
        self,
        decoder: Decoder,
        ledger: UndoLedger,
        *,
        tower: bool,
        noting: bool,
        done: Callable[[Request], None],
        evicting: Sequence[int] = (),
    ):
        self.decoder, self.tower, self.noting, self.done = decoder, tower, noting, done
        self.evicting = evicting
        self.shelving: Shelving | None = None
        self.requests: WeakKeyDictionary[Any, Request] = WeakKeyDictionary()
        self.whole: WeakSet[Any] = WeakSet()
        roots = [decoder.root] if decoder.core is None else [decoder.root, decoder.core]
        self.entrance = Entry(roots, ledger, opens=self._open, closes=self._close, continues=self._continues)

    @property
    def now(self) -> Call | None:
        """The forward that this thread is in."""
        return self.entrance.call

    def end(self) -> None:
        """The attachment is over: what was read with it cannot go on without it."""
        for cache, request in list(self.requests.items()):
            if request.altered:
                close(
                    cache,
                    "the attachment that this cache's prompt was pruned with has been removed; start a new prompt",
                )

    def look_at(self, cache: Any, kwargs: dict) -> None:
        """A cache that was filled without this attachment is checked once."""
        if cache is not None and cache not in self.whole:
            check_foreign(self.decoder, cache, kwargs)
            self.whole.add(cache)

    def _continues(self, cache: Any) -> None:
        check_conversation(self.requests.get(cache) if cache is not None else None, cache)

    def _open(self, call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
        """Finds out whether a forward reads a prompt or goes on with one. Answers with what the model is called
        with."""
        call.maps = host.maps_asked(inputs, getattr(self.decoder.root, "config", None), self.decoder.lm.config)
        ids = inputs.get("input_ids")
        filled = call.cache is not None and host.held(call.cache) > 0
        if self._goes_on(call, inputs, filled):
            return inputs
        if ids is None:
            raise UnsupportedError(
                "pruning needs input_ids to find the visual tokens; inputs_embeds alone do not tell where they are"
            )
        call.visual = self.decoder.visual(ids)
        call.prefill = bool(call.visual.any())
        if not call.prefill:
            call.plain = ids
            return inputs
        call.tokens = ids
        if self.decoder.text is not None:
            return self._text(call, inputs, ids)
        call.parts = self.decoder.parts(ids, inputs)
        call.told = partial(self.decoder.sources, inputs, call.parts)
        if self.tower or self.noting:
            call.sources = call.told()
            call.blends = self.decoder.blends(call.sources, call.parts)
        if self.tower and any(blend is not None for blend in call.blends):
            raise UnsupportedError(
                f"{type(self.decoder.root).__name__} interpolates videos behind the projector, where no token is one "
                "of the tower's any more: what a stage drops or merges in the tower has no place there; decide "
                "behind the projector (site='projector' where a method has it) or in the language model"
            )
        call.encoded = self.decoder.encoded(inputs)
        return self._prompt(call, inputs, ids)

    def _text(self, call: Call, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
        """What a model without images is called with, once the tokens of its prompt are known."""
        inputs = self._prompt(call, inputs, ids)
        assert self.decoder.text is not None
        call.visual = prunable_tokens(call, ids, *self.decoder.text)
        call.prefill = bool(call.visual.any())
        call.plain = None if call.prefill else ids
        call.parts = prompts(call.visual, call.segments)
        call.pictures = self.decoder.pictures(ids, inputs)
        return inputs

    def _prompt(self, call: Call, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
        """Finds out what of ``ids`` ``[B, T]`` is the prompt."""
        call.segments = prompts_in_rows(inputs, call)
        if inputs.get("labels") is not None:
            # positions without a prediction are masked out of it before the loss reads it
            call.labels = inputs["labels"].clone()
            return {**inputs, "labels": call.labels}
        call.prompt = self.entrance.prompt(ids, real_tokens(call.mask, *ids.shape).to(ids.device))
        return inputs

    def _goes_on(self, call: Call, inputs: dict[str, Any], filled: bool) -> bool:
        """Whether the call's cache is ``filled`` with a prompt that the forward continues; its request, if it was read
        with this attachment."""
        known = call.cache is not None and call.cache in self.requests
        ids = inputs.get("input_ids")
        pixels = host.pictured(inputs)
        again = known and self.shelving is not None
        if filled and pixels and not again and ids is not None and bool(self.decoder.visual(ids).any()):
            raise UnsupportedError(
                "visual tokens in a continuation of a cache cannot be pruned; start a new prompt with the whole "
                "conversation"
            )
        if known and filled:
            call.request = self.requests[call.cache]
            if call.request.broken:
                raise UnsupportedError(
                    "a turn of this conversation broke off, so that its cache is no whole one: start a new prompt with "
                    "the whole conversation"
                )
            if call.request.packed:
                raise UnsupportedError(
                    "several prompts packed into one row cannot be continued; read each prompt in a row of its own"
                )
            if self.shelving is not None:
                self.shelving.look(call, inputs)
            return True
        if filled and getattr(call.cache, MARK, False):
            raise UnsupportedError(
                "this cache is a copy of a pruned one, or of another attachment: only the one that the prompt was read "
                "into goes on"
            )
        if known:  # it was emptied for another prompt
            del self.requests[call.cache]
            mark(call.cache, False)
        return filled  # a request whose prompt was read without this attachment: it stays dense

    def _close(self, call: Call, output: Any) -> None:
        if call.plain is not None:  # nothing to prune, and the report says so
            self._tell(_dense_request(call))
            return
        if not call.prefill:
            return
        request = call.request
        if request is None:
            raise UnsupportedError(
                f"{type(self.decoder.root).__name__} did not call its language model as this library knows it, so "
                "nothing was pruned"
            )
        cache = host.cache_of(output)
        cache = call.cache if cache is None else cache
        self._evict(request, cache)
        self._finish(request)
        if cache is not None:
            self.requests[cache] = request
            mark(cache, request.altered)
            if request.altered or request.shelf is not None:
                follow(cache, {name: getattr(request, how) for name, how in host.MOVES.items()})
            idle = [number for number, half in request.skipped if request.idle(number, half) and half == "attention"]
            if idle:
                bar(cache, "crop", f"layer {idle[0]} was left out and caches nothing, so this cache cannot be cut back")
        self._tell(request)

    def _evict(self, request: Request, cache: Any) -> None:
        """Takes out of the caches in front of evicting cuts what these dropped."""
        begin = 0
        for at in self.evicting:
            level = request.level_at(at)
            if cache is None and self.entrance.generation is not None:
                raise UnsupportedError("what is evicted from caches can only be told with a cache: use_cache=True")
            left = dict[int, SequenceLength]()
            for i in range(begin, at):
                held = request.level_at(i)
                if cache is not None and held is not level:
                    host.shorten(cache, i, within(held, level))
                    # keys stay at the positions that they were read at
                    left.setdefault(id(held), replace(level, shift=held.shift, elsewhere={}))
                    request.cached[i], request.evicted[i] = left[id(held)], level.counts
            begin = at

    def _finish(self, request: Request) -> None:
        """What the steps behind the prompt have to know of each layer's cache."""
        request.at = tuple(request.level_at(i) for i in range(len(self.decoder.layers)))
        for i, level in enumerate(request.at):
            if not request.idle(i, "attention"):
                request.first.setdefault((id(level), self.decoder.kinds[i]), i)
        # The model makes one mask for all layers of a type, as wide as the cache of the first.
        lost = {kind for kind in self.decoder.kinds if not request.at[self.decoder.kinds.index(kind)].dense}
        request.pruned = frozenset(
            i for i, level in enumerate(request.at) if not level.dense or self.decoder.kinds[i] in lost
        )
        request.uneven = frozenset(
            i for i in request.pruned if not request.at[i].whole or self.decoder.window_of(i) is not None
        )

    def _tell(self, request: Request) -> None:
        """Reports a prefill. The unconditional prompt that guidance reads beside the real one is not what a user asks
        about."""
        running = self.entrance.generation
        if running is not None:
            if running.reported and not request.units:
                return
            running.reported |= bool(request.units)
        self.done(request)


def _dense_request(call: Call) -> Request:
    """The books of a prompt without visual tokens."""
    assert call.plain is not None
    b, t = call.plain.shape
    real = real_tokens(call.mask, b, t).to(call.plain.device)
    level = dense_level(real, torch.zeros_like(call.plain, dtype=torch.bool))
    counts = level.valid.sum(1).tolist()
    return Request(t, [[] for _ in range(b)], [], level.valid, level.shift, [level], text_tokens=counts)
