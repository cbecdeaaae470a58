"""Halves of decoder layers that a method leaves out: their attention, or their MLP, adds nothing to what passes by.

Who leaves out what is decided once, while the prompt is read, and holds for all that follows it. A half that no sample
of the batch needs is not run, and its attention caches nothing; where some need it, it runs for all of them, and the
others are not given what it makes. A cut may scale: then the half's input, the residual stream, goes on times a factor,
which is put on where the half begins (an attention: the layer's input) or ends (an MLP: the layer's output).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from ..base import PlannedCut
from . import host
from .arguments import LAYER
from .description import Decoder
from .halves import probe_order, silence
from .request import Call
from .rows import rows_of, with_rows
from .text import prompt_at
from .toy import toy_prompt


class Skipping:
    """Stands in front of the halves at ``cuts``; ``now()``: the forward that the thread is in."""

    def __init__(self, decoder: Decoder, cuts: list[PlannedCut], ledger: UndoLedger, now: Callable[[], Call | None]):
        self.now = now
        self.watched = {(planned.cut.layer, planned.cut.half) for planned in cuts}
        if cuts:
            probe_halves(decoder)
        if any(planned.cut.scale != 1 for planned in cuts):
            probe_order(decoder)
        for planned in cuts:
            number, half = planned.cut.layer, planned.cut.half
            if half == "attention" and number == decoder.kinds.index(decoder.kinds[number]):
                raise UnsupportedError(
                    f"layer {number} is the first of type {decoder.kinds[number]}: how much has been read is told by "
                    "what its attention caches, so it cannot be left out"
                )
            if not hasattr(decoder.layers[number], "input_layernorm"):
                raise UnsupportedError(
                    f"layer {number} has no input_layernorm, behind which it is decided what is left out"
                )
            layer, decide = decoder.layers[number], ledger.timed(planned.skip)
            module, scale = getattr(layer, host.HALVES[half]), planned.cut.scale
            ahead = half == "attention" and scale != 1  # decided in front of the layer
            made = self._forward(number, half, layer, module, None if ahead else decide, planned.gate)
            ledger.replace(module, "forward", made)
            if ahead:
                ledger.before(layer, self._scale_in(number, scale, decide))
            elif scale != 1:
                ledger.after(layer, self._scale_out(number, scale))

    def _scale_in(self, number: int, scale: float, decide: Callable) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call, key = self.now(), (number, "attention")
            if call is None or call.request is None or call.aside:
                return None
            x = LAYER.first(args, kwargs)
            if call.prefill:
                self._decide(call, key, decide, x)
            left = call.request.skipping.get(key, [])
            return LAYER.put_first(args, kwargs, _scaled(x, left, scale)) if any(left) else None

        return enter

    def _scale_out(self, number: int, scale: float) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            call = self.now()
            if call is None or call.request is None or call.aside:
                return None
            left = call.request.skipping.get((number, "mlp"), [])
            if not any(left):
                return None
            x = _scaled(rows_of(output), left, scale)
            return with_rows(output, x)

        return leave

    def _forward(
        self,
        number: int,
        half: str,
        layer: nn.Module,
        module: nn.Module,
        decide: Callable | None,
        gate: Callable[[Tensor, Tensor], Tensor | None],
    ) -> Callable:
        own = module.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            entered = entering(self.now(), number, half, layer, args, kwargs)
            if entered is None:
                return own(*args, **kwargs)
            call, x = entered
            assert call.request is not None
            if call.prefill and decide is not None:
                weight = self._gate(call, (number, half), gate, x)
                if weight is not None:  # in training every half runs
                    if host.cache_in(kwargs) is not None:
                        raise UnsupportedError(
                            "what decides which layers are left out is being trained, where all of them run, and a "
                            "cache would be another than in use: use_cache=False"
                        )
                    out = own(*args, **kwargs)
                    return with_rows(out, rows_of(out) * weight[:, None, None].to(x.dtype))
                self._decide(call, (number, half), decide, x)
            left = call.request.skipping.get((number, half), [])
            if any(left):
                _check(call, half, layer, host.cache_in(kwargs))
            if left and all(left):
                return silence(half, x)
            out = own(*args, **kwargs)
            if not any(left):
                return out
            gone = torch.tensor(left, device=x.device)[:, None, None]
            return with_rows(out, rows_of(out).masked_fill(gone, 0))

        return torch.compiler.disable(forward, recursive=False)

    @staticmethod
    def _gate(
        call: Call, key: tuple[int, str], gate: Callable[[Tensor, Tensor], Tensor | None], x: Tensor
    ) -> Tensor | None:
        """By what each sample's half is multiplied, ``[B]``, where the method is being trained: 0 or 1, with the
        gradient of what decides; samples without visual tokens keep theirs. ``None``: it is not trained."""
        request = call.request
        assert request is not None
        if not torch.is_grad_enabled():
            return None
        prompt, some = _asked(call, x)
        weight = gate(x, prompt)
        if weight is None:
            return None
        weight = torch.where(some, weight, torch.ones_like(weight))
        request.gates[key] = weight
        request.skipped[key] = (weight.detach() == 0).tolist()
        return weight

    @staticmethod
    def _decide(call: Call, key: tuple[int, str], decide: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> None:
        """Asks the method about the prompt whose rows are ``x`` ``[B, T, C]``; samples without visual tokens stay
        whole."""
        request = call.request
        assert request is not None
        prompt, some = _asked(call, x)
        left = decide(x.detach(), prompt) & some
        if bool(left.any()):
            request.skipped[key] = left.tolist()
            request.skipping[key] = list(request.skipped[key])


def _asked(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of ``x`` ``[B, T, C]`` are a prompt's, ``[B, T]``, and which samples have visual tokens, ``[B]``."""
    check_rows(call)
    assert call.level is not None
    level = call.level.on(x.device)
    return prompt_at(call, level), (level.visual & level.valid).any(1)


def entering(
    call: Call | None, number: int, half: str, layer: nn.Module, args: tuple, kwargs: dict
) -> tuple[Call, Tensor] | None:
    """The forward that a half of layer ``number`` comes by in, and the rows ``[B, T, C]`` that it is given; ``None``:
    nothing is left out there.

    Raises:
        UnsupportedError: it is called otherwise than is known here, or by gradient checkpointing.
    """
    if call is None and host.in_backward():
        raise UnsupportedError(CHECKPOINTS)
    if call is None or call.request is None or call.aside:
        return None
    call.halves.add((number, half))
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise UnsupportedError(
            f"the {half} of layer {number} is called with something else than rows of tokens, so it cannot be left out"
        )
    if host.without_cache(layer):
        raise UnsupportedError(CHECKPOINTS)
    return call, x


def check_rows(call: Call) -> None:
    """Raises :class:`UnsupportedError` for several prompts in a row."""
    if call.segments is not None:
        raise UnsupportedError(
            "which layers are left out is decided prompt by prompt, and several prompts are packed into one row: read "
            "each in a row of its own"
        )


def check_halves(call: Call, watched: Iterable[tuple[int, str]]) -> None:
    """Every half came by in the forward that ends; what took its place since would run unseen."""
    for number, half in sorted(set(watched) - call.halves):
        raise UnsupportedError(
            f"the {half} of layer {number} was replaced since attach(), what stands there now is not watched: remove() "
            "and attach again"
        )


def _scaled(x: Tensor, left: list[bool], scale: float) -> Tensor:
    """``x`` ``[B, T, C]`` times ``scale`` in the samples that are ``left`` out."""
    return x * scale if all(left) else torch.where(torch.tensor(left, device=x.device)[:, None, None], x * scale, x)


CHECKPOINTS = (
    "gradient checkpointing runs layers again when nobody knows which of them were left out: "
    "gradient_checkpointing_disable()"
)


def _check(call: Call, half: str, layer: nn.Module, cache: Any) -> None:
    """Raises :class:`UnsupportedError` where leaving out a half of ``layer`` would mislead what stands around it."""
    if half == "attention" and call.maps:
        raise UnsupportedError(
            "an attention that was left out has no map, and the maps of the layers behind it would take its place: "
            "leave out output_attentions"
        )
    if half == "attention" and (host.offloads(cache) or host.offloads(call.cache)):
        raise UnsupportedError(
            "an offloaded cache brings a layer's keys back while the layer in front of it is read, which a layer that "
            "was left out is not: use another cache"
        )
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if layer.training and torch.is_grad_enabled() and together and torch.distributed.get_world_size() > 1:
        raise UnsupportedError(
            "processes that train together would leave out different layers, and wait for each other's gradients: "
            "train in one process, or without the attachment"
        )


def probe_halves(decoder: Decoder) -> None:
    """A layer whose attention and MLP give zeros must hand on what it was given, to the last bit.

    Raises:
        UnsupportedError: it does not, or its halves have other names or outputs.
    """
    with toy_prompt(decoder, "halves") as toy:
        if toy is None:
            return
        ledger, entered = UndoLedger(), dict[int, Tensor]()

        def silent(half: str, number: int) -> Callable:
            def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
                first = rows_of(output)
                known = isinstance(output, tuple) and len(output) == 2 if half == "attention" else first is output
                if not known or first.shape != entered[number].shape:
                    raise UnsupportedError(
                        f"{toy.name}: the {half} of layer {number} gives something else than is known here"
                    )
                return (torch.zeros_like(first), *output[1:]) if half == "attention" else torch.zeros_like(first)

            return leave

        def enter(number: int) -> Callable:
            def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
                entered[number] = LAYER.first(args, kwargs)

            return note

        def check(number: int) -> Callable:
            def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                out = rows_of(output)
                if not torch.equal(out, entered[number].to(out.device)):
                    raise UnsupportedError(
                        f"{toy.name}: layer {number} changes what it is given also without its attention and its MLP, "
                        "so leaving out a half of it is not defined"
                    )

            return leave

        try:
            for number, layer in enumerate(decoder.layers):
                ledger.before(layer, enter(number))
                for half, name in host.HALVES.items():
                    if not hasattr(layer, name):
                        raise UnsupportedError(f"{toy.name}: layer {number} has no {name}, so no half of it is known")
                    ledger.after(getattr(layer, name), silent(half, number))
                ledger.after(layer, check(number))
            toy.root(toy.ids, attention_mask=toy.mask)
        finally:
            ledger.undo()
