"""Turbo: "Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Models" (arXiv 2312.07408; extended in
arXiv 2407.11717, ECCV 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.types import Geometry, Selection, TokenView, UnsupportedError
from ._tower import class_attention, received_attention
from .base import Cut, MethodInfo, option, register
from .tome import ToMe, bipartite


@register(
    MethodInfo(
        name="turbo",
        paper="arXiv 2407.11717",
        idea="merges similar token pairs as ToMe, but spares tokens that the class token attends to",
        kinds=("vision",),
        needs={"vision": frozenset({"projections"})},
        merges=True,
        even=True,
        score=(
            "class attention, weighted, minus the cosine similarity to the nearest token of the other half; that half "
            "is not ranked"
        ),
        cases=({"keep": 0.8}, {"keep": 0.25}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Turbo(ToMe):
    """Information degree (section 3): mutual redundancy minus semantic value. ToMe with the edge score ``cos(k_i, k_j)
    - beta^|gamma - t| alpha factor c_i``: c the class token's attention in the same block, softmax over all tokens with
    the log sizes, mean over heads; t the merging blocks so far (the first: 0). Only the source i is penalised, so the
    attention says which tokens merge, never into which; ``alpha=0`` is ToMe."""

    alpha: float = option(1.0, "weight of the class attention: 1 in the official code, 5 in its scripts", least=0)
    beta: float = option(
        1.0, "the weight falls by this factor per merging block away from gamma; 1: the same in all", least=0, most=1
    )
    gamma: float = option(0.0, "the merging block of the full weight, the first is 0", least=0)
    factor: float = option(
        30.0,
        "multiplies alpha: 30 in the official code only, which makes up for attention being of the size of 1 / N; 1: "
        "the paper's difference R - alpha A",
        least=0,
    )
    threshold: int = option(
        40,
        "with r=: a block that finds fewer tokens, class token included, merges none (official code); keep= is met "
        "whatever this says",
        least=0,
    )
    attention: str = option(
        "auto",
        "'class': the class token's, as published; 'received': what each token receives, mean over all queries (ours, "
        "for towers without class token); 'auto': the class token's where there is one",
        choices=("auto", "class", "received"),
    )

    def merges(self, geometry: Geometry, keep: int | None) -> list[int]:
        wish = super().merges(geometry, keep)
        if self.r is None:
            return wish
        n, prefix, out = geometry.tokens, geometry.prefix, []
        for r in wish:
            out.append(min(r, n // 2) if n + prefix >= self.threshold else 0)
            n -= out[-1]
        return out

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        has_class = "class_token" in geometry.traits
        if self.attention == "class" and not has_class:
            raise UnsupportedError(
                f"turbo: attention='class' needs a class token and a {geometry.arch} tower has none; use "
                "attention='received'"
            )
        source = "class" if self.attention != "received" and has_class else "received"
        cuts, t = [], 0
        before: int | None = geometry.tokens
        for cut in super().plan(geometry, keep):
            weight = self.beta ** abs(self.gamma - t) * self.alpha * self.factor
            cuts.append(replace(cut, data={"weight": weight, "attention": source}))
            t, before = t + (cut.keep != before), cut.keep
        return tuple(cuts)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        keys = view.source("projections").keys().mean(1)
        attention = class_attention(view) if cut.data["attention"] == "class" else received_attention(view)
        return bipartite(
            keys,
            view,
            view.features.shape[1] - (cut.keep or 0),
            official=self.order == "official",
            penalty=attention * cut.data["weight"],
        )
