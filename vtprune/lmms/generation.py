"""Answers of one batch of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..inputs.chats import kinds
from ..measure.samples import sample_seed
from . import meter
from .pruned import PrunedModel, same_kinds
from .settings import cut


@torch.no_grad()
def answers(
    pruned: PrunedModel, chats: Sequence[list[dict[str, Any]]], numbers: Sequence[int], settings: dict[str, Any]
) -> list[str]:
    """One batch. Samples that show different kinds of things go apart; where answers are drawn at random, each goes
    alone, on a seed of its own."""
    settings = dict(settings)
    until = settings.pop("until")
    texts: dict[int, str] = {}
    for group in [[i] for i in range(len(chats))] if settings["do_sample"] else same_kinds(chats):
        decoded = _generate(pruned, [chats[i] for i in group], [numbers[i] for i in group], settings)
        for i, text in zip(group, decoded, strict=True):
            texts[i] = cut(text, until).strip()
    return [texts[i] for i in range(len(chats))]


def _generate(
    pruned: PrunedModel, chats: Sequence[list[dict[str, Any]]], numbers: Sequence[int], settings: dict[str, Any]
) -> list[str]:
    asked = meter.clock(pruned.device)()
    inputs = pruned.inputs(chats).to(pruned.device, pruned.model.dtype)
    pruned.reseed(numbers, settings.get("num_beams") or 1)
    if settings["do_sample"]:
        torch.manual_seed(sample_seed(pruned.seed, numbers[0]))
    report = partial(pruned.report, inputs, bool(kinds(chats[0])))
    sequences, cost = meter.generate(pruned.model, inputs, report, asked, **settings)
    pruned.costs.append(cost)
    return pruned.processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
