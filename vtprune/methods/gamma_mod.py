"""γ-MoD: "γ-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models" (arXiv 2410.13859)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.select import from_mask, marked, top
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from ._weights import load_weights
from .base import Action, Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="gamma-mod",
        paper="arXiv 2410.13859",
        idea="in chosen layers only the visual tokens that a trained router picks run, the others pass them by",
        kinds=("llm",),
        needs={"llm": frozenset({"states"})},
        keep=0.5,
        exact=False,
        routes=True,
        learns=True,
        score="the router's probability",
        cases=(
            {"keep": 0.5, "layers": (1, 2, 4)},
            {"keep": 3, "layers": (2, 3), "weigh": "p"},
            {"keep": 0.25, "layers": (1, 3), "rule": "threshold", "weigh": "p"},
        ),
    )
)
@dataclass(frozen=True, kw_only=True)
class GammaMoD(Method):
    """Mixture of depths: in front of every routed layer l one router ``W_r`` ``[2, C]``, shared by all of them and
    without bias, gives each visual token ``p = softmax(W_r norm_l(x))[1]``, norm_l the layer's own input norm. The
    ``keep`` best tokens of an image, S, and all others that are not visual run the layer, with keys and values of their
    own there; ``x_S <- x_S + Attn(norm x_S)``, ``x_S <- x_S + p_S MLP(norm x_S)``, and the other visual tokens come to
    layer l + 1 as they came to l. Which layers are routed is said by ARank (``vtprune fit gamma-mod``), else all but
    0, 1, 2 and the last, as the official code's default.

    The paper's full text is not known to us; this is built from the official code's behaviour as others describe it.
    Ours: only visual tokens are routed and weighed (in the code everything up to a fixed position is, and the question
    and the answer always run; generated tokens always run, as in its Mini-Gemini variant), ``keep`` is a share of
    them and is met in use as well (in the code inference goes by a threshold: ``rule``), positions are the original
    ones (in the code counted anew within a layer: ``positions="compact"``), and the model around the router is frozen
    where the paper trains it all. For that, ``weigh="unit"`` is the default: p divides by its own value, so that S is
    not changed and keep=1.0 is the dense model, trained or not, and only the gradient is that of ``log p``.

    The router is ``handle.modules["gamma-mod"]``, trained by ``vtprune train gamma-mod``. While it wants gradients
    S is that of ``keep`` whatever the rule, and ``handle.told()`` gives each routed layer's ``router``, the
    cross-entropy of the router's outputs against membership in S, mean over an image's tokens."""

    layers: tuple[int, ...] | int | None = option(
        None, "routed layers (default: all but 0, 1, 2 and the last, the official code's preset)"
    )
    rule: str = option(
        "topk",
        "which visual tokens run: 'topk' the keep best of each image (ours), 'threshold' those whose p is at least "
        "threshold (official code), 'random' keep of them drawn by the seed, as a control",
        choices=("topk", "threshold", "random"),
    )
    threshold: float = option(0.5, "of rule='threshold' (official code: 0.005)", least=0, most=1)
    weigh: str = option(
        "unit",
        "by what the MLP's half is multiplied of visual tokens that run: 'p' (published), or 'unit': by 1, with the "
        "gradient of log p (ours; keep=1.0 is the dense model)",
        choices=("unit", "p"),
    )
    init: str = option(
        "random", "router before training: 'random', or 'zeros' (p = 1/2 everywhere)", choices=("random", "zeros")
    )
    weights: str | None = option(None, "a trained router (safetensors; metadata: layers=3,4,5 and weigh=unit)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        cuts: list[Cut] = []
        routed, free = self._routed(geometry), self.rule == "threshold"
        away = partial(Cut, keep=0 if free else keep, adaptive=free, action=Action.STASH, passing=True)
        for i in routed:
            cuts.append(away(site=f"llm.{i}", data={"keep": keep}))
            if i + 1 < geometry.llm_layers:
                cuts.append(Cut(site=f"llm.{i + 1}", action=Action.RESTORE))
        return tuple(cuts)

    def faithful(self) -> bool:
        return self.weigh == "unit"

    def _routed(self, geometry: Geometry) -> tuple[int, ...]:
        routed = layers("gamma-mod", self.layers, geometry, tuple(range(3, geometry.llm_layers - 1)))
        if not routed:
            raise VtpruneError(
                f"gamma-mod: all of the {geometry.llm_layers} layers are among 0, 1, 2 and the last, which are not "
                "routed unless layers= says so"
            )
        return routed

    def build(self, branch: Any, geometry: Geometry) -> Router:
        routed = self._routed(geometry)
        router = Router(routed, geometry.width)
        if self.init == "random":
            nn.init.normal_(router.w.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        if self.weights is not None:
            told = {"layers": ",".join(map(str, routed)), "weigh": self.weigh}
            load_weights("gamma-mod", self.weights, router, told, "the router of this model", must_tell=True)
        return router.requires_grad_(False)

    def work(self, tokens: Any, text: Any, cut: Cut, geometry: Geometry) -> Any:
        return flops(tokens, geometry.width) if cut.action is Action.STASH else 0

    def select(self, view: TokenView, cut: Cut) -> Selection:
        learning, keep = torch.is_grad_enabled(), cut.data["keep"]
        told = view.module(view.source("states", layer="next", norm="layer"))  # [B, N, 2]
        p = told.detach().softmax(-1)[..., 1]
        if self.rule == "random" and not learning:
            chosen = top(_drawn(view, cut.layer), keep, view.valid, view.protected)
        elif self.rule == "threshold" and not learning:
            ran = view.valid & (view.protected | (p >= self.threshold))
            chosen = replace(from_mask(ran), score=p)
        else:
            chosen = top(p, keep, view.valid, view.protected)
        if learning:
            ran = marked(chosen.kept, view.valid.shape[1])
            loss = nn.functional.cross_entropy(told.transpose(1, 2), ran.long(), reduction="none")
            view.tell("router", loss.masked_fill(~view.valid, 0).sum(1) / view.counts.clamp_min(1))
        if self.weigh == "p":
            weight = told.softmax(-1)[..., 1]
        else:
            log = told.log_softmax(-1)[..., 1]
            weight = 1 + log - log.detach() if learning else None
        return replace(chosen, mlp=weight, work=flops(view.counts, view.features.shape[2]))


def flops(tokens: Any, width: int) -> Any:
    """What the router runs for so many ``tokens``, two per multiply-add."""
    return 2 * tokens * 2 * width


def _drawn(view: TokenView, layer: int) -> Tensor:
    """``[B, N]``: a number drawn for each token, by the seed and the layer alone."""
    seeds = (view.seed,) if isinstance(view.seed, int) else view.seed
    whole = view.grid[0] * view.grid[1]
    draws = [torch.rand(whole, generator=torch.Generator().manual_seed(1000 * s + layer)) for s in seeds]
    drawn = torch.stack(draws).to(view.index.device).expand(len(view.index), -1)
    return drawn.gather(1, view.index.clamp_min(0))


class Router(nn.Module):
    """``W_r`` of tokens ``width`` wide, for the layers ``routed``."""

    def __init__(self, routed: tuple[int, ...], width: int):
        super().__init__()
        self.routed = routed
        self.w = nn.Linear(width, 2, bias=False)
        nn.init.zeros_(self.w.weight)

    def forward(self, rows: Tensor) -> Tensor:
        """What it gives of ``rows`` ``[B, N, C]``, ``[B, N, 2]`` before the softmax, in its own precision."""
        with torch.autocast(rows.device.type, enabled=False):
            return self.w(rows.to(self.w.weight.dtype))
