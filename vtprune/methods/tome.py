"""ToMe: "Token Merging: Your ViT But Faster" (arXiv 2210.09461, ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..core.select import merged
from ..core.types import Geometry, Selection, TokenView, UnsupportedError, VtpruneError
from .base import Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="tome",
        paper="arXiv 2210.09461",
        idea="merges the r most similar token pairs of a bipartite matching in every block",
        kinds=("vision",),
        needs={"vision": frozenset({"projections"})},
        merges=True,
        even=True,
        score="minus the cosine similarity to the nearest token of the other half; that half is not ranked",
        cases=({"keep": 0.8}, {"keep": 0.25}),
    )
)
@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """Section 3: between attention and MLP of every block; metric = keys, mean over heads; size-weighted mean;
    proportional attention (eq. 1)."""

    r: int | tuple[int, ...] | None = option(
        None, "tokens merged per block: an int, or a list with one entry per block; replaces keep=", least=0
    )
    inflect: float = option(
        0.0,
        "with an int r: -1 merges most in the first blocks, 1 in the last (the official (r, inflect) schedule)",
        least=-1,
        most=1,
    )
    proportional: bool = option(True, "add the log of the sizes to the attention logits (eq. 1)")
    order: str = option(
        "position",
        "'position': tokens stay in raster order; 'official': [unmerged A, all B] as the official code, which changes "
        "later matchings",
        choices=("position", "official"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        if self.inflect and not isinstance(self.r, int):
            raise VtpruneError(f"tome: inflect={self.inflect:g} spreads an integer r=; it says nothing here")
        count, n = geometry.vision_layers, geometry.tokens
        if self.r is None:
            assert keep is not None
            wish = spread(n - keep, count, n, geometry.prefix)
        else:
            wish = schedule(self.r, self.inflect, count)
        cuts = []
        for i, r in enumerate(wish):
            n -= min(r, n // 2)
            cuts.append(Cut(site=f"vision.{i}", keep=n, inside=True, proportional=self.proportional))
        return tuple(cuts)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        keys = view.source("projections").k[:, :, view.prefix :].mean(1)
        return bipartite(keys, view, view.features.shape[1] - (cut.keep or 0), official=self.order == "official")


def schedule(r: int | tuple[int, ...], inflect: float, count: int) -> list[int]:
    """The official ``parse_r``: constant, linear from ``r (1 - inflect)`` to ``r (1 + inflect)`` (each truncated), or
    as given."""
    if isinstance(r, list | tuple):
        if len(r) != count:
            raise VtpruneError(f"tome: r has {len(r)} entries, the tower has {count} blocks that count")
        return list(r)
    low = int(r * (1.0 - inflect))
    high = 2 * r - low
    return [int(low + (high - low) * i / max(count - 1, 1)) for i in range(count)]


def spread(total: int, count: int, tokens: int, prefix: int) -> list[int]:
    """``total`` merges over ``count`` blocks as evenly as the halving limit allows; raises :class:`VtpruneError` if
    they do not fit."""
    out, n = [], tokens
    for left in range(count, 0, -1):
        # an even share, or what the blocks behind could not make up for
        r = min(max(-(-total // left), n - (n - total) * 2 ** (left - 1)), n // 2)
        out.append(r)
        n, total = n - r, total - r
    if total:
        raise VtpruneError(f"tome: {count} blocks that halve at most leave {n} of {tokens} tokens; ask for keep >= {n}")
    return out


def bipartite(metric: Tensor, view: TokenView, r: int, *, official: bool = False) -> Selection:
    """Bipartite soft matching (section 3, steps 1-5) of patches ``metric`` ``[B, N, c]``; prefix tokens take part in
    the parity only.

    Positions alternate between A and B counting the prefix; every a finds its most similar b; the ``r`` most similar
    pairs merge.
    """
    if view.extent[0] < view.valid.shape[1]:
        raise UnsupportedError(
            "merging needs the same number of tokens in every image; the stage before it kept different numbers"
        )
    b, n, _ = metric.shape
    first, second = (torch.arange((view.prefix + side) % 2, n, 2, device=metric.device) for side in (0, 1))
    identity = torch.arange(n, device=metric.device).repeat(b, 1)
    r = min(r, len(first) if len(second) else 0)
    if r <= 0:
        return merged(torch.ones_like(identity, dtype=torch.bool), identity, span=(n, n))
    best, partner = kernels.match(metric, first, second)  # [B, |A|]
    ranked = best.argsort(dim=1, descending=True, stable=True)
    source, stay = first[ranked[:, :r]], first[ranked[:, r:]]  # [B, r], [B, |A| - r]
    destination = identity.scatter(1, source, second[partner.gather(1, ranked[:, :r])])
    kept = torch.ones_like(identity, dtype=torch.bool).scatter(1, source, False)
    chosen = merged(kept, destination, span=(n - r, n - r))
    # the B side is not ranked
    score = best.new_full(identity.shape, torch.nan).scatter(1, first.expand(b, -1), best.neg())
    if not official:
        return replace(chosen, score=score)
    # The official order: unmerged A (by position with a class token, by falling similarity without), then B.
    rest = torch.cat([stay.sort(1).values if view.prefix else stay, second.expand(b, -1)], dim=1)
    column = kept.long().cumsum(1) - 1
    return Selection(chosen.kept, chosen.target, chosen.weight, column.gather(1, rest), score, chosen.span)
