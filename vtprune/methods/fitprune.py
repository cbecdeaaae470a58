"""FitPrune: "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models" (arXiv
2409.10197, AAAI 2025). Made from the paper and from what others write of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..core.select import top
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from .base import Cut, Method, MethodInfo, layers, left_by, option, register


@register(
    MethodInfo(
        name="fitprune",
        paper="arXiv 2409.10197",
        idea="drops a fitted number of tokens at each layer: those that image and text both attend to least",
        kinds=("llm",),
        needs={"llm": frozenset({"query_attention", "text"})},
        keep=0.25,
        score="attention received from the image's tokens (mean) times that from the text behind it (sum), of the "
        "largest head each, in the layer before the cut",
        cases=({"keep": 0.75}, {"keep": 2, "layers": (1, 3)}),
    )
)
@dataclass(frozen=True, kw_only=True)
class FitPrune(Method):
    """``s_j = mean_i max_h A[h, i, j] * sum_t max_h A[h, t, j]`` over the image's tokens i that are left and the text
    t behind it, A the attention of the layer before the cut; the lowest go, for good. How many at which layer is
    fitted beforehand (``vtprune fit fitprune`` writes ``layers`` and ``counts``). Without that the schedule is ours:
    the tokens down to ``keep`` leave in equal parts at every layer from the third to the middle one. An image
    with no text behind it goes by its own tokens."""

    layers: tuple[int, ...] | None = option(
        None, "layers in front of which it cuts, above 0 (default: every one from layer 2 to the middle; ours)"
    )
    counts: tuple[float, ...] | None = option(
        None,
        "left in front of each of layers=: numbers of tokens, or floats as fractions of the original number, none "
        "above the one before; replaces keep=",
        above=0,
    )
    by: str = option(
        "both",
        "which attention ranks: 'both', their product, or 'visual' or 'text' alone",
        choices=("both", "visual", "text"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        depth, n = geometry.llm_layers, geometry.tokens
        first = max(min(2, depth // 2), 1)
        chosen = layers("fitprune", self.layers, geometry, tuple(range(first, max(depth // 2, first) + 1)))
        if chosen[0] < 1:
            raise VtpruneError("fitprune: layer 0 has no attention in front of it; use layers >= 1")
        if self.counts is None:
            assert keep is not None
            left = [n - (n - keep) * (i + 1) // len(chosen) for i in range(len(chosen))]
        else:
            left = left_by(self.counts, geometry)
            if len(left) != len(chosen) or any(a < b for a, b in pairwise(left)):
                raise VtpruneError(
                    f"fitprune: counts={list(self.counts)} must be {len(chosen)} falling numbers, one per layer of "
                    f"{list(chosen)}"
                )
        return tuple(Cut(site=f"llm.{i}", keep=k, observe=(i - 1,)) for i, k in zip(chosen, left, strict=True))

    def select(self, view: TokenView, cut: Cut) -> Selection:
        score = self._importance(view).masked_fill(~view.valid, -torch.inf)
        return top(score, cut.keep or 0, view.valid, view.protected)

    def _importance(self, view: TokenView) -> Tensor:
        """``[B, N]``."""
        factors: list[Tensor] = []
        if self.by != "text":
            factors.append(view.source("query_attention", layer="previous", query="visual", heads="max"))
        if self.by != "visual":
            behind = view.source("text").after  # [B, T]
            asked = view.source("query_attention", layer="previous", query=behind, heads="max")
            factors.append(torch.where(behind.any(1, keepdim=True), asked * behind.sum(1, keepdim=True), 1.0))
        return factors[0] if len(factors) == 1 else factors[0] * factors[1]
