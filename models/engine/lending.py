"""Keys and values of a layer's own rows that are made of what entered an earlier layer (SwiftKV, arXiv 2410.03960).

While the attention of a layer runs, its key and value projections are given the lent rows, behind the layer's own input
norm, instead of the layer's own; queries, rotary positions, cache and masks stay the model's. It is the same for a
prompt and for every token behind it. Rows that left the sequence lend through ``routing.py``.

A method that was trained for it has a norm and projections of its own (:class:`~vtprune.core.types.Lender`). Then the
forwards of the layer's projections are replaced, queries too: for samples that borrow, within that attention, the
method's modules answer, and the model's own everywhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from ..base import PlannedCut
from . import host
from .arguments import LAYER
from .beside import lent, projected
from .description import Decoder
from .request import Call, Loan
from .rows import same
from .toy import toy_prompt


class Lending:
    """The input of the first of the layers at ``cuts`` lends to all of them; ``now()``: the forward that the thread is
    in."""

    def __init__(self, decoder: Decoder, cuts: list[PlannedCut], now: Callable[[], Call | None]):
        self.decoder, self.now = decoder, now
        self.layers = sorted({planned.cut.layer for planned in cuts})
        self.lenders = {p.cut.layer: p.lender for p in cuts if p.lender is not None}
        self.names = (*host.LENT, host.ASKING) if self.lenders else host.LENT
        if self.layers:
            probe_projections(decoder, self.layers, self.names)

    def watch(self, ledger: UndoLedger) -> None:
        """Hooks the layers, behind the hooks that shorten the sequence: what these leave is lent."""
        for number in self.layers:
            layer = self.decoder.layers[number]
            if number == self.layers[0]:
                ledger.before(layer, self._open)
            attention = getattr(layer, host.HALVES["attention"])
            ledger.before(attention, self._enter(number, layer))
            for name in self.names:
                projection = getattr(attention, name)
                ledger.before(projection, self._give(name))
                if number in self.lenders:
                    ledger.replace(projection, "forward", ledger.timed(self._forward(number, layer, name, projection)))
            ledger.after(attention, self._leave(number))

    def check(self, call: Call) -> None:
        """Every attention came by in the forward that ends; what took its place since would read its own rows."""
        missing = [] if call.loan is None else [number for number in self.layers if number not in call.loan.done]
        if missing:
            raise UnsupportedError(REPLACED.format(f"attention of layer {missing[0]}"))

    def _open(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """What enters the first of the layers is what lends, in the forward itself: layers that run before their turn
        read their own rows. Samples without tokens that could be pruned borrow nothing."""
        call = self.now()
        if call is None or call.request is None or call.aside:
            return
        request = call.request
        if call.segments is not None:
            raise UnsupportedError(
                "which prompts borrow keys and values is decided prompt by prompt, and several are packed into one "
                "row: read each in a row of its own"
            )
        if call.prefill:
            request.borrows = [count > 0 for count in request.levels[0].counts]
        if any(request.borrows):
            rows = LAYER.first(args, kwargs)
            every = all(request.borrows)
            call.loan = Loan(rows, None if every else torch.tensor(request.borrows, device=rows.device)[:, None, None])

    def _enter(self, number: int, layer: Any) -> Callable:
        projections = {name: getattr(getattr(layer, host.HALVES["attention"]), name) for name in self.names}
        lender = self.lenders.get(number)

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            call = self.now()
            if call is None and host.in_backward():
                raise UnsupportedError(CHECKPOINTS)
            if call is None or call.loan is None:
                return
            if host.without_cache(layer):
                raise UnsupportedError(CHECKPOINTS)
            # a wrapper around one of them (an adapter) would add what it makes of the layer's own rows
            if any(getattr(module, name) is not projection for name, projection in projections.items()):
                raise UnsupportedError(REPLACED.format(f"{self._spoken} projection of layer {number}"))
            own, loan = LAYER.first(args, kwargs), call.loan
            rows = loan.rows.to(own.device)
            if own.shape != rows.shape:
                raise UnsupportedError(
                    f"layer {number} reads {own.shape[1]} tokens, and {rows.shape[1]} lend it keys and values: rows "
                    "were dropped among the layers that borrow"
                )
            behind = layer.input_layernorm(rows) if lender is None else lent(lender, self.decoder.layers, rows)
            loan.given = behind if loan.who is None else torch.where(loan.who.to(own.device), behind, own)
            loan.came.clear()

        return enter

    def _give(self, name: str) -> Callable:
        def give(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = self.now()
            if call is None or call.loan is None or call.loan.given is None:  # asked by a score, or by routing
                return None
            call.loan.came.append(name)
            if name == host.ASKING:  # queries are of the layer's own rows
                return None
            return (call.loan.given, *args[1:]), kwargs

        return give

    def _leave(self, number: int) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            call = self.now()
            if call is None or call.loan is None or call.loan.given is None:
                return
            if sorted(call.loan.came) != sorted(self.names):
                raise UnsupportedError(REPLACED.format(f"{self._spoken} projection of layer {number}"))
            call.loan.given = None
            call.loan.done.add(number)

        return leave

    def _forward(self, number: int, layer: Any, name: str, projection: nn.Module) -> Callable:
        """The forward of a ``projection`` of layer ``number`` for which the method has one of its own."""
        own, lender, short = projection.forward, self.lenders[number], name[0]

        @functools.wraps(own)
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            call = self.now()
            if call is None or call.loan is None or call.loan.given is None:
                return own(x, *args, **kwargs)
            made, who = projected(lender, layer, short, x), call.loan.who
            return made if who is None else torch.where(who.to(x.device), made, own(x, *args, **kwargs))

        return torch.compiler.disable(forward, recursive=False)

    @property
    def _spoken(self) -> str:
        return "query, key or value" if self.lenders else "key or value"


REPLACED = (
    "the {} was replaced since attach(), what stands there now is not given what lends keys and values: remove() and "
    "attach again"
)
CHECKPOINTS = (
    "gradient checkpointing runs layers again when nobody knows what lent them keys and values: "
    "gradient_checkpointing_disable()"
)


@dataclass
class _Seen:
    """Of one layer in a toy prompt: its input behind its norm, and what its attention and its projections were
    given."""

    norm: Tensor | None = None
    attention: Tensor | None = None
    given: dict[str, list[Tensor]] = field(default_factory=dict)


def probe_projections(decoder: Decoder, layers: list[int], names: tuple[str, ...] = host.LENT) -> None:
    """Each of the ``layers`` must make its keys and its values by one projection each, of its input behind its norm;
    also its queries where ``names`` says so.

    Raises:
        UnsupportedError: one does not, or its parts have other names.
    """
    with toy_prompt(decoder, f"keys from layer {layers[0]}") as toy:
        if toy is None:
            return
        for number in layers:
            layer = decoder.layers[number]
            attention = getattr(layer, host.HALVES["attention"], None)
            parts = [("input_layernorm", layer), *((name, attention) for name in names)]
            lacks = next((name for name, owner in parts if not isinstance(getattr(owner, name, None), nn.Module)), None)
            if lacks is not None:
                raise UnsupportedError(
                    f"{toy.name}: layer {number} has no {lacks}: its keys and values are made otherwise than is known "
                    "here (with its queries in one projection, or from rows that no norm has been in front of)"
                )
        seen, ledger = {number: _Seen(given={name: [] for name in names}) for number in layers}, UndoLedger()
        try:
            for number in layers:
                _watch(decoder.layers[number], seen[number], ledger)
            toy.root(toy.ids, attention_mask=toy.mask)
        finally:
            ledger.undo()
        for number in layers:
            found = seen[number]
            for name, given in found.given.items():
                if len(given) != 1:
                    raise UnsupportedError(
                        f"{toy.name}: layer {number} calls its {name} {len(given)} times, it shares keys and values "
                        "with others, or makes them otherwise than is known here"
                    )
            rows = (found.attention, *(given[0] for given in found.given.values()))
            if any(found.norm is None or x is None or not same(x, found.norm) for x in rows):
                raise UnsupportedError(
                    f"{toy.name}: layer {number} makes its keys and values of something else than its input behind its "
                    "norm"
                )


def _watch(layer: Any, seen: _Seen, ledger: UndoLedger) -> None:
    """Notes what passes through a ``layer``."""

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.norm = layer.input_layernorm(LAYER.first(args, kwargs))

    def attend(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.attention = LAYER.first(args, kwargs)

    def project(name: str) -> Callable:
        return lambda module, args, kwargs: seen.given[name].append(args[0])

    attention = getattr(layer, host.HALVES["attention"])
    ledger.before(layer, enter)
    ledger.before(attention, attend)
    for name in seen.given:
        ledger.before(getattr(attention, name), project(name))
