"""PiToMe: "Accelerating Transformers with Spectrum-Preserving Token Merging" (arXiv 2405.16148, NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..core.select import merged
from ..core.types import Geometry, Selection, TokenView, UnsupportedError, VtpruneError
from .base import Cut, Method, MethodInfo, option, register
from .tome import bipartite


@dataclass(frozen=True)
class Variant:
    """How one official wrapper runs it: ``metric`` keys or hidden states, ``inside`` between attention and MLP,
    ``margin(l, L)``, ``kind(l, L)``: pitome, bsm or tome."""

    metric: str
    inside: bool
    margin: Callable[[int, int], float]
    kind: Callable[[int, int], str]
    weighted: bool = True
    proportional: bool = False


VARIANTS = {
    "deit": Variant(
        "keys", True, lambda i, n: 0.75 * (1 - i / n), lambda i, n: "bsm" if i < (n + 1) // 2 else "pitome"
    ),
    "mae": Variant("keys", True, lambda i, n: 0.75 * (1 - i / n), lambda i, n: "pitome" if i < (n + 1) // 2 else "bsm"),
    "clip": Variant("hidden", True, lambda i, n: 0.95 * (1 - i / n), lambda i, n: "pitome"),
    "hf-clip": Variant(
        "hidden",
        False,
        lambda i, n: 0.9 * (1 - i / n),
        lambda i, n: "tome" if i <= n // 2 else "pitome",
        weighted=False,
    ),
    "blip": Variant("hidden", True, lambda i, n: 0.9 * (1 - i / n), lambda i, n: "pitome"),
    "blip2": Variant("keys", True, lambda i, n: 0.75 - 0.4 * i / n, lambda i, n: "pitome", proportional=True),
    "paper": Variant("keys", True, lambda i, n: 0.9 - 0.9 * i / n, lambda i, n: "pitome", proportional=True),
}
_BY_ARCH = {"clip": "hf-clip"}


@register(
    MethodInfo(
        name="pitome",
        paper="arXiv 2405.16148",
        idea="merges only tokens of large, dense clusters (high energy) and protects the distinct ones",
        kinds=("vision",),
        needs={"vision": frozenset({"projections"})},
        merges=True,
        even=True,
        score=(
            "minus the energy (mean similarity to all); in blocks that match by similarity (bsm, tome), minus that to "
            "the nearest of the other half"
        ),
        cases=({"keep": 0.8}, {"keep": 0.25}),
    )
)
@dataclass(frozen=True, kw_only=True)
class PiToMe(Method):
    """Energy ``E_i = mean_j f(cos(k_i, k_j) - m)`` (eq. 4); of the 2r tokens of highest energy every second merges into
    its nearest among the others (algorithm 1)."""

    variant: str = option(
        "auto",
        f"placement, metric and margins of one official wrapper: {', '.join(VARIANTS)}; 'auto': hf-clip for CLIP "
        "towers of an MLLM, else deit",
        choices=("auto", *VARIANTS),
    )
    ratio: float | None = option(
        None, "tokens kept per block, the paper's rho; replaces keep= (a block merges at most half)", least=0.5, most=1
    )
    matching: str | None = option(
        None,
        "'pitome', 'bsm' (energy-rank parity, then ToMe's rule) or 'tome' (which splits raster order) in every block "
        "instead of the variant's mixture",
        choices=(None, "pitome", "bsm", "tome"),
    )
    alpha: float = option(1.0, "scale of the energy's negative branch (eq. 4)", above=0)
    energy: str = option(
        "elu",
        "'elu': ELU(x - m), the official code; 'paper': x above the margin, alpha (exp(x - m) - 1) below it",
        choices=("elu", "paper"),
    )
    proportional: bool | None = option(
        None, "add the log of the sizes to the attention logits; default: as the variant"
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        name = (
            self.variant
            if self.variant != "auto"
            else _BY_ARCH.get(geometry.arch, "deit")
            if geometry.llm_layers
            else "deit"
        )
        v = VARIANTS[name]
        depth, count = geometry.vision_depth, geometry.vision_layers
        if self.ratio is not None:
            # Plain ToMe blocks count the prefix tokens as well (official code).
            counts = falling(
                geometry.tokens,
                self.ratio,
                count,
                [geometry.prefix * ((self.matching or v.kind(i, depth)) == "tome") for i in range(count)],
            )
        else:
            assert keep is not None
            counts = reach(geometry.tokens, keep, count)
        proportional = v.proportional if self.proportional is None else self.proportional
        return tuple(
            Cut(
                site=f"vision.{i}",
                keep=k,
                inside=v.inside,
                proportional=proportional,
                data={
                    "margin": v.margin(i, depth),
                    "kind": self.matching or v.kind(i, depth),
                    "metric": v.metric,
                    "weighted": v.weighted,
                },
            )
            for i, k in enumerate(counts)
        )

    def select(self, view: TokenView, cut: Cut) -> Selection:
        if view.extent[0] < view.valid.shape[1]:
            raise UnsupportedError(
                "merging needs the same number of tokens in every image; the stage before it kept different numbers"
            )
        metric = view.features if cut.data["metric"] == "hidden" else view.source("projections").keys().mean(1)
        r = view.features.shape[1] - (cut.keep or 0)
        selection = (
            bipartite(metric, view, r)
            if cut.data["kind"] == "tome"
            else self._match(metric, r, cut.data["margin"], cut.data["kind"])
        )
        if cut.data["weighted"]:
            return selection
        return replace(selection, weight=torch.ones_like(view.size))  # the HF CLIP wrapper takes the plain mean

    def _match(self, metric: Tensor, r: int, margin: float, kind: str) -> Selection:
        b, n, _ = metric.shape
        identity = torch.arange(n, device=metric.device).repeat(b, 1)
        if r <= 0:
            return merged(torch.ones_like(identity, dtype=torch.bool), identity, span=(n, n))
        # self-similarity included: official code
        energy = kernels.energy(metric, "elu" if self.energy == "elu" else "jump", margin=margin, alpha=self.alpha)
        rank = energy.argsort(dim=1, descending=True, stable=True)
        if kind == "pitome":
            a, d = rank[:, 0 : 2 * r : 2], rank[:, 1 : 2 * r : 2]  # [B, r] each
            source, target, score = a, d.gather(1, kernels.match(metric, a, d)[1]), energy.neg()
        else:  # PiToMe-BSM: parity of the energy rank, then the r most similar edges
            a, d = rank[:, 0::2], rank[:, 1::2]
            best, nearest = kernels.match(metric, a, d)
            edge = best.argsort(dim=1, descending=True, stable=True)[:, :r]
            source, target = a.gather(1, edge), d.gather(1, nearest.gather(1, edge))
            score = best.new_full(identity.shape, torch.nan).scatter(1, a, best.neg())
        kept = torch.ones_like(identity, dtype=torch.bool).scatter(1, source, False)
        left = n - source.shape[1]
        return replace(merged(kept, identity.scatter(1, source, target), span=(left, left)), score=score)


def falling(tokens: int, ratio: float, count: int, extra: Sequence[int] = ()) -> list[int]:
    """Tokens after each block: ``n - floor(n - n * ratio)``, evaluated in this form; ``extra`` tokens per block count
    in the ratio but never merge."""
    out = []
    for more in extra or [0] * count:
        tokens -= min(int(tokens + more - (tokens + more) * ratio), tokens // 2)
        out.append(tokens)
    return out


def reach(tokens: int, keep: int, count: int) -> list[int]:
    """The falling schedule that ends at exactly ``keep``: the smallest ratio that does not pass it, the last blocks
    take the rest."""
    low, high = 0.5, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if falling(tokens, middle, count)[-1] >= keep else (middle, high)
    counts = falling(tokens, high, count)
    extra = counts[-1] - keep
    previous = counts[-2] if count > 1 else tokens
    if extra and previous - keep > previous // 2:
        raise VtpruneError(
            f"pitome: {count} blocks cannot merge {tokens} tokens down to {keep}; ask for keep >= "
            f"{previous - previous // 2}"
        )
    return [*counts[:-1], keep]
