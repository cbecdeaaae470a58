"""DPVR-LF: "Late-Layer Fusion is Enough: Dual-Path Vision Token Routing for MLLMs under Visual Saturation" (arXiv
2606.09131)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.select import from_mask
from ..core.types import Geometry, Selection, TokenView, VtpruneError
from ._started import STARTS, started
from ._weights import load_weights
from .base import Action, Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="dpvr-lf",
        paper="arXiv 2606.09131",
        idea="takes visual tokens out of the deep layers, through a trained side branch, and back for the last",
        kinds=("llm",),
        needs={"llm": frozenset({"query_attention", "layers"})},
        keep=None,
        budgeted=False,
        routes=True,
        cases=(
            {"split": 3},
            {"split": 1, "variant": "pc"},
            {"split": 1, "variant": "kv"},
            {"split": 0, "fusion_rows": "keys"},
        ),
    )
)
@dataclass(frozen=True, kw_only=True)
class DpvrLf(Method):
    """Section 3: layers ``0 .. s-1`` see everything; a side branch B of the backbone's own layers runs over the visual
    rows of ``h^s``; the layers between see text only, at their original positions; the last ``fusion`` layers see both
    again. Variants PC and KV give the same text and differ in cost.

    Train with ``vtprune train dpvr-lf``; the branch is ``handle.modules["dpvr-lf"]``."""

    split: int | None = option(None, "s: first layer without visual tokens (default: round(0.5625 * depth), 18 of 32)")
    fusion: int = option(1, "K: last layers that see text and visual tokens", least=0)
    branch_layers: int = option(1, "d_v: layers in the side branch", least=1)
    init: str = option(
        "copy",
        "side branch before training: 'copy' of layer s, 'identity' (outputs zeroed) or 'random'",
        choices=STARTS,
    )
    fusion_rows: str = option(
        "full",
        "visual rows in the last layer: 'full', or 'keys': keys and values only; the text is the same, the work less "
        "(fusion=1)",
        choices=("full", "keys"),
    )
    variant: str = option(
        "lf",
        "'lf' late fusion; 'pc': every deep layer gets B's output as visual rows (no saving); 'kv': as their keys and "
        "values only",
        choices=("lf", "pc", "kv"),
    )
    weights: str | None = option(None, "a trained branch (safetensors)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        depth = geometry.llm_layers
        (s,) = layers("dpvr-lf", self.split, geometry, (max(1, round(0.5625 * depth)),))
        if s + self.fusion > depth:
            raise VtpruneError(f"dpvr-lf: split={s} and fusion={self.fusion} do not fit into {depth} layers")
        if self.branch_layers > depth:
            raise VtpruneError(
                f"dpvr-lf: branch_layers={self.branch_layers} is more than the {depth} layers of this model"
            )
        if self.variant == "pc":
            aside = Cut(site=f"llm.{s}", action=Action.STASH)
            return (aside, *(Cut(site=f"llm.{i}", action=Action.RESTORE) for i in range(s, depth)))
        away = Cut(site=f"llm.{s}", keep=0, action=Action.STASH)
        if self.variant == "kv":
            return (away, *(Cut(site=f"llm.{i}", action=Action.CONTEXT) for i in range(s, depth)))
        if self.fusion_rows == "keys":
            if self.fusion != 1:
                raise VtpruneError(
                    "dpvr-lf: fusion_rows='keys' needs fusion=1, the visual rows of an earlier fusion layer go on "
                    f"(got fusion={self.fusion})"
                )
            return (away, Cut(site=f"llm.{depth - 1}", action=Action.CONTEXT))
        back = () if self.fusion == 0 else (Cut(site=f"llm.{depth - self.fusion}", action=Action.RESTORE),)
        return (away, *back)

    def select(self, view: TokenView, cut: Cut) -> Selection | None:
        return None if cut.keep is None else from_mask(torch.zeros_like(view.valid))

    def build(self, branch: Any, geometry: Geometry) -> nn.ModuleList:
        s = self.plan(geometry, None)[0].layer
        copies: list[Any] = [branch(s) for _ in range(self.branch_layers)]
        module = nn.ModuleList(copies)
        started(copies, self.init)
        if self.weights is not None:
            fits = f"{self.branch_layers} layers of this model"
            load_weights("dpvr-lf", self.weights, module, {"split": str(s)}, fits)
        return module

    def restore(self, hidden: Tensor, run: Any, module: nn.ModuleList) -> Tensor:
        for layer in module:
            hidden = run(layer, hidden)
        return hidden
