"""MuE: "You Need Multiple Exiting: Dynamic Early Exiting for Accelerating Unified Vision Language Model" (arXiv
2211.11152, CVPR 2023), its exit of the image in a language model that reads images."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.select import from_mask
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from ..kernels.base import wide
from .base import Action, Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="mue",
        paper="arXiv 2211.11152",
        idea="visual tokens stop at the layer that hardly changes them any more; deeper layers read them as they are",
        kinds=("llm",),
        needs={"llm": frozenset({"keys", "states"})},
        keep=None,
        budgeted=False,
        routes=True,
        cases=({"threshold": 0.9}, {"threshold": 0.5}),
    )
)
@dataclass(frozen=True, kw_only=True)
class MuE(Method):
    """The paper's exit test, carried over to a decoder: with ``h^l`` the visual tokens in front of layer l, they exit
    in front of the first layer l >= 1 where ``cos(vec(h^l), vec(h^(l-1))) > theta``, over all tokens of what a budget
    applies to (an image; ``per="sample"``: all of a prompt) and no padding. From there on they are not changed any
    more: layers l and later make keys and values of ``h^l`` with their own norms and projections, and text goes on.
    Every image decides for itself, whatever else is in the batch.

    The paper's model is an encoder and a decoder, in which images and text exit from the encoder each by a test of its
    own, and words from the decoder by a third; it is trained with a loss behind every layer. Here the image exits alone
    and nothing is trained; the paper's thresholds are not known to us, the default is ours."""

    threshold: float = option(
        0.99, "theta: visual tokens exit where the cosine is above it; 1: never", least=-1, most=1
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        depth = geometry.llm_layers
        if depth < 2:
            raise VtpruneError(f"mue: a model of {depth} layers has no two whose inputs could be compared")
        exits = (
            Cut(site=f"llm.{i}", keep=0, adaptive=True, action=Action.STASH, observe=(i - 1,)) for i in range(1, depth)
        )
        return (*exits, *(Cut(site=f"llm.{i}", adaptive=True, action=Action.CONTEXT) for i in range(1, depth)))

    def select(self, view: TokenView, cut: Cut) -> Selection:
        pair = (view.features, view.source("states", layer="previous"))
        now, before = (wide(x).masked_fill(~view.valid[..., None], 0).flatten(1) for x in pair)
        lengths = now.norm(dim=1) * before.norm(dim=1)
        cosine = ((now * before).sum(1) / lengths.clamp_min(1e-30)).clamp(-1, 1)
        leaves = (cosine > self.threshold) & view.valid.any(1)
        return from_mask(view.valid & (view.protected | ~leaves[:, None]))
