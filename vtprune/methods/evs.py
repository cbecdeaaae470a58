"""EVS: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference" (arXiv 2510.14624)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.select import top
from ..core.types import Geometry, Selection, TokenView
from ._video import framed, loose, per_frame, spread, unit
from .base import Cut, Method, MethodInfo, register

FIRST = 255.0  # dissimilarity of the first frame's tokens, above any other (2)


@register(
    MethodInfo(
        name="evs",
        paper="arXiv 2510.14624",
        idea="drops the tokens of a video that are most like the same place in the frame before",
        kinds=("projector",),
        exact=False,
        video=True,
        whole=True,
        score="1 - cosine with the same place in the frame before; 255 in the first frame",
        cases=({"keep": 0.75}, {"keep": 0.4}),
    )
)
@dataclass(frozen=True, kw_only=True)
class EVS(Method):
    """Section 3: of the T frames of P projected tokens ``max(P, keep)`` stay: those of the largest ``1 - cos(e_t,
    e_(t-1))`` at their place, over the whole video, ties to the earlier. The first frame always stays; any other may
    lose all of its tokens. What belongs to no frame (new-line tokens) stays as well."""

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        assert keep is not None
        if geometry.frames:
            keep = max(keep, per_frame(geometry) + loose(geometry))
        return (Cut(site="projector", keep=keep),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        x = unit(framed(view.features, view))
        change = (x[:, 1:] - x[:, :-1]).square().sum(-1) / 2  # 1 - cos, exactly 0 of equal tokens
        change = torch.cat([torch.full_like(x[:, :1, :, 0], FIRST), change], 1)
        return top(spread(change, view, FIRST), cut.keep or 0, view.valid, view.protected, span=view.extent)
