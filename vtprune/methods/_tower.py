"""What methods share that score tokens by blocks of the tower and decide once: behind the last block whose output is
used, or, where a family folds its patches, behind the projector with the scores noted in the tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.types import Action, Geometry, Projections, Selection, TokenView, UnsupportedError
from ..kernels.base import rows
from .base import Cut, Method, option

# By kind of site, what such methods need: projections in the tower, nothing behind it.
NEEDS = {"vision": frozenset({"projections"})}


@dataclass(frozen=True, kw_only=True)
class TowerScored(Method):
    """A subclass says which :meth:`blocks` it scores, how (:meth:`score`), and what it keeps (:meth:`choose`)."""

    site: str = option(
        "auto",
        "where it decides: 'tower' (behind the last block that is used, on its features), 'projector' (on projected "
        "features, the tower's scores noted), 'auto': the tower where stages can be placed on single patches",
        choices=("auto", "tower", "projector"),
    )

    def blocks(self, geometry: Geometry) -> tuple[int, ...]:
        """The blocks whose attention is scored, ascending; by default the last one that is used."""
        return (geometry.seen_layers - 1,)

    def score(self, view: TokenView, cut: Cut) -> Tensor:
        """``[B, N]``: what :meth:`choose` is given of one block."""
        raise NotImplementedError

    def choose(self, view: TokenView, scores: list[Tensor], cut: Cut) -> Selection:
        """The decision, from the scores ``[B, N]`` of all :meth:`blocks`, NaN where the tower did not make a token."""
        raise NotImplementedError

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        last = last_seen(self.info.name, geometry)
        inside = "vision" in geometry.provides
        if self.site == "tower" and not inside:
            raise UnsupportedError(
                f"{self.info.name}: site='tower' drops tokens in the tower, where {geometry.family} has no stages; use "
                "site='projector'"
            )
        if self.site == "projector" and "projector" not in geometry.provides:
            raise UnsupportedError(f"{self.info.name}: {geometry.family} has no projector; use site='tower'")
        scored = self.blocks(geometry)
        data = {"blocks": scored}
        if self.site == "projector" or not inside or (self.site == "auto" and geometry.fold > 1):
            notes = [Cut(site=f"vision.{i}", action=Action.NOTE) for i in scored]
            return (*notes, Cut(site="projector", keep=keep, data=data))
        notes = [Cut(site=f"vision.{i}", action=Action.NOTE) for i in scored if i < last]
        return (*notes, Cut(site=f"vision.{last}", keep=keep, data=data))

    def note(self, view: TokenView, cut: Cut) -> Tensor:
        return self.score(view, cut)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        scores = [
            self.score(view, cut) if cut.site == f"vision.{i}" else view.noted(f"vision.{i}")
            for i in cut.data["blocks"]
        ]
        return self.choose(view, scores, cut)


def last_seen(name: str, geometry: Geometry) -> int:
    """The last block of the tower whose output is used. Raises :class:`UnsupportedError` where the method ``name``
    cannot look at its attention."""
    if not geometry.seen_layers:
        raise UnsupportedError(
            f"{name} scores by the vision tower's attention, which {geometry.family} ({geometry.arch}) does not show"
        )
    return geometry.seen_layers - 1


def class_attention(view: TokenView) -> Tensor:
    """``[B, N]``: the class token's attention in the block, softmax over all tokens, mean over heads; 0 on padding. In
    towers without a class token the attention that each patch receives, averaged over all queries."""
    p = view.prefix
    if not p:
        return received_attention(view)
    t = view.source("projections")
    bias = None if t.bias is None else t.bias[:, 0, 0]
    found = kernels.query_scores(t.q[:, :, :1], t.k, scale=t.scale, bias=bias)
    return t.per_token(found[:, p:]) * view.valid


def received_attention(view: TokenView) -> Tensor:
    """``[B, N]``: the attention that each patch receives in the block, mean over heads and over all queries (the class
    token's among them); 0 on padding. Blocks that attend within windows: queries of other windows give nothing."""
    t, p = projections(view), view.prefix
    windows = view.source("windows") if "windows" in view.sources else None
    if windows is not None:
        return t.per_token(_within(t, windows, t.real(view.valid))) * view.valid
    real = t.real(view.valid)
    weight = real.to(torch.float32) / real.sum(1, keepdim=True)
    bias = None if t.bias is None else t.bias[:, 0, 0]
    found = kernels.query_scores(t.q, t.k, scale=t.scale, weight=weight, bias=bias)
    return t.per_token(found[:, p:]) * view.valid


def projections(view: TokenView) -> Projections:
    """The block's, also of one that attends within windows."""
    return view.source("projections", **({"windows": True} if "windows" in view.sources else {}))


def _within(t: Projections, windows: Tensor, real: Tensor) -> Tensor:
    """``[B, N]``: the attention received of blocks in which the patches of each of the ``windows`` ``[B, W, m]`` (-1:
    padding) see each other, and no patch is in two; mean over the ``real`` ones ``[B, N]``."""
    (b, w, m), n = windows.shape, t.k.shape[2]
    at, there = windows.clamp_min(0).flatten(1), (windows >= 0).flatten(0, 1)
    q, k = (rows(x.transpose(1, 2).flatten(2), at).view(b * w, m, *x.shape[1::2]).transpose(1, 2) for x in (t.q, t.k))
    weight = there.to(torch.float32) / real.sum(1).repeat_interleave(w)[:, None]
    bias = torch.zeros_like(weight).masked_fill(~there, -torch.inf)
    found = kernels.query_scores(q, k, scale=t.scale, weight=weight, bias=bias)  # [B W, m]
    received = found.new_zeros(b, n + 1)  # the last one takes the padding
    return received.scatter_(1, torch.where(there, windows.flatten(0, 1), n).view(b, -1), found.view(b, -1))[:, :n]
