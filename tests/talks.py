"""Conversations with a model: a prompt, and what is said behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vtprune.models.engine.host import cache_of, cached

TYPES = ("mm_token_type_ids", "token_type_ids")  # inputs with an entry for each token


@dataclass
class Talk:
    """A prompt, and what is said behind it, the same in every sample."""

    model: Any
    inputs: dict[str, Any]
    cache: Any = None
    ids: Tensor = field(init=False)
    mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.ids = self.inputs["input_ids"]
        self.mask = self.inputs.get("attention_mask", torch.ones_like(self.ids))

    @torch.no_grad()
    def read(self, **more: Any) -> Tensor:
        out = self.model(**self.inputs, use_cache=True, **more)
        self.cache = cache_of(out)
        return out.logits

    @torch.no_grad()
    def say(self, tokens: list[int] | Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
        """Logits of more tokens, at once; ``mask`` ``[B, q]``."""
        tokens = torch.as_tensor(tokens)
        new = tokens if tokens.ndim == 2 else tokens.expand(len(self.ids), -1)
        self.ids = torch.cat([self.ids, new], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(new) if mask is None else mask], 1)
        more = {"input_ids": new, "attention_mask": self.mask, **more}
        return self.model(**more, **cached(self.model, self.cache)).logits

    def anew(self) -> Talk:
        """All of it as one prompt."""
        inputs = {**self.inputs, "input_ids": self.ids, "attention_mask": self.mask}
        more = self.ids.shape[1] - self.inputs["input_ids"].shape[1]
        for name in TYPES:
            if name in inputs:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, more))
        return Talk(self.model, inputs)
