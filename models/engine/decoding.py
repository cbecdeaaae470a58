"""Tokens behind a prompt: whether its cache can go on with them, and what the decoder stack is given for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.types import UnsupportedError
from . import host
from .description import Decoder
from .level import backend
from .request import Call, Request
from .routing import FULL


def check_conversation(request: Request | None, cache: Any) -> None:
    """``generate`` finds out what is new in a conversation by the length of the cache's first layer."""
    if request is not None and not request.at[0].dense and host.held(cache) > 0:
        raise UnsupportedError(
            f"this cache holds {request.at[0].width} of its prompt's {request.length} tokens in the first layer, "
            "by which generate() would cut the "
            "conversation at the wrong place; start a new prompt with the whole conversation, or feed the new "
            "tokens to the model one by one"
        )


def check_foreign(decoder: Decoder, cache: Any, kwargs: dict) -> None:
    """A cache that no request here has filled must be whole: a copy of a pruned one has lost what tells which tokens it
    holds."""
    held, mask, ids = host.held(cache), kwargs.get("attention_mask"), kwargs.get("position_ids")
    if held == 0:
        return
    given = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    layers, new = range(len(decoder.layers)), given.shape[1]
    total = held + new
    ragged = any(host.held(cache, i) != held for i in layers)
    # a cache of fixed size also takes a mask of that size
    sizes = (total, max(host.columns(cache, new, i)[0] for i in layers))
    longer = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] not in sizes
    if ragged or longer or (ids is not None and ids.numel() > 0 and int(ids.max()) >= total + decoder.first_position):
        raise UnsupportedError(
            "this cache looks like a copy of a pruned one; only the cache object that the prompt was read into can "
            "be continued"
        )


def continue_prompt(
    decoder: Decoder, call: Call, args: tuple, kwargs: dict, *, compact: bool
) -> tuple[tuple, dict] | None:
    """What the decoder stack is called with for new tokens behind a prompt; ``None``: what it was called with."""
    request, embeds, mask = call.request, kwargs["inputs_embeds"], call.mask
    assert request is not None
    call.level = base = request.at[0]
    b, q = embeds.shape[:2]
    if b != len(base.rows):
        if not request.altered:  # the cache is as any other
            return None
        raise UnsupportedError(
            f"this cache holds {len(base.rows)} prompts, and {b} rows of new tokens were given: one row belongs to each"
        )
    new = host.held(call.cache) - base.width + q  # tokens behind the prompt, these included
    two = isinstance(mask, Tensor) and mask.ndim == 2
    _check_lengths(request, call, q, new, mask.shape[1] if two else None)
    call.tail = mask[:, request.length :].bool() if two else torch.ones(b, new, dtype=torch.bool, device=embeds.device)
    # One new token that sees all its layer has cached needs no mask, and under sdpa the model makes none.
    easy = q == 1 and not compact and backend(decoder.lm.config) == "sdpa"
    easy = easy and (mask is None or base.dense or (two and bool(call.tail.all())))
    call.serve = request.uneven if easy else request.pruned
    ids = call.ids = _positions(decoder, call, kwargs.get("position_ids"), q, new, two, embeds.device)
    if base.dense:
        return args, {**kwargs, "position_ids": ids}
    # Every layer is given its own mask; the stack must only not trip over the caller's, which is longer than the
    # first layer's cache.
    prepared = kwargs.get("attention_mask")
    return args, {
        **kwargs,
        "attention_mask": prepared if isinstance(prepared, dict) else None,
        "position_ids": ids,
    }


def _check_lengths(request: Request, call: Call, q: int, new: int, columns: int | None) -> None:
    """The mask, of so many ``columns``, must show the prompt and the ``new`` tokens, ``q`` of which come now, and the
    cache must hold just as many in all layers."""
    width = request.at[0].width
    if columns is not None and columns != request.length + new:
        raise UnsupportedError(
            f"this cache holds {width} of {request.length} prompt tokens; a continuation must bring one new "
            "token sequence and the whole mask "
            f"({request.length + new} columns, got {columns}): start a new prompt instead"
        )
    if new < q or any(host.held(call.cache, i) - request.at[i].width != new - q for i in request.first.values()):
        raise UnsupportedError(
            "this cache was cut back into its prompt, or in some layers only; only growing it is supported"
        )
    for i in request.first.values():  # layers that hold visual tokens beside their own rows
        if i in request.keys_only and (size := host.columns(call.cache, q, i)[0]) < host.held(call.cache, i) + q:
            raise UnsupportedError(FULL.format(size))


def _positions(
    decoder: Decoder, call: Call, ids: Tensor | None, q: int, new: int, two: bool, device: torch.device
) -> Tensor | None:
    """The positions of the ``q`` tokens that come now, of ``new`` behind the prompt: the caller's ``ids`` where they
    are right, else those that follow the whole prompt. ``two``: the caller's mask has two dimensions."""
    request = call.request
    assert request is not None
    base = request.at[0]
    if not call.placed and (not base.dense or decoder.mrope):
        ids = request.next.to(device)[:, None] + torch.arange(new - q, new, device=device)
        return ids[None].expand(3, -1, -1) if decoder.mrope else ids
    if ids is None or two or base.dense or ids.ndim != 2:
        return ids
    if bool((ids[:, 0] != request.next.to(ids.device) + new - q).any()):
        raise UnsupportedError(
            f"this cache holds {base.width} of {request.length} prompt tokens and {new - q} behind them, so the "
            "next position is "
            f"{(request.next + new - q).tolist()}, not {ids[:, 0].tolist()}: pass the new tokens alone, or start a "
            "new prompt"
        )
    return ids
