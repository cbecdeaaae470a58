"""GemFilter: "Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction"
(arXiv 2409.17422)."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.select import top
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from ._prompt import pooled
from .base import Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="gemfilter",
        paper="arXiv 2409.17422",
        idea="an early layer, read ahead, chooses the tokens; the model then starts anew on them alone",
        kinds=("llm",),
        needs={"llm": frozenset({"products"})},
        keep=0.25,
        whole=True,
        positions="compact",
        score="product of the last prompt token's query and the key at the filter layer, averaged over neighbours",
        cases=({"keep": 0.75}, {"keep": 2, "layer": 3}),
    )
)
@dataclass(frozen=True, kw_only=True)
class GemFilter(Method):
    """Algorithm 1: ``s_j = sum_h q_h(last) . k_h(j)`` at the filter layer, rotated, without a softmax, then the average
    over 5 neighbours; the best tokens are read again from layer 0, at positions 0, 1, 2 ... (``positions="compact"``,
    the default of this method; M-RoPE models keep the original ones). The filter layer's own pass stops in front of it
    and fills no cache; its FLOPs are in the report. The appendix speaks of maximum pooling, algorithm and code of the
    average. There nothing is protected; here the prompt's first and last tokens stay where the model is a text model,
    and all text in one that reads images."""

    layer: int | None = option(
        None, "the filter layer (default: 13 of 32, in proportion, as for Llama-3.1-8B)", least=0
    )
    pool: int = option(5, "neighbours that the score is averaged over, odd", least=1)

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        (layer,) = layers("gemfilter", self.layer, geometry, (13 * geometry.llm_layers // 32,))
        if self.pool % 2 == 0:
            raise VtpruneError(f"gemfilter: pool={self.pool} must be odd")
        return (Cut(site="llm.0", keep=keep, ahead=layer),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        assert cut.ahead is not None
        return top(pooled(view, cut.ahead, self.pool, last=True), cut.keep or 0, view.valid, view.protected)
