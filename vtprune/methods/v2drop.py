"""V²Drop: "Variation-aware Vision Token Dropping for Faster Large Vision-Language Models" (arXiv 2509.01552, CVPR
2026)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..core.select import top
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from ..kernels.base import wide
from .base import Cut, Method, MethodInfo, layers, option, register

OFFICIAL = (3, 17, 22)  # of 32 layers
HALF = 0.5  # kept of the current tokens at every cut but the last (official code)


@register(
    MethodInfo(
        name="v2drop",
        paper="arXiv 2509.01552",
        idea="drops the visual tokens that the layer in front of the cut has changed least",
        kinds=("llm",),
        needs={"llm": frozenset({"states"})},
        keep=1,
        score="L2 norm of the update that the layer in front of the cut made",
        cases=({"keep": 0.75}, {"keep": 2, "layers": (1, 3)}),
    )
)
@dataclass(frozen=True, kw_only=True)
class V2Drop(Method):
    """Section 3.2: before layer L a token's variation is ``||x_L - x_(L-1)||`` over the states that enter the two
    layers; the tokens of the largest stay. Every cut but the last leaves half of the current tokens, never fewer than
    ``keep``, which the last leaves; ``keep=1`` is the official setting."""

    layers: tuple[int, ...] | None = option(
        None,
        "layers in front of which it cuts, above 0 (default: 3, 17 and 22 of 32 layers, as the official code, "
        "elsewhere in proportion)",
    )
    ratios: tuple[float, ...] | None = option(
        None,
        "tokens left after each cut as fractions of the current number, at least one; replaces keep= (official: 0.5, "
        "0.5, 0; Qwen2-VL 0.25, 0.05, 0)",
        least=0,
        most=1,
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        depth, n = geometry.llm_layers, geometry.tokens
        usual = tuple(sorted({min(max(round(i * depth / 32), 1), depth - 1) for i in OFFICIAL}))
        chosen = layers("v2drop", self.layers, geometry, usual)
        if chosen[0] < 1:
            raise VtpruneError("v2drop: no layer in front of layer 0 has an update that could be seen; use layers >= 1")
        if self.ratios is not None and len(self.ratios) != len(chosen):
            raise VtpruneError(
                f"v2drop: ratios={list(self.ratios)} must be {len(chosen)} fractions, one per layer of {list(chosen)}"
            )
        counts = [n]
        for i in range(len(chosen)):
            if self.ratios is not None:
                counts.append(max(1, int(counts[-1] * self.ratios[i])))
                continue
            assert keep is not None
            last = i == len(chosen) - 1
            counts.append(min(keep, counts[-1]) if last else max(int(counts[-1] * HALF), min(keep, counts[-1])))
        assert all(a >= b for a, b in pairwise(counts))
        return tuple(
            Cut(site=f"llm.{layer}", keep=k, observe=(layer - 1,)) for layer, k in zip(chosen, counts[1:], strict=True)
        )

    def select(self, view: TokenView, cut: Cut) -> Selection:
        before = view.source("states", layer="previous")
        score = (wide(view.features) - wide(before)).norm(dim=-1)
        return top(score, cut.keep or 0, view.valid, view.protected)
