"""Cached greedy decoding, by ``generate`` and by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtprune.models.engine.host import cache_of, cached

from .case import Case, attention_mask

STEPS = 8  # cached decoding steps


def generate(c: Case) -> tuple[Tensor, Tensor]:
    """Greedy logits ``[B, STEPS, V]`` and tokens ``[B, STEPS]``; end-of-sequence does not stop it and no image
    placeholder is generated."""
    rules: dict[str, Any] = {
        "max_new_tokens": STEPS,
        "min_new_tokens": STEPS,
        "do_sample": False,
        "suppress_tokens": list(c.adapter.unspoken),
    }
    model: Any = c.model
    with torch.no_grad():
        out = model.generate(**c.inputs, **rules, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits, dim=1), out.sequences[:, c.inputs["input_ids"].shape[1] :]


def stepper(c: Case, inputs: dict[str, Any]) -> Any:
    """Greedy decoding by hand: yields the last row's logits, one step at a time."""
    mask = attention_mask(inputs)
    with torch.no_grad():
        out = c.model(**inputs, use_cache=True)
    while True:
        logits = out.logits[0, -1]
        yield logits
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        with torch.no_grad():
            placed = {} if c.geometry.mrope else {"attention_mask": mask, "position_ids": c.positions(mask)[:, -1:]}
            out = c.model(
                input_ids=logits.argmax()[None, None], **cached(c.model, cache_of(out)), use_cache=True, **placed
            )


def steps(c: Case, inputs: dict[str, Any]) -> list[Tensor]:
    """The logits of the first :data:`STEPS` of :func:`stepper`."""
    logits = stepper(c, inputs)
    return [next(logits) for _ in range(STEPS)]
