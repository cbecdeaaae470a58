"""Log-likelihoods of given continuations, for tasks that let the model choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..inputs.chats import kinds
from . import meter
from .pruned import PrunedModel, same_kinds


def likelihoods(
    pruned: PrunedModel,
    chats: Sequence[list[dict[str, Any]]],
    numbers: Sequence[int],
    endings: Sequence[Sequence[int]],
) -> list[tuple[float, bool]]:
    """Of one batch: the summed negative log-likelihood of every continuation (``endings``: its tokens), and whether
    greedy decoding would give it."""
    scores: dict[int, tuple[float, bool]] = {}
    for group in same_kinds(chats):
        part = _score(pruned, [chats[i] for i in group], [numbers[i] for i in group], [endings[i] for i in group])
        scores.update(zip(group, part, strict=True))
    return [scores[i] for i in range(len(chats))]


def _score(
    pruned: PrunedModel,
    chats: Sequence[list[dict[str, Any]]],
    numbers: Sequence[int],
    endings: Sequence[Sequence[int]],
) -> list[tuple[float, bool]]:
    inputs = pruned.inputs(chats)
    start = inputs["input_ids"].shape[1]
    tail, real = _padded(endings, inputs["input_ids"].dtype)
    _extend(inputs, tail, real)
    inputs = inputs.to(pruned.device, pruned.model.dtype)
    pruned.reseed(numbers)
    clock = meter.clock(pruned.device)
    began = clock()
    tail, real = tail.to(pruned.device), real.to(pruned.device)
    # labels say where the prompt ends: what ranks visual tokens must not see the continuation
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, start:] = torch.where(real, tail, -100)
    # as long as the prompt, also when pruned
    logits = pruned.model(**inputs, labels=labels, use_cache=False).logits[:, start - 1 : -1].float()
    chances = logits.log_softmax(-1).gather(2, tail[..., None])[..., 0]
    pruned.costs.append(meter.scored(pruned.report(inputs, bool(kinds(chats[0]))), clock() - began))
    hit = logits.argmax(-1) == tail
    return [(-float(chances[row][real[row]].sum()), bool(hit[row][real[row]].all())) for row in range(len(endings))]


def _padded(endings: Sequence[Sequence[int]], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Continuations as ``[B, longest]``, filled up with zeros, and which of the tokens are real."""
    width = max(map(len, endings))
    tail = torch.zeros(len(endings), width, dtype=dtype)
    real = torch.zeros(len(endings), width, dtype=torch.bool)
    for row, ending in enumerate(endings):
        tail[row, : len(ending)], real[row, : len(ending)] = torch.tensor(ending), True
    return tail, real


def _extend(inputs: Any, tail: torch.Tensor, real: torch.Tensor) -> None:
    """Puts the continuations behind the prompts, and fills up whatever else there is per token."""
    shape = inputs["input_ids"].shape
    for name in [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.shape == shape]:
        more = tail if name == "input_ids" else real if name == "attention_mask" else torch.zeros_like(tail)
        inputs[name] = torch.cat([inputs[name], more.to(inputs[name].dtype)], 1)
