"""PyramidDrop: "Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction" (arXiv
2410.17247, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.select import top
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from .base import Cut, Method, MethodInfo, equal_shares, layers, option, register


@register(
    MethodInfo(
        name="pyramiddrop",
        paper="arXiv 2410.17247",
        idea="drops visual tokens in stages: the last instruction token's attention ranks them before each",
        kinds=("llm",),
        needs={"llm": frozenset({"query_attention"})},
        keep=0.125,
        score="attention of the last instruction token at the cut",
        cases=({"keep": 0.75}, {"keep": 2, "layers": (1, 3)}),
    )
)
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Method):
    """Section 3.2. With S cuts and ``keep`` = K of N tokens at the end, cut i leaves ``floor(N * (K / N) ** (i / S))``
    (lambda = (K / N) ** (1 / S)); the defaults give 1/2, 1/4, 1/8. Training (labels present): the query rows are all
    tokens in front of an answer, the selection is hard and gradients flow through what is kept."""

    layers: tuple[int, ...] | None = option(
        None, "first layer of each shortened stage (default: a quarter, half and three quarters of the depth)"
    )
    ratios: tuple[float, ...] | None = option(
        None, "tokens left after each cut as fractions of the original number; replaces keep=", most=1
    )
    score_layer: str = option(
        "next",
        "'next': projections of the layer behind the cut (official code); 'previous': attention of the layer before it "
        "(paper)",
        choices=("next", "previous"),
    )
    keys: str = option(
        "all", "softmax over 'all' causal keys (official) or 'visual' keys only", choices=("all", "visual")
    )
    rope: bool = option(True, "use rotary positions in the score")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        t, n = geometry.llm_layers, geometry.tokens
        cuts = layers("pyramiddrop", self.layers, geometry, tuple(sorted({t // 4, t // 2, 3 * t // 4})))
        if self.score_layer == "previous" and cuts[0] == 0:
            raise VtpruneError("pyramiddrop: score_layer='previous' needs layers >= 1")
        if self.ratios is not None:
            if (
                len(self.ratios) != len(cuts)
                or any(not 0 < r <= 1 for r in self.ratios)
                or list(self.ratios) != sorted(self.ratios, reverse=True)
            ):
                raise VtpruneError(
                    f"pyramiddrop: ratios={list(self.ratios)} must be {len(cuts)} falling fractions in (0, 1], one per "
                    f"layer of {list(cuts)}"
                )
            counts = [max(1, int(n * r)) for r in self.ratios]
        else:
            assert keep is not None
            counts = equal_shares(n, keep, len(cuts))
        observe = (lambda i: (i - 1,)) if self.score_layer == "previous" else (lambda i: ())
        return tuple(Cut(site=f"llm.{i}", keep=k, observe=observe(i)) for i, k in zip(cuts, counts, strict=True))

    def select(self, view: TokenView, cut: Cut) -> Selection:
        score = view.source("query_attention", layer=self.score_layer, keys=self.keys, rope=self.rope)
        # a training sample without an answer stays whole (official code)
        keep = torch.where(view.source("queried"), cut.keep or 0, view.counts)
        return top(score, keep, view.valid, view.protected)
