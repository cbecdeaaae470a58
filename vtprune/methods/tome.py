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
        "official",
        "order of the tokens that the next block splits into two halves: 'official': the unmerged of this block's "
        "first half, then its second half, as the official code; 'position': raster order",
        choices=("official", "position"),
    )

    def merges(self, geometry: Geometry, keep: int | None) -> list[int]:
        """How many pairs each block is asked to merge."""
        count, name = geometry.vision_layers, self.info.name
        if self.inflect and not isinstance(self.r, int):
            raise VtpruneError(f"{name}: inflect={self.inflect:g} spreads an integer r=; it says nothing here")
        if self.r is not None:
            return schedule(self.r, self.inflect, count, name)
        assert keep is not None
        return spread(geometry.tokens - keep, count, geometry.tokens, geometry.prefix, name)

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        n, cuts = geometry.tokens, []
        for i, r in enumerate(self.merges(geometry, keep)):
            n -= min(r, n // 2)
            cuts.append(Cut(site=f"vision.{i}", keep=n, inside=True, proportional=self.proportional))
        return tuple(cuts)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        keys = view.source("projections").keys().mean(1)
        return bipartite(keys, view, view.features.shape[1] - (cut.keep or 0), official=self.order == "official")


def schedule(r: int | tuple[int, ...], inflect: float, count: int, name: str = "tome") -> list[int]:
    """The official ``parse_r``: constant, linear from ``r (1 - inflect)`` to ``r (1 + inflect)`` (each truncated), or
    as given."""
    if isinstance(r, list | tuple):
        if len(r) != count:
            raise VtpruneError(f"{name}: r has {len(r)} entries, the tower has {count} blocks that count")
        return list(r)
    low = int(r * (1.0 - inflect))
    high = 2 * r - low
    return [int(low + (high - low) * i / max(count - 1, 1)) for i in range(count)]


def spread(total: int, count: int, tokens: int, prefix: int, name: str = "tome") -> list[int]:
    """``total`` merges over ``count`` blocks as evenly as the halving limit allows; raises :class:`VtpruneError` if
    they do not fit."""
    out, n = [], tokens
    for left in range(count, 0, -1):
        # an even share, or what the blocks behind could not make up for
        r = min(max(-(-total // left), n - (n - total) * 2 ** (left - 1)), n // 2)
        out.append(r)
        n, total = n - r, total - r
    if total:
        raise VtpruneError(
            f"{name}: {count} blocks that halve at most leave {n} of {tokens} tokens; ask for keep >= {n}"
        )
    return out


def bipartite(
    metric: Tensor, view: TokenView, r: int, *, official: bool = False, penalty: Tensor | None = None
) -> Selection:
    """Bipartite soft matching (section 3, steps 1-5) of patches ``metric`` ``[B, N, c]``; prefix tokens take part in
    the parity only.

    Tokens alternate between A and B counting the prefix; every a finds its most similar b; the ``r`` best pairs merge.

    Args:
        official: tokens alternate in the order that the official code leaves behind a matching, which the view's memory
            keeps from cut to cut; the running sequence stays in raster order. Otherwise they alternate in raster order.
        penalty: ``[B, N]``, subtracted from the similarity of a token's pair: it says which a merge, never into which
            b.
    """
    if view.extent[0] < view.valid.shape[1]:
        raise UnsupportedError(
            "merging needs the same number of tokens in every image; the stage before it kept different numbers"
        )
    b, n, _ = metric.shape
    identity = torch.arange(n, device=metric.device).repeat(b, 1)
    sequence = _recalled(view) if official else identity
    first, second = (sequence[:, (view.prefix + side) % 2 :: 2] for side in (0, 1))  # [B, |A|], [B, |B|]
    r = min(r, first.shape[1] if second.shape[1] else 0)
    if r <= 0:
        return merged(torch.ones_like(identity, dtype=torch.bool), identity, span=(n, n))
    best, partner = kernels.match(metric, first, second)  # [B, |A|]
    if penalty is not None:
        best = best - penalty.gather(1, first)
    ranked = best.argsort(dim=1, descending=True, stable=True)
    source = first.gather(1, ranked[:, :r])
    destination = identity.scatter(1, source, second.gather(1, partner.gather(1, ranked[:, :r])))
    kept = torch.ones_like(identity, dtype=torch.bool).scatter(1, source, False)
    if official:
        # Unmerged A (in their order with a class token, by falling similarity without), then B.
        stay = ranked[:, r:].sort(1).values if view.prefix else ranked[:, r:]
        _remember(view, torch.cat([first.gather(1, stay), second], dim=1))
    # the B side is not ranked
    score = best.new_full(identity.shape, torch.nan).scatter(1, first, best.neg())
    return replace(merged(kept, destination, span=(n - r, n - r)), score=score)


def _remember(view: TokenView, sequence: Tensor) -> None:
    """Keeps the positions ``sequence`` ``[B, m]``, in the order in which the next matching counts them, by original
    index: other stages may drop some."""
    place = torch.arange(sequence.shape[1], device=sequence.device).expand_as(sequence)
    table = place.new_zeros(len(sequence), view.grid[0] * view.grid[1])
    view.memory["place"] = table.scatter(1, view.index.gather(1, sequence), place)


def _recalled(view: TokenView) -> Tensor:
    """``[B, N]``: the view's positions in the order that the matching before left; raster order at first."""
    place = view.memory.get("place")
    return (view.index if place is None else place.gather(1, view.index)).argsort(1)
