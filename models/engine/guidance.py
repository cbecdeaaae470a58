"""How much attention visual tokens receive in a layer of a model that reads whole prompts: what a pruning module is
guided by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from . import host
from .arguments import LAYER
from .description import Decoder
from .level import dense_level
from .prompt import real_tokens
from .scores import attention_to, query_rows


@torch.no_grad()
def received(
    decoder: Decoder, number: int, inputs: dict[str, Any], run: Callable[[], Any]
) -> tuple[Tensor, Tensor, Any]:
    """``run()``, one forward of the whole model over ``inputs``, with what was seen of it: the attention that each
    column of the prompts receives in layer ``number``, ``[B, T]``, the mean over heads and over the real rows behind
    the sample's last visual token; which columns are visual, ``[B, T]`` bool; and what ``run`` answered. From the
    layer's own projections, so any attention backend will do."""
    ids = inputs["input_ids"]
    visual = decoder.visual(ids)
    level = dense_level(real_tokens(inputs.get("attention_mask"), *ids.shape).to(ids.device), visual)
    seen: dict[str, Any] = {}
    ledger, block = UndoLedger(), decoder.layers[number]

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.update(x=LAYER.first(args, kwargs), kwargs=kwargs)

    try:
        ledger.before(block, look)
        output = run()
    finally:
        ledger.undo()
    x, kwargs = seen["x"], seen["kwargs"]
    if x.shape[:2] != ids.shape:
        raise UnsupportedError(
            f"layer {number} read {x.shape[1]} rows of a prompt of {ids.shape[1]}: it is no whole one"
        )
    level = level.on(x.device)
    column = torch.arange(level.width, device=x.device)
    last = torch.where(level.visual, column, -1).amax(1, keepdim=True)
    rows, weight = query_rows(level.valid & (column > last) & (last >= 0))
    with host.gathered(block):
        told = attention_to(
            block,
            x,
            rows,
            weight,
            level,
            kwargs["position_embeddings"],
            kwargs.get("attention_mask"),
            "all",
            pairs=decoder.pairs,
        )
    return told, level.visual, output
