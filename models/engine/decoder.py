"""The engine for language models: shared by every decoder family. Hooks gather hidden states, positions, rotary tables
and masks; nothing is replaced.

The model prepares the caller's whole sequence; hooks on the layers shorten it. A *level* is one sequence length: the
dense one first, and every cut starts a new one, also a cut in front of layer 0 (tokens that the vision side dropped).
The state a request needs while decoding hangs on its cache object, weakly: interleaved requests do not meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

from ... import kernels
from ...core.ledger import MARK, UndoLedger, close, follow, mark
from ...core.select import combine
from ...core.types import Action, Seed, TokenView, UnsupportedError, VtpruneError
from ..base import PlannedCut
from . import host
from .entry import Entry
from .layout import Part, present, units
from .level import Level, backend, decode_mask, dense_level, pack, packed, prefill_mask, within
from .request import Call, Encoded, Request, Stash
from .scores import answer_starts, attention_to, heads, query_rows, take, turn
from .tower import Record, Run


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A family's description of its language model. ``root`` takes ``input_ids`` / ``labels``; ``core`` is the model in
    it that takes ``input_ids`` as well (``None``: there is none); ``lm`` is the decoder stack that it calls; ``layers``
    those of the stack; ``visual(input_ids)`` a bool mask of the placeholders ``[B, T]``; ``parts(input_ids, inputs)``
    what they stand for; ``sources(inputs, parts)`` which of the tower's tokens each was made of; ``encoded(inputs)``
    what the encoders did for the forward, by modality; ``kinds`` each layer's attention type; ``window`` of the sliding
    ones; ``rotary(x, ids, kind)`` the rotary table of other positions, ``pairs`` whether it turns each channel with its
    neighbour; ``mrope`` positions have three axes; ``first_position`` of a prompt's first token."""

    root: Any
    lm: Any
    layers: Any
    visual: Callable[[Tensor], Tensor]
    parts: Callable[[Tensor, dict[str, Any]], list[list[Part]]]
    sources: Callable[[dict[str, Any], list[list[Part]]], list[Tensor]]
    kinds: tuple[str, ...]
    window: int | None
    rotary: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]
    mrope: bool
    pairs: bool = False
    first_position: int = 0
    core: Any = None
    encoded: Callable[[dict[str, Any]], dict[str, Encoded]] = lambda inputs: {}

    def window_of(self, number: int) -> int | None:
        return self.window if self.kinds[number] == "sliding_attention" else None


class DecoderEngine:
    """Hooks one language model. ``tower`` says that the tower may drop tokens; ``entry`` are the stages behind the
    projector; ``per`` what a budget applies to; ``done(request)`` is called after each prefill, ``arrived(request)``
    before the entry stages: it answers with their :class:`Run`."""

    def __init__(
        self,
        decoder: Decoder,
        cuts: list[PlannedCut],
        ledger: UndoLedger,
        *,
        positions: str,
        per: str,
        tower: bool,
        entry: list[PlannedCut],
        seed: Seed,
        done: Callable[[Request], None],
        arrived: Callable[[Request], Run],
    ):
        if positions not in ("original", "compact"):
            raise VtpruneError(f"positions={positions!r} is not one of 'original', 'compact'")
        backend(decoder.lm.config)
        for module in (decoder.lm, decoder.layers[0]):
            host.cache_name(module)
        for planned in cuts:
            if planned.cut.action is Action.CONTEXT and decoder.window_of(planned.cut.layer) is not None:
                raise UnsupportedError(
                    f"layer {planned.cut.layer} has a sliding window, whose cache does not hold visual tokens ahead "
                    "of the text; choose another variant"
                )
        self.d, self.cuts, self.positions, self.per, self.tower, self.entry, self.seed = (
            decoder,
            cuts,
            positions,
            per,
            tower,
            entry,
            seed,
        )
        self.done, self.arrived = done, arrived
        self.branch = ledger.timed(self._branch, counts=False)
        self.requests: WeakKeyDictionary[Any, Request] = WeakKeyDictionary()
        self.whole: WeakSet[Any] = WeakSet()  # caches filled without this attachment that were looked at
        # id of a rotary table -> the forward that a checkpoint repeats
        self.replays: WeakValueDictionary[int, Call] = WeakValueDictionary()
        self.observed = {i for c in cuts for i in c.cut.observe}
        first = 0 if tower or entry else min((c.cut.layer for c in cuts), default=0)
        roots = [decoder.root] if decoder.core is None else [decoder.root, decoder.core]
        self.entrance = Entry(roots, ledger, opens=self._open, closes=self._close, continues=self._continues)
        self.local = self.entrance.local
        ledger.before(decoder.lm, self._enter)
        ledger.after(decoder.lm, self._leave)
        self.depth, self.watched = len(decoder.layers), dict[int, Any]()
        for i, layer in enumerate(decoder.layers):
            if i >= first or i in self.observed:
                self.watched[i] = layer
                ledger.before(layer, self._layer(i, [c for c in cuts if c.cut.layer == i]))

    # -------------------------------------------------------------------------------------------------------------
    # calls

    @property
    def call(self) -> Call | None:
        return self.entrance.call

    def end(self) -> None:
        """The attachment is over: what was read with it cannot go on without it."""
        for cache, request in list(self.requests.items()):
            if any(not level.dense for level in request.levels):
                close(
                    cache,
                    "the attachment that this cache's prompt was pruned with has been removed; start a new prompt",
                )

    def _continues(self, cache: Any) -> None:
        """``generate`` finds out what is new in a conversation by the length of the cache's first layer."""
        request = self.requests.get(cache) if cache is not None else None
        if request is not None and not request.at[0].dense and not host.fixed(cache) and host.held(cache) > 0:
            raise UnsupportedError(
                f"this cache holds {request.at[0].width} of its prompt's {request.length} tokens in the first layer, "
                "by which generate() would cut the "
                "conversation at the wrong place; start a new prompt with the whole conversation, or feed the new "
                "tokens to the model one by one"
            )

    def _open(self, call: Call, given: dict[str, Any]) -> dict[str, Any]:
        call.cache, call.mask, call.positions = (
            host.cache_in(given),
            given.get("attention_mask"),
            given.get("position_ids"),
        )
        known = call.cache is not None and call.cache in self.requests
        filled = call.cache is not None and host.held(call.cache) > 0
        ids = given.get("input_ids")
        seen = any(v is not None and len(v) for k, v in given.items() if k.startswith(host.PIXELS) or k == host.ENCODED)
        if filled and seen and ids is not None and bool(self.d.visual(ids).any()):
            raise UnsupportedError(
                "visual tokens in a continuation of a cache cannot be pruned; start a new prompt with the whole "
                "conversation"
            )
        if known and filled:
            call.request = self.requests[call.cache]
            if call.request.packed:
                raise UnsupportedError(
                    "several prompts packed into one row cannot be continued; read each prompt in a row of its own"
                )
            return given
        if filled and getattr(call.cache, MARK, False):
            raise UnsupportedError(
                "this cache is a copy of a pruned one, or of another attachment: only the one that the prompt was read "
                "into goes on"
            )
        if known:  # it was emptied for another prompt
            del self.requests[call.cache]
            mark(call.cache, False)
        if filled:
            return given  # a request whose prompt was read without this attachment: it stays dense
        if ids is None:
            raise UnsupportedError(
                "pruning needs input_ids to find the visual tokens; inputs_embeds alone do not tell where they are"
            )
        call.visual = self.d.visual(ids)
        call.prefill = bool(call.visual.any())
        if not call.prefill:
            call.plain = ids
            return given
        call.found = self.d.parts(ids, given)
        call.sources = self.d.sources(given, call.found) if self.tower else []
        call.encoded = self.d.encoded(given)
        call.segments = _segments(given, call)
        if given.get("labels") is not None:
            call.labels = given[
                "labels"
            ].clone()  # positions without a prediction are masked out of it before the loss reads it
            return {**given, "labels": call.labels}
        call.prompt = self.entrance.prompt(ids, _real(call.mask, *ids.shape).to(ids.device))
        return given

    def _close(self, call: Call, output: Any) -> None:
        if call.plain is not None:  # nothing to prune, and the report says so
            b, t = call.plain.shape
            level = dense_level(
                _real(call.mask, b, t).to(call.plain.device), torch.zeros_like(call.plain, dtype=torch.bool)
            )
            request = Request(
                t,
                [[] for _ in range(b)],
                [],
                level.valid,
                level.shift,
                [level],
                text_tokens=level.valid.sum(1).tolist(),
            )
            self._tell(request)
            return
        request = call.request  # type: ignore[assignment]
        if request is None or not call.prefill:
            if call.prefill:
                raise UnsupportedError(
                    f"{type(self.d.root).__name__} did not call its language model as this library knows it, so "
                    "nothing was pruned"
                )
            return
        request.at = tuple(request.level_at(i) for i in range(len(self.d.layers)))
        for i, level in enumerate(request.at):
            request.first.setdefault((id(level), self.d.kinds[i]), i)
        request.pruned = frozenset(i for i, level in enumerate(request.at) if not level.dense)
        request.uneven = frozenset(
            i for i in request.pruned if not request.at[i].whole or self.d.window_of(i) is not None
        )
        cache = host.cache_of(output)
        cache = call.cache if cache is None else cache
        if cache is not None:
            self.requests[cache] = request
            pruned = any(not level.dense for level in request.levels)
            mark(cache, pruned)
            if pruned:
                follow(cache, {name: getattr(request, how) for name, how in host.MOVES.items()})
        self._tell(request)

    def _tell(self, request: Request) -> None:
        """Reports a prefill. The unconditional prompt that guidance reads beside the real one is not what a user asks
        about."""
        running = self.entrance.generation
        if running is not None:
            if running.told and not request.units:
                return
            running.told |= bool(request.units)
        self.done(request)

    # ------------------------------------------------------------------------------------------- entering and leaving
    # the decoder

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None:
            ids = args[0] if args else kwargs.get("input_ids")
            if ids is None or bool(self.d.visual(ids).any()):
                raise UnsupportedError(
                    f"{type(module).__name__} inside an attached model was called by itself, where it cannot be told "
                    "which tokens are visual; "
                    f"call the {type(self.d.root).__name__}, or remove() the attachment first"
                )
            return None
        if call.request is None and not call.prefill:
            if call.cache is not None and call.cache not in self.whole:
                self._check_dense(call.cache, kwargs)
                self.whole.add(call.cache)
            return None
        backend(self.d.lm.config)
        self._check_layers(module.layers)
        return self._enter_prefill(call, args, kwargs) if call.prefill else self._enter_decode(call, args, kwargs)

    def _check_layers(self, layers: Any) -> None:
        """Layers that took the places of those that are watched have no hooks; wrappers around the same ones have."""
        for i, layer in self.watched.items():
            now = layers[i] if i < len(layers) else None
            if now is not layer and (now is None or all(m is not layer for m in now.modules())):
                raise UnsupportedError(
                    f"layer {i} was taken out or replaced since attach(), what stands there now is not watched: "
                    "remove() and attach again"
                )
        if len(layers) != self.depth:
            raise UnsupportedError(
                f"there are {len(layers)} layers, and {self.depth} at attach(): remove() and attach again"
            )

    def _enter_prefill(self, call: Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        assert call.visual is not None
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or embeds.ndim != 3 or embeds.shape[:2] != call.visual.shape:
            raise UnsupportedError(
                f"{type(self.d.root).__name__} hands its language model something else than one embedding per token of "
                "the prompt, so nothing can be pruned"
            )
        b, t = embeds.shape[:2]
        visual, real = call.visual.to(embeds.device), _real(call.mask, b, t).to(embeds.device)
        level = dense_level(real, visual)
        request = Request(
            t, call.found, units(call.found, self.per, call.segments), real, _next(kwargs.get("position_ids"), level)
        )
        request.text_tokens = (real & ~visual).sum(1).tolist()
        request.levels.append(level)
        request.sources, request.packed = call.sources, call.segments is not None
        call.request, call.level = request, level
        call.question = _question(call, level)
        held = call.question & level.visual
        request.held = held if bool(held.any()) else None
        if not self.tower and not self.entry:
            return args, kwargs
        gone = torch.zeros_like(visual)
        if self.tower:
            request.vision = assign(request, call.encoded)
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

    def _project(
        self, call: Call, request: Request, embeds: Tensor, visual: Tensor, planes: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, list[Tensor] | None]:
        """The stages behind the projector. ``visual`` ``[B, T]`` marks the placeholders; answers with the sequence
        (merged tokens in the place of the kept one), the visual tokens gone and, merged alike, the ``planes`` that
        DeepStack adds later."""
        run = self.arrived(request)
        found = request.units
        columns, owner = request.table.to(embeds.device).clamp_min(0), request.owner.to(embeds.device)[:, None]
        at = columns.gather(1, run.index.clamp_min(0))
        x = embeds[owner, at].masked_fill(~run.valid[..., None], 0)
        spread = [p.new_zeros(*visual.shape, p.shape[-1]).masked_scatter(visual[..., None], p) for p in planes or ()]
        extra = [p[owner, at] for p in spread]
        rasters = tuple(u.rasters for u in found)
        for planned in self.entry:
            view = run.view(
                x,
                planned,
                grid=(x.shape[1], 1),
                prefix=0,
                depth=1,
                seed=self._seed(request),
                sources={},
                rasters=rasters,
            )
            if call.held is not None:
                at = columns.gather(1, run.index.clamp_min(0))
                view = replace(view, protected=call.held.to(embeds.device)[owner, at] & run.valid)
            selection = planned.select(view)
            if selection is None:
                run.note(planned, run.index)
                continue
            extra = [combine(p, selection, run.size)[0] for p in extra]
            x = run.apply(x, selection, planned)
        request.entry = run
        at = columns.gather(1, run.index.clamp_min(0))
        where = owner.expand_as(at)[run.valid], at[run.valid]
        embeds, gone = embeds.clone(), visual.clone()
        embeds[where], gone[where] = x[run.valid], False
        for p, e in zip(spread, extra, strict=True):
            p[where] = e[run.valid]
        return embeds, gone, None if planes is None else [p[visual] for p in spread]

    def _seed(self, request: Request) -> Seed:
        """The seed for a view of all units: one for all, or that of each unit's sample."""
        if isinstance(self.seed, int):
            return self.seed
        if len(self.seed) != len(request.parts):
            raise VtpruneError(f"{len(self.seed)} seeds were given for a batch of {len(request.parts)} samples")
        return tuple(self.seed[u.sample] for u in request.units)

    def _check_dense(self, cache: Any, kwargs: dict) -> None:
        """A cache that no request here has filled must be whole: a copy of a pruned one has lost what tells which
        tokens it holds."""
        if host.fixed(cache):
            return
        held, mask, ids = host.held(cache), kwargs.get("attention_mask"), kwargs.get("position_ids")
        total = held + kwargs["inputs_embeds"].shape[1]
        ragged = len({host.held(cache, i) for i in range(len(self.d.layers))}) > 1
        longer = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != total
        if held and (
            ragged
            or longer
            or (ids is not None and ids.numel() > 0 and int(ids.max()) >= total + self.d.first_position)
        ):
            raise UnsupportedError(
                "this cache looks like a copy of a pruned one; only the cache object that the prompt was read into can "
                "be continued"
            )

    def _enter_decode(self, call: Call, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        request, embeds, mask = call.request, kwargs["inputs_embeds"], call.mask
        assert request is not None
        call.level = base = request.at[0]
        b, q = embeds.shape[:2]
        if b != len(base.rows):
            if not request.pruned:  # nothing was dropped: the cache is as any other
                return None
            raise UnsupportedError(
                f"this cache holds {len(base.rows)} prompts, and {b} rows of new tokens were given: one row belongs to "
                "each"
            )
        held = host.held(call.cache)
        new = held - base.width + q  # tokens behind the prompt, these included
        two = isinstance(mask, Tensor) and mask.ndim == 2
        if two and mask.shape[1] != request.length + new:
            raise UnsupportedError(
                f"this cache holds {base.width} of {request.length} prompt tokens; a continuation must bring one new "
                "token sequence and the whole mask "
                f"({request.length + new} columns, got {mask.shape[1]}): start a new prompt instead"
            )
        if not host.fixed(call.cache):
            if new < q or any(
                host.held(call.cache, i) - request.at[i].width != new - q for i in request.first.values()
            ):
                raise UnsupportedError(
                    "this cache was cut back into its prompt, or in some layers only; only growing it is supported"
                )
        call.tail = (
            mask[:, request.length :].bool() if two else torch.ones(b, new, dtype=torch.bool, device=embeds.device)
        )
        # One new token that sees all its layer has cached needs no mask, and under sdpa the model makes none.
        easy = (
            q == 1
            and self.positions == "original"
            and backend(self.d.lm.config) == "sdpa"
            and not host.fixed(call.cache)
        )
        easy = easy and (mask is None or base.dense or (two and bool(call.tail.all())))
        call.serve = request.uneven if easy else request.pruned
        ids = kwargs.get("position_ids")
        if not call.placed and (not base.dense or self.d.mrope):
            ids = request.next.to(embeds.device)[:, None] + torch.arange(new - q, new, device=embeds.device)
            ids = ids[None].expand(3, -1, -1) if self.d.mrope else ids
        elif (
            ids is not None
            and not two
            and not base.dense
            and ids.ndim == 2
            and bool((ids[:, 0] != request.next.to(ids.device) + new - q).any())
        ):
            raise UnsupportedError(
                f"this cache holds {base.width} of {request.length} prompt tokens and {new - q} behind them, so the "
                "next position is "
                f"{(request.next + new - q).tolist()}, not {ids[:, 0].tolist()}: pass the new tokens alone, or start a "
                "new prompt"
            )
        call.ids = ids
        if base.dense:
            return args, {**kwargs, "position_ids": ids}
        # Every layer is given its own mask; the stack must only not trip over the caller's, which is longer than the
        # first layer's cache.
        return args, {
            **kwargs,
            "attention_mask": kwargs["attention_mask"] if isinstance(kwargs.get("attention_mask"), dict) else None,
            "position_ids": ids,
        }

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Puts the final hidden states back to the caller's length, dropped positions zero, and takes their predictions
        out of the labels."""
        call = self.call
        if call is None or call.request is None:
            return None
        if call.ran != len(self.watched):
            raise UnsupportedError(
                f"{call.ran} of the {len(self.watched)} layers ran that this attachment watches in "
                f"{type(module).__name__}: layers were skipped, or run twice"
            )
        if not call.prefill or call.level is None or call.level.dense:
            return None
        level, length = call.level.on(output.last_hidden_state.device), call.request.length
        hidden = output.last_hidden_state
        b, _, c = hidden.shape
        where = torch.where(level.valid, level.rows, length)
        full = put(hidden.new_zeros(b, length + 1, c), where, hidden)[:, :length]
        if call.labels is not None:
            present = torch.zeros(b, length + 1, dtype=torch.bool, device=hidden.device).scatter_(1, where, True)[
                :, :length
            ]
            silent = ~present[:, :-1].to(call.labels.device)
            call.labels[:, 1:].masked_fill_(silent, -100)
        output.last_hidden_state = full
        return output

    # -------------------------------------------------------------------------------------------------------------
    # layers

    def _layer(self, number: int, cuts: list[PlannedCut]) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = self.call
            # a checkpoint runs the layer again, long after the forward
            if call is None or call.request is None and module.training:
                tables = kwargs.get("position_embeddings")
                again = self.replays.get(id(tables[0])) if isinstance(tables, tuple) else None
                return None if again is None else self._again(again, number, args, kwargs)
            if call.request is None:
                return None
            call.ran += 1
            if not call.prefill:
                # What is easy needs nothing, unless the model made a mask after all (compiled, of another length).
                if number not in call.serve and (
                    number not in call.request.pruned or kwargs.get("attention_mask") is None
                ):
                    return None
                x = args[0] if args else kwargs["hidden_states"]
                return args, {
                    **kwargs,
                    **self._serve_decode(call, call.request.at[number].on(x.device), number, kwargs, x),
                }
            x = args[0] if args else kwargs["hidden_states"]
            call.dense.setdefault(self.d.kinds[number], kwargs)
            assert call.level is not None
            self._count(call, number)
            level, changed = call.level, x
            if number == 0 and call.gone is not None:
                changed = self._drop(call, 0, level.valid & ~call.gone.to(level.rows.device), x)
            for planned in cuts:
                if planned.cut.action is not Action.CONTEXT:
                    changed = self._cut(call, planned, number, changed)
            context = [
                planned for planned in cuts if planned.cut.action is Action.CONTEXT and planned.stage in call.stash
            ]
            for planned in context:
                kwargs = {**kwargs, **self._context(call, planned, number, module, changed, kwargs)}
            self._count(call, number + 1)
            level = call.level
            if number in self.observed:
                call.inputs[number] = (changed, level)
            if level.dense and changed is x:
                return None
            if not level.dense and not context:
                kwargs = {**kwargs, **self._serve_prefill(call, level.on(x.device), number, kwargs, changed)}
            if host.checkpointed(module):
                self._remember(call, number, level)
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        return enter

    def _remember(self, call: Call, number: int, level: Level) -> None:
        """What a checkpointed layer must find when it runs again in the backward pass, hooks included, as in
        transformers releases up to 5.17."""
        if any(c.cut.action is not Action.SELECT for c in self.cuts):
            raise UnsupportedError(
                "routing methods need a newer transformers for gradient checkpointing, or "
                "gradient_checkpointing_disable()"
            )
        if number not in call.done:
            call.done[number] = (None, level)
        table = call.dense[self.d.kinds[number]]["position_embeddings"][0]
        table._vtprune_call = call  # the checkpoint keeps the table, and nobody else keeps the call
        self.replays[id(table)] = call

    def _again(self, call: Call, number: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if number not in call.done:
            return None
        order, level = call.done[number]
        x = args[0] if args else kwargs["hidden_states"]
        if order is not None:
            x = take(x, order)
        kwargs = {**kwargs, **self._serve_prefill(call, level.on(x.device), number, kwargs, x)}
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def _count(self, call: Call, upto: int) -> None:
        assert call.request is not None and call.level is not None
        while (number := len(call.request.layer_tokens)) < upto:
            counts = call.level.counts
            extra = call.request.keys_only.get(number, [0] * len(counts))
            call.request.layer_tokens.append([a + b for a, b in zip(counts, extra, strict=True)])

    def finish_counts(self, request: Request) -> None:
        """Layers without a hook (in front of the first cut) processed what level 0 holds."""
        counts = request.levels[0].counts
        while len(request.layer_tokens) < len(self.d.layers):
            request.layer_tokens.append(counts)

    def _serve_prefill(
        self, call: Call, level: Level, number: int, kwargs: dict, x: Tensor, keys: Level | None = None
    ) -> dict[str, Any]:
        """Rotary table, position ids and mask for ``level`` at layer ``number``, made once per level and attention
        type. ``x`` tells dtype and device."""
        key = (id(level), self.d.kinds[number], id(keys))
        if key in call.served:
            return call.served[key]
        dense = call.dense.get(self.d.kinds[number], kwargs)
        rope, ids = dense["position_embeddings"], dense.get("position_ids")
        if level.dense and keys is None:
            return {name: dense.get(name) for name in ("position_embeddings", "position_ids", "attention_mask")}
        if self.positions == "compact" and not level.dense:
            full = torch.arange(rope[0].shape[1], device=x.device)[None] if ids is None else ids
            ids = self._compact(level, full.to(x.device).expand(len(level.rows), -1).gather(1, level.rows))
            rope = self.d.rotary(x, ids, self.d.kinds[number])
        else:
            # three axes each for themselves (GLM-4.5V)
            flat = () if ids is None else tuple(ids) if ids.ndim == 3 else (ids,)
            cos, sin, *more = kernels.gather(level.rows, *(t.to(level.rows.device) for t in (*rope, *flat)))
            rope, ids = (cos, sin), None if ids is None else torch.stack(more) if ids.ndim == 3 else more[0]
        out = {"position_embeddings": rope, "position_ids": ids}
        cached = self._columns(call, number, x.shape[1])[0]
        sliding, how = self.d.window_of(number) is not None, backend(self.d.lm.config)
        out["attention_mask"] = prefill_mask(
            dense.get("attention_mask"), level, level if keys is None else keys, x, cached, how, sliding
        )
        if how == "flash" and call.segments is not None:
            out |= packed(call.segments.to(level.rows.device).gather(1, level.rows))
        call.served[key] = out
        return out

    @staticmethod
    def _columns(call: Call, number: int, q: int) -> tuple[int, int]:
        """Columns that the cache of layer ``number`` will show for ``q`` more tokens, and the first one's place in all
        it has seen."""
        if call.cache is None:
            return q, 0
        return host.columns(call.cache, q, number)

    def _compact(self, level: Level, ids: Tensor) -> Tensor:
        """Positions 0, 1, 2 … among the real tokens (padding takes 0), as PyramidDrop's official code renumbers;
        remembers the distance for decoding."""
        compact = (level.valid.long().cumsum(1) - 1).clamp_min(0)
        last = torch.where(level.valid, torch.arange(ids.shape[1], device=ids.device), -1).argmax(1, keepdim=True)
        level.shift = (ids.gather(1, last) - compact.gather(1, last))[:, 0]
        return compact

    def _serve_decode(self, call: Call, level: Level, number: int, kwargs: dict, x: Tensor) -> dict[str, Any]:
        key = (id(level), self.d.kinds[number])
        if key in call.served:
            return call.served[key]
        request = call.request
        assert request is not None and call.tail is not None
        out: dict[str, Any] = {}
        if self.positions == "compact":
            ids = call.ids if call.ids is not None else kwargs["position_ids"]
            ids = ids.to(x.device) - level.shift[:, None]
            out = {"position_ids": ids, "position_embeddings": self.d.rotary(x, ids, self.d.kinds[number])}
        tail, columns = call.tail.to(x.device), self._columns(call, number, x.shape[1])
        how, window = backend(self.d.lm.config), self.d.window_of(number)
        out["attention_mask"] = decode_mask(level, tail, request.length, x.shape[1], columns, window, x, how)
        call.served[key] = out
        return out

    # ---------------------------------------------------------------------------------------------------------------
    # cuts

    def _drop(self, call: Call, number: int, keep: Tensor, x: Tensor) -> Tensor:
        """Starts the level that keeps ``keep`` ``[B, M]`` of the present one."""
        assert call.request is not None and call.level is not None
        call.level, order = pack(number, keep, call.level)
        call.request.levels.append(call.level)
        before = call.done.get(number, (None, None))[0]
        call.done[number] = (order if before is None else before.gather(1, order), call.level)
        return take(x, order.to(x.device))

    def _cut(self, call: Call, planned: PlannedCut, number: int, x: Tensor) -> Tensor:
        request = call.request
        assert request is not None and call.level is not None
        level = call.level
        if planned.cut.action is Action.RESTORE:
            return self._restore(call, planned, number, x)
        if planned.cut.action is Action.STASH:
            call.stash[planned.stage] = Stash(x, level)
        level = level.on(x.device)
        # each unit's remaining tokens: columns of the present level, and places in the unit
        where, index = _remaining(request, level, x.device)
        owner = request.owner.to(x.device)
        valid = where >= 0
        view = TokenView(
            features=x.detach()[owner[:, None], where.clamp_min(0)],  # decisions carry no gradient
            valid=valid,
            index=index,
            size=valid.to(torch.float32),
            protected=torch.zeros_like(valid) if call.held is None else self._held(call, level, where, owner),
            grid=(where.shape[1], 1),
            layer=planned.cut.layer,
            depth=len(self.d.layers),
            seed=self._seed(request),
            memory=request.memory.setdefault(planned.stage, {}),
            sources={
                "query_attention": lambda **kw: self.query_attention(call, planned, x, where, owner, **kw),
                "queried": lambda: self._queried(call, owner),
            },
            rasters=tuple(u.rasters for u in request.units),
        )
        selection = planned.select(view)
        if selection is None:
            return x
        request.notes.append(partial(_record, planned.cut.site, planned.stage, index, selection.kept, selection.score))
        if selection.target is not None:
            raise UnsupportedError("merging inside the language model is not supported by this adapter")
        if torch.equal(valid.sum(1), selection.counts):
            return x
        chosen = torch.where(selection.kept >= 0, where.gather(1, selection.kept.clamp_min(0)), level.width)
        text = nn.functional.pad(level.valid & ~level.visual, (0, 1))  # the extra column takes the padding
        keep = text.index_put(
            (owner[:, None].expand_as(chosen), chosen), torch.ones((), dtype=torch.bool, device=x.device)
        )[:, :-1]
        if call.held is not None and bool(
            (call.held.to(x.device).gather(1, level.rows) & level.visual & level.valid & ~keep).any()
        ):
            raise UnsupportedError(ENDS)
        call.level = level
        return self._drop(call, number, keep, x)

    @staticmethod
    def _held(call: Call, level: Level, where: Tensor, owner: Tensor) -> Tensor:
        assert call.held is not None
        held = call.held.to(where.device).gather(1, level.rows) & level.valid
        return held[owner[:, None], where.clamp_min(0)] & (where >= 0)

    def _restore(self, call: Call, planned: PlannedCut, number: int, x: Tensor) -> Tensor:
        """Routing (DPVR, arXiv 2606.09131, phase 4): the stashed visual rows come back, changed by the method's side
        branch, into the positions they left."""
        request, level = call.request, call.level
        assert request is not None and level is not None
        if planned.stage not in call.stash:  # no image in this batch
            return x
        stash = call.stash[planned.stage]
        made = self.branch(call, planned, stash)
        if level is stash.level:
            return torch.where(level.visual[..., None], made, x)
        place = torch.where(level.valid, within(stash.level, level), made.shape[1])
        padded = torch.cat([made, made[:, :1]], dim=1)  # the extra row takes the padding
        out = put(padded, place, x)[:, :-1]
        old = stash.level
        call.level = Level(number, old.rows, old.valid, old.visual, old.shift.clone())
        call.done.pop(number, None)  # what was taken before counts other columns
        request.levels.append(call.level)
        self._record_return(request, planned, old)
        return out

    @staticmethod
    def _record_return(request: Request, planned: PlannedCut, level: Level) -> None:
        back = []
        for unit in request.units:
            there = set(level.rows[unit.sample][level.valid[unit.sample]].tolist())
            back.append(torch.tensor([i for i, p in enumerate(unit.columns.tolist()) if p in there], dtype=torch.long))
        request.notes.append(
            Record(planned.cut.site, planned.stage, [0] * len(back), [len(k) for k in back], back, None)
        )

    def _context(
        self, call: Call, planned: PlannedCut, number: int, module: Any, x: Tensor, kwargs: dict
    ) -> dict[str, Any]:
        """Routing (DPVR, arXiv 2606.09131, variant KV): the stashed visual rows, changed by the side branch, give this
        layer keys and values and nothing else.

        They are put into the layer's cache ahead of its own rows; without a cache, into one that lives for this layer
        only.
        """
        request, level, stash = call.request, call.level, call.stash[planned.stage]
        assert request is not None and level is not None
        made = self.branch(call, planned, stash)
        alone = stash.alone
        if self.positions == "compact":  # the text keeps the places it has among the visual tokens
            old = self._serve_prefill(call, stash.level, number, kwargs, stash.hidden)
            tables = tuple(take(t, stash.rows.clamp_min(0)) for t in old["position_embeddings"])
        else:
            tables = self._serve_prefill(call, alone, number, kwargs, x)["position_embeddings"]
        if stash.joined is None:
            rows, valid = (torch.cat([getattr(alone, n), getattr(level, n)], 1) for n in ("rows", "valid"))
            keys = Level(number, rows, valid, torch.cat([alone.valid, level.visual], 1), alone.shift)
            serving: dict[str, Any] = dict(self._serve_prefill(call, level, number, kwargs, x, keys))
            if self.positions == "compact":
                here = within(stash.level, level)
                serving["position_embeddings"] = tuple(take(t, here) for t in old["position_embeddings"])
                serving["position_ids"] = (
                    take(old["position_ids"], here) if old.get("position_ids") is not None else None
                )
                keys.shift = stash.level.shift.clone()
            stash.joined = keys, serving
            self._record_return(request, planned, stash.level)
        request.cached[number], serving = stash.joined
        request.keys_only[number] = alone.valid.sum(1).tolist()
        index = stash.rows.clamp_min(0)
        attention = module.self_attn
        hidden = module.input_layernorm(take(made, index))
        key, value = heads(attention, "k", hidden), heads(attention, "v", hidden)
        cache = host.cache_in(kwargs)
        cache = host.new_cache() if cache is None else cache
        cache.update(turn(key, tables[0], tables[1], self.d.pairs), value, number)
        return {**serving, **host.cached(module, cache)}

    def _branch(self, call: Call, planned: PlannedCut, stash: Stash) -> Tensor:
        """The side branch over the visual rows alone, once: they see each other as in the dense model, at their own
        positions; no cache. ``[B, M, C]`` with the other rows unchanged."""
        if stash.out is not None:
            return stash.out
        x, alone, rows = stash.hidden, stash.alone, stash.rows
        assert call.request is not None
        call.request.branched[planned.stage] = alone.valid.sum(1).tolist()

        def run(layer: Any, hidden: Tensor) -> Tensor:
            own, source = next(layer.parameters()), next(self.d.layers[layer.self_attn.layer_idx].parameters())
            if (
                (own.dtype, own.device) != (source.dtype, source.device)
                and own.is_floating_point()
                and source.is_floating_point()
            ):
                layer.to(source.device, source.dtype)  # the model has been moved since
            kind = self.d.kinds[layer.self_attn.layer_idx]
            if kind not in call.dense:
                raise UnsupportedError(
                    f"the side branch copies a layer of type {kind}, of which none has run behind the split yet; "
                    "choose another split"
                )
            dense = call.dense[kind]
            tables = tuple(take(t, alone.rows) for t in dense["position_embeddings"])
            if self.positions == "compact":
                served = self._serve_prefill(call, stash.level, layer.self_attn.layer_idx, dense, x)
                tables = tuple(take(t, rows.clamp_min(0)) for t in served["position_embeddings"])
            sliding = kind == "sliding_attention"
            bias = prefill_mask(dense.get("attention_mask"), alone, alone, x, 0, backend(self.d.lm.config), sliding)
            out = layer(hidden, attention_mask=bias, position_embeddings=tables)
            return out[0] if isinstance(out, tuple) else out

        out = planned.bring_back(take(x, rows.clamp_min(0)), run)
        place = torch.where(rows >= 0, rows, x.shape[1])
        stash.out = put(torch.cat([x, x[:, :1]], dim=1), place, out)[:, :-1]
        return stash.out

    # -------------------------------------------------------------------------------------------------------------
    # scores

    def query_attention(
        self,
        call: Call,
        planned: PlannedCut,
        x: Tensor,
        where: Tensor,
        owner: Tensor,
        *,
        layer: str = "next",
        query: str = "last",
        keys: str = "all",
        rope: bool = True,
    ) -> Tensor:
        """Attention of the query rows (mean over rows and heads) to each candidate: ``[G, N]``.

        ``query``: ``"last"`` the last prompt token (with labels: every token in front of an answer), ``"all"`` every
        row. ``layer``: projections of the layer about to run on this cut's input (``"next"``) or the real attention of
        the layer before it (``"previous"``). ``keys``: softmax over all keys that the row sees or over the visual ones
        alone.
        """
        assert call.level is not None
        level = call.level.on(x.device)
        number = planned.cut.layer if layer == "next" else planned.cut.layer - 1
        if layer == "previous":
            x, seen_at = call.inputs[number]
            if seen_at is not call.level:
                raise UnsupportedError(
                    f"two stages cut before layer {planned.cut.layer}; the second cannot use the attention of the "
                    "layer before"
                )
            level = level.on(x.device)
        dense = call.dense[self.d.kinds[number]]
        rotary = self._serve_prefill(call, level, number, dense, x)["position_embeddings"] if rope else None
        asking = self._asking(call, level, query)
        segments = None if call.segments is None else call.segments.to(x.device).gather(1, level.rows)
        out = torch.empty_like(where, dtype=torch.float32)
        block = self.d.layers[number]
        with host.gathered(block):
            for part in (None,) if segments is None else range(int(segments.max()) + 1):
                mine = asking if part is None else asking & (segments == part)
                one = query == "last" and call.labels is None
                rows, weight = query_rows(mine, 1 if one else None)  # [B, R] each
                score = attention_to(
                    block, x, rows, weight, level, rotary, dense.get("attention_mask"), keys, segments, self.d.pairs
                )
                score = score.to(where.device)[owner[:, None], where.clamp_min(0)]
                out = (
                    score
                    if part is None
                    else torch.where(self._part(call, owner)[:, None] == part, score.to(out.dtype), out)
                )
        return out.masked_fill(where < 0, -torch.inf)

    def _asking(self, call: Call, level: Level, query: str) -> Tensor:
        """``[B, M]``: the level's rows that rank."""
        assert call.question is not None and call.request is not None
        if call.labels is None and call.prompt is None and self.d.root.training:
            raise UnsupportedError(
                "ranking goes by the prompt's last token, which a training forward without labels does not tell from "
                "the answer's: pass labels to the "
                "model (label smoothing and loss functions outside of it take them away), or choose a method that does "
                "not rank by the text"
            )
        question = call.question.to(level.rows.device)
        asking = question.gather(1, level.rows) & level.valid
        if call.held is not None and bool((asking.sum(1) != question.sum(1)).any()):
            raise UnsupportedError(
                "an answer begins right behind an image whose last token is gone, which ranks for it: put text between "
                "them"
            )
        if query == "last":
            return asking
        # every row up to the last that asks, without answers
        column = torch.arange(level.width, device=asking.device)
        upto = torch.where(asking, column, -1)
        if call.segments is not None:
            parts = call.segments.to(level.rows.device).gather(1, level.rows)
            same = parts[:, :, None] == parts[:, None]  # [B, M, M]
            upto = torch.where(same, upto[:, None], -1).amax(2)
        else:
            upto = upto.amax(1, keepdim=True)
        every = level.valid & (column <= upto)
        if call.labels is not None:
            answers = (call.labels.to(level.rows.device) != -100).gather(1, level.rows) & ~level.visual
            every = every & ~answers
        return every

    def _part(self, call: Call, owner: Tensor) -> Tensor:
        """``[G]``: which of the prompts packed into its row each unit belongs to."""
        assert call.request is not None and call.segments is not None
        return call.segments.to(owner.device)[owner, call.request.table[:, 0].to(owner.device)]

    def _queried(self, call: Call, owner: Tensor) -> Tensor:
        """``[G]`` bool: the unit's prompt has a row that asks; with labels only prompts that are answered have one."""
        assert call.question is not None
        question = call.question.to(owner.device)
        if call.segments is None:
            return question.any(1)[owner]
        same = call.segments.to(owner.device)[owner] == self._part(call, owner)[:, None]
        return (question[owner] & same).any(1)


ENDS = (
    "the prompt ends with an image token that this recipe drops, so that nothing is left to answer from: put text "
    "behind the image, or choose a method that "
    "keeps it"
)


def _segments(given: dict[str, Any], call: Call) -> Tensor | None:
    """Which of the prompts packed into its row each token belongs to ``[B, T]``; ``None`` where a row is one prompt.
    Packs carry no mask: their positions begin anew, or flash attention is told where they begin."""
    if call.mask is not None:
        return None
    assert call.visual is not None
    starts = given.get(host.PACKED[0])
    if starts is not None:
        if len(call.visual) != 1:
            raise UnsupportedError("sequences packed into one row are known; these are several rows")
        first = torch.zeros(call.visual.shape[1] + 1, dtype=torch.long, device=call.visual.device)
        first[starts.long().to(first.device)] = 1
        return first[:-1].cumsum(0)[None] - 1
    ids = call.positions
    if ids is None or (ids.ndim == 3 and len(ids) == 3):
        return None
    ids = ids[0] if ids.ndim == 3 else ids
    seams = nn.functional.pad(ids[:, 1:] != ids[:, :-1] + 1, (1, 0))
    return seams.long().cumsum(1).expand(len(call.visual), -1) if bool(seams.any()) else None


def _question(call: Call, level: Level) -> Tensor:
    """The rows that rank, ``[B, T]``: with labels those in front of an answer (placeholders are never an answer), else
    the prompt's last."""
    if call.labels is not None:
        return answer_starts(call.labels.to(level.rows.device), level)
    column = level.rows
    real = level.valid if call.prompt is None else level.valid & (column < call.prompt.to(column.device)[:, None])
    if call.segments is None:
        last = torch.where(real, column, -1).amax(1, keepdim=True)
        return real & (column == last)
    ends = nn.functional.pad(call.segments[:, 1:] != call.segments[:, :-1], (0, 1), value=True)
    return real & ends.to(real.device)


def _remaining(request: Request, level: Level, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where every unit's remaining tokens are in ``level`` and which of the unit they are, ``[G, N]`` each, padded with
    -1."""
    place = torch.where(level.valid, level.rows, request.length)
    column = torch.arange(level.width, device=device).expand_as(place)
    at = torch.full((len(place), request.length + 1), -1, device=device).scatter_(1, place, column)[:, :-1]
    table = request.table.to(device)
    found = torch.where(table >= 0, at[request.owner.to(device)[:, None], table.clamp_min(0)], -1)
    n = found.shape[1]
    order = torch.where(found >= 0, torch.arange(n, device=device), n).sort(1).values
    order = order[:, : max(int((order < n).sum(1).max()), 1)] if len(order) else order
    there = order < n
    return torch.where(there, found.gather(1, order.clamp_max(n - 1)), -1), torch.where(there, order, -1)


def _record(site: str, stage: int, index: Tensor, kept: Tensor, score: Tensor | None) -> Record:
    index, kept = index.cpu(), kept.cpu()
    left = [row[mine[mine >= 0]] for row, mine in zip(index, kept, strict=True)]
    ranked = None if score is None else (index, score)
    return Record(site, stage, (index >= 0).sum(1).tolist(), [len(k) for k in left], left, None, ranked)


def assign(request: Request, encoded: dict[str, Encoded]) -> list[list[tuple[Run, int]]]:
    """The tower's passes that made each sample's images and frames, in the prompt's order."""
    want = {
        kind: [[n for p in parts if (p.video >= 0) == (kind == "video") for n in p.passes] for parts in request.parts]
        for kind in ("image", "video")
    }
    made: dict[str, list[tuple[Run, int]]] = {kind: encoded[kind].passes if kind in encoded else [] for kind in want}
    out: list[list[tuple[Run, int]]] = []
    at = dict.fromkeys(want, 0)
    copies = {}
    for kind, samples in want.items():
        total, have = sum(map(len, samples)), len(made[kind])
        if total and (not have or total % have or len(samples) % (total // have)):
            raise UnsupportedError(
                f"the prompt's {kind}s need {total} passes of the vision tower, and {have} are known: encode them with "
                "this attachment, by the model's own "
                f"{host.ENCODERS[kind]}()"
            )
        copies[kind] = total // have if total else 1
    for b, parts in enumerate(request.parts):
        rows = []
        for kind in want:
            if b % copies[kind] == 0:
                start = at[kind]
                at[kind] += len(want[kind][b])
            else:
                start = at[kind] - len(want[kind][b])
            mine = made[kind][start : start + len(want[kind][b])]
            if [run.tokens for run, _ in mine] != want[kind][b]:
                raise UnsupportedError(f"the vision tower's passes are of another size than the prompt's {kind}s")
            rows.append(iter(mine))
        out.append([next(rows[p.video >= 0]) for p in parts for _ in p.passes])
    return out


def arrived(request: Request, visual: Tensor) -> Tensor:
    """``[B, T]``: the visual tokens that the tower handed over, and the new-line tokens of rows that have one left."""
    assert request.vision is not None
    live: dict[int, Tensor] = {}
    for run, _ in (p for rows in request.vision for p in rows):
        if id(run) not in live:
            index = torch.where(run.index >= 0, run.index, run.tokens)
            live[id(run)] = torch.zeros(run.images, run.tokens + 1, dtype=torch.bool, device=index.device).scatter_(
                1, index, True
            )[:, :-1]
    there = []
    for b, (parts, rows, sources) in enumerate(zip(request.parts, request.vision, request.sources, strict=True)):
        if len(sources):
            mine = torch.cat(
                [live[id(run)][g] for run, g in rows] or [torch.zeros(1, dtype=torch.bool, device=visual.device)]
            ).to(visual.device)
            held = None if request.held is None else request.held[b][visual[b]]
            there.append(present(parts, sources, mine[sources.to(visual.device).clamp_min(0)], held))
    return torch.zeros_like(visual).masked_scatter(visual, torch.cat(there)) if there else torch.zeros_like(visual)


def _real(mask: Any, batch: int, length: int) -> Tensor:
    """Which tokens of the prompt are not padding, ``[B, T]``: the caller's 2-D mask, or what the prepared 4-D one lets
    anybody see."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UnsupportedError("pruning shortens the attention masks; pass a 2-D attention_mask [batch, sequence]")
    if mask.ndim == 4:
        if mask.is_floating_point() and bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any()):
            raise UnsupportedError(
                "an additive mask with other values than 0 and -inf cannot be shortened; pass a 2-D attention_mask "
                "[batch, sequence]"
            )
        mask = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].any(1)[:, :length].expand(batch, -1)
    if mask.shape != (batch, length):
        raise UnsupportedError(f"the attention_mask is {list(mask.shape)} for a prompt of {[batch, length]} tokens")
    return mask.bool()


def _next(ids: Tensor | None, level: Level) -> Tensor:
    """The position behind the prompt ``[B]``; ids ``[B, T]``, or ``[3 or 4, B, T]`` with three axes (four: the text's
    own in front)."""
    b, t = level.rows.shape
    if ids is None:
        return torch.full((b,), t, device=level.rows.device)
    ids = ids.to(level.rows.device)
    if ids.ndim == 3:
        ids = ids[-3:].amax(0)
    return torch.where(level.valid, ids.expand(b, -1), -1).amax(1) + 1


def put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``x`` ``[B, T, C]`` with ``values`` ``[B, M, C]`` in its ``rows`` ``[B, M]``."""
    return x.index_put((torch.arange(len(x), device=x.device)[:, None], rows.to(x.device)), values)
