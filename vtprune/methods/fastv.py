"""FastV: "An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.select import top
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from .base import Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="fastv",
        paper="arXiv 2403.06764",
        idea="ranks visual tokens by the attention of an early layer and drops the rest before the next",
        kinds=("llm",),
        needs={"llm": frozenset({"query_attention"})},
        score="attention of the query tokens in the layer before the cut",
        cases=({"keep": 0.75}, {"keep": 2, "layer": 3}),
    )
)
@dataclass(frozen=True, kw_only=True)
class FastV(Method):
    """``s_j`` = mean over heads of layer ``K - 1``'s attention to visual token j (section 4.1); the cut falls before
    layer ``K``."""

    layer: int = option(2, "K: first layer with the short sequence; layer K-1 ranks (>= 1)")
    query: str = option(
        "last",
        "'last': the last prompt token, as the official code; 'all': mean over all text and visual rows, as the paper "
        "words it",
        choices=("last", "all"),
    )
    keys: str = option(
        "all", "softmax over 'all' causal keys (official) or 'visual' keys only", choices=("all", "visual")
    )
    rope: bool = option(True, "use rotary positions in the score; False is FEATHER's correction (arXiv 2412.13180)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        (layer,) = layers("fastv", self.layer, geometry, ())
        if layer < 1:
            raise VtpruneError(
                "fastv: layer=0 has no attention in front of it; use layer >= 1 (or the method 'random')"
            )
        return (Cut(site=f"llm.{layer}", keep=keep, observe=(layer - 1,)),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        score = view.source("query_attention", layer="previous", query=self.query, keys=self.keys, rope=self.rope)
        return top(score, cut.keep or 0, view.valid, view.protected)
