"""MindSkip: "Router-Tuning: A Simple and Effective Approach for Enabling Dynamic-Depth in Transformers" (arXiv
2410.13184)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.types import Geometry
from ._weights import load_weights
from .base import Action, Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="mindskip",
        paper="arXiv 2410.13184",
        idea="leaves out the attention of layers whose trained gate says that the prompt does not need it",
        kinds=("llm",),
        keep=None,
        budgeted=False,
        skips=True,
        cases=({"init": "random"}, {"init": "random", "layers": (1, 3), "threshold": 0.6}),
    )
)
@dataclass(frozen=True, kw_only=True)
class MindSkip(Method):
    """Section 3: in each routed layer l a gate ``sigma = sigmoid(w_l . mean_t norm_l(x_t))`` over the prompt's tokens;
    the attention runs where ``sigma >= tau``, the MLP always. One decision for each prompt and layer, which its answer
    shares. Gates of zeros, as before training, leave nothing out: ``sigma = 0.5``.

    Samples without tokens that could be pruned stay whole. The gates are ``handle.modules["mindskip"]``, ``w``
    ``[layers, C]`` float32, trained by ``vtprune train mindskip``. Once they want gradients (``requires_grad_()``)
    every attention runs, times ``m = 1[sigma >= tau]`` whose gradient is that of ``sigma`` (straight through);
    ``handle.gates()`` gives ``m``."""

    layers: tuple[int, ...] | int | None = option(
        None, "routed layers (default: half of them, up to the last but one: 15 to 30 of 32)"
    )
    threshold: float = option(0.5, "tau: the attention runs where its gate is at least that", least=0, most=1)
    init: str = option(
        "zeros", "gates before training: 'zeros' (everything runs) or 'random'", choices=("zeros", "random")
    )
    weights: str | None = option(None, "trained gates (safetensors; metadata: layers=1,2,3)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        return tuple(Cut(site=f"llm.{i}", action=Action.SKIP, half="attention") for i in self._routed(geometry))

    def _routed(self, geometry: Geometry) -> tuple[int, ...]:
        depth = geometry.llm_layers
        default = tuple(range(depth - depth // 2 - 1, depth - 1))
        return layers("mindskip", self.layers, geometry, default)

    def build(self, branch: Any, geometry: Geometry) -> Gates:
        routed = self._routed(geometry)
        gates = Gates(routed, geometry.width)
        if self.init == "random":
            nn.init.normal_(gates.w, generator=torch.Generator().manual_seed(0))
        if self.weights is not None:
            told = {"layers": ",".join(map(str, routed))}
            fits = f"{len(routed)} gates of this model"
            load_weights("mindskip", self.weights, gates, told, fits, must_tell=True)
        return gates.requires_grad_(False)

    def skip(self, rows: Tensor, prompt: Tensor, cut: Cut, module: Gates) -> Tensor:
        return module(rows, prompt, cut.layer) < self.threshold

    def gate(self, rows: Tensor, prompt: Tensor, cut: Cut, module: Gates) -> Tensor | None:
        if not module.w.requires_grad:
            return None
        sigma = module(rows, prompt, cut.layer)
        return (sigma >= self.threshold).to(sigma) + (sigma - sigma.detach())


class Gates(nn.Module):
    """A gate for each of the layers ``routed``, ``width`` wide."""

    def __init__(self, routed: tuple[int, ...], width: int):
        super().__init__()
        self.routed = routed
        self.w = nn.Parameter(torch.zeros(len(routed), width))

    def forward(self, rows: Tensor, prompt: Tensor, layer: int) -> Tensor:
        """``sigma`` ``[B]`` of ``layer`` for ``rows`` ``[B, T, C]``, of which ``prompt`` ``[B, T]`` are meant."""
        mean = rows.float().masked_fill(~prompt[..., None], 0).sum(1) / prompt.sum(1, keepdim=True).clamp_min(1)
        return torch.sigmoid((mean * self.w[self.routed.index(layer)].to(mean)).sum(-1))
