"""VidCom2: "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models" (arXiv
2505.14454, EMNLP 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.select import from_mask, placed, top
from ..core.types import Geometry, Selection, TokenView
from ..kernels.base import wide
from ._video import framed, loose, spread, unit
from .base import Cut, Method, MethodInfo, option, register

TEMPERATURE = 0.01  # of the softmax over frames
WIDTHS = (-3, -2, -1, 0, 1)  # k: a kernel of variance 2^k each


@register(
    MethodInfo(
        name="vidcom2",
        paper="arXiv 2505.14454",
        idea="gives unusual frames more tokens, and keeps those that are least like their frame and the video",
        kinds=("projector",),
        keep=0.25,
        video=True,
        whole=True,
        score="minus the similarity with the centres of the video and of the frame, compared frame by frame",
        cases=({"keep": 0.75}, {"keep": 0.2}, {"keep": 0.4, "rounding": "frames"}),
    )
)
@dataclass(frozen=True, kw_only=True)
class VidCom2(Method):
    """Section 3, on a video's projected tokens x in the half of the channels that varies least, of length one. With the
    centres ``c_v`` of the video and ``c_f`` of the frame, ``K(x, c) = sum_k exp(-|x - c|^2 / 2^(k+1))`` for k from -3
    to 1 says how usual a token is in the video (v) and in the frame (u).

    A frame's share of the budget R follows from ``s = -mean v``: ``min(1, R (1 + w - mean w))`` with ``w`` the softmax
    of ``s / 0.01`` over frames; of its tokens those of the lowest ``v + u`` stay, at least one in every frame."""

    rounding: str = option(
        "exact",
        "'exact': where the shares of the frames do not add up to the budget, the tokens of the highest v + u go, or "
        "those of the lowest come back; 'frames': frame by frame round(share * tokens), whatever the sum (official "
        "code)",
        choices=("exact", "frames"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        assert keep is not None
        if self.rounding == "exact" or not geometry.frames or keep >= geometry.tokens:
            return (Cut(site="projector", keep=keep),)
        least = geometry.frames + loose(geometry)
        most = min(geometry.tokens, keep + least)  # each frame rounds up by less than one
        return (Cut(site="projector", keep=min(least, keep), adaptive=True, most=most, data={"share": keep}),)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        keep = cut.data.get("share", cut.keep or 0)
        usual, video = usualness(wide(framed(view.features, view)))  # [B, F, P] each
        quota = quotas(video, keep - (view.valid.shape[1] - usual[0].numel()))
        place = placed(-usual)  # in the frame
        mine, score = spread(place < quota[..., None], view, True), spread(-usual, view, torch.nan)
        if "share" in cut.data:
            return replace(from_mask(mine | view.protected), score=score)
        # the first of each frame, then what the frames chose, then what is least usual
        turn = mine.long() + spread(place == 0, view, True)
        order = placed(score.nan_to_num(torch.inf))
        turn = (turn * order.shape[1] - order).double()
        return replace(top(turn, keep, view.valid, view.protected, span=view.extent), score=score)


def usualness(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens ``x`` ``[B, F, P, C]`` ``v + u`` and ``v``, ``[B, F, P]`` each: how like the centres of frame and
    video they are."""
    flat = x.flatten(1, 2)
    some = flat.var(1, correction=0).argsort(dim=1, stable=True)[:, : max(x.shape[-1] // 2, 1)]  # [B, C/2]
    x = x.gather(3, some[:, None, None].expand(*x.shape[:3], -1))
    x = unit(x)
    v = _kernel(x, x.mean((1, 2), keepdim=True))
    return v + _kernel(x, x.mean(2, keepdim=True)), v


def quotas(v: Tensor, keep: int) -> Tensor:
    """``[B, F]``: tokens of each frame, of ``keep`` in all, by how usual ``v`` ``[B, F, P]`` its tokens are."""
    f, p = v.shape[1:]
    s = -v.mean(2)
    w = torch.softmax((s - s.amax(1, keepdim=True)) / TEMPERATURE, 1)
    share = (keep / (f * p) * (1 + w - w.mean(1, keepdim=True))).clamp_max(1)
    return (share * p).round().long().clamp_min(1)


def _kernel(x: Tensor, centre: Tensor) -> Tensor:
    far = (x - centre).square().sum(-1)
    return torch.stack([torch.exp(-far / 2.0 ** (k + 1)) for k in WIDTHS]).sum(0)
