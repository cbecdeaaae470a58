"""SwiftKV: "SwiftKV: Fast Prefill-Optimized Inference with Knowledge-Preserving Model Transformation" (arXiv
2410.03960)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.select import from_mask
from ..core.types import Geometry, Lender, Selection, TokenView, UnsupportedError
from ._weights import load_weights
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
        cases=({"layer": 2, "rows": "all"}, {"layer": 3}, {"layer": 1}, {"layer": 2, "rows": "all", "norms": "each"}),
    )
)
@dataclass(frozen=True, kw_only=True)
class SwiftKV(Method):
    """SingleInputKV: with ``x^n`` the output of the first n layers, every layer ``j >= n`` takes
    ``K_j = R(W_K^j norm(x^n))`` and ``V_j = W_V^j norm(x^n)`` of every token, of prompt and answer alike, and its
    queries ``W_Q^j`` from its own hidden states. So a prompt's tokens whose logits nobody reads stop behind layer
    n - 1: the prunable ones do here, and layers n and later cache them all the same. The cache is as large as the dense
    model's, the prefill cheaper. A prompt without anything to prune is the unchanged model's, the paper's teacher.

    Without ``norms`` and ``weights`` this is the mechanism alone: norm (each layer's), ``W_Q^j``, ``W_K^j`` and
    ``W_V^j`` are the model's own, and answers of a model that was not trained for it suffer. With one of them there
    are copies, which ``vtprune train swiftkv`` distils: ``handle.modules["swiftkv"]`` (:class:`Distilled`), biases of
    the projections among them. One norm in front of all projections (``norms='one'``, published) and one of each layer
    make the same functions possible, as the gain of a norm is a factor of the columns of ``W_K`` and ``W_V``; they
    begin, and so train, otherwise. Norms per head (Qwen3, Gemma 3) stay the model's.

    AcrossKV, the sharing of a cache among layers, is not part of it: each layer keeps a cache of its own here.

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
    norms: str | None = option(
        None,
        "norms of the distilled part: 'one' for all layers from n on, at first layer n's (the paper), or one of "
        "'each', at first its own (default: with weights= 'one', else there is no distilled part)",
        choices=("one", "each"),
    )
    weights: str | None = option(None, "a distilled part (safetensors; metadata: layer=6, norms=one)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        depth = geometry.llm_layers
        n = self._first(geometry)
        deep = [f"llm.{j}" for j in range(n, depth)]
        lent = tuple(Cut(site=site, action=Action.LEND) for site in deep)
        if self.rows == "all":
            return lent
        context = (Cut(site=site, action=Action.CONTEXT) for site in deep)
        return (Cut(site=f"llm.{n}", keep=0, action=Action.STASH), *context, *lent)

    def _first(self, geometry: Geometry) -> int:
        (n,) = layers("swiftkv", self.layer, geometry, (geometry.llm_layers // 2,))
        return n

    def select(self, view: TokenView, cut: Cut) -> Selection:
        return from_mask(view.valid & view.protected)

    def build(self, branch: Any, geometry: Geometry) -> Distilled | None:
        if self.norms is None and self.weights is None:
            return None
        n, norms = self._first(geometry), self.norms or "one"
        part = Distilled(n, norms)
        for j in range(n, geometry.llm_layers):
            part.take(branch(j), j)
        if self.weights is not None:
            told = {"layer": str(n), "norms": norms}
            fits = f"layers {n} to {geometry.llm_layers - 1} of this model"
            load_weights("swiftkv", self.weights, part, told, fits, must_tell=True)
        return part.requires_grad_(False)

    def lend(self, cut: Cut, module: Distilled | None) -> Lender | None:
        return None if module is None or cut.action is Action.STASH else module.lender(cut.layer)


class Distilled(nn.Module):
    """``norm^swift``, ``W_Q^swift``, ``W_K^swift`` and ``W_V^swift`` of the layers from ``first`` on; ``norms``:
    ``"one"`` for all of them or one of ``"each"``."""

    def __init__(self, first: int, norms: str):
        super().__init__()
        self.first, self.norms = first, norms
        self.norm, self.q, self.k, self.v = (nn.ModuleList() for _ in range(4))

    def take(self, layer: Any, number: int) -> None:
        """Adds what is needed of a copied ``layer``, the model's ``number``. Raises :class:`UnsupportedError` for one
        whose queries, keys and values are not made by three linear projections behind a norm."""
        attention = getattr(layer, "self_attn", None)
        found = {name: getattr(attention, f"{name}_proj", None) for name in "qkv"}
        wrong = next((f"{name}_proj" for name, part in found.items() if type(part) is not nn.Linear), None)
        norm = getattr(layer, "input_layernorm", None)
        if wrong is not None or norm is None:
            raise UnsupportedError(
                f"swiftkv: layer {number} has no {wrong or 'input_layernorm'} of the usual kind: its queries, keys "
                "and values cannot be distilled one by one"
            )
        if self.norms == "each" or not len(self.norm):
            self.norm.append(norm)
        for name, part in found.items():
            getattr(self, name).append(part)

    def lender(self, number: int) -> Lender:
        """What takes the places of the model's own at layer ``number``."""
        i, one = number - self.first, self.norms == "one"
        return Lender(
            norm=self.norm[0 if one else i],
            beside=self.first if one else number,
            projections={"q": self.q[i], "k": self.k[i], "v": self.v[i]},
        )
