"""SwiftKV: "SwiftKV: Fast Prefill-Optimized Inference with Knowledge-Preserving Model Transformation" (arXiv
2410.03960)."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.select import from_mask
from ..core.types import Geometry, Selection, TokenView
from .base import Action, Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="swiftkv",
        paper="arXiv 2410.03960",
        idea="deep layers take the keys and values of all tokens from one layer's input, where prunable tokens stop",
        kinds=("llm",),
        needs={"llm": frozenset({"keys"})},
        keep=None,
        budgeted=False,
        routes=True,
        elsewhere={"rows": "all"},
        cases=({"layer": 2, "rows": "all"}, {"layer": 3}, {"layer": 1}),
    )
)
@dataclass(frozen=True, kw_only=True)
class SwiftKV(Method):
    """SingleInputKV: with ``x^n`` the output of the first n layers, every layer ``j >= n`` takes
    ``K_j = R(W_K^j norm_j(x^n))`` and ``V_j = W_V^j norm_j(x^n)`` of every token, of prompt and answer alike, and its
    queries from its own hidden states. So a prompt's tokens whose logits nobody reads stop behind layer n - 1: the
    prunable ones do here, and layers n and later cache them all the same. The cache is as large as the dense model's,
    the prefill cheaper.

    This is the mechanism without the paper's training: ``norm_j``, ``W_K^j``, ``W_V^j`` and ``W_Q^j`` are the model's
    own, where the paper distils ``norm^swift``, ``W_K^swift``, ``W_V^swift`` and ``W_Q^swift`` (AcrossKV, the sharing
    of caches among layers, is not part of it either); answers of a model that was not trained for it suffer. A prompt
    without anything to prune is the unchanged model's, the paper's teacher.

    Published n: 16 of 32 (Llama-3.1-8B), 40 of 80 (70B), 63 of 126 (405B); 21 of 28 (Qwen2.5-7B), 36 of 48 (14B), 48
    of 64 (32B); 15 of 27 (DeepSeek-V2-Lite)."""

    layer: int | None = option(
        None,
        "n: first layer whose keys and values are made of its own input x^n, as those of all behind it are "
        "(default: the middle one, 16 of 32 as in the paper)",
    )
    rows: str = option(
        "needed",
        "what runs through the layers from n on: 'needed' rows (all but the prunable tokens), or 'all', as when the "
        "paper trains: what 'needed' rows hold is the same, nothing is saved",
        choices=("needed", "all"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        depth = geometry.llm_layers
        (n,) = layers("swiftkv", self.layer, geometry, (depth // 2,))
        deep = [f"llm.{j}" for j in range(n, depth)]
        lent = tuple(Cut(site=site, action=Action.LEND) for site in deep)
        if self.rows == "all":
            return lent
        context = (Cut(site=site, action=Action.CONTEXT) for site in deep)
        return (Cut(site=f"llm.{n}", keep=0, action=Action.STASH), *context, *lent)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        return from_mask(view.valid & view.protected)
