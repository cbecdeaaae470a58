"""The engine for language models: shared by every decoder family. Hooks gather hidden states, positions, rotary tables and masks; nothing is replaced.

A *level* is one sequence length. Level 0 is what enters the decoder (visual tokens that the vision side dropped are already gone), and every cut starts a
new one.
``rows`` hold positions of the caller's sequence, so outputs can be put back where the caller expects them. The state a request needs while decoding hangs on
its cache object, weakly: interleaved requests do not meet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ledger import UndoLedger
from ..types import TokenView, UnsupportedError, VtpruneError
from ._tower import Record
from .base import PlannedCut


@dataclass(frozen=True)
class Decoder:
    """A family's description of its language model. ``root`` takes ``input_ids`` / ``labels``; ``lm`` is the decoder stack it calls; ``spans(input_ids)`` a
    bool mask
    of the visual placeholders ``[B, T]``; ``tokens`` placeholders per image; ``heads(layer)`` its attention module."""

    root: Any
    lm: Any
    layers: Any
    spans: Callable[[Tensor], Tensor]
    tokens: int
    grid: tuple[int, int]


@dataclass
class Level:
    """``rows`` ``[B, M]`` positions in the caller's sequence, ascending among ``valid`` ``[B, M]``; ``parent`` ``[B, M]`` the same in level 0; ``shift``
    ``[B]`` by how much
    compact positions fall behind at the end of the prompt; ``visual`` ``[B, M]`` marks visual tokens."""

    first: int
    rows: Tensor
    valid: Tensor
    visual: Tensor
    parent: Tensor
    shift: Tensor
    dense: bool = False  # nothing was dropped: the caller's own masks and positions serve


@dataclass
class Request:
    """One prefill and what its decoding steps need."""

    length: int
    groups: list[list[Tensor]]  # per sample, per image: positions of its visual tokens in the caller's sequence
    levels: list[Level] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    layer_tokens: list[list[int]] = field(default_factory=list)  # per layer, per sample
    text_tokens: list[int] = field(default_factory=list)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    branched: dict[int, list[int]] = field(default_factory=dict)  # stage -> per sample, visual tokens that its side branch ran over
    cached: dict[int, Level] = field(default_factory=dict)  # layers whose cache holds more rows than pass through them
    keys_only: dict[int, list[int]] = field(default_factory=dict)  # layer -> per sample, visual tokens that gave it keys and values only
    vision: Any = None

    @property
    def base(self) -> Level:
        """What the first layer's cache holds, and with it the masks and positions that transformers makes while decoding.

        A cut before layer 0 takes the place of level 0.
        """
        return self.cached.get(0) or [level for level in self.levels if level.first == 0][-1]

    @property
    def base_shift(self) -> Tensor:
        """By how much the base's compact positions fall behind the caller's, ``[B]``."""
        first = self.levels[0]
        return first.shift if self.base is first else first.shift + self.base.shift


@dataclass
class Stash:
    """The rows that a routing method takes out of the stack: ``hidden`` ``[B, M, C]`` of ``level``; ``out`` what its side branch made of them; ``joined`` what
    a layer that they give only keys and values caches, and its mask and rotary table."""

    hidden: Tensor
    level: Level
    out: Tensor | None = None
    joined: tuple[Level, dict[str, Any]] | None = None

    @cached_property
    def rows(self) -> Tensor:
        """Columns of the visual rows, ``[B, V]``, padded with -1."""
        found = [r.nonzero()[:, 0] for r in self.level.visual & self.level.valid]
        return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)


@dataclass
class Call:
    """One forward of the root."""

    request: Request | None = None
    prefill: bool = False
    labels: Tensor | None = None
    visual: Tensor | None = None
    cache: Any = None
    level: Level | None = None
    served: dict[int, dict[str, Any]] = field(default_factory=dict)
    inputs: dict[int, tuple[Tensor, Level]] = field(default_factory=dict)
    stash: dict[int, Stash] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)


def sentinel(width: int, like: Tensor) -> Tensor:
    """The row that marks a visual token dropped before the decoder: +inf and -inf in turn, which no computation yields. ``[width]``"""
    row = torch.full((width,), torch.inf, dtype=like.dtype, device=like.device)
    row[1::2] = -torch.inf
    return row


class DecoderEngine:
    """Hooks one language model. ``entry`` says that the vision side may drop tokens; ``done(request)`` is called after each prefill."""

    def __init__(
        self,
        decoder: Decoder,
        cuts: list[PlannedCut],
        ledger: UndoLedger,
        *,
        positions: str,
        entry: bool,
        seed: int,
        done: Callable[[Request], None],
    ):
        if positions not in ("original", "compact"):
            raise VtpruneError(f"positions={positions!r} is not one of 'original', 'compact'")
        self.d, self.cuts, self.positions, self.entry, self.seed, self.done = decoder, cuts, positions, entry, seed, done
        self.local = threading.local()
        self.requests: WeakKeyDictionary[Any, Request] = WeakKeyDictionary()
        self.observed = {i for c in cuts for i in c.observe}
        first = 0 if entry else min((c.layer for c in cuts), default=0)
        ledger.before(decoder.root, self._open)
        ledger.after(decoder.root, self._close, first=False, always=True)
        ledger.before(decoder.lm, self._enter)
        ledger.after(decoder.lm, self._leave)
        for i, layer in enumerate(decoder.layers):
            if i >= first or i in self.observed:
                ledger.before(layer, self._layer(i, [c for c in cuts if c.layer == i]))

    # ------------------------------------------------------------------------------------------------------------- calls

    @property
    def call(self) -> Call | None:
        stack = getattr(self.local, "stack", None)
        return stack[-1] if stack else None

    def _open(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not hasattr(self.local, "stack"):
            self.local.stack = []
        call = Call()
        self.local.stack.append(call)
        call.cache = kwargs.get("past_key_values")
        known = call.cache is not None and call.cache in self.requests
        filled = call.cache is not None and call.cache.get_seq_length() > 0
        ids = args[0] if args else kwargs.get("input_ids")
        seen = any(v is not None and len(v) for k, v in kwargs.items() if k.startswith("pixel_values") or k == "mm_encoder_outputs")
        if filled and seen and ids is not None and bool(self.d.spans(ids).any()):
            raise UnsupportedError("visual tokens in a continuation of a cache cannot be pruned; start a new prompt with the whole conversation")
        if known and filled:
            call.request = self.requests[call.cache]
            return None
        if filled:
            return None  # a request whose prompt was read without this attachment: it stays dense
        if ids is None:
            raise UnsupportedError("pruning needs input_ids to find the visual tokens; inputs_embeds alone do not tell where they are")
        call.visual = self.d.spans(ids)
        call.prefill = bool(call.visual.any())
        if call.prefill and kwargs.get("labels") is not None:
            call.labels = kwargs["labels"].clone()  # positions without a prediction are masked out of it before the loss reads it
            return args, {**kwargs, "labels": call.labels}
        return None

    def _close(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        call = self.local.stack.pop()
        if call.request is None or not call.prefill or output is None:
            return
        hidden = getattr(output, "image_hidden_states", None)
        if self.entry and isinstance(hidden, Tensor) and hidden.ndim >= 2:
            gone = (hidden == sentinel(hidden.shape[-1], hidden)).all(-1)
            if bool(gone.any()):
                output.image_hidden_states = hidden.masked_fill(gone[..., None], 0)
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self.requests[cache] = call.request
        self.done(call.request)

    # ------------------------------------------------------------------------------------------- entering and leaving the decoder

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None or (call.request is None and not call.prefill):
            if call is not None and call.cache is not None:
                self._check_dense(call.cache, kwargs)
            return None
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise UnsupportedError(
                "gradient checkpointing runs layers again outside the forward and is not supported yet; call gradient_checkpointing_disable()"
            )
        cache = kwargs.get("past_key_values")
        if cache is not None and getattr(cache, "is_compileable", False):
            raise UnsupportedError("pruning changes the length of the cache per layer; use a dynamic cache (the default), not a static one")
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise UnsupportedError("pruning builds the attention masks itself; pass a 2-D attention_mask [batch, sequence]")
        return self._enter_prefill(call, args, kwargs, embeds, mask) if call.prefill else self._enter_decode(call, args, kwargs, embeds, mask)

    def _enter_prefill(self, call: Call, args: tuple, kwargs: dict, embeds: Tensor, mask: Tensor | None) -> tuple[tuple, dict]:
        assert call.visual is not None
        b, t = embeds.shape[:2]
        visual = call.visual.to(embeds.device)
        groups = [list(row.nonzero()[:, 0].split(self.d.tokens)) if bool(row.any()) else [] for row in visual]
        if any(len(g) != self.d.tokens for sample in groups for g in sample):
            raise VtpruneError(f"the prompt's visual tokens are not whole images of {self.d.tokens}")
        request = call.request = Request(t, groups)
        real = torch.ones(b, t, dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
        gone = torch.zeros_like(real)
        if self.entry:
            gone = visual & (embeds == sentinel(embeds.shape[-1], embeds)).all(-1)
        request.text_tokens = (real & ~visual).sum(1).tolist()
        if not bool(gone.any()):
            rows = torch.arange(t, device=embeds.device).repeat(b, 1)
            level = Level(0, rows, real, visual & real, rows, torch.zeros(b, dtype=torch.long, device=embeds.device), dense=True)
            request.levels.append(level)
            call.level = level
            return args, kwargs
        ids = kwargs.get("position_ids")
        ids = torch.arange(t, device=embeds.device)[None] if ids is None else ids
        ids = ids.expand(b, -1)
        level = self._pack(0, real & ~gone, visual, right=bool(real[:, -1].all()))
        request.levels.append(level)
        call.level = level
        ids = ids.gather(1, level.rows)
        if self.positions == "compact":
            ids = self._compact(level, ids)
        embeds = embeds.gather(1, level.rows[..., None].expand(-1, -1, embeds.shape[-1])).masked_fill(~level.valid[..., None], 0)
        # Always a mask: without one transformers takes the gaps in the positions for the seams of packed sequences.
        mask = level.valid.long()
        return args, {**kwargs, "inputs_embeds": embeds, "attention_mask": mask, "position_ids": ids}

    def _check_dense(self, cache: Any, kwargs: dict) -> None:
        """A cache that no request here has filled must be whole: a copy of a pruned one has lost what tells which tokens it holds."""
        held, mask, ids = cache.get_seq_length(), kwargs.get("attention_mask"), kwargs.get("position_ids")
        total = held + kwargs["inputs_embeds"].shape[1]
        ragged = len({cache.get_seq_length(i) for i in range(len(self.d.layers))}) > 1
        longer = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != total
        if held and not getattr(cache, "is_compileable", False) and (ragged or longer or (ids is not None and int(ids.max()) >= total)):
            raise UnsupportedError("this cache looks like a copy of a pruned one; only the cache object that the prompt was read into can be continued")

    def _enter_decode(self, call: Call, args: tuple, kwargs: dict, embeds: Tensor, mask: Tensor | None) -> tuple[tuple, dict] | None:
        request = call.request
        assert request is not None
        base = request.base
        call.level = base
        if base.dense:
            return None
        b, q = embeds.shape[:2]
        new = call.cache.get_seq_length() - base.rows.shape[1] + q  # tokens behind the prompt, these included
        if mask is not None and mask.shape[1] != request.length + new:
            raise UnsupportedError(
                f"this cache holds {base.rows.shape[1]} of {request.length} prompt tokens; a continuation must bring one new token sequence and the whole mask "
                f"({request.length + new} columns, got {mask.shape[1]}): start a new prompt instead"
            )
        ids = kwargs.get("position_ids")
        if ids is None:
            ids = torch.arange(request.length + new - q, request.length + new, device=embeds.device)[None].expand(b, -1)
        elif mask is None and ids.ndim == 2 and int(ids[0, 0]) != request.length + new - q:
            raise UnsupportedError(
                f"this cache holds {base.rows.shape[1]} of {request.length} prompt tokens and {new - q} behind them, so the next position is "
                f"{request.length + new - q}, not {int(ids[0, 0])}: pass the new tokens alone, or start a new prompt"
            )
        if self.positions == "compact":
            ids = ids - request.base_shift[:, None]
        tail = torch.ones(b, new, dtype=torch.bool, device=embeds.device) if mask is None else mask[:, request.length :].bool()
        return args, {**kwargs, "attention_mask": torch.cat([base.valid, tail], dim=1).long(), "position_ids": ids}

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Puts the final hidden states back to the caller's length, dropped positions zero, and takes their predictions out of the labels."""
        call = self.call
        if call is None or call.request is None or not call.prefill or call.level is None or call.level.dense:
            return None
        level, length = call.level, call.request.length
        hidden = output.last_hidden_state
        b, _, c = hidden.shape
        where = torch.where(level.valid, level.rows, length)
        full = hidden.new_zeros(b, length + 1, c).scatter(1, where[..., None].expand(-1, -1, c), hidden)[:, :length]
        if call.labels is not None:
            present = torch.zeros(b, length + 1, dtype=torch.bool, device=hidden.device).scatter_(1, where, True)[:, :length]
            silent = ~present[:, :-1].to(call.labels.device)
            call.labels[:, 1:].masked_fill_(silent, -100)
        output.last_hidden_state = full
        return output

    # ------------------------------------------------------------------------------------------------------------- layers

    def _layer(self, number: int, cuts: list[PlannedCut]) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = self.call
            if call is None or call.request is None:
                return None
            x = args[0] if args else kwargs["hidden_states"]
            if not call.prefill:
                call.level = self._level_at(call.request, number)
                if call.level is call.request.base:
                    return None
                return args, {**kwargs, **self._serve(call, call.level, kwargs, x)}
            call.base = call.base or kwargs  # the first hooked layer still has what the decoder made for level 0
            self._count(call, number)
            changed = x
            for cut in cuts:
                if not cut.context:
                    changed = self._cut(call, cut, changed)
            context = [cut for cut in cuts if cut.context and cut.stage in call.stash]
            for cut in context:
                kwargs = {**kwargs, **self._context(call, cut, module, changed, kwargs)}
            self._count(call, number + 1)
            level = call.level
            assert level is not None
            if number in self.observed:
                call.inputs[number] = (changed, level)
            if level is call.request.levels[0] and changed is x:
                return None
            if level is not call.request.levels[0] and not context:
                kwargs = {**kwargs, **self._serve(call, level, kwargs, changed)}
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        return enter

    @staticmethod
    def _level_at(request: Request, number: int) -> Level:
        if number in request.cached:
            return request.cached[number]
        current = request.levels[0]
        for level in request.levels:
            if level.first <= number:
                current = level
        return current

    def _count(self, call: Call, upto: int) -> None:
        assert call.request is not None and call.level is not None
        counts = (call.level.visual & call.level.valid).sum(1).tolist()
        while (number := len(call.request.layer_tokens)) < upto:
            extra = call.request.keys_only.get(number, [0] * len(counts))
            call.request.layer_tokens.append([a + b for a, b in zip(counts, extra, strict=True)])

    def finish_counts(self, request: Request) -> None:
        """Layers without a hook (in front of the first cut) processed what level 0 holds."""
        first = request.levels[0]
        counts = (first.visual & first.valid).sum(1).tolist()
        while len(request.layer_tokens) < len(self.d.layers):
            request.layer_tokens.append(counts)

    def _serve(self, call: Call, level: Level, kwargs: dict, x: Tensor) -> dict[str, Any]:
        """Rotary table, position ids and mask for ``level``, made once per level and call. ``x`` ``[B, M, C]`` tells dtype and device."""
        assert call.request is not None
        if call.prefill and level is call.request.levels[0]:
            return call.base
        key = id(level)
        if key not in call.served:
            call.served[key] = self._serve_prefill(call, level, x) if call.prefill else self._serve_decode(call, level, kwargs, x)
        return call.served[key]

    def _positions_of(self, level: Level, kwargs: dict, x: Tensor) -> Tensor:
        ids = kwargs.get("position_ids")
        m0 = kwargs["position_embeddings"][0].shape[1]
        ids = torch.arange(m0, device=x.device)[None] if ids is None else ids
        return ids.expand(x.shape[0], -1).gather(1, level.parent)

    def _serve_prefill(self, call: Call, level: Level, x: Tensor) -> dict[str, Any]:
        kwargs = call.base
        ids = self._positions_of(level, kwargs, x)
        if self.positions == "compact":
            ids = self._compact(level, ids)
            rope = self.d.lm.rotary_emb(x, position_ids=ids)
        else:
            rope = tuple(_take(t, level.parent) for t in kwargs["position_embeddings"])
        return {"position_ids": ids, "position_embeddings": rope, "attention_mask": self._mask_prefill(level, kwargs.get("attention_mask"), x)}

    def _compact(self, level: Level, ids: Tensor) -> Tensor:
        """Positions 0, 1, 2 … among the real tokens (padding takes 0), as PyramidDrop's official code renumbers; remembers the distance for decoding."""
        compact = (level.valid.long().cumsum(1) - 1).clamp_min(0)
        last = torch.where(level.valid, torch.arange(ids.shape[1], device=ids.device), -1).argmax(1, keepdim=True)
        level.shift = (ids.gather(1, last) - compact.gather(1, last))[:, 0]
        return compact

    def _mask_prefill(self, level: Level, mask: Any, x: Tensor, keys: Level | None = None) -> Any:
        """The mask of ``level``'s rows over the rows of ``keys`` (``None``: over themselves), in the form of the caller's ``mask``."""
        m, flash = level.rows.shape[1], "flash" in (self.d.lm.config._attn_implementation or "")
        if keys is not None and flash:
            raise UnsupportedError("visual tokens that give only keys and values need a mask that flash attention does not take; use sdpa or eager attention")
        if isinstance(mask, Tensor) and mask.ndim == 2:  # flash attention: padding only
            return None if bool(level.valid.all()) else level.valid.to(mask.dtype)
        if mask is None and keys is None and bool(level.valid.all()):
            return None
        if mask is None and flash:
            return level.valid.long()
        keys = level if keys is None else keys
        own = nn.functional.pad(torch.eye(m, dtype=torch.bool, device=x.device), (keys.rows.shape[1] - m, 0))
        seen = (keys.rows[:, None] <= level.rows[..., None]) & keys.valid[:, None]
        seen = (seen | own)[:, None]  # a padding row sees itself, so no row is empty
        if mask is None:
            return seen
        if not isinstance(mask, Tensor):
            raise UnsupportedError(f"attention masks of type {type(mask).__name__} (flex attention) cannot be shortened; use sdpa, eager or flash attention")
        mask = mask.expand(x.shape[0], -1, -1, -1)
        short = mask.gather(2, level.parent[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        short = short.gather(3, keys.parent[:, None, None, :].expand(-1, mask.shape[1], m, -1))
        if short.dtype == torch.bool:
            return short & seen | own
        low = torch.finfo(short.dtype).min
        short = short.masked_fill(~seen, low)
        return short.masked_fill((own & ~level.valid[..., None])[:, None], 0)

    def _serve_decode(self, call: Call, level: Level, kwargs: dict, x: Tensor) -> dict[str, Any]:
        request = call.request
        assert request is not None
        base = request.base
        out: dict[str, Any] = {}
        if self.positions == "compact":
            ids = kwargs["position_ids"] + (request.base_shift - request.levels[0].shift - level.shift)[:, None]
            out = {"position_ids": ids, "position_embeddings": self.d.lm.rotary_emb(x, position_ids=ids)}
        mask = kwargs.get("attention_mask")
        whole = bool(level.valid.all())
        if mask is None:
            if whole:
                return out
            q = x.shape[1]
            new = self._new(call, level, q)
            tail = torch.ones(q, new, dtype=torch.bool, device=x.device).tril(new - q)
            seen = torch.cat([level.valid[:, None].expand(-1, q, -1), tail.expand(x.shape[0], -1, -1)], dim=2)[:, None]
            out["attention_mask"] = seen[:, 0, -1].long() if "flash" in (self.d.lm.config._attn_implementation or "") else seen
            return out
        if not isinstance(mask, Tensor):
            raise UnsupportedError(f"attention masks of type {type(mask).__name__} (flex attention) cannot be shortened; use sdpa, eager or flash attention")
        width = mask.shape[-1]
        # A level may hold rows that the base never had (routing from layer 0): every new token sees them, through one more, open column.
        mask = nn.functional.pad(mask, (0, 1), value=1 if mask.dtype in (torch.bool, torch.long) else 0)
        before = self._within(base, level, missing=width)
        columns = torch.cat([before, torch.arange(base.rows.shape[1], width, device=x.device).expand(x.shape[0], -1)], dim=1)
        keep = torch.cat([level.valid, torch.ones(x.shape[0], width - base.rows.shape[1], dtype=torch.bool, device=x.device)], dim=1)
        if mask.ndim == 2:
            out["attention_mask"] = mask.gather(1, columns) * keep.to(mask.dtype)
            return out
        short = mask.expand(x.shape[0], -1, -1, -1)
        short = short.gather(3, columns[:, None, None].expand(-1, short.shape[1], short.shape[2], -1))
        keep = keep[:, None, None]
        out["attention_mask"] = short & keep if short.dtype == torch.bool else short.masked_fill(~keep, torch.finfo(short.dtype).min)
        return out

    @staticmethod
    def _new(call: Call, level: Level, q: int) -> int:
        """Tokens behind the prompt, these included, told by the length that the level's own first layer has cached (it has not run yet)."""
        return call.cache.get_seq_length(level.first) - level.rows.shape[1] + q

    # --------------------------------------------------------------------------------------------------------------- cuts

    def _pack(self, first: int, mask: Tensor, visual: Tensor, right: bool, parent: Level | None = None) -> Level:
        """The level that keeps ``mask`` ``[B, M]`` of ``parent`` (``None``: of the caller's sequence), aligned to the side on which the prompt ends."""
        width = max(int(mask.sum(1).max()), 1)
        m = mask.shape[1]
        position = torch.where(mask, torch.arange(m, device=mask.device), -1 if right else m)
        order = position.sort(dim=1).values
        order = order[:, m - width :] if right else order[:, :width]
        valid = (order >= 0) & (order < m)
        order = torch.where(valid, order, 0)
        marks = visual.gather(1, order) & valid
        shift = torch.zeros(mask.shape[0], dtype=torch.long, device=mask.device)
        if parent is None:  # level 0 is its own parent
            itself = torch.arange(width, device=mask.device).expand_as(order)
            return Level(first, order, valid, marks, itself, shift)
        return Level(first, parent.rows.gather(1, order), valid, marks, parent.parent.gather(1, order), shift)

    def _cut(self, call: Call, cut: PlannedCut, x: Tensor) -> Tensor:
        request, level = call.request, call.level
        assert request is not None and level is not None
        if cut.restore:
            return self._restore(call, cut, x)
        if cut.stash:
            call.stash[cut.stage] = Stash(x, level)
        # Where every image's remaining tokens are in the present level: [G, N], padded with -1.
        here, sample, origin = [], [], []
        for b, images in enumerate(request.groups):
            at = torch.full((request.length,), -1, device=x.device)
            at[level.rows[b][level.valid[b]]] = level.valid[b].nonzero()[:, 0]
            for group in images:
                found = at[group]
                origin.append((found >= 0).nonzero()[:, 0])
                here.append(found[found >= 0])
                sample.append(b)
        if not here:
            return x
        where = nn.utils.rnn.pad_sequence(here, batch_first=True, padding_value=-1)
        index = nn.utils.rnn.pad_sequence(origin, batch_first=True, padding_value=-1)
        owner = torch.tensor(sample, device=x.device)
        valid = where >= 0
        features = x[owner[:, None], where.clamp_min(0)]
        view = TokenView(
            features=features,
            valid=valid,
            index=index,
            size=valid.to(torch.float32),
            protected=torch.zeros_like(valid),
            grid=self.d.grid,
            layer=cut.layer,
            depth=len(self.d.layers),
            seed=self.seed,
            memory=request.memory.setdefault(cut.memory_key, {}),
            sources={
                "query_attention": lambda **kw: self.query_attention(call, cut, x, where, owner, **kw),
                "queried": lambda: self._queried(call, owner),
            },
        )
        selection = cut.select(view)
        if selection is None:
            return x
        before, after = valid.sum(1).tolist(), selection.counts.tolist()
        kept = [index[g][selection.kept[g][selection.kept[g] >= 0]] for g in range(len(here))]
        request.records.append(Record(cut.site, cut.stage, before, after, [k.cpu() for k in kept], None))
        if selection.target is not None:
            raise UnsupportedError("merging inside the language model is not supported by this adapter")
        if before == after:
            return x
        keep = level.valid & ~level.visual
        for g, b in enumerate(sample):
            chosen = selection.kept[g]
            keep[b, where[g][chosen[chosen >= 0]]] = True
        right = bool(level.valid[:, -1].all())
        fresh = self._pack(cut.layer, keep, level.visual, right, parent=level)
        call.level = fresh
        request.levels.append(fresh)
        order = self._within(level, fresh)
        return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))

    @staticmethod
    def _within(level: Level, fresh: Level, missing: int = 0) -> Tensor:
        """Columns of ``level`` that hold the rows of ``fresh``; ``missing`` for rows that it does not hold."""
        size = int(max(level.rows.max(), fresh.rows.max())) + 1
        at = torch.full((level.rows.shape[0], size + 1), missing, dtype=torch.long, device=level.rows.device)
        place = torch.where(level.valid, level.rows, size)
        at.scatter_(1, place, torch.arange(level.rows.shape[1], device=place.device).expand_as(place))
        return torch.where(fresh.valid, at.gather(1, fresh.rows), 0)

    def _restore(self, call: Call, cut: PlannedCut, x: Tensor) -> Tensor:
        """Routing (DPVR, arXiv 2606.09131, phase 4): the stashed visual rows come back, changed by the method's side branch, into the positions they left."""
        request, level = call.request, call.level
        assert request is not None and level is not None
        if cut.stage not in call.stash:  # no image in this batch
            return x
        stash = call.stash[cut.stage]
        made = self._branch(call, cut, stash)
        if level is stash.level:
            return torch.where(level.visual[..., None], made, x)
        place = torch.where(level.valid, self._within(stash.level, level), made.shape[1])
        padded = torch.cat([made, made[:, :1]], dim=1)  # the extra row takes the padding
        out = padded.scatter(1, place[..., None].expand(-1, -1, x.shape[-1]), x)[:, :-1]
        old = stash.level
        call.level = Level(cut.layer, old.rows, old.valid, old.visual, old.parent, old.shift)
        request.levels.append(call.level)
        self._record_return(request, cut, old)
        return out

    @staticmethod
    def _record_return(request: Request, cut: PlannedCut, level: Level) -> None:
        back = []
        for b, images in enumerate(request.groups):
            there = set(level.rows[b][level.valid[b]].tolist())
            back += [torch.tensor([i for i, p in enumerate(group.tolist()) if p in there], dtype=torch.long) for group in images]
        request.records.append(Record(cut.site, cut.stage, [0] * len(back), [len(k) for k in back], back, None))

    def _context(self, call: Call, cut: PlannedCut, module: Any, x: Tensor, kwargs: dict) -> dict[str, Any]:
        """Routing (DPVR, arXiv 2606.09131, variant KV): the stashed visual rows, changed by the side branch, give this layer keys and values and nothing else.

        They are put into the layer's cache ahead of its own rows; without a cache, into one that lives for this layer only.
        """
        request, level, stash = call.request, call.level, call.stash[cut.stage]
        assert request is not None and level is not None
        made = self._branch(call, cut, stash)
        old, real, index = stash.level, stash.rows >= 0, stash.rows.clamp_min(0)
        served = self._serve(call, old, call.base, stash.hidden)
        tables = served["position_embeddings"]
        if stash.joined is None:
            rows, parent = (torch.cat([a.gather(1, index), b], 1) for a, b in ((old.rows, level.rows), (old.parent, level.parent)))
            valid, visual = (torch.cat([real, own], 1) for own in (level.valid, level.visual))
            # Shifts count from level 0, whose own is known to every decoding step.
            shift = torch.zeros_like(old.shift) if old is request.levels[0] else old.shift
            keys = Level(cut.layer, rows, valid, visual, parent, shift)
            here = self._within(old, level)
            serving: dict[str, Any] = {"position_embeddings": tuple(_take(t, here) for t in tables)}
            if served.get("position_ids") is not None:
                serving["position_ids"] = served["position_ids"].expand(len(here), -1).gather(1, here)
            serving["attention_mask"] = self._mask_prefill(level, call.base.get("attention_mask"), x, keys)
            stash.joined = keys, serving
            self._record_return(request, cut, old)
        request.cached[cut.layer], serving = stash.joined
        request.keys_only[cut.layer] = real.sum(1).tolist()
        attention = module.self_attn
        hidden = module.input_layernorm(made.gather(1, index[..., None].expand(-1, -1, made.shape[-1])))
        key, value = _heads(attention, "k", hidden), _heads(attention, "v", hidden)
        cache = kwargs.get("past_key_values")
        if cache is None:
            from transformers import DynamicCache

            cache = DynamicCache()
        cache.update(_rotate(key, *(_take(t, index) for t in tables)), value, cut.layer)
        return {**serving, "past_key_values": cache}

    def _branch(self, call: Call, cut: PlannedCut, stash: Stash) -> Tensor:
        """The side branch over the visual rows alone, once: they see each other causally, at their own positions; no cache. ``[B, M, C]`` with the other rows
        unchanged."""
        if stash.out is not None:
            return stash.out
        level, x = stash.level, stash.hidden
        rope = self._serve(call, level, call.base, x)["position_embeddings"]
        rows = stash.rows
        real, index = rows >= 0, rows.clamp_min(0)
        assert call.request is not None
        call.request.branched[cut.stage] = real.sum(1).tolist()
        v = rows.shape[1]
        seen = torch.ones(v, v, dtype=torch.bool, device=x.device).tril()[None] & real[:, None]
        seen = (seen | torch.eye(v, dtype=torch.bool, device=x.device))[:, None]
        bias = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, torch.finfo(x.dtype).min)
        tables = tuple(_take(t, index) for t in rope)

        def run(layer: nn.Module, hidden: Tensor) -> Tensor:
            out = layer(hidden, attention_mask=bias, position_embeddings=tables)
            return out[0] if isinstance(out, tuple) else out

        wide = index[..., None].expand(-1, -1, x.shape[-1])
        out = cut.bring_back(x.gather(1, wide), run)
        place = torch.where(real, rows, x.shape[1])[..., None].expand_as(wide)
        stash.out = torch.cat([x, x[:, :1]], dim=1).scatter(1, place, out)[:, :-1]
        return stash.out

    # ------------------------------------------------------------------------------------------------------------- scores

    def query_attention(
        self,
        call: Call,
        cut: PlannedCut,
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

        ``query``: ``"last"`` the last prompt token (with labels: every token in front of an answer), ``"all"`` every row. ``layer``: projections of the
        layer about
        to run on this cut's input (``"next"``) or the real attention of the layer before it (``"previous"``). ``keys``: softmax over all causal keys or over
        the
        visual ones alone. A few rows at a time meet the keys, never a full map, so any attention backend will do.
        """
        level, request = call.level, call.request
        assert level is not None and request is not None
        number = cut.layer if layer == "next" else cut.layer - 1
        if layer == "previous":
            x, seen_at = call.inputs[number]
            if seen_at is not level:
                raise UnsupportedError(f"two stages cut before layer {cut.layer}; the second cannot use the attention of the layer before")
        rotary = self._serve(call, level, call.base, x)["position_embeddings"] if rope else None
        rows, weight = self._query_rows(call, level, query)  # [B, R], weights [B, R]
        score = torch.zeros(x.shape[:2], dtype=weight.dtype, device=x.device)
        for part, share in zip(rows.split(64, 1), weight.split(64, 1), strict=True):
            p = self._attention_rows(self.d.layers[number], x, part, level, rotary, keys)  # [B, R, M]
            score = score + (p * share[..., None]).sum(1)
        return score[owner[:, None], where.clamp_min(0)].masked_fill(where < 0, -torch.inf)

    @staticmethod
    def _attention_rows(block: Any, x: Tensor, rows: Tensor, level: Level, rotary: tuple[Tensor, Tensor] | None, keys: str) -> Tensor:
        """Post-softmax attention of ``rows`` ``[B, R]`` over the level's M tokens, mean over heads, at least float32: ``[B, R, M]``."""
        attention = block.self_attn
        h = block.input_layernorm(x)
        q = _heads(attention, "q", h.gather(1, rows[..., None].expand(-1, -1, h.shape[-1])))
        k = _heads(attention, "k", h)
        if rotary is not None:
            cos, sin = (t.expand(x.shape[0], -1, -1) for t in rotary)
            q = _rotate(q, _take(cos, rows), _take(sin, rows))
            k = _rotate(k, cos, sin)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = (q @ k.transpose(-1, -2)) * attention.scaling  # [B, H, R, M]
        allowed = level.valid[:, None] & (torch.arange(x.shape[1], device=x.device) <= rows[..., None])  # [B, R, M]
        if keys == "visual":
            allowed = allowed & level.visual[:, None]
        logits = logits.masked_fill(~allowed[:, None], -torch.inf)
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return torch.nan_to_num(wide.softmax(-1)).mean(1)

    @staticmethod
    def _queried(call: Call, owner: Tensor) -> Tensor:
        """``[G]`` bool: the image's sample has a query row; with labels only samples that answer have one."""
        if call.labels is None:
            return torch.ones_like(owner, dtype=torch.bool)
        return _answer_starts(call.labels).any(1).to(owner.device)[owner]

    @staticmethod
    def _query_rows(call: Call, level: Level, query: str) -> tuple[Tensor, Tensor]:
        column = torch.arange(level.rows.shape[1], device=level.rows.device)
        last = torch.where(level.valid, column, -1).argmax(1)
        wanted: list[Tensor] = []
        for b in range(level.rows.shape[0]):
            found = last[b : b + 1]
            if query == "all":
                found = level.valid[b].nonzero()[:, 0]
            elif call.labels is not None:
                starts = _answer_starts(call.labels[b]).nonzero()[:, 0].to(level.rows.device)
                if len(starts):
                    hit = (level.rows[b][None] == starts[:, None]) & level.valid[b][None]
                    found = hit.int().argmax(1)[hit.any(1)]
            wanted.append(found)
        rows = nn.utils.rnn.pad_sequence(wanted, batch_first=True, padding_value=-1)
        weight = (rows >= 0).double()
        return rows.clamp_min(0), weight / weight.sum(1, keepdim=True).clamp_min(1)


def _heads(attention: Any, name: str, x: Tensor) -> Tensor:
    """Projection ``name`` (q, k, v) of ``x`` ``[B, M, C]`` with the norm per head that Qwen3 has: ``[B, H, M, d]``."""
    out = getattr(attention, f"{name}_proj")(x).view(*x.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{name}_norm", None)
    return (out if norm is None else norm(out)).transpose(1, 2)


def _answer_starts(labels: Tensor) -> Tensor:
    """The positions in front of each answer: labels ``[..., T]`` to bool ``[..., T - 1]``."""
    return (labels[..., 1:] != -100) & (labels[..., :-1] == -100)


def _take(table: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[B, M]`` of a rotary table ``[B or 1, T, d]``."""
    table = table.expand(rows.shape[0], -1, -1)
    return table.gather(1, rows[..., None].expand(-1, -1, table.shape[-1]))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout of Llama, Mistral and Qwen: x ``[B, H, R, d]``, tables ``[B, R, d]``."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
