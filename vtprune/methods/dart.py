"""DART: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More" (arXiv 2502.11494,
EMNLP 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.select import gather, ranks, top
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from ._turns import SCORE
from .base import Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="dart",
        paper="arXiv 2502.11494",
        idea="keeps a few pivot tokens and those that duplicate them least",
        kinds=("llm",),
        needs={"llm": frozenset({"keys", "states", "text"})},
        keep=128 / 576,
        score=SCORE,
        cases=({"keep": 0.75}, {"keep": 2, "layer": 3}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Dart(Method):
    """Before layer K: pivots are the visual and the text tokens whose keys in layer K - 1 (rotated, all heads side by
    side) have the largest L1 norms. Each in turn, visual ones first and both by falling norm, takes the visual tokens
    left of the lowest cosine with it, compared after the language model's final norm; the official code's order is that
    of a set. Visual pivots and what was taken stay. Tokens that must stay take the places of the last ones taken."""

    layer: int = option(2, "K: first layer with the short sequence; layer K-1 has the keys (>= 1)")
    visual_pivots: int = option(4, "visual tokens that are pivots, never more than keep=", least=1)
    text_pivots: int = option(4, "text tokens that are pivots, fewer where there are fewer", least=0)
    text: str = option(
        "after",
        "which text pivots come from: 'after' the unit's last visual token, or 'all' of the prompt; published ports "
        "differ",
        choices=("after", "all"),
    )
    count: str = option(
        "exact",
        "'exact': keep= tokens, shared out evenly among the pivots; 'official': the visual pivots, and for each pivot "
        "floor(keep / pivots) tokens, which is a few more or fewer: 124 for keep=0.222 of 576, 132 for keep=128",
        choices=("exact", "official"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        (layer,) = layers("dart", self.layer, geometry, ())
        if layer < 1:
            raise VtpruneError("dart: no layer in front of layer 0 has keys that could be seen; use layer >= 1")
        assert keep is not None
        each, pivots = 0, self.visual_pivots + self.text_pivots
        if self.count == "official":
            each = keep // pivots
            keep = min(self.visual_pivots + pivots * each, geometry.tokens)
        return (Cut(site=f"llm.{layer}", keep=keep, observe=(layer - 1,), data={"each": each}),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        b, n = view.valid.shape
        budget = view.counts.clamp_max(cut.keep or 0)  # [B]
        text = view.source("text", keys="previous", norm=True)
        states = view.source("states", layer="next", norm=True)
        visual = strongest(view.source("keys", layer="previous"), view.valid, self.visual_pivots, budget)
        words = strongest(text.keys, text.after if self.text == "after" else text.valid, self.text_pivots)
        taken = (visual >= 0).sum(1, keepdim=True)  # [B, 1]: tokens chosen so far
        shares = self._shares(torch.cat([visual, words], 1) >= 0, budget - taken[:, 0], cut)
        x = torch.cat([states, gather(states, visual), gather(text.hidden, words)], 1)  # [B, N + P, C]
        every = torch.arange(x.shape[1], device=x.device)
        # the extra column takes the padding
        turn = torch.full((b, n + 1), -1, device=x.device)
        turn = turn.scatter(1, torch.where(visual >= 0, visual, n), every[: visual.shape[1]].expand_as(visual))[:, :n]
        free = view.valid & (turn < 0)
        for p in range(shares.shape[1]):
            similar = kernels.match(x, every[:n], every[n + p : n + p + 1])[0].masked_fill(~free, torch.inf)  # [B, N]
            rank = ranks(similar.argsort(dim=1, stable=True))
            take = (rank < shares[:, p : p + 1]) & free
            turn, free = torch.where(take, taken + rank, turn), free & ~take
            taken = taken + take.sum(1, keepdim=True)
        return top(-torch.where(turn < 0, taken, turn).float(), taken[:, 0], view.valid, view.protected)

    def _shares(self, real: Tensor, left: Tensor, cut: Cut) -> Tensor:
        """``[B, P]``: how many tokens each pivot takes, of those that are ``real`` ``[B, P]``; of the ``left`` ``[B]``
        that do not divide the first ones take one more each."""
        if self.count == "official":
            return real * cut.data["each"]
        pivots = real.sum(1).clamp_min(1)
        more = real.cumsum(1) <= (left % pivots)[:, None]
        return real * ((left // pivots)[:, None] + more)


def strongest(keys: Tensor, there: Tensor, most: int, limit: Tensor | None = None) -> Tensor:
    """Of the tokens ``there`` ``[B, N]`` those whose ``keys`` ``[B, N, G, d]`` have the largest L1 norms, by falling
    norm: ``[B, most]``, of each image at most ``limit`` ``[B]``; padded with -1."""
    norm = keys.abs().sum((2, 3), dtype=torch.promote_types(keys.dtype, torch.float32)).nan_to_num(-1)
    order = norm.masked_fill(~there, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :most]
    real = there.gather(1, order)
    if limit is not None:
        real &= torch.arange(order.shape[1], device=order.device) < limit[:, None]
    return torch.where(real, order, -1)
