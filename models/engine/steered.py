"""VISTA's equations (arXiv 2502.03628), what is known of one steered prompt, and of one forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Steered:
    """One prompt, for as long as its cache lives.

    Attributes:
        batch: samples in it.
        seen: which of them have images, ``[B]``; ``None``: none has, and nothing is steered.
        vectors: per layer what the images add to its output at the prompt's last token, ``[B, C]``, zero for samples
            without images; empty: nothing is injected.
        held: tokens in the first layer's cache once the prompt had been read.
    """

    batch: int
    seen: Tensor | None = None
    vectors: list[Tensor] = field(default_factory=list)
    held: int = 0

    def move(self, index: Tensor) -> None:
        """The cache's samples ``index`` ``[B']`` take the places of all."""
        if self.seen is not None:
            self.seen = self.seen[index.to(self.seen.device)]
            self.batch = len(self.seen)
        self.vectors = [v[index.to(v.device)] for v in self.vectors]

    def repeat(self, times: int) -> None:
        """Every sample of the cache stands there ``times`` times."""
        self.move(torch.arange(self.batch).repeat_interleave(times))


@dataclass(eq=False)
class Steer:
    """One pass of the language model.

    Attributes:
        prompt: what it is steered by; ``None``: it measures.
        opens: it reads the prompt, and no more tokens behind it.
        last: measuring: the column of each sample's last prompt token, ``[B]``.
        states: measuring: by layer, its output there, ``[B, C]``.
        columns: the index of those that are given logits.
        window: the outputs of the layers that logits are taken from too, at those columns, ``[B, k, C]``.
        alive: which columns of the caller's reach the last layer, ``[B, T]``; ``None``: all.
        final: the language model's output at those columns, ``[B, k, C]``.
        injected: layers whose MLP was steered.
    """

    prompt: Steered | None = None
    opens: bool = False
    last: Tensor | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    columns: Any = field(default_factory=lambda: slice(0, None))
    window: list[Tensor] = field(default_factory=list)
    alive: Tensor | None = None
    final: Tensor | None = None
    injected: set[int] = field(default_factory=set)


def normalised(x: Tensor) -> Tensor:
    """``x`` ``[..., C]`` over its L2 norm; zero stays zero."""
    size = x.norm(dim=-1, keepdim=True)
    return x / torch.where(size > 0, size, 1)


def inject(x: Tensor, v: Tensor, strength: float) -> Tensor:
    """``|x| n(n(x) + strength (1 + max(0, cos(x, -v))) n(v))`` (section 4.1), with n the L2 normalisation.

    Args:
        x: what MLPs add to the residual stream, ``[B, T, C]``; computed in float32 at least.
        v: each sample's vector, ``[B, C]``; where it is zero ``x`` comes back as it is, to the last bit.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    wide, toward = x.to(kind), normalised(v.to(x.device, kind))[:, None]
    unit = normalised(wide)
    away = (unit * -toward).sum(-1, keepdim=True).clamp_min(0)
    mixed = unit + strength * (1 + away) * toward
    # an exact opposite of the same weight leaves no direction, but for rounding
    there = (toward != 0).any(-1, keepdim=True) & (mixed.norm(dim=-1, keepdim=True) > 8 * torch.finfo(kind).eps)
    return torch.where(there, (wide.norm(dim=-1, keepdim=True) * normalised(mixed)).to(x.dtype), x)


def blend(logits: Tensor, early: list[Tensor], share: float, rows: Tensor) -> Tensor:
    """``(1 - share) logits + share mean(early)`` (section 4.2, self-logits augmentation) for ``rows`` ``[B, k]``,
    ``logits`` ``[B, k, V]`` for the others."""
    mixed = (1 - share) * logits + share * (sum(early[1:], early[0]) / len(early))
    return torch.where(rows[..., None], mixed, logits)


def without_images(inputs: dict[str, Tensor], real: Tensor, visual: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What prompts are given with one entry per token, ``[B, T]`` each, without the ``visual`` tokens and padded
    behind, ``[B, T']``, with a mask; and how far each column moved to the left, ``[B, T]``."""
    keep = real & ~visual
    width = int(keep.sum(1).max())
    order = (~keep).long().argsort(dim=1, stable=True)[:, :width]
    mask = torch.arange(width, device=keep.device) < keep.sum(1, keepdim=True)
    moved = torch.arange(keep.shape[1], device=keep.device) - (keep.cumsum(1) - 1)
    order = torch.where(mask, order, order[:, :1])  # padding repeats a word, which is hidden
    alone = {name: entries.gather(1, order.to(entries.device)) for name, entries in inputs.items()}
    return {**alone, "attention_mask": mask.long()}, moved
