"""How much each sub-layer of a language model changes what passes by (AdaSkip, arXiv 2501.02336)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vtprune.models.engine.arguments import LAYER
from vtprune.models.engine.halves import Halves, probe_order
from vtprune.models.engine.host import cache_in
from vtprune.models.engine.rows import rows_of
from vtprune.models.engine.skipping import probe_halves

from ..check.attach import attach
from ..core.ledger import UndoLedger
from ..core.planning import bind
from ..core.types import UnsupportedError, VtpruneError
from ..methods.base import choice

MEANS = ("tokens", "requests")
ANSWERS = ("labels", "use_cache", "logits_to_keep")  # what says nothing of the prompt


@torch.no_grad()
def similarities(
    model: Any, batches: Iterable[Mapping[str, Any]], *, mean: str = "tokens"
) -> tuple[list[float], list[float]]:
    """Of the model's 2L sub-layers (attention and MLP of layer 0, of layer 1, ...), residual sums included: the cosine
    similarity of input and output, and the norm of the output over that of the input.

    Args:
        batches: what the model is called with, one batch of prompts or several: ``input_ids``, with padding
            ``attention_mask`` ``[B, T]``, and pictures; labels are left aside.
        mean: ``"tokens"``, as in the paper: both are means over all tokens. ``"requests"``, as in the official code:
            the similarity is averaged over each prompt's tokens, the ratio is that of a prompt's Frobenius norms, and
            every prompt counts alike.

    Raises:
        VtpruneError: no prompts or no batches of them, another ``mean``, values that are not finite, or a model in
            training mode.
        UnsupportedError: layers that are no two halves one behind the other, or whatever ``attach`` refuses.
    """
    choice("mean", mean, MEANS)
    adapter = bind(model)
    depth = adapter.geometry.llm_layers
    if not depth:
        raise UnsupportedError(f"{type(model).__name__} has no language model, in whose layers this is measured")
    if any(module.training for module in model.modules()):
        raise VtpruneError("a model in training mode is not the one that answers: model.eval() first")
    probe_halves(adapter.describe())
    probe_order(adapter.describe())
    totals = torch.zeros(2 * depth, 3, dtype=torch.float64)  # similarity, ratio, and how many were added
    # it leaves nothing out, and a model that is attached already is refused
    with attach(model, "adaskip", similarity=(0.0,) * (2 * depth), sublayers=0):
        for inputs in [batches] if isinstance(batches, Mapping) or not isinstance(batches, Iterable) else batches:
            if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), Tensor):
                raise VtpruneError("a batch is what the model is called with: a mapping with a tensor input_ids [B, T]")
            asked = {k: v for k, v in inputs.items() if k not in ANSWERS}
            _read(model, adapter.decoder_layers(), asked, totals, mean)
    if not bool(totals[:, 2].all()):
        raise VtpruneError("nothing to measure on: there are no prompts")
    if not bool(totals.isfinite().all()):
        raise VtpruneError("the model's layers make values on these prompts that are not finite: check the inputs")
    means = totals[:, :2] / totals[:, 2:]
    return means[:, 0].clamp(-1, 1).tolist(), means[:, 1].tolist()  # rounding aside, a cosine is at most 1


def _read(model: Any, layers: list[Any], inputs: dict[str, Any], totals: Tensor, mean: str) -> None:
    """Adds to ``totals`` what one batch shows. Each layer runs twice: once with its MLP silent, for what stands between
    its halves."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    ledger = UndoLedger()

    def watch(number: int, own: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = LAYER.first(args, kwargs)
            if x.shape[:2] != real.shape or cache_in(kwargs) is not None:
                raise UnsupportedError(
                    f"{type(model).__name__} calls its layers with other rows than the prompt's, or with a cache"
                )
            between = halves.run(own, {"mlp": None}, args, kwargs)
            out = own(*args, **kwargs)
            totals[2 * number] += _told(x, between, real, mean)
            totals[2 * number + 1] += _told(between, rows_of(out), real, mean)
            return out

        return forward

    try:
        halves = Halves(layers, ledger)
        for number, layer in enumerate(layers):
            ledger.replace(layer, "forward", watch(number, layer.forward))
        placed = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        model(**placed, use_cache=False, logits_to_keep=1)
    finally:
        ledger.undo()


def _told(x: Tensor, y: Tensor, real: Tensor, mean: str) -> Tensor:
    """``[3]``: sums of similarity and ratio from ``x`` to ``y`` ``[B, T, C]``, and of how many tokens or prompts."""
    real = real.to(x.device)
    x, y = x.double(), y.to(x.device).double()
    least = torch.finfo(torch.float64).tiny
    before, after = (t.norm(dim=-1).masked_fill(~real, 0) for t in (x, y))  # [B, T]
    cosine = ((x * y).sum(-1) / (before * after).clamp_min(least)).masked_fill(~real, 0)
    if mean == "tokens":
        sums = [cosine.sum(), (after / before.clamp_min(least)).sum(), real.sum()]
        return torch.stack([s.double().cpu() for s in sums])
    count = real.sum(1)
    there = count > 0
    ratio = after.norm(dim=1) / before.norm(dim=1).clamp_min(least)  # of Frobenius norms
    sums = [(cosine.sum(1) / count.clamp_min(1))[there].sum(), ratio[there].sum(), there.sum()]
    return torch.stack([s.double().cpu() for s in sums])
