"""Steers the language model of one multimodal model (VISTA, arXiv 2502.03628): every prompt with images is read with
and without them, and what they add to each layer's output at its last token turns what the MLPs add, in that prompt
and in all that follows it.

A steering stands around an attachment: it measures, and steers, the model as that leaves it. Its hooks are its own; of
the attachment it asks which of the caller's columns the rows of a layer are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger, close, follow
from ...core.types import UnsupportedError
from . import host
from .decoder import DecoderEngine
from .description import Decoder
from .entry import Entry
from .halves import probe_added
from .level import SequenceLength
from .prompt import prompts_in_rows, real_tokens
from .request import Call
from .rows import put, rows_of, with_rows
from .steered import Steer, Steered, blend, inject, without_images


class Steerer:
    """Hooks one language model.

    Attributes:
        decoder: the language model.
        strength: lambda; 0: nothing is measured or injected.
        share: alpha; 0: logits stay.
        follows: inputs with one entry per token.
        window: the first and the last layer, from 1, that logits are taken from.
        normed: behind the final norm.
        requests: how the prompt of each cache is steered.
        attached: the attachment that stands within; ``None``: there is none.
        owner: the handle, which lives as long as its hooks do.
        entrance: the ways into the model.
    """

    def __init__(
        self,
        decoder: Decoder,
        ledger: UndoLedger,
        *,
        follows: Collection[str],
        strength: float,
        share: float,
        window: tuple[int, int],
        normed: bool,
        requests: WeakKeyDictionary[Any, Steered],
        attached: DecoderEngine | None,
        owner: Any,
    ):
        self.decoder, self.strength, self.share, self.window = decoder, strength, share, window
        self.normed, self.requests, self.attached, self.owner = normed, requests, attached, owner
        self.follows = follows
        self.layers, self.head = list(decoder.layers), host.head_of(decoder.root)
        if share and self.head is None:
            raise UnsupportedError(f"{type(decoder.root).__name__} has no head whose logits could be blended: alpha=0")
        if strength:
            with nullcontext() if attached is None else attached.entrance.aside():
                probe_added(decoder)
        roots = [decoder.root] if decoder.core is None else [decoder.root, decoder.core]
        self.entrance = Entry(roots, ledger, opens=self._open, closes=self._close, continues=self._continues)
        ledger.before(decoder.lm, self._enter, first=True)
        ledger.after(decoder.lm, self._leave, first=False)  # behind the attachment, which puts rows back
        for number, layer in enumerate(self.layers):
            module = host.added(layer) if strength else None
            if module is not None:
                ledger.after(module, self._added(number))
            if strength or (share and window[0] <= number + 1 <= window[1]):
                ledger.after(layer, self._layer(number), first=False)  # what the attachment makes of the output
        if share and self.head is not None:
            ledger.after(self.head, self._logits)

    def end(self) -> None:
        """The steering is over: what was read with it cannot go on without it."""
        for cache, prompt in list(self.requests.items()):
            if prompt.seen is not None:
                close(cache, "the steering that this cache's prompt was read with has been removed; start a new prompt")

    # forwards ---------------------------------------------------------------------------------------------------------

    def _continues(self, cache: Any) -> None:
        self._known(cache)

    def _known(self, cache: Any) -> Steered | None:
        """How the prompt in ``cache`` is steered; ``None``: there is none in it."""
        if cache is None or host.held(cache) == 0:
            return None
        prompt = self.requests.get(cache)
        if prompt is None:
            raise UnsupportedError(
                "this cache was not filled with this steering, or is a copy: by what its prompt was steered is not "
                "known; start a new prompt"
            )
        return prompt

    def _open(self, call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
        """Measures what a prompt is steered by, or finds it by the cache that the forward goes on with."""
        root, ids = self.decoder.root, inputs.get("input_ids")
        if inputs.get("labels") is not None or any(m.training for m in (root, self.decoder.lm, *self.layers)):
            raise UnsupportedError(
                "a steered model cannot be trained, and gives no loss: its vectors are measured in other passes; "
                "use model.eval() and no labels"
            )
        if self.share and host.head_of(root) is not self.head:
            raise UnsupportedError(
                f"the head of {type(root).__name__} was replaced since steer(): remove() and steer again"
            )
        prompt = self._known(call.cache)
        if prompt is not None:
            self._goes_on(prompt, call, inputs)
        elif ids is None:
            raise UnsupportedError(
                "steering needs input_ids to find the visual tokens, which inputs_embeds alone do not tell"
            )
        else:
            call.visual = self.decoder.visual(ids)
            prompt = self._read(call, inputs, ids) if bool(call.visual.any()) else Steered(len(ids))
        call.steering = Steer(prompt, call.visual is not None, columns=host.columns_kept(inputs))
        return inputs

    def _goes_on(self, prompt: Steered, call: Call, inputs: dict[str, Any]) -> None:
        """Raises :class:`UnsupportedError` for tokens that do not belong behind what the cache holds."""
        ids = inputs.get("input_ids")
        given = inputs["inputs_embeds"] if ids is None else ids
        if ids is not None and host.pictured(inputs) and bool(self.decoder.visual(ids).any()):
            raise UnsupportedError(
                "an image behind a prompt would be another prompt's, steered by other vectors: start a new prompt with "
                "the whole conversation"
            )
        if prompt.seen is not None and len(given) != prompt.batch:
            raise UnsupportedError(
                f"this cache holds {prompt.batch} prompts, and {len(given)} rows of new tokens were given: one row "
                "belongs to each"
            )
        if host.held(call.cache) < prompt.held:
            raise UnsupportedError(
                "this cache was cut back into its prompt, behind whose last token its vectors were measured: start a "
                "new prompt"
            )

    def _read(self, call: Call, inputs: dict[str, Any], ids: Tensor) -> Steered:
        """Measures the prompts ``ids`` ``[B, T]``, some of which have images."""
        assert call.visual is not None
        two = call.mask is None or (isinstance(call.mask, Tensor) and call.mask.ndim == 2)
        if not two and self.entrance.generation is None:
            raise UnsupportedError("steering reads the prompt without its images too: pass a 2-D attention_mask [B, T]")
        if prompts_in_rows(inputs, call) is not None:
            raise UnsupportedError("prompts packed into one row cannot be steered: read each in a row of its own")
        real = real_tokens(call.mask, *ids.shape).to(ids.device)
        seen = (call.visual & real).any(1)
        prompt = self.entrance.prompt(ids, real)
        if not self.strength:
            return Steered(len(ids), seen)
        column = torch.arange(ids.shape[1], device=ids.device)
        within = real if prompt is None else real & (column < prompt[:, None])
        last = torch.where(within, column, -1).amax(1)
        asks = last.clamp_min(0)[:, None]
        if bool((seen & ((last < 0) | call.visual.gather(1, asks)[:, 0])).any()):
            raise UnsupportedError(
                "the prompt ends with an image token, which the prompt without its images does not have: put text "
                "behind the image"
            )
        mask = None if call.mask is None else real.long()
        along = {n: inputs[n] for n in self.follows if inputs.get(n) is not None}
        # answers that stand behind are no part of what is measured
        alone, moved = without_images({"input_ids": ids, **along}, within, call.visual)
        with host.remembered(self.decoder.core or self.decoder.root):
            whole = self._measure(call, host.measuring(self.decoder.root, inputs, mask), asks[:, 0])
            asks = (asks - moved.gather(1, asks)).clamp_min(0)[:, 0]
            told = self._measure(call, host.measuring(self.decoder.root, alone, None), asks)
        vectors = [(a - b).masked_fill(~seen.to(a.device)[:, None], 0) for a, b in zip(whole, told, strict=True)]
        return Steered(len(ids), seen, vectors)

    @torch.no_grad()
    def _measure(self, call: Call, inputs: dict[str, Any], last: Tensor) -> list[Tensor]:
        """The output of every layer ``[B, C]`` at the columns ``last`` ``[B]``, unsteered."""
        call.steering = Steer(last=last)
        self.decoder.root.forward(**inputs)
        states = call.steering.states
        if len(states) != len(self.layers):
            raise UnsupportedError(
                f"{len(states)} of {len(self.layers)} layers ran that this steering watches: layers were skipped, or "
                "replaced since steer(); remove() and steer again"
            )
        return [states[i] for i in range(len(self.layers))]

    def _close(self, call: Call, output: Any) -> None:
        now = call.steering
        assert now is not None and now.prompt is not None
        missed = sorted({*range(len(self.layers))} - now.injected) if now.prompt.vectors else []
        if missed:
            raise UnsupportedError(
                f"layer {missed[0]} did not run as steer() found it: it was skipped, or replaced since; remove() and "
                "steer again"
            )
        if not now.opens:
            return
        cache = host.cache_of(output)
        cache = call.cache if cache is None else cache
        if cache is not None:
            now.prompt.held = host.held(cache)
            self.requests[cache] = now.prompt
            follow(cache, {name: getattr(now.prompt, how) for name, how in host.MOVES.items()}, "steering")

    # the stack --------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> Steer | None:
        """What this thread's pass is."""
        call = self.entrance.call
        return None if call is None else call.steering

    def _level(self, width: int, device: torch.device) -> SequenceLength | None:
        """Which of the caller's columns the rows of the layer that runs are, ``width`` of them; ``None``: all."""
        call = None if self.attached is None else self.attached.call
        if call is None or not call.prefill or call.level is None or call.level.dense:
            return None
        if call.level.width != width:
            raise UnsupportedError("the attachment's layers hand on rows that steering cannot tell the columns of")
        return call.level.on(device)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.now is None:
            raise UnsupportedError(
                f"{type(module).__name__} inside a steered model was called by itself, where no prompt is known; call "
                f"the {type(self.decoder.root).__name__}, or remove() the steering first"
            )

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        now = self.now
        if now is None or now.prompt is None or now.prompt.seen is None or not self.share:
            return
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        now.final = hidden[:, now.columns]
        call = None if self.attached is None else self.attached.call
        if call is not None and call.prefill and call.level is not None and not call.level.dense:
            level = call.level.on(hidden.device)
            there = torch.zeros(len(hidden), hidden.shape[1] + 1, dtype=torch.bool, device=hidden.device)
            where = torch.where(level.valid, level.rows, hidden.shape[1])
            now.alive = there.scatter(1, where, True)[:, :-1][:, now.columns]

    def _added(self, number: int) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            now = self.now
            if now is None or now.prompt is None or not now.prompt.vectors:
                return None
            x = rows_of(output)
            vector = now.prompt.vectors[number]
            if x.ndim != 3 or len(x) != len(vector) or x.shape[2] != vector.shape[1]:
                raise UnsupportedError(
                    f"the MLP of layer {number} gives {list(x.shape)} for {len(vector)} prompts, so it is not known "
                    "whose rows they are"
                )
            now.injected.add(number)
            turned = inject(x, vector, self.strength)
            return with_rows(output, turned)

        return leave

    def _layer(self, number: int) -> Callable:
        logits = self.share and self.window[0] <= number + 1 <= self.window[1]

        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            now, call = self.now, None if self.attached is None else self.attached.call
            if now is None or (call is not None and call.aside):
                return
            hidden = rows_of(output)
            if now.prompt is None:
                now.states[number] = self._at(hidden, now.last)
            elif logits and now.prompt.seen is not None:
                now.window.append(self._whole(hidden, now)[:, now.columns])

        return leave

    def _at(self, hidden: Tensor, last: Tensor | None) -> Tensor:
        """The rows of ``hidden`` ``[B, n, C]`` that stand for the columns ``last`` ``[B]`` of the caller's."""
        assert last is not None
        last, level = last.to(hidden.device), self._level(hidden.shape[1], hidden.device)
        if level is not None:
            here = (level.rows == last[:, None]) & level.valid
            if bool((~here.any(1) & level.valid.any(1)).any()):
                raise UnsupportedError("the attachment drops the prompt's last token, at which vectors are measured")
            last = here.long().argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def _whole(self, hidden: Tensor, now: Steer) -> Tensor:
        """``hidden`` ``[B, n, C]`` in the caller's columns, zero where rows were dropped."""
        level, call = self._level(hidden.shape[1], hidden.device), None if self.attached is None else self.attached.call
        if level is None or call is None or call.request is None:
            return hidden
        length = call.request.length
        where = torch.where(level.valid, level.rows, length)
        return put(hidden.new_zeros(len(hidden), length + 1, hidden.shape[2]), where, hidden)[:, :length]

    def _logits(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        now = self.now
        if now is None or now.prompt is None or now.prompt.seen is None:
            return None
        x, first, last = args[0] if args else next(iter(kwargs.values())), *self.window
        if now.final is None or len(now.window) != last - first + 1 or not _same(x, now.final):
            raise UnsupportedError(
                f"the head of {type(self.decoder.root).__name__} reads something else than its language model's "
                "output, so that logits of earlier layers are not defined: alpha=0"
            )
        early = [self.decoder.lm.norm(h) if self.normed else h for h in now.window]
        rows = now.prompt.seen.to(output.device)[:, None].expand(output.shape[:2])
        if now.alive is not None:
            rows = rows & now.alive.to(output.device)
        return blend(output, [module.forward(h.to(x.device)) for h in early], self.share, rows)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or hold the same: views of one another are not read."""
    if a.shape != b.shape:
        return False
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b.to(a.device))
