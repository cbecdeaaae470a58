"""DyCoke: "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models" (arXiv 2411.15024, CVPR 2025):
temporal token merging, the stage in front of the language model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..core.select import placed, top
from ..core.types import Geometry, Selection, TokenView
from ._video import framed, per_frame, spread, unit
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="dycoke",
        paper="arXiv 2411.15024",
        idea="leaves every fourth frame of a video whole, and of the others what differs most from the frame before",
        kinds=("projector",),
        exact=False,
        video=True,
        whole=True,
        score="minus the cosine with the place in the compared frame, ranked frame by frame; none in whole frames",
        cases=({"keep": 0.75}, {"ratio": 0.3}, {"keep": 0.6, "groups": "official"}),
    )
)
@dataclass(frozen=True, kw_only=True)
class DyCoke(Method):
    """Section 3.2, in groups of four frames: the second is compared with the first, the fourth with the third, the
    third with the first, place by place; of each compared frame the tokens of the lowest cosine stay, as many in every
    one (where the budget does not divide, one more in the earlier ones), ties to the earlier token. The first of each
    group stays whole, whatever the budget; so does what belongs to no frame.

    The paper says that what goes is merged; the official code drops it, and so it is here. Its second stage, which
    chooses columns of the cache anew while it decodes and frees none of them, is not part of this method."""

    ratio: float | None = option(
        None, "share kept of each compared frame, rounded down (official: 1 - K = 0.3); replaces keep=", above=0, most=1
    )
    groups: str = option(
        "all",
        "'all': every group alike, also one that the video's end cuts short; 'official': the third frame of the last "
        "group stays whole, as in the official code",
        choices=("all", "official"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        f, p, n = geometry.frames, per_frame(geometry), geometry.tokens
        if not f:  # of a typical image, what a long video's frames keep
            share = None if self.ratio is None else max(int(n * (1 + 3 * self.ratio) / 4), 1)
            return (Cut(site="projector", keep=keep if share is None else share),)
        compared = [t for t in range(f) if self._with(t, f) is not None]
        whole = n - len(compared) * p
        if self.ratio is not None:
            counts = [int(self.ratio * p + 1e-9)] * len(compared)
        else:
            assert keep is not None
            each, more = divmod(max(keep - whole, 0), max(len(compared), 1))
            counts = [each + (i < more) for i in range(len(compared))]
        quota = [p] * f
        for t, count in zip(compared, counts, strict=True):
            quota[t] = count
        return (Cut(site="projector", keep=whole + sum(counts), data={"quota": tuple(quota)}),)

    def _with(self, t: int, frames: int) -> int | None:
        """The frame that frame ``t`` of a video is compared with; ``None``: it stays whole."""
        if t % 2:
            return t - 1
        return t - 2 if t % 4 == 2 and not (self.groups == "official" and t - 2 >= frames - 4) else None

    def select(self, view: TokenView, cut: Cut) -> Selection:
        x = unit(framed(view.features, view))
        f, device = x.shape[1], x.device
        partner = [self._with(t, f) for t in range(f)]
        before = torch.tensor([t if q is None else q for t, q in enumerate(partner)], device=device)
        compared = torch.tensor([q is not None for q in partner], device=device)[:, None]
        change = (x - x[:, before]).square().sum(-1) / 2  # [B, F, P]: 1 - cos, exactly 0 of equal tokens
        quota = torch.tensor(cut.data["quota"], device=device)[:, None]
        place = placed(change)
        # where tokens must stay, the last ones of the compared frames make room
        turn = torch.where(compared, (place < quota).double() - place / x.shape[2], 2)
        chosen = top(spread(turn, view, 2), cut.keep or 0, view.valid, view.protected, span=view.extent)
        return replace(chosen, score=spread((change - 1).masked_fill(~compared, torch.nan), view, torch.nan))
