"""The two halves of decoder layers one by one: what stands between them, whatever the layer's norms are called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from . import host
from .arguments import LAYER
from .description import Decoder
from .rows import rows_of, with_rows
from .toy import toy_prompt


class Halves:
    """Runs ``layers`` with halves silent: these are not run, zeros or other rows take the place of what they make.

    Attributes:
        given: what an MLP was last given, ``[B, T, C]``.
    """

    def __init__(self, layers: Sequence[nn.Module], ledger: UndoLedger):
        self.silent: Mapping[str, Tensor | None] = {}
        self.given = torch.empty(0)
        for layer in layers:
            for half, name in host.HALVES.items():
                module = getattr(layer, name)
                ledger.replace(module, "forward", self._forward(half, module.forward))

    def _forward(self, half: str, own: Callable) -> Callable:
        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = LAYER.first(args, kwargs)
            if half == "mlp":
                self.given = x
            return silence(half, x, self.silent[half]) if half in self.silent else own(*args, **kwargs)

        return forward

    def run(self, layer: Callable, silent: Mapping[str, Tensor | None], args: tuple, kwargs: dict) -> Tensor:
        """The rows that the forward ``layer`` makes of its arguments with the halves ``silent``: with the rows that
        each gives instead (``None``: zeros)."""
        self.silent = silent
        try:
            return rows_of(layer(*args, **kwargs))
        finally:
            self.silent = {}


def silence(half: str, x: Tensor, instead: Tensor | None = None) -> Any:
    """What a half that is left out gives for the rows ``x``: zeros, or other rows ``instead``."""
    rows = torch.zeros_like(x) if instead is None else instead
    return (rows, None) if half == "attention" else rows


def probe_order(decoder: Decoder) -> None:
    """An MLP must read what its layer's attention leaves in the residual stream and nothing else: given that as the
    layer's input, with the attention silent, it reads the same.

    Raises:
        UnsupportedError: it does not, as where both halves read the layer's input side by side.
    """
    with toy_prompt(decoder, "order of halves") as toy:
        if toy is None:
            return
        ledger, real = UndoLedger(), toy.mask.bool()

        def check(number: int, own: Callable) -> Callable:
            @functools.wraps(own)
            def forward(*args: Any, **kwargs: Any) -> Any:
                def read(x: Tensor, attention: Tensor | None) -> tuple[Tensor, Tensor]:
                    """What leaves the layer, and what its MLP was given, if the attention gives these rows."""
                    out = halves.run(own, {"attention": attention, "mlp": None}, *LAYER.put_first(args, kwargs, x))
                    return out, halves.given[real]

                x = LAYER.first(args, kwargs)
                between, given = read(x, x.roll(1, -1))
                again, before = read(between, None)[1], read(x, None)[1]
                off = float((again - given).abs().max() / given.abs().max().clamp_min(1e-30))
                if torch.equal(given, before) or not off <= toy.limit:
                    raise UnsupportedError(
                        f"{toy.name}: the MLP of layer {number} does not read what its attention leaves, so that "
                        "nothing stands between the two that could be measured or scaled"
                    )
                return between

            return forward

        try:
            halves = Halves(decoder.layers, ledger)
            for number, layer in enumerate(decoder.layers):
                ledger.replace(layer, "forward", check(number, layer.forward))
            toy.root(toy.ids, attention_mask=toy.mask)
        finally:
            ledger.undo()


def probe_added(decoder: Decoder) -> None:
    """What each layer's MLP adds to the residual stream goes into the layer's output as it is: with the rest held, the
    output's derivative by it is one.

    Raises:
        UnsupportedError: it is not, or the MLP has another name.
    """
    name = type(decoder.lm).__name__
    unknown = next((i for i, layer in enumerate(decoder.layers) if host.added(layer) is None), None)
    if unknown is not None:
        raise UnsupportedError(f"{name}: layer {unknown} has none of {', '.join(host.ADDED)}, so its MLP is not known")
    with toy_prompt(decoder, "added") as toy, torch.enable_grad():
        if toy is None:
            return
        ledger, added = UndoLedger(), dict[int, Tensor]()

        def hold(number: int) -> Callable:
            def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
                first = rows_of(output)
                added[number] = first.detach().requires_grad_()
                return with_rows(output, added[number])

            return leave

        def check(number: int) -> Callable:
            def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                out = rows_of(output)
                by = torch.arange(out.numel(), device=out.device).view(out.shape).to(out.dtype)
                (moved,) = torch.autograd.grad(out, added[number], by, allow_unused=True)
                if moved is None or not torch.equal(moved, by):
                    raise UnsupportedError(
                        f"{name}: what the MLP of layer {number} gives is not what the layer adds to its residual "
                        "stream, so it cannot be steered or weighed"
                    )

            return leave

        try:
            for number, layer in enumerate(decoder.layers):
                module = host.added(layer)
                assert module is not None
                ledger.after(module, hold(number))
                ledger.after(layer, check(number))
            toy.root(toy.ids, attention_mask=toy.mask)
        finally:
            ledger.undo()
