"""Counts the matrix products that really run: for language models whose configuration does not say what a token costs
(experts, latent attention)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from . import host
from .adapted import adapted
from .description import Decoder
from .shapes import Layer
from .toy import Toy, toy_prompt

PRODUCTS = {  # which arguments are multiplied
    "mm": (0, 1),
    "addmm": (1, 2),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
    "_scaled_mm": (0, 1),
    "_int_mm": (0, 1),
    "_grouped_mm": (0, 1),
    "grouped_mm_fallback": (0, 1),
}


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products in ``total``, of this thread alone; grouped products of experts too,
    which torch's own counter leaves out. ``blind``: attention ran in a kernel that is not known here."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.blind = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = str(func).split(".")[1] if "." in str(func) else str(func)  # "aten.mm.default"
        if name not in PRODUCTS and not name.startswith("_scaled_dot_product") and hasattr(func, "decompose"):
            with self:
                made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        out = func(*args, **(kwargs or {}))
        if name in PRODUCTS:
            a, b = (args[i].shape for i in PRODUCTS[name])
            self.total += a.numel() * b[-1]
        elif name.startswith("_scaled_dot_product"):
            q, k, v = (args[i].shape for i in range(3))
            self.total += q.numel() // q[-1] * k[-2] * (q[-1] + v[-1])
        elif "flash" in name or "attention" in name:
            self.blind = True
        return out


def fit(name: str, number: int, work: list[tuple[int, int]]) -> tuple[int, int]:
    """Multiply-adds per token, and per query and key, of layer ``number``. ``work``: tokens and multiply-adds of three
    prompts.

    Raises:
        UnsupportedError: they are not a whole number per token and one per pair of tokens.
    """
    (n, f), (m, g), (p, h) = work
    pair, left = divmod(g * n - f * m, m * n * (m - n))
    row, rest = divmod(f - pair * n * n, n)
    if left or rest or h != row * p + pair * p * p:
        raise UnsupportedError(
            f"{name}: the work of layer {number} is not so much per token and so much per pair of tokens ({f:,}, {g:,} "
            f"and {h:,} multiply-adds for "
            f"{n}, {m} and {p} tokens), so that what pruning saves could not be told"
        )
    return row, pair


_counted: WeakKeyDictionary[Any, tuple[tuple[Layer, ...], tuple[int, ...]]] = WeakKeyDictionary()


def count(decoder: Decoder, said: tuple[Layer, ...] | None) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """What each layer does with a token, and the tokens that its cache keeps at most (0: all): counted on toy prompts.
    ``said`` by the configuration, ``None`` where it does not tell: it holds where the count agrees, and where quantised
    or adapted modules do work that cannot be counted.

    Raises:
        UnsupportedError: the work cannot be told.
    """
    lm, name = decoder.lm, type(decoder.lm).__name__
    with toy_prompt(decoder, "work") as toy:
        if toy is None:
            return _counted[lm]
        foreign = adapted(lm)
        if foreign and (said is None or not all(_plain(layer) for layer in decoder.layers)):
            raise UnsupportedError(
                f"{name} with {', '.join(foreign)}: what its layers do with a token cannot be counted; attach to the "
                "model as it was before"
            )
        work, halves, cache, blind = _work(toy, decoder)
        layers, held = [], []
        for i, runs in enumerate(work):
            key, value, most = host.stored(cache, i)
            held.append(most)
            if foreign and said is not None:
                layers.append(replace(said[i], kept=key + value))
                continue
            row, pair = fit(name, i, runs)
            if blind:  # every query head meets keys and values of the width that the cache has
                heads = lm.config.num_attention_heads
                pair = (key + value) * heads // (getattr(lm.config, "num_key_value_heads", None) or heads)
            known = None if said is None else said[i]
            agrees = known is not None and (known.row + known.key, known.pair, known.kept) == (row, pair, key + value)
            counted = Layer(row, 0, pair, key + value, _per_token(halves[i]))
            layers.append(known if known is not None and agrees else counted)
        _counted[lm] = tuple(layers), tuple(held)
    return _counted[lm]


def _per_token(work: list[tuple[int, int]]) -> int | None:
    """Multiply-adds per token, from tokens and multiply-adds of some prompts; ``None``: there is no such number."""
    each = {divmod(done, n) for n, done in work}
    per, rest = each.pop() if len(each) == 1 else (0, 1)
    return None if rest else per


Work = list[list[tuple[int, int]]]


def _work(toy: Toy, decoder: Decoder) -> tuple[Work, Work, Any, bool]:
    """Per layer the multiply-adds of prompts of a few lengths, ``(length, multiply-adds)``, and those of its MLP alone;
    the last prompt's cache, and whether attention was not counted in it."""
    work: Work = [[] for _ in decoder.layers]
    halves: Work = [[] for _ in decoder.layers]
    for n in (3, 6, 11):
        ledger, mode = UndoLedger(), Products()
        for i, layer in enumerate(decoder.layers):
            _watch(ledger, layer, mode, work[i], n)
            if (mlp := getattr(layer, host.HALVES["mlp"], None)) is not None:
                _watch(ledger, mlp, mode, halves[i], n)
        try:
            with mode:
                cache = host.cache_of(toy.root(toy.ids[:1, :n], attention_mask=torch.ones_like(toy.ids[:1, :n])))
        finally:
            ledger.undo()
    return work, halves, cache, mode.blind


def _watch(ledger: UndoLedger, module: Any, mode: Products, work: list[tuple[int, int]], n: int) -> None:
    """Adds to ``work`` what ``module`` does with a prompt of ``n`` tokens."""
    ledger.before(module, lambda m, a, k: work.append((n, -mode.total)))
    ledger.after(module, lambda m, a, k, o: work.append((n, work.pop()[1] + mode.total)))


def _plain(layer: Any) -> bool:
    """Whether a decoder layer is made of the projections that the usual configuration names."""
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    return all(hasattr(getattr(layer, part, None), name) for part, names in parts.items() for name in names)
