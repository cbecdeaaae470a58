"""PyramidInfer: "PyramidInfer: Pyramid KV Cache Compression for High-throughput LLM Inference" (arXiv 2405.12532,
Findings of ACL 2024): its prefill."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.select import top
from ..core.types import Geometry, Selection, TokenView, UnsupportedError
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="pyramidinfer",
        paper="arXiv 2405.12532",
        idea="behind every layer the context shrinks to what the prompt's recent tokens attend to; these all stay",
        kinds=("llm",),
        needs={"llm": frozenset({"query_attention", "text", "prompt"})},
        keep=None,
        budgeted=False,
        dial=("p", 0.05, 1.0),
        score="attention from the recent tokens in the layer before the cut, later ones weighing more, mean over heads",
        cases=({"p": 0.8, "floor": 4}, {"p": 0.3, "floor": 4, "interval": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class PyramidInfer(Method):
    """Section 3.3, and of the official code the version for transformers 4.31. Behind layer i (of L; each
    ``interval``-th) the context, which is all but the last ``int(recent * n) + 1`` of the prompt's n tokens, keeps
    ``int(C r_i)`` of the C it has left, ``r_i = p + (1 - p)(1 + cos(pi i / L)) / 2``, if that is more than ``floor``.
    Ranked by the attention of the recent rows, weighted from 1 to 1.2; the first four tokens are always kept. What is
    kept stays at its positions. Reducing the cache while it grows behind the prompt is not offered. For language models
    without images, which this is about, and with ``per="prompt"`` for others."""

    p: float = option(
        0.9, "share that the last layers keep of what is left (0.9: 7B and 70B; 0.8: 13B)", least=0, most=1
    )
    recent: float = option(0.2, "share of the prompt that asks, and stays", above=0, below=1)
    floor: int = option(64, "a context that would not stay larger than this is left as it is", least=0)
    interval: int = option(1, "layers from cut to cut (1: 7B, 2: 13B, 3: 70B)", least=1)

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        depth = geometry.llm_layers
        if depth < 3:
            raise UnsupportedError(f"pyramidinfer cuts between layers, of which {geometry.family} has {depth}")
        shares = {i: self.p + (1 - self.p) * (1 + math.cos(math.pi * i / depth)) / 2 for i in range(depth - 1)}
        return tuple(
            Cut(site=f"llm.{i + 1}", keep=1, adaptive=True, observe=(i,), data={"share": shares[i]})
            for i in range(self.interval, depth - 1, self.interval)  # layer 0 keeps everything
        )

    def select(self, view: TokenView, cut: Cut) -> Selection:
        text = view.source("text")
        front, behind = text.valid & ~text.after, text.valid & text.after
        head, tail = front.sum(1), behind.sum(1)  # [B]
        n = view.grid[0] * view.grid[1] + head + tail
        asks = (self.recent * n.double() + 1e-9).long() + 1
        place = torch.where(view.valid, head[:, None] + view.index, -1)
        recent = place >= (n - asks)[:, None]
        score = view.source(
            "query_attention",
            layer="previous",
            query=_weight((n - tail)[:, None] + behind.cumsum(1) - 1, n, asks) * behind,
            visual=_weight(place, n, asks) * recent,
        )
        context = (view.valid & ~recent).sum(1) + head
        left = (context.double() * cut.data["share"] + 1e-9).long()
        left = torch.where(left > self.floor, left, context)
        keep = recent.sum(1) + (left - head).clamp_min(0)
        return top(score.masked_fill(recent, torch.inf), keep, view.valid, view.protected | recent)


def _weight(place: Tensor, n: Tensor, asks: Tensor) -> Tensor:
    """``[B, M]``: from 1 for the first of the last ``asks`` of ``n`` tokens to 1.2 for the last."""
    first = (n - asks)[:, None]
    return 1 + 0.2 * (place - first) / (asks - 1).clamp_min(1)[:, None]
