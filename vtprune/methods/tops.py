"""TOPS: two stages of pruning by relevance, coverage and diversity, behind the projector and in the language model
(arXiv 2606.27161)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.types import Action, Geometry, Selection, TokenView, UnsupportedError, VtpruneError
from ..kernels.base import wide
from ._greedy import covering
from ._tower import NEEDS, class_attention
from ._turns import SCORE
from .base import Cut, Method, MethodInfo, layers, option, register

DEPTHS = (0.375, 0.75)  # layers 12 and 24 of 32, 15 and 30 of 40


@register(
    MethodInfo(
        name="tops",
        paper="arXiv 2606.27161",
        idea="chooses, one after the other, tokens that are relevant, cover others and are unlike those chosen; before "
        "the language model by the tower's attention, in it, twice, by the text's",
        kinds=("projector", "llm", "vision"),
        needs={**NEEDS, "llm": frozenset({"query_attention", "text"})},
        keep=16 / 576,
        score=SCORE,
        cases=({"keep": 0.75}, {"keep": 2, "layers": (1, 3)}),
        elsewhere={"relevance": "norm"},
    )
)
@dataclass(frozen=True, kw_only=True)
class Tops(Method):
    """First the token of the highest relevance r, then those of the highest ``r~_i + diversity * (1 - max_(j in S)
    F_ij)~ + coverage * (sum_(j not in S) max(0, F_ij - max_(k in S) F_jk))~``, F the cosines of the tokens' states, S
    what is chosen, ``~`` divided by the mean. Behind the projector r is the class attention and 2T tokens stay; before
    two layers of the language model it is the attention of the text in the layer in front, and T and then T / 4 stay.
    ``keep`` is what stays at last: the paper's 64 tokens are ``keep=16``, 128, 64 and 16 of 576, a mean of 76 over 32
    layers."""

    layers: tuple[int, ...] | None = option(
        None,
        "layers of the language model in front of which it cuts, above 0; the last leaves keep=, the others four times "
        "that (default: 12 and 24 of 32, elsewhere in proportion; the paper: 12 and 16 of Qwen2.5-VL's 28)",
    )
    diversity: float = option(0.5, "weight of the second term", least=0)
    coverage: float = option(0.5, "weight of the third term behind the projector", least=0)
    coverage_llm: float = option(0.5, "weight of the third term in the language model (paper: 0.4 to 1)", least=0)
    scale: str = option(
        "mean",
        "terms are divided by their 'mean' over the tokens that can be chosen (the paper's algorithms) or brought to "
        "their 'range', 0 to 1 (its text)",
        choices=("mean", "range"),
    )
    relevance: str = option(
        "auto",
        "behind the projector: 'attention', the class attention of the last block that is used (in towers without a "
        "class token that which a patch receives), 'norm', the length of the projected features, 'auto': attention "
        "where the tower shows its blocks, else norm",
        choices=("auto", "attention", "norm"),
    )
    raters: str = option(
        "text",
        "whose attention ranks in the language model: 'text', the mean over all text (the paper takes some of it, by a "
        "rule that it does not give, to the same effect within 0.3 points), 'last', the last prompt token",
        choices=("text", "last"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        assert keep is not None
        depth, last = geometry.llm_layers, geometry.seen_layers - 1
        if self.relevance == "attention" and last < 0:
            raise UnsupportedError(
                f"tops: the blocks of its vision tower are not shown by {geometry.family} ({geometry.arch}); use "
                "relevance='norm'"
            )
        usual = tuple(sorted({min(max(round(share * depth), 1), depth - 1) for share in DEPTHS}))
        chosen = layers("tops", self.layers, geometry, usual)
        if chosen[0] < 1:
            raise VtpruneError("tops: layer 0 has no attention in front of it; use layers >= 1")
        noted, data = [], {}
        if last >= 0 and self.relevance != "norm":
            noted, data = [Cut(site=f"vision.{last}", action=Action.NOTE)], {"noted": f"vision.{last}"}
        first = Cut(site="projector", keep=min(8 * keep, geometry.tokens), data=data)
        counts = [*[min(4 * keep, geometry.tokens)] * (len(chosen) - 1), keep]
        inside = [Cut(site=f"llm.{i}", keep=k, observe=(i - 1,)) for i, k in zip(chosen, counts, strict=True)]
        return (*noted, first, *inside)

    def note(self, view: TokenView, cut: Cut) -> Tensor:
        return class_attention(view)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        if cut.kind == "llm":
            query = view.source("text").valid if self.raters == "text" else "last"
            relevance = view.source("query_attention", layer="previous", query=query)
        elif "noted" in cut.data:
            relevance = view.noted(cut.data["noted"])
        else:
            relevance = wide(view.features).norm(dim=-1)
        relevance = self._scaled(wide(relevance), view.valid)
        weight = (~relevance.isnan()).to(relevance.dtype)  # 0 for what the tower did not make
        prior = torch.full_like(relevance, self.coverage_llm if cut.kind == "llm" else self.coverage)
        return covering(
            view.features,
            cut.keep or 0,
            view,
            relevance=relevance,
            prior=prior,
            weight=weight,
            diversity=self.diversity,
            scale=self.scale,
        )

    def _scaled(self, value: Tensor, valid: Tensor) -> Tensor:
        """``value`` ``[B, N]`` divided by its mean, or from 0 to 1; NaN stays."""
        there = valid & ~value.isnan()
        if self.scale == "mean":
            by = value.masked_fill(~there, 0).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
        else:
            low = value.masked_fill(~there, torch.inf).amin(1, keepdim=True)
            value = value - low
            by = value.masked_fill(~there, 0).amax(1, keepdim=True)
        return value / by.masked_fill(by == 0, 1)
