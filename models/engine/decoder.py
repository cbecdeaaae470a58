"""The engine for language models: shared by every decoder family. Hooks gather hidden states, positions, rotary tables
and masks; nothing is replaced.

The model prepares the caller's whole sequence; hooks on the layers shorten it. A *level* is one sequence length: the
dense one first, and every cut starts a new one, also a cut in front of layer 0 (tokens that the vision side dropped).
The state a request needs while decoding hangs on its cache object, weakly: interleaved requests do not meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...core.ledger import UndoLedger
from ...core.types import Action, Seed, UnsupportedError, VtpruneError
from ..base import PlannedCut
from . import host, retention
from .ahead import check_ahead
from .arguments import LAYER
from .calls import Calls
from .cuts import Cuts
from .decoder_replays import LayerReplays
from .decoding import continue_prompt
from .description import Decoder
from .fusing import Fusing
from .lending import Lending
from .level import backend
from .online import Online
from .prefill import Prefill
from .ranking import Ranking
from .request import Call, Request
from .routing import Routing
from .run import Run
from .serving import Serving
from .skipping import Skipping, check_halves
from .turns import Shelving
from .weighing import Weighing


class DecoderEngine:
    """Hooks one language model. ``tower`` says that the tower may drop tokens, ``noting`` that notes are taken there;
    ``entry`` are the stages behind the projector; ``per`` what a budget applies to; ``done(request)`` is called after
    each prefill, ``arrived(request)`` before the entry stages: it answers with their :class:`Run`."""

    def __init__(
        self,
        decoder: Decoder,
        cuts: list[PlannedCut],
        ledger: UndoLedger,
        *,
        positions: str,
        per: str,
        tower: bool,
        noting: bool,
        entry: list[PlannedCut],
        seed: Seed,
        done: Callable[[Request], None],
        arrived: Callable[[Request], Run],
    ):
        if positions not in ("original", "compact"):
            raise VtpruneError(f"positions={positions!r} is not one of 'original', 'compact'")
        _check_model(decoder, cuts)
        self.decoder, self.seed, self.depth = decoder, seed, len(decoder.layers)
        self.planned, self.serving = cuts, Serving(decoder, compact=positions == "compact")
        routing = Routing(decoder, self.serving, ledger)
        skips, lends = ([c for c in cuts if c.cut.action is what] for what in (Action.SKIP, Action.LEND))
        cuts = [c for c in cuts if c.cut.action not in (Action.SKIP, Action.LEND)]
        fusing = Fusing(decoder, cuts, ledger)
        self.cuts = Cuts(decoder, Ranking(decoder, self.serving), routing, fusing, self._seeds)
        self.prefill = Prefill(
            decoder, per=per, tower=tower, noting=noting, entry=entry, seeds=self._seeds, books=arrived
        )
        routes = any(c.cut.action is not Action.SELECT for c in cuts)
        self.replays = LayerReplays(decoder, self.serving, routes=routes)
        evicting = [c.cut.layer for c in cuts if c.cut.evict]
        self.calls = Calls(decoder, ledger, tower=tower, noting=noting, done=done, evicting=evicting)
        self.entrance, self.local, self.requests = self.calls.entrance, self.calls.entrance.local, self.calls.requests
        self.skipping = Skipping(decoder, [c for c in skips if not c.cut.watch], ledger, lambda: self.call)
        self.online = Online(decoder, [c for c in skips if c.cut.watch], ledger, lambda: self.call)
        self.lending = Lending(decoder, lends, lambda: self.call)
        self.weighing = Weighing(decoder, [c.cut.layer for c in cuts if c.cut.passing], ledger, lambda: self.call)
        ledger.before(decoder.lm, self._enter)
        ledger.after(decoder.lm, self._leave)
        self.observed = {i for c in cuts for i in c.cut.observe}
        self.watched = dict[int, Any]()
        # the first layer whose prompt is not, or does not stay, the dense model's
        first = 0 if tower or entry or evicting else min((c.cut.layer for c in cuts), default=0)
        for i, layer in enumerate(decoder.layers):
            if i >= first or i in self.observed:
                self.watched[i] = layer
                ledger.before(layer, self._layer(i, [c for c in cuts if c.cut.layer == i]))
        self.lending.watch(ledger)

    @property
    def call(self) -> Call | None:
        return self.calls.now

    @property
    def shelving(self) -> Shelving | None:
        return self.calls.shelving

    def shelve(self) -> None:
        """Later turns choose again. Raises :class:`UnsupportedError` where they could not."""
        p = self.prefill
        self.calls.shelving = Shelving(self.decoder, self.planned, p, elsewhere=p.tower or p.noting or bool(p.entry))

    def end(self) -> None:
        """The attachment is over: what was read with it cannot go on without it."""
        self.calls.end()

    def finish_counts(self, request: Request) -> None:
        """Layers without a hook (in front of the first cut) processed what level 0 holds."""
        counts = request.levels[0].counts
        while len(request.layer_tokens) < self.depth:
            request.layer_tokens.append(counts)

    def _seeds(self, request: Request) -> Seed:
        """The seed for a view of all units: one for all, or that of each unit's sample."""
        if isinstance(self.seed, int):
            return self.seed
        if len(self.seed) != len(request.parts):
            raise VtpruneError(f"{len(self.seed)} seeds were given for a batch of {len(request.parts)} samples")
        return tuple(self.seed[u.sample] for u in request.units)

    # the stack --------------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None:
            ids = args[0] if args else kwargs.get("input_ids")
            if ids is None or bool(self.decoder.visual(ids).any()):
                raise UnsupportedError(
                    f"{type(module).__name__} inside an attached model was called by itself, where it cannot be told "
                    "which tokens are visual; "
                    f"call the {type(self.decoder.root).__name__}, or remove() the attachment first"
                )
            return None
        if call.request is None and not call.prefill:
            self.calls.look_at(call.cache, kwargs)
            return None
        backend(self.decoder.lm.config)
        self._check_layers(module.layers)
        if self.decoder.text is not None and kwargs.get("inputs_embeds") is None:
            kwargs = {**kwargs, "input_ids": None, "inputs_embeds": self.decoder.lm.embed_tokens(kwargs["input_ids"])}
        if call.prefill:
            begun = self.prefill.begin(call, args, kwargs)
            if self.shelving is not None:
                self.shelving.begin(call, kwargs)
            return begun
        goes_on = continue_prompt(self.decoder, call, args, kwargs, compact=self.serving.compact)
        if self.shelving is not None:
            self.shelving.go_on(call, kwargs["inputs_embeds"].shape[1])
        return goes_on

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

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call = self.call
        if call is None or call.request is None:
            return None
        if call.ran != len(self.watched):
            raise UnsupportedError(
                f"{call.ran} of the {len(self.watched)} layers ran that this attachment watches in "
                f"{type(module).__name__}: layers were skipped, or run twice"
            )
        check_halves(call, self.skipping.watched | self.online.watched)
        self.lending.check(call)
        self.weighing.check(call)
        if not call.prefill or call.level is None or call.level.dense:
            return None
        return self.prefill.end(call, output)

    # one layer --------------------------------------------------------------------------------------------------------

    def _layer(self, number: int, cuts: list[PlannedCut]) -> Callable:
        changing = [c for c in cuts if c.cut.action is not Action.CONTEXT]
        context = [c for c in cuts if c.cut.action is Action.CONTEXT]

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = self.call
            # a checkpoint runs the layer again, long after the forward
            if call is None or (call.request is None and module.training):
                return self.replays.again(number, args, kwargs)
            if call.request is None or call.aside:
                return None
            call.ran += 1
            shelving = self.shelving
            if shelving is not None:
                x = LAYER.first(args, kwargs)
                whole = shelving.keep(call, number, x, kwargs)
                if whole is not None and number < shelving.first:
                    return None
                if whole is not None:
                    args, kwargs = LAYER.put_first(args, kwargs, whole)
            if call.prefill:
                return self._read(call, number, changing, context, module, args, kwargs)
            return self._continue(call, number, args, kwargs)

        return enter

    def _continue(self, call: Call, number: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """What layer ``number`` is called with for new tokens behind a prompt."""
        request = call.request
        assert request is not None
        # What is easy needs nothing, unless the model made a mask after all (compiled, of another length).
        if number not in call.serve and (number not in request.pruned or kwargs.get("attention_mask") is None):
            return None
        x = LAYER.first(args, kwargs)
        level = request.at[number].on(x.device)
        return args, {**kwargs, **self.serving.decode(call, level, number, kwargs, x)}

    def _read(
        self,
        call: Call,
        number: int,
        changing: list[PlannedCut],
        context: list[PlannedCut],
        module: nn.Module,
        args: tuple,
        kwargs: dict,
    ) -> tuple[tuple, dict] | None:
        """What layer ``number`` is called with in a prefill, behind its cuts: those ``changing`` the sequence, and
        those that give the layer ``context``."""
        x = LAYER.first(args, kwargs)
        call.dense.setdefault(self.decoder.kinds[number], kwargs)
        assert call.level is not None
        self.cuts.count(call, number)
        level, changed = call.level, x
        if number == 0 and call.gone is not None:
            changed = self.cuts.drop(call, 0, level.valid & ~call.gone.to(level.rows.device), x)
        for planned in changing:
            if host.without_cache(module) and planned.trains():
                raise UnsupportedError(retention.TRAINED)
            changed = self.cuts.apply(call, planned, number, changed)
        retention.check(call, module, kwargs)
        context = [planned for planned in context if planned.stage in call.stash]
        for planned in context:
            kwargs = {**kwargs, **self.cuts.routing.context(call, planned, number, module, changed, kwargs)}
        self.cuts.count(call, number + 1)
        level = call.level
        if number in self.observed:
            call.inputs[number] = (changed, level)
        masked = not level.dense or call.retained is not None
        if not masked and changed is x:
            return None
        if masked and not context:
            kwargs = {**kwargs, **self.serving.prefill(call, level.on(x.device), number, kwargs, changed)}
        if host.checkpointed(module):
            self.replays.remember(call, number, level)
        return LAYER.put_first(args, kwargs, changed)


def _check_model(decoder: Decoder, cuts: list[PlannedCut]) -> None:
    """Raises :class:`UnsupportedError` for a language model whose masks or caches cannot be shortened by ``cuts``."""
    backend(decoder.lm.config)
    for module in (decoder.lm, decoder.layers[0]):
        host.cache_name(module)
    for planned in cuts:
        check_ahead(decoder, planned)
        sliding = [i for i in range(planned.cut.layer) if planned.cut.evict and decoder.window_of(i) is not None]
        if sliding:
            raise UnsupportedError(
                f"layer {sliding[0]} has a sliding window, from whose cache nothing can be evicted: truncate nothing"
            )
        if planned.cut.action is Action.CONTEXT and decoder.window_of(planned.cut.layer) is not None:
            raise UnsupportedError(
                f"layer {planned.cut.layer} has a sliding window, whose cache does not hold visual tokens ahead of the "
                "text; choose another variant"
            )
