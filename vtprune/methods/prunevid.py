"""PruneVid: "PruneVid: Visual Token Pruning for Efficient Video Large Language Models" (arXiv 2412.16117, Findings of
ACL 2025); from the paper alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.select import merged, placed, top
from ..core.types import Geometry, Selection, TokenView
from ..kernels.base import wide
from ..kernels.density import distances, nearest, prominence
from ._video import begins, framed, loose, scenes, shape, spread, summed, unit
from .base import Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="prunevid",
        paper="arXiv 2412.16117",
        idea="averages what is static in a scene over time, clusters what is left; later the question prunes",
        kinds=("projector", "llm"),
        needs={"llm": frozenset({"query_attention", "text"})},
        keep=0.15,
        exact=False,
        merges=True,
        video=True,
        whole=True,
        score="in the language model the most attention that a token of the question pays in any head",
        cases=({"keep": 0.4}, {"keep": 0.15, "clusters": 0.3, "threshold": 0.3}),
    )
)
@dataclass(frozen=True, kw_only=True)
class PruneVid(Method):
    """Sections 3.2 and 3.3. Frames, as mean tokens, are clustered (density peaks) into ``scenes`` of neighbours. A
    place is static in a scene if the mean cosine of its tokens over all pairs of the scene's frames is above
    ``threshold``; static tokens become their mean over the scene. The static means of a scene, and the other tokens of
    each frame, are clustered (density peaks) into ``clusters`` of their number, each the mean of its members. In front
    of ``layer`` the tokens stay that get the most attention, the maximum over heads and the question's tokens.

    ``keep`` counts what is left in the end; a budget that needs more than ``clusters`` leave raises that share. Scenes
    are neighbours like this: between two centres the frames up to some place go to the first, the others to the second,
    so that the sum of squared distances is least. A cluster stands at its centre, a static one in the first frame of
    its scene. Where no text stands behind the video nobody asks, and the earlier tokens stay. The official code takes
    the tokens that go out of the cache of the earlier layers too; here layers in front of the cut keep what they read,
    as in a dense model."""

    scenes: float = option(0.25, "scenes per frame, rounded down, one at least", above=0, most=1)
    threshold: float = option(0.8, "mean cosine above which a place is static", least=-1, most=1)
    clusters: float = option(0.5, "clusters per token, rounded, one at least", above=0, most=1)
    neighbours: int = option(5, "nearest tokens that the density is of, the token itself among them", least=1)
    layer: int | None = option(None, "first layer with keep tokens (default: 10 of 32, in proportion)", least=1)

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        assert keep is not None
        n, frames = geometry.tokens, max(geometry.frames, 1)
        (layer,) = layers("prunevid", self.layer, geometry, (max(10 * geometry.llm_layers // 32, 1),))
        share = max(self.clusters, keep / n)
        rest = loose(geometry)
        most = min(n, rest + int(share * (n - rest)) + 2 * frames)  # scenes and frames round up by less than one
        return (
            Cut(site="projector", keep=1, adaptive=True, most=most, data={"share": share}),
            Cut(site=f"llm.{layer}", keep=keep, observe=(layer - 1,)),
        )

    def select(self, view: TokenView, cut: Cut) -> Selection | None:
        if cut.kind == "llm":
            return top(self._asked(view), cut.keep or 0, view.valid, view.protected)
        return None if cut.data["share"] >= 1 else self._clustered(view, cut.data["share"])

    @staticmethod
    def _asked(view: TokenView) -> Tensor:
        """``[B, N]``: the most attention that a token of the question pays in any head; 0 without a question."""
        text = view.source("text")
        question = text.valid & text.after
        found = view.source("query_attention", layer="previous", query=question, heads="most")
        return torch.where(question.any(1, keepdim=True), found, torch.zeros_like(found))

    def _clustered(self, view: TokenView, share: float) -> Selection:
        f, p = shape(view)
        x = wide(framed(view.features, view))  # [B, F, P, C]
        starts = self._starts(x.mean(2))
        scene, size = scenes(starts)
        at = scene[..., None].expand(-1, -1, p)
        # mean cosine over pairs of frames: (|sum|^2 - n) / (n (n - 1))
        n = size[..., None]
        like = (summed(unit(x), scene).square().sum(-1) - n) / (n * (n - 1)).clamp_min(1)
        held = framed(view.protected, view)  # what must stay is merged with nothing
        static = (n > 1) & (like > self.threshold) & (summed(held.long(), scene) == 0)  # [B, scenes, P]
        means = summed(x, scene) / n.clamp_min(1)[..., None]
        still = static.gather(1, at)
        centre, to = self._clusters(means, static, share)
        middle, into = self._clusters(x, ~still & ~held, share)
        frame = torch.arange(f, device=x.device)[:, None]
        begin = begins(scene, size)[..., None]
        kept = torch.where(still, centre.gather(1, at) & (frame == begin), middle | held)
        own = torch.arange(p, device=x.device)
        goes = torch.where(still, begin * p + to.gather(1, at), frame * p + torch.where(held, own, into))
        weight = torch.where(still, 1 / size.gather(1, scene)[..., None].to(x.dtype), 1.0)  # of the mean over time
        every = torch.arange(view.valid.shape[1], device=x.device).expand_as(view.valid)
        destination = torch.cat([goes.flatten(1), every[:, f * p :]], 1)
        return merged(spread(kept, view, True), destination, spread(weight, view, 1.0))

    def _clusters(self, x: Tensor, able: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """``[B, F, P]``: the centres of the clusters of the tokens ``x`` ``[B, F, P, C]`` that are ``able``, row by
        row, and the centre of each."""
        some = able.sum(-1)
        count = torch.where(some > 0, (share * some.double()).round().long().clamp_min(1), 0)
        centre = able & (placed(prominence(x, able, self.neighbours), able) < count[..., None])
        return centre, nearest(x, centre)

    def _starts(self, frames: Tensor) -> Tensor:
        """``[B, F]`` bool: the frames, of mean tokens ``frames`` ``[B, F, C]``, that begin a scene."""
        b, f, _ = frames.shape
        every = torch.ones(b, f, dtype=torch.bool, device=frames.device)
        count = max(int(self.scenes * f + 1e-9), 1)
        centre = placed(prominence(frames, every, self.neighbours)) < count
        far = distances(frames)  # [B, F, F]
        at = torch.where(centre, torch.arange(f, device=frames.device), f).sort(1).values[:, :count]  # [B, S]
        cost = far.gather(1, at[..., None].expand(-1, -1, f))  # [B, S, F]
        # between two centres: how much more the frames up to each would cost with the second than with the first
        more = (cost[:, :-1] - cost[:, 1:]).cumsum(2)
        column = torch.arange(f, device=frames.device)
        between = (column >= at[:, :-1, None]) & (column < at[:, 1:, None])
        split = more.masked_fill(~between, torch.inf).argmin(2) + 1  # [B, S - 1] the first frame of the second
        return torch.zeros_like(every).scatter_(1, torch.cat([torch.zeros_like(at[:, :1]), split], 1), True)
