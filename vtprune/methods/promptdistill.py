"""PromptDistill: "PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient Large
Language Model Inference" (arXiv 2503.23274)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..core.select import top
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from ._prompt import pooled
from .base import Cut, Method, MethodInfo, equal_shares, layers, left_by, option, register


@register(
    MethodInfo(
        name="promptdistill",
        paper="arXiv 2503.23274",
        idea="behind a layer only the tokens go on whose keys its last query meets best, once or in stages",
        kinds=("llm",),
        needs={"llm": frozenset({"products"})},
        keep=0.25,
        score="product of the last prompt token's query and the key in the selection layer, averaged over neighbours",
        cases=({"keep": 0.75}, {"keep": 2, "layers": (1, 3)}),
    )
)
@dataclass(frozen=True, kw_only=True)
class PromptDistill(Method):
    """Behind selection layer l: ``s_j = mean_h q_h(last) . k_h(j) / sqrt(d)``, rotated, without softmax or mask, over
    the tokens that are left; the last token's own score is zero, then the average over 5 neighbours. The best ``keep``
    go on to layer l + 1 at their original positions, the last token always. Layers up to l keep what they have read, or
    with ``truncate``, once the prompt has been read, only what their stage sent on. Several stages without ``counts``
    keep equal shares of what is left, down to ``keep``; of several truncated ones each layer keeps what the next stage
    behind it sent on (both ours)."""

    layers: tuple[int, ...] | None = option(None, "selection layers (default: 13 of 32, in proportion)")
    counts: tuple[float, ...] | None = option(
        None,
        "left behind each of layers=: numbers of tokens, or floats as fractions of the original number, none above the "
        "one before; replaces keep=",
        above=0,
    )
    pool: int = option(5, "neighbours that the score is averaged over, odd; 1: none", least=1)
    truncate: int = option(
        0, "stages in front of which caches are truncated behind the prefill (cache_truncation_end); -1: all", least=-1
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        depth = geometry.llm_layers
        chosen = layers("promptdistill", self.layers, geometry, (min(13 * depth // 32, depth - 2),))
        if self.pool % 2 == 0:
            raise VtpruneError(f"promptdistill: pool={self.pool} must be odd")
        if chosen[-1] == depth - 1 or chosen[0] < 0:
            raise VtpruneError("promptdistill: nothing is left to read behind the last layer, so it cannot select")
        if self.counts is None:
            assert keep is not None
            left = equal_shares(geometry.tokens, keep, len(chosen))
        else:
            left = left_by(self.counts, geometry)
            if len(left) != len(chosen) or any(a < b for a, b in pairwise(left)):
                raise VtpruneError(
                    f"promptdistill: counts={list(self.counts)} must be {len(chosen)} falling numbers, one for each of "
                    f"{list(chosen)}"
                )
        if self.truncate > len(chosen):
            raise VtpruneError(f"promptdistill: truncate={self.truncate}, and there are {len(chosen)} stages")
        short = len(chosen) if self.truncate < 0 else self.truncate
        return tuple(
            Cut(site=f"llm.{i + 1}", keep=k, observe=(i,), evict=n < short)
            for n, (i, k) in enumerate(zip(chosen, left, strict=True))
        )

    def select(self, view: TokenView, cut: Cut) -> Selection:
        return top(pooled(view, "previous", self.pool, last=False), cut.keep or 0, view.valid, view.protected)
