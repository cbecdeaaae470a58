"""FastVID: "FastVID: Dynamic Density Pruning for Fast Video Large Language Models" (arXiv 2503.11187, NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.select import marked, merged, placed, top
from ..core.types import Action, Geometry, Mix, Selection, TokenView
from ..kernels.base import wide
from ..kernels.density import closest, prominence
from ._tower import class_attention, last_seen
from ._video import framed, scenes, shape, spread, unit
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="fastvid",
        paper="arXiv 2503.11187",
        idea="cuts a video into scenes, keeps salient tokens and merges the rest into anchor frames' dense ones",
        kinds=("projector", "vision"),
        needs={"vision": frozenset({"projections"})},
        keep=0.1,
        merges=True,
        video=True,
        whole=True,
        score="class attention of the last block that is used; anchors of the other tokens are not ranked by it",
        cases=({"keep": 0.75}, {"keep": 0.3, "context": 0.6}),
    )
)
@dataclass(frozen=True, kw_only=True)
class FastVID(Method):
    """Section 3, on projected tokens. A scene begins where the cosine of two neighbouring frames' mean tokens is below
    ``threshold`` or among the ``segments - 1`` lowest. Of the r tokens of a frame ``int(context r)`` are for context,
    the others its salient ones: those of the highest class attention. A scene's tokens for context are shared by its
    anchor frames, every ``step``-th, counted back from its last; there those of the highest density times distance
    (DPC-KNN among tokens that are not salient) are anchors. Every token of the scene that is neither salient nor an
    anchor of that frame goes to the most similar (cosine) anchor of each anchor frame: ``x' = w x + (1 - w) mean`` with
    ``w = max(1 / (members + 1), beta)``.

    The budget is met: frames and anchors in front take what does not divide (the official code drops it), and where an
    anchor frame has not tokens enough anchor frames stand closer. Ties go to the earlier token (the official code adds
    noise of 1e-6). Global features of frames are their mean projected tokens, and the attention is the tower's (the
    official code takes both from the tower's pooling head)."""

    segments: int = option(8, "scenes at least (official: 8)", least=1)
    threshold: float = option(0.9, "cosine of neighbouring frames below which a scene begins", least=-1, most=1)
    context: float = option(0.4, "share of a frame's tokens that are for context, rounded down", least=0, most=1)
    step: int = option(4, "frames from anchor frame to anchor frame", least=1)
    neighbours: int = option(4, "nearest tokens that the density is of, the token itself among them", least=1)
    beta: float = option(0.6, "least weight of an anchor's own features", least=0, most=1)

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        site = f"vision.{last_seen('fastvid', geometry)}"
        return Cut(site=site, action=Action.NOTE), Cut(site="projector", keep=keep, data={"note": site})

    def note(self, view: TokenView, cut: Cut) -> Tensor:
        return class_attention(view)

    def select(self, view: TokenView, cut: Cut) -> Selection | None:
        (f, p), n, budget = shape(view), view.valid.shape[1], cut.keep or 0
        if budget >= n:
            return None
        x = wide(framed(view.features, view))  # [B, F, P, C]
        attention = framed(view.noted(cut.data["note"]), view)
        scene, _ = scenes(self._starts(x.mean(2)))
        each, more = divmod(max(budget - (n - f * p), 0), f)
        share = int(each * self.context + 1e-9)
        salient = torch.tensor([each - share + (t < more) for t in range(f)], device=x.device)
        step = min(self.step, (p - each + share - (more > 0)) // share) if share else 1
        anchors = _anchors(scene, share, step)  # [B, F] tokens of each frame
        held = framed(view.protected, view)
        order = placed(attention.masked_fill(held, torch.inf))
        chosen = order < salient[:, None]
        rank = placed(prominence(x, ~chosen, self.neighbours), ~chosen)
        anchor = ~chosen & (rank < anchors[..., None])  # [B, F, P]
        # protected tokens that a frame has no room for take the places of the last anchors, then of the last salient
        worth = spread(torch.where(chosen, p - order, -rank).to(x.dtype), view, torch.inf)
        there = spread(chosen | anchor | held, view, True)
        kept = marked(top(worth, budget, there, view.protected, span=(budget, budget)).kept, n)
        anchor &= framed(kept, view)
        score = spread(attention.masked_fill(anchor, torch.nan), view, torch.nan)
        if not share:
            return replace(merged(kept, torch.where(kept, _arange(kept), -1), span=(budget, budget)), score=score)
        return replace(self._merged(view, x, scene, kept, anchor, rank, min(share * step, p)), score=score)

    def _starts(self, frames: Tensor) -> Tensor:
        """``[B, F]`` bool: the frames, of mean tokens ``frames`` ``[B, F, C]``, that begin a scene."""
        x = unit(frames)
        like = (x[:, 1:] * x[:, :-1]).sum(-1)
        cut = (like < self.threshold) | (placed(-like) < self.segments - 1)
        return torch.cat([torch.ones_like(cut[:, :1]) if cut.shape[1] else cut.new_ones(len(x), 1), cut], 1)

    def _merged(
        self, view: TokenView, x: Tensor, scene: Tensor, kept: Tensor, anchor: Tensor, rank: Tensor, most: int
    ) -> Selection:
        """The ``kept`` ``[B, N]`` with what goes into the anchors among them: at most ``most`` in a frame, of the
        ``rank`` ``[B, F, P]``."""
        b, f, p, c = x.shape
        chosen = framed(kept, view) & ~anchor
        n = view.valid.shape[1]
        # [B, F, A] places of each frame's anchors in it, and the directions there
        at = torch.where(anchor, rank, p).argsort(dim=-1, stable=True)[..., :most]
        there = anchor.gather(2, at)
        way = unit(x)
        groups = way.gather(2, at[..., None].expand(-1, -1, -1, c))  # [B, F, A, C]
        # [B, F P, F] to each frame's anchors; of directions the nearest has the highest cosine
        distance, into = closest(way.flatten(1, 2), groups, there)
        frame = torch.arange(f, device=x.device).repeat_interleave(p)
        own = (frame[:, None] == torch.arange(f, device=x.device)) & anchor.flatten(1)[..., None]
        joins = (scene[:, frame][..., None] == scene[:, None]) & ~chosen.flatten(1)[..., None] & ~own
        joins &= there.any(2)[:, None]
        place = torch.arange(f, device=x.device) * p + at.gather(2, into.mT).mT  # [B, F P, F] in the video
        members = torch.zeros(b, n, dtype=x.dtype, device=x.device)
        members.scatter_add_(1, place.flatten(1), joins.flatten(1).to(x.dtype))
        weight = torch.where(members > 0, (1 / (members + 1)).clamp_min(self.beta), 1)
        share = (1 - weight) / members.clamp_min(1)
        column = kept.long().cumsum(1) - 1
        slots = column.gather(1, place.flatten(1))
        shared = share.gather(1, place.flatten(1))
        source = torch.arange(f * p, device=x.device).repeat_interleave(f).expand(b, -1)
        every = _arange(kept)
        mix = Mix(
            torch.cat([every, source], 1),
            torch.cat([torch.where(kept, column, -1), torch.where(joins.flatten(1), slots, -1)], 1),
            torch.cat([weight, shared], 1),
        )
        # in reports a token stands with the most similar of the anchors that it went into
        first = distance.masked_fill(~joins, torch.inf).argmin(-1, keepdim=True)
        home = torch.where(joins.any(-1), place.gather(2, first)[..., 0], -1)
        home = torch.cat([home, home.new_full((b, n - f * p), -1)], 1)
        return replace(merged(kept, torch.where(kept, every, home)), mix=mix)


def _anchors(scene: Tensor, share: int, step: int) -> Tensor:
    """``[B, F]``: anchors in each frame, 0 in those that are no anchor frame, with ``share`` for each frame of a
    ``scene`` ``[B, F]``."""
    _, size = scenes(torch.nn.functional.pad(scene.diff(dim=1), (1, 0), value=1) > 0)
    end = size.cumsum(1).gather(1, scene)  # behind the frame's scene
    length = size.gather(1, scene)
    back = end - 1 - torch.arange(scene.shape[1], device=scene.device)
    count = (length + step - 1) // step
    total = length * share
    earlier = count - 1 - back // step  # anchor frames of the scene in front of this one
    return (total // count + (earlier < total % count)) * (back % step == 0)


def _arange(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)
