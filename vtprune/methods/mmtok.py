"""MMTok: "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs" (arXiv 2508.18264, ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.types import Action, Geometry, Selection, TokenView, UnsupportedError
from ..kernels.base import cosines, wide
from ._greedy import covering
from ._turns import SCORE
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="mmtok",
        paper="arXiv 2508.18264",
        idea="chooses, one after the other, the token that covers most of the question's words and of the picture",
        kinds=("projector", "vision"),
        needs={"projector": frozenset({"text"})},
        keep=64 / 576,
        score=SCORE,
        cases=({"keep": 0.75}, {"keep": 3}),
        elsewhere={"features": "projected"},
    )
)
@dataclass(frozen=True, kw_only=True)
class MMTok(Method):
    """Sections 3.2 to 3.4: T times the token j of the highest ``sum_i max(0, M_ij - best_i)``, where ``best_i`` is the
    largest entry of row i at a chosen token, at first 0, and ``M = [P; alpha Q]`` with rows ``P = softmax(cos(z, v) /
    text_temperature) / m`` of the m words and ``Q = softmax(cos(x, x) / temperature) / N`` of the N patches; z input
    embeddings, v projected features, x those of the encoder. Rows of Q are made a few at a time.

    The words are all tokens behind the image, those of the chat template among them (of the whole prompt where none
    follow it): the official code's list of stop words and of benchmark suffixes goes by words. Patches of a padded
    picture's border compete like others."""

    alpha: float = option(0.5, "weight of covering the picture; 0: the words alone", least=0)
    text_temperature: float = option(
        0.02, "of words against patches (official code: 0.02 for LLaVA, 0.01 for Qwen2.5-VL)", above=0
    )
    temperature: float = option(0.2, "of patches against patches", above=0)
    features: str = option(
        "auto",
        "x: 'encoder', the output of the last block that is used, as the official code, 'projected', 'auto': encoder "
        "where the tower shows its blocks, else projected",
        choices=("auto", "encoder", "projected"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        last = geometry.seen_layers - 1
        if self.features == "encoder" and last < 0:
            raise UnsupportedError(
                f"mmtok: the blocks of its vision tower are not shown by {geometry.family} ({geometry.arch}); use "
                "features='projected'"
            )
        if self.features == "projected" or last < 0:
            return (Cut(site="projector", keep=keep),)
        site = f"vision.{last}"
        return Cut(site=site, action=Action.NOTE), Cut(site="projector", keep=keep, data={"noted": site})

    def note(self, view: TokenView, cut: Cut) -> Tensor:
        return view.features

    def select(self, view: TokenView, cut: Cut) -> Selection:
        x = view.noted(cut.data["noted"]) if "noted" in cut.data else view.features
        n = view.counts[:, None].clamp_min(1)
        made = view.valid & wide(x[..., 0]).isfinite()  # False for what the tower did not make
        total = kernels.energy(x, "exp", margin=1.0, alpha=self.temperature, valid=view.valid) * n
        weight = torch.where(made, self.alpha / (n * total), 0)
        return covering(x, cut.keep or 0, view, rows=self._words(view), weight=weight, temperature=self.temperature)

    def _words(self, view: TokenView) -> Tensor:
        """P ``[B, T, N]``, zero where there is no word."""
        text = view.source("text")
        behind = text.valid & text.after
        words = torch.where(behind.any(1, keepdim=True), behind, text.valid)
        logits = cosines(text.hidden, view.features) / self.text_temperature
        rows = logits.masked_fill(~view.valid[:, None], -torch.inf).softmax(-1)
        rows = rows / words.sum(1)[:, None, None].clamp_min(1)
        return rows.masked_fill(~(words[..., None] & view.valid[:, None]), 0)
