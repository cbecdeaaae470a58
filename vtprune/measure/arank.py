"""ARank: the mean rank of a layer's attention maps (γ-MoD, arXiv 2410.13859); low is redundant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vtprune.models.engine.arguments import LAYER
from vtprune.models.engine.host import gathered
from vtprune.models.engine.level import dense_level
from vtprune.models.engine.scores import question, turn, visible

from ..check.attach import attach
from ..core.ledger import UndoLedger
from ..core.planning import bind
from ..core.types import UnsupportedError, VtpruneError


def ranks(maps: Tensor) -> Tensor:
    """Of attention maps ``[..., T, T]`` without their diagonal, ``[...]``: numerical ranks in float32, with numpy's
    tolerance (``T eps sigma_max``)."""
    return torch.linalg.matrix_rank(maps.float().tril(-1))


@torch.no_grad()
def aranks(model: Any, prompts: Iterable[Mapping[str, Any]]) -> list[float]:
    """``tau_l``: of every decoder layer the mean over prompts and heads of :func:`ranks` of its attention in a prompt.

    Args:
        prompts: what the model is called with, one prompt each, without padding.

    Raises:
        VtpruneError: no prompts, a batch of several or with padding, or a model in training mode.
        UnsupportedError: attention whose maps are not known here, or whatever ``attach`` refuses.
    """
    adapter = bind(model)
    if "keys" not in adapter.geometry.provides.get("llm", ()):
        raise UnsupportedError(
            f"{type(model).__name__} does not show queries and keys of a language model, of which maps are made"
        )
    if any(module.training for module in model.modules()):
        raise VtpruneError("a model in training mode is not the one that answers: model.eval() first")
    depth = adapter.geometry.llm_layers
    totals, count = torch.zeros(depth, dtype=torch.float64), 0
    # nothing is dropped there; a model that is attached already, or that cannot be routed, is refused
    with attach(model, "gamma-mod", layers=tuple(range(depth)), keep=1.0):
        for inputs in prompts:
            mask = inputs.get("attention_mask")
            if len(inputs["input_ids"]) != 1 or (mask is not None and not bool(mask.bool().all())):
                raise VtpruneError("attention maps are measured prompt by prompt, without padding")
            totals, count = totals + _read(model, adapter, inputs), count + 1
    if not count:
        raise VtpruneError("nothing to measure on: there are no prompts")
    return (totals / count).tolist()


def _read(model: Any, adapter: Any, inputs: Mapping[str, Any]) -> Tensor:
    """``[layers]``: the mean over heads in one prompt."""
    decoder, found = adapter.describe(), dict[int, float]()
    real = torch.ones_like(inputs["input_ids"]).bool().to(model.device)
    level, ledger = dense_level(real, torch.zeros_like(real)), UndoLedger()

    def watch(number: int) -> Callable:
        def enter(module: Any, args: tuple, kwargs: dict) -> None:
            x, tables = LAYER.first(args, kwargs), kwargs["position_embeddings"]
            here = level.on(x.device)
            with gathered(module):
                q, k, how = question(module, x, here.rows, tables, decoder.pairs)
            seen = visible(here, here.rows, kwargs.get("attention_mask"), "all")[:, None]
            found[number] = float(ranks(attention(q, k, seen, **how)).double().mean())

        return enter

    try:
        for number, layer in enumerate(decoder.layers):
            ledger.before(layer, watch(number))
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        ledger.undo()
    return torch.tensor([found[i] for i in range(len(decoder.layers))], dtype=torch.float64)


def attention(
    q: Tensor, k: Tensor, seen: Tensor, *, scale: float, rotary: tuple[Tensor, Tensor] | None, cap: float | None
) -> Tensor:
    """Maps ``[1, H, T, T]`` of queries ``q`` ``[1, H, T, d]`` and keys ``k`` ``[1, G, T, d]``, which are not rotated
    yet; ``seen`` ``[1, 1, T, T]`` bool; in float32 at least."""
    kind = torch.promote_types(q.dtype, torch.float32)
    k = k.to(kind) if rotary is None else turn(k.to(kind), *rotary, pairs=False)
    logits = q.to(kind) @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * scale
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return logits.masked_fill(~seen, -torch.inf).softmax(-1)
