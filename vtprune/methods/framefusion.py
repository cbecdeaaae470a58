"""FrameFusion: "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision Language
Models" (arXiv 2501.01986, ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.select import from_mask, marked, merged, placed, top
from ..core.types import Geometry, Selection, TokenView, UnsupportedError
from ._video import shape, unit
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="framefusion",
        paper="arXiv 2501.01986",
        idea="merges what is alike in neighbouring frames layer by layer, then drops what gets the least attention",
        kinds=("llm",),
        needs={"llm": frozenset({"query_attention"})},
        keep=0.2,
        merges=True,
        video=True,
        mean="ratio",
        score="cosine with the same place in the frame before, negated, while it merges; then the attention received",
        cases=({"keep": 0.6}, {"keep": 0.3, "threshold": 0.2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class FrameFusion(Method):
    """Section 3.2. In front of layer 0, 1 ... a video's token is alike its predecessor, the token of the same place in
    the nearest frame before that is left, if their cosine is at least ``threshold``. If fewer tokens are alike than
    still have to go, all of them merge (a run of them into its first token, a plain mean), and if they are less than
    ``least`` of the tokens it is the last layer that merges; else only as many as have to go, the most alike, and all
    is done. In front of the layer behind the last that merged the tokens of the highest attention stay: mean over heads
    and over all rows of the prompt, in the layer before.

    The official code states the mean cost over 28 layers, here ``ratio``, and raises where merging spends more than
    that; here merging ends so early that the layers behind can make up for it. Less than the whole first layer takes,
    where nothing is alike, cannot be met: one token is left then. ``keep`` counts what is left in the end. In a
    language model of too few layers it prunes in front of the last, whatever else could merge."""

    threshold: float = option(0.6, "cosine from which on two tokens are alike", least=-1, most=1)
    least: float = option(
        0.1, "share of the tokens that must be alike for the next layer to merge too", least=0, most=1
    )
    ratio: float | None = option(
        None,
        "mean share of the tokens over the layers (official 'cost': 0.3); replaces keep=",
        above=0,
        most=1,
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        n, depth = geometry.tokens, geometry.llm_layers
        if depth < 2:
            raise UnsupportedError("framefusion prunes by a layer in front of the cut, and this model has one layer")
        # everywhere, whatever the video's length: its stages are the model's
        last = depth - 1
        cuts = [Cut(site=f"llm.{i}", keep=1, adaptive=True, observe=(i - 1,) if i else ()) for i in range(depth)]
        if self.ratio is not None:
            cost = self.ratio * n * depth
            data: dict[str, Any] = {"cost": cost, "depth": depth}
            # the first layer may have all, the others one; what the last ones have is rounded
            mean = max(cost, n + depth - 1) / depth + 0.5
            return tuple(replace(cut, mean=mean, data={**data, "last": cut.layer == last}) for cut in cuts)
        assert keep is not None
        data = {"keep": keep}
        end = replace(cuts[-1], keep=keep, adaptive=False)
        # a layer that is not followed by the one that prunes leaves at most (1 - least) of the tokens
        most = [max(keep, int(n * (1 - self.least) ** i)) for i in range(depth)]
        cuts = [replace(cut, most=m) for cut, m in zip(cuts[:-1], most, strict=False)]
        return tuple(replace(cut, data={**data, "last": cut.layer == last}) for cut in (*cuts, end))

    def select(self, view: TokenView, cut: Cut) -> Selection:
        state, count = view.memory, view.counts.double()
        if state.get("over"):
            return from_mask(view.valid, view.extent)
        done = state.get("done", torch.zeros_like(view.counts, dtype=torch.bool))  # [B], all
        merging, spent = state.get("merging", ~done), state.get("spent", torch.zeros_like(count))
        left = self._left(cut, count, spent)
        like, order = _alike(view)
        alike = view.valid & (like >= self.threshold) & ~view.protected
        have, many = alike.sum(1), (count - left).clamp_min(0)
        merging = merging & ~self._overdrawn(cut, spent + count - have, have < many)
        prune = ~done if cut.data["last"] else ~done & ~merging
        merge = ~done & ~prune
        final = merge & (have >= many)  # as many are alike as have to go
        some = placed(like, alike) < torch.where(final, many, have)[:, None]
        goes = alike & some & merge[:, None]
        kept, score = view.valid & ~goes, (-like).masked_fill(~merge[:, None] | like.isinf(), torch.nan)
        done = done | final | prune
        pruning, state["over"] = torch.stack([prune.any(), done.all()]).tolist()
        if pruning:
            attention = view.source("query_attention", layer="previous", query="all")
            best = top(attention, left.long(), view.valid, view.protected)
            kept = torch.where(prune[:, None], marked(best.kept, kept.shape[1]), kept)
            score = torch.where(prune[:, None], attention.to(score.dtype), score)
        state["done"], state["merging"] = done, merge & ~final & (have >= self.least * count)
        state["spent"] = spent + kept.sum(1)
        every = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        home = torch.where(kept, every, torch.where(goes, _roots(goes, order), -1))
        return replace(merged(kept, home, torch.ones_like(view.size)), score=score)

    @staticmethod
    def _overdrawn(cut: Cut, spent: Tensor, goes_on: Tensor) -> Tensor:
        """``[B]``: whether merging on, which would have ``spent`` tokens in all up to this layer, leaves less than one
        for each layer behind it. In front of the first layer nothing is known to prune by."""
        if "cost" not in cut.data or not cut.layer:
            return torch.zeros_like(goes_on)
        return goes_on & (spent + cut.data["depth"] - cut.layer - 1 > cut.data["cost"])

    @staticmethod
    def _left(cut: Cut, count: Tensor, spent: Tensor) -> Tensor:
        """``[B]``: tokens that are to be left of ``count``, where the layers in front have had ``spent`` in all."""
        if "cost" not in cut.data:
            return count.clamp_max(cut.data["keep"])
        rest = (cut.data["cost"] - spent) / (cut.data["depth"] - cut.layer)
        return torch.minimum(rest.round().clamp_min(1), count)


def _alike(view: TokenView) -> tuple[Tensor, Tensor]:
    """``[B, N]``: the cosine of each token with its predecessor, -inf where it has none; and an order of the tokens in
    which it stands behind that."""
    f, p = shape(view)
    inside = view.valid & (view.index < f * p)
    key = torch.where(inside, view.index % p * f + view.index // p, f * p)
    order = key.argsort(dim=1, stable=True)
    place = torch.where(inside, view.index % p, -1).gather(1, order)
    x = unit(view.features)
    x = x.gather(1, order[..., None].expand_as(x))
    same = (place[:, 1:] == place[:, :-1]) & (place[:, 1:] >= 0)
    near = (x[:, 1:] * x[:, :-1]).sum(-1).masked_fill(~same, -torch.inf)
    near = torch.nn.functional.pad(near, (1, 0), value=-torch.inf)
    return torch.empty_like(near).scatter_(1, order, near), order


def _roots(goes: Tensor, order: Tensor) -> Tensor:
    """``[B, N]``: for each token the last one in ``order`` up to it that does not go."""
    stays = torch.where(goes.gather(1, order), -1, torch.arange(order.shape[1], device=order.device))
    root = order.gather(1, stays.cummax(1).values.clamp_min(0))
    return torch.empty_like(root).scatter_(1, order, root)
