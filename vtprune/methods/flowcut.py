"""FlowCut: "Rethinking Redundancy via Information Flow for Efficient Vision-Language Models" (arXiv 2505.19536, NeurIPS
2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.select import from_mask, top
from ..core.types import Geometry, Selection, TokenView, UnsupportedError
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="flowcut",
        paper="arXiv 2505.19536",
        idea="follows the information flow of the class token through the tower and prunes by its running average",
        kinds=("vision",),
        needs={"vision": frozenset({"projections"})},
        keep=128 / 576,
        carries=True,
        score="running average over blocks of class attention + value similarity, times the L1 norm of the mean value",
        cases=({"keep": 0.75}, {"keep": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class FlowCut(Method):
    """Score of a block (section 3.3): class-token attention and value similarity, each normalised over patches, times
    the L1 norm of the mean value; a running average over blocks decides; every second block prunes by the entropy of
    the class attention, the last decision is a hard cut to ``keep``.

    Towers without class token: the paper takes the mean query and value for the class token's; the official Qwen2-VL
    code has no semantic term, so ``semantic="none", final="behind", epsilon=1e-7`` is its form.
    """

    batch: str = option(
        "image",
        "'image': every image prunes by its own entropy, so results do not depend on the batch; 'max': the batch "
        "maximum (official code)",
        choices=("image", "max"),
    )
    every: int = option(2, "blocks between two prunings", least=1)
    ema: float = option(0.5, "weight of the old value in the running average", least=0, below=1)
    query: str = option(
        "auto",
        "global token: 'class', 'mean' (mean query and value, for towers without one), 'auto'",
        choices=("auto", "class", "mean"),
    )
    semantic: str = option(
        "code",
        "'code': softmax of raw value products over all tokens; 'paper': scaled by 1/sqrt(d), over patches only "
        "(appendix); 'none': attention alone, not normalised over patches (the official Qwen2-VL code)",
        choices=("code", "paper", "none"),
    )
    final: str = option(
        "before",
        "where the hard cut falls: 'before' the last block that is used (the official LLaVA code), 'behind' it (the "
        "official Qwen2-VL code)",
        choices=("before", "behind"),
    )
    epsilon: float = option(
        0.0,
        "added to the normalised attention in the entropy's logarithm: 1e-7 in the official Qwen2-VL code",
        least=0,
        below=1,
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        has_class = "class_token" in geometry.traits
        if self.query == "class" and not has_class:
            raise UnsupportedError(
                f"flowcut: query='class' needs a class token and a {geometry.arch} tower has none; use query='mean'"
            )
        chosen = "class" if self.query != "mean" and has_class else "mean"
        last = geometry.vision_layers - (1 if self.final == "behind" else 2)  # 2: one block runs on what is left
        last = max(last, 0)
        return tuple(
            Cut(site=f"vision.{i}", keep=keep, adaptive=i < last, data={"remaining": last - i, "query": chosen})
            for i in range(last + 1)
        )

    def select(self, view: TokenView, cut: Cut) -> Selection | None:
        target, remaining = cut.keep or 0, cut.data["remaining"]
        counts, most = view.counts, view.extent[1]
        if remaining == 0 and most <= target:
            return from_mask(view.valid, view.extent)  # nothing to do, said in the report
        if most <= target:
            return None
        attention, score = self._score(view, cut.data["query"])
        running = score
        if "score" in view.memory:  # by original index: other stages may have dropped tokens since
            running = self.ema * view.memory["score"].gather(1, view.index.clamp_min(0)) + (1 - self.ema) * score
        table = running.new_zeros(len(running), view.grid[0] * view.grid[1] + 1).scatter_(
            1, view.index % (view.grid[0] * view.grid[1] + 1), running
        )
        view.memory["score"] = table
        if remaining % self.every:
            return None
        kept = target if remaining == 0 else self._counts(attention, counts, target, remaining)
        return top(running, kept, view.valid, view.protected, span=view.extent)

    def _counts(self, attention: Tensor, counts: Tensor, target: int, remaining: int) -> Tensor:
        """``n' = max(n - P, T)`` with ``P = round((n - T) / sqrt(rho) * (1 - (H / ln n)^2))`` (eq. 8) and ``H = - sum p
        ln(p + epsilon)``; ``0 ln 0 := 0``."""
        p = attention / attention.sum(1, keepdim=True)
        entropy = -torch.special.xlogy(p, p + self.epsilon).sum(1)
        n = counts.to(p.dtype)
        share = 1 - (entropy / n.log().clamp_min(torch.finfo(p.dtype).tiny)) ** 2
        cut = ((n - target) / remaining**0.5 * share).round()
        if self.batch == "max":
            cut = cut.max().expand_as(cut)
        return torch.minimum((counts - cut.long()).clamp_min(target), counts)

    def _score(self, view: TokenView, query: str) -> tuple[Tensor, Tensor]:
        """Class attention ``[B, N]`` and the block's score ``[B, N]``, both zero on padding."""
        t, p = view.source("projections"), view.prefix
        real = t.real(view.valid)
        if query == "class":
            q, v = t.q[:, :, 0], t.v[:, :, 0]
        else:
            wide = torch.promote_types(t.q.dtype, torch.float32)
            weight = (real.to(wide) / real.sum(1, keepdim=True))[:, None, :, None].to(t.q.dtype)
            q, v = (t.q * weight).sum(2), (t.v * weight).sum(2)
        paper = self.semantic == "paper"
        seen = real
        if paper:
            seen = real.clone()
            seen[:, :p] = False
        bias = None if t.bias is None else t.bias[:, 0, 0]
        scores = kernels.flow_scores(
            q, v, t.k, t.v, scale=t.scale, value_scale=t.scale if paper else 1.0, bias=bias, value_seen=seen
        )
        attention, similar, strength = (t.per_token(s[:, p:]) * view.valid for s in scores)
        if self.semantic == "none":
            return attention, attention * strength
        score = attention / attention.sum(1, keepdim=True) + similar / similar.sum(1, keepdim=True)
        return attention, score * strength
