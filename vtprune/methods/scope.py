"""SCOPE: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs" (arXiv 2510.24214, NeurIPS
2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.types import Geometry, Selection, TokenView, UnsupportedError, VtpruneError
from ..kernels.base import wide
from ._greedy import covering
from ._tower import NEEDS, TowerScored, class_attention
from ._turns import SCORE
from .base import Cut, MethodInfo, option, register


@register(
    MethodInfo(
        name="scope",
        paper="arXiv 2510.24214",
        idea="chooses, one after the other, the token that covers most of what is not covered yet, times its saliency",
        kinds=("vision", "projector"),
        needs=NEEDS,
        keep=64 / 576,
        score=SCORE,
        cases=({"keep": 0.75}, {"keep": 0.1}, {"keep": 3, "features": "projected"}),
        elsewhere={"saliency": "norm", "features": "projected"},
    )
)
@dataclass(frozen=True, kw_only=True)
class Scope(TowerScored):
    """Section 3: T times the token v of the highest ``A_v^alpha * sum_u max(0, cos(x_u, x_v) - c_u)``, where ``c_u`` is
    the largest similarity of u with a chosen token, at first 0."""

    alpha: float = option(1.0, "power of the saliency; 0: coverage alone (facility location)", least=0)
    saliency: str = option(
        "auto",
        "A: 'attention', the class attention of the last block that is used (in towers without a class token that "
        "which a patch receives), 'norm', the length of x (a port's form for such towers), 'auto': attention where the "
        "tower has a class token and shows its blocks, else norm",
        choices=("auto", "attention", "norm"),
    )
    features: str = option(
        "auto",
        "x: 'encoder', the output of the last block that is used, 'projected', behind the projector (as a port has "
        "it), 'auto': encoder where the tower shows its blocks, else projected",
        choices=("auto", "encoder", "projected"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        shown = bool(geometry.seen_layers)
        if not shown and (self.site == "tower" or self.saliency == "attention" or self.features == "encoder"):
            raise UnsupportedError(
                f"scope: the blocks of its vision tower are not shown by {geometry.family} ({geometry.arch}); use "
                "site='projector', saliency='norm', features='projected' or their 'auto'"
            )
        if self.site == "tower" and self.features == "projected":
            raise VtpruneError("scope: features='projected' are not there in the tower; use site='projector'")
        if self.features == "projected" and "projector" not in geometry.provides:
            raise UnsupportedError(
                f"scope: features='projected' need a projector, and {geometry.family} ({geometry.arch}) has none; use "
                "features='encoder'"
            )
        classed = shown and "class_token" in geometry.traits
        data = {
            "saliency": self.saliency if self.saliency != "auto" else "attention" if classed else "norm",
            "features": self.features if self.features != "auto" else "encoder" if shown else "projected",
        }
        if data == {"saliency": "norm", "features": "projected"}:  # nothing is asked of the tower
            return (Cut(site="projector", keep=keep, data=data),)
        placed = replace(self, site="projector") if data["features"] == "projected" else self
        return tuple(replace(cut, data={**cut.data, **data}) for cut in super(Scope, placed).plan(geometry, keep))

    def note(self, view: TokenView, cut: Cut) -> Tensor:
        """``[B, N, 1 + C]`` or either part: the attention, and features where they are not to be projected."""
        parts = [class_attention(view)[..., None]] if cut.data["saliency"] == "attention" else []
        parts += [wide(view.features)] if cut.data["features"] == "encoder" else []
        return torch.cat([p.to(parts[-1].dtype) for p in parts], -1)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        known, attention = view.features, cut.data["saliency"] == "attention"
        if cut.kind == "vision":
            known = self.note(view, cut)
        elif "blocks" in cut.data:
            known = view.noted(f"vision.{cut.data['blocks'][0]}")
        x = view.features if cut.data["features"] == "projected" else known[..., 1:] if attention else known
        saliency = wide(known[..., 0] if attention else wide(x).norm(dim=-1))
        missing = saliency.isnan()  # the tower did not make the token
        most = saliency.masked_fill(missing | ~view.valid, 0).amax(1, keepdim=True)
        prior = (saliency / most.clamp_min(torch.finfo(most.dtype).tiny)) ** self.alpha
        prior, weight = prior.masked_fill(missing, torch.nan), (~missing).to(prior.dtype)
        return covering(x, cut.keep or 0, view, prior=prior, weight=weight)
