"""The probe for language models that nobody has tested here: what the engine does to them is compared with the dense
model under masks, on a toy prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import kernels
from ...core.ledger import UndoLedger
from ...core.select import from_mask
from ...core.types import Cut, Selection, TokenView, UnsupportedError
from ..base import PlannedCut
from . import host
from .books import carry
from .decoder import DecoderEngine
from .description import Decoder
from .level import dense_level
from .masked import hide_in_decoder
from .rows import take
from .scores import heads, question, visible
from .toy import IMAGE, TEXT, Toy, toy_prompt

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling")


def probe(decoder: Decoder) -> None:
    """Prunes a toy prompt before layer 0 and in the middle, prefill and cached steps.

    Raises:
        UnsupportedError: the results are not those of the dense model under the same masks.
    """
    with toy_prompt(decoder, "cuts") as toy:
        if toy is None:
            return
        middle = len(decoder.layers) // 2
        dense = _run(toy)
        if not torch.equal(_pruned(toy, [_cut(0, 0, 0), _cut(middle, 1, 0)]), dense):
            raise UnsupportedError(
                f"{toy.name}: with nothing dropped the hooks change its output, so it cannot be pruned here"
            )
        got = _pruned(toy, [_cut(0, 0, 1), _cut(middle, 1, 1)])
        want, lost = _masked(toy)
        there = torch.cat([toy.mask.bool() & ~lost, torch.ones_like(toy.mask[:, :2], dtype=torch.bool)], 1)
        error = float((got - want)[there].abs().max() / want[there].abs().max())
        if not error <= toy.limit:
            raise UnsupportedError(
                f"{toy.name}: pruned on a toy prompt it is {error:.1e} off the dense model under the same masks: it "
                "cannot be pruned here"
            )


def probe_queries(decoder: Decoder) -> None:
    """The attention that methods rank by, recomputed and times the values, must be what each layer gives to its own
    output projection.

    Raises:
        UnsupportedError: it is not, or the projections have other names.
    """
    with toy_prompt(decoder, "queries") as toy:
        if toy is None:
            return
        for number, block in enumerate(decoder.layers):
            attention: Any = getattr(block, "self_attn", None)
            fused = hasattr(attention, "qkv_proj")
            lacks = [n for n in PROJECTIONS if not hasattr(attention, n) and not (fused and n[0] in "qkv")]
            if lacks or not hasattr(block, "input_layernorm"):
                raise UnsupportedError(
                    f"{toy.name}: its attention has no {', '.join(lacks) or 'input_layernorm'} under the usual names"
                )
            x, kwargs, want = _read(toy, block)
            mixed = _mixed(toy, block, x, kwargs)
            error = float((mixed - want[:, -1:]).abs().max() / want.abs().max())
            if not error <= toy.limit:
                raise UnsupportedError(
                    f"{toy.name}: layer {number}'s attention is not what its projections and rotary table give in the "
                    "usual layout"
                )


def _read(toy: Toy, block: Any) -> tuple[Tensor, dict[str, Any], Tensor]:
    """What a layer is given, and what its attention hands to its output projection."""
    seen: dict[str, Any] = {}
    ledger = UndoLedger()
    ledger.before(block, lambda m, a, k: seen.update(x=a[0] if a else k["hidden_states"], kwargs=k))
    ledger.before(block.self_attn.o_proj, lambda m, a, k: seen.update(mixed=a[0]))
    try:
        toy.root(toy.ids, attention_mask=toy.mask)
    finally:
        ledger.undo()
    return seen["x"], seen["kwargs"], seen["mixed"]


def _mixed(toy: Toy, block: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The values of the layer's input ``x``, mixed by the attention of the prompt's last token: ``[2, 1, C]``."""
    level = dense_level(toy.mask.bool(), toy.marks)
    rows = torch.full((len(toy.ids), 1), toy.ids.shape[1] - 1, device=toy.ids.device)
    rotary = kwargs.get("position_embeddings")
    tables = None if rotary is None else (take(rotary[0], level.rows), take(rotary[1], level.rows))
    q, k, how = question(block, x, rows, tables, toy.decoder.pairs)
    seen = visible(level, rows, kwargs.get("attention_mask"), "all")
    group = q.shape[1] // k.shape[1]
    each = [
        kernels.query_scores(q[:, i : i + 1], k[:, i // group : i // group + 1], seen=seen, **how)
        for i in range(q.shape[1])
    ]
    p = torch.stack(each, 1)[:, :, None]  # [B, H, 1, M]
    v = heads(block.self_attn, "v", block.input_layernorm(x))
    return (p.to(v.dtype) @ v.repeat_interleave(p.shape[1] // v.shape[1], 1)).transpose(1, 2).flatten(2)


def _cut(layer: int, number: int, keep: int) -> PlannedCut:
    def select(view: TokenView) -> Selection:
        return from_mask(view.valid & (view.index % (2 * number + 2) == 0)) if keep else from_mask(view.valid)

    return PlannedCut(cut=Cut(site=f"llm.{layer}"), stage=number, select=select)


def _masked(toy: Toy) -> tuple[Tensor, Tensor]:
    """What the dense model gives where the same tokens are hidden, and those hidden in its last layer ``[2, T]``."""
    ledger, hidden, depth = UndoLedger(), [], len(toy.decoder.layers)
    for i in range(depth):
        lost = toy.marks.clone()
        lost[:, TEXT : TEXT + IMAGE : 2 if i < depth // 2 else 4] = False
        hidden.append(lost)
    hide_in_decoder(ledger, list(toy.decoder.layers), hidden)
    try:
        return _run(toy), hidden[-1]
    finally:
        ledger.undo()


def _run(toy: Toy) -> Tensor:
    """Hidden states of the prompt and of two more tokens, ``[B, T + 2, C]``."""
    mask = toy.mask
    out = toy.root(toy.ids, attention_mask=mask)
    rows = [out.last_hidden_state]
    for step in range(2):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        places = mask.shape[1] - 1 + torch.zeros_like(mask[:, :1])
        out = toy.root(
            toy.ids[:, step : step + 1],
            attention_mask=mask,
            position_ids=places,
            **host.cached(toy.decoder.lm, host.cache_of(out)),
        )
        rows.append(out.last_hidden_state)
    return torch.cat(rows, 1).double()


def _pruned(toy: Toy, cuts: list[PlannedCut]) -> Tensor:
    ledger = UndoLedger()
    options: dict[str, Any] = {
        "positions": "original",
        "per": "image",
        "tower": False,
        "noting": False,
        "entry": [],
        "seed": 0,
    }
    try:
        DecoderEngine(toy.decoder, cuts, ledger, **options, done=lambda request: None, arrived=carry)
        return _run(toy)
    finally:
        ledger.undo()
