"""HoloV: "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention" (arXiv
2510.02912, NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.select import marked, top
from ..core.types import Geometry, Selection, TokenView
from ..kernels.base import CHUNK, cosines, rows
from ._tower import NEEDS, TowerScored, class_attention
from .base import Cut, MethodInfo, option, register

SCALE = 1e3  # of the attention (official code)
EPSILON = 1e-6  # the official code adds it to the norms as well


@register(
    MethodInfo(
        name="holov",
        paper="arXiv 2510.02912",
        idea="shares the budget among strips of the image by attention and variance; each keeps its most attended",
        kinds=("projector", "vision"),
        needs=NEEDS,
        keep=64 / 576,
        score="class attention of the last block that is used; the most attended of each strip go first",
        cases=({"keep": 0.75}, {"keep": 3}, {"keep": 5, "strips": 3, "surplus": "tokens"}),
    )
)
@dataclass(frozen=True, kw_only=True)
class HoloV(TowerScored):
    """Section 3: the raster sequence is cut into P contiguous strips of (nearly) equal length. Within one, a token's
    similarities to the others have the mean m and the variance v (cosine, the diagonal set to 0, divided by n - 1); its
    score is ``1e3 a + alpha v mean(1e3 a) / mean(v)``, a the class attention, both means over the image. A strip's
    share w of the budget T is that of its mean score: ``floor(w T)`` tokens, and what is left goes to the largest w,
    one each. A strip keeps its most attended tokens.

    A strip may be given more tokens than it has. The official code leaves that surplus out and fills up with rows of
    zeros, which the language model reads; here other tokens take the places (``surplus=``), so that the count is exact.
    Tokens stand in raster order; the official code sorts those of a strip by falling attention. It decides behind the
    projector, on projected features, as the official code. In towers without a class token a is the mean attention
    received. Strips are made of those tokens left that the tower made: new-line tokens stay only when no others are
    left out."""

    site: str = option(
        "auto",
        "where it decides: 'projector' (on projected features, the tower's attention noted; official code), 'tower' "
        "(behind the last block that is used, on its features), 'auto': the projector where there is one",
        choices=("auto", "tower", "projector"),
    )
    strips: int | None = option(
        16,
        "P, of any image (official code for LLaVA); none: max(1, int(16/9 N / T)), its code for Qwen",
        least=1,
    )
    alpha: float = option(0.09, "weight of the variance against the attention", least=0)
    surplus: str = option(
        "strips",
        "tokens that a full strip cannot take go to the 'strips' that have room, shared as before, or to the most "
        "attended 'tokens' that are left (the official code: to none, rows of zeros instead)",
        choices=("strips", "tokens"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        if self.site == "auto" and "projector" in geometry.provides:
            return replace(self, site="projector").plan(geometry, keep)
        return super().plan(geometry, keep)

    def score(self, view: TokenView, cut: Cut) -> Tensor:
        return class_attention(view)

    def choose(self, view: TokenView, scores: list[Tensor], cut: Cut) -> Selection:
        (attention,), limit, n = scores, cut.keep or 0, view.valid.shape[1]
        known = view.valid & ~attention.isnan()  # [B, N]
        count = known.sum(1)  # [B]
        strips = torch.full_like(count, self.strips or 0)
        if self.strips is None:
            strips = 16 * count // (9 * max(limit, 1))
        place = _cut(known, torch.minimum(strips, count).clamp_min(1))  # [B, P, n]
        there, at = place >= 0, place.clamp_min(0).flatten(1)
        inside = torch.where(there, attention.gather(1, at).view(place.shape), 0)
        score = self._scores(view.features, inside, place)
        mean = score.sum(2) / there.sum(2).clamp_min(1)
        share = shared(mean, there.sum(2), count.clamp_max(limit), again=self.surplus == "strips")
        ranked = torch.where(there, inside, -1).argsort(dim=2, descending=True, stable=True)
        first = torch.arange(place.shape[2], device=place.device) < share[..., None]
        chosen = torch.where(there.gather(2, ranked) & first, place.gather(2, ranked), -1)
        picked = marked(chosen.flatten(1), n)
        # what the strips have chosen, then by attention: the count is exact also where they have not chosen enough
        best = top(attention.double() + 2 * picked, limit, view.valid, view.protected, span=view.extent)
        return replace(best, score=attention)

    def _scores(self, features: Tensor, attention: Tensor, place: Tensor) -> Tensor:
        """Of each place ``[B, P, n]``, 0 on padding."""
        there = place >= 0
        x = rows(features, place.flatten(1)).view(-1, place.shape[2], features.shape[2])  # [B P, n, C]
        others = (there.sum(2, keepdim=True) - 1).clamp_min(1)
        spread = []
        for i in range(0, place.shape[2], step := max(1, CHUNK // place.numel())):
            s = cosines(x[:, i : i + step], x).view(*place.shape[:2], -1, place.shape[2]) * there[:, :, None]
            s.diagonal(i, 2, 3).zero_()
            mean = s.sum(-1, keepdim=True) / others[..., None]
            spread.append(((s - mean) * there[:, :, None]).square().sum(-1) / others)
        variance = torch.cat(spread, 2) * there
        total = there.sum((1, 2), keepdim=True).clamp_min(1)
        mean_a, mean_v = (t.sum((1, 2), keepdim=True) / total for t in (SCALE * attention, variance))
        return SCALE * attention + self.alpha * variance * mean_a / (mean_v + EPSILON)


def shared(weight: Tensor, room: Tensor, budget: Tensor, *, again: bool) -> Tensor:
    """``[B, P]`` whole numbers: ``budget`` ``[B]`` shared by ``weight`` ``[B, P]``, what rounding down leaves to the
    largest weights one each, never more than there is ``room`` ``[B, P]``. ``again``: what found no room is shared
    among those that have some, until nothing is left (there is room for all of it)."""
    weight, given = weight.double(), torch.zeros_like(room)
    while True:
        left, free = (budget - given.sum(1))[:, None], room > given
        w = torch.where(free, weight, 0)
        w = torch.where(w.sum(1, keepdim=True) > 0, w, free.double())  # all alike where none weighs anything
        w = w / w.sum(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        share = (w * left + 1e-9).long()  # whole shares stay whole
        order = torch.where(free, w, -1).argsort(dim=1, descending=True, stable=True)
        number = torch.arange(w.shape[1], device=w.device).expand_as(order)
        extra = (number < left - share.sum(1, keepdim=True)).long()  # of the largest weights
        given = torch.minimum(given + share + torch.zeros_like(share).scatter(1, order, extra), room)
        if not again or torch.equal(given.sum(1), budget):
            return given


def _cut(known: Tensor, strips: Tensor) -> Tensor:
    """``[B, P, n]``: positions of the tokens ``known`` ``[B, N]`` in each of ``strips`` ``[B]`` strips, of which number
    i begins with the ``floor(i N / P)``-th; -1 where a strip is shorter than others or an image has fewer."""
    number, count = known.long().cumsum(1) - 1, known.sum(1).clamp_min(1)
    p, width = torch.stack([strips.max(), (-(-count // strips)).max()]).tolist()
    strips, count = strips[:, None], count[:, None]
    strip = ((number + 1) * strips - 1) // count
    column = number - strip * count // strips
    place = torch.full((len(known), p * width + 1), -1, device=known.device)
    at = torch.arange(known.shape[1], device=known.device).expand_as(known)
    return place.scatter(1, torch.where(known, strip * width + column, p * width), at)[:, :-1].view(-1, p, width)
