"""What a decoder layer finds when gradient checkpointing runs it again in the backward pass, hooks included, as in
transformers releases up to 5.17."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from ...core.types import UnsupportedError
from .arguments import LAYER
from .description import Decoder
from .level import SequenceLength
from .request import Call
from .rows import take
from .serving import Serving


class LayerReplays(WeakValueDictionary[int, Call]):
    """The forwards by the rotary table (its ``id``) that each of their checkpoints keeps. ``routes``: a method routes
    tokens, which cannot be repeated."""

    def __init__(self, decoder: Decoder, serving: Serving, *, routes: bool):
        super().__init__()
        self.decoder, self.serving, self.routes = decoder, serving, routes

    def remember(self, call: Call, number: int, level: SequenceLength) -> None:
        """Layer ``number`` reads ``level``."""
        if self.routes or call.merged:
            what = "routing methods need" if self.routes else "merging in the language model needs"
            raise UnsupportedError(
                f"{what} a newer transformers for gradient checkpointing, or gradient_checkpointing_disable()"
            )
        if number not in call.done:
            call.done[number] = (None, level)
        table = call.dense[self.decoder.kinds[number]]["position_embeddings"][0]
        table._vtprune_call = call  # the checkpoint keeps the table, and nobody else keeps the call
        self[id(table)] = call

    def again(self, number: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """What layer ``number``, called outside of any forward that is known, is called with; ``None``: what it
        was."""
        tables: Any = kwargs.get("position_embeddings")
        call = self.get(id(tables[0])) if isinstance(tables, tuple) else None
        if call is None or number not in call.done:
            return None
        order, level = call.done[number]
        x = LAYER.first(args, kwargs)
        if order is not None:
            x = take(x, order)
        kwargs = {**kwargs, **self.serving.prefill(call, level.on(x.device), number, kwargs, x)}
        return LAYER.put_first(args, kwargs, x)
