"""VoMix: "Vote&Mix: Plug-and-Play Token Reduction for Efficient Vision Transformer" (arXiv 2408.17062, ICME 2025), a
reconstruction.

Known from the abstract and from summaries: in every layer a vote by token similarity says which tokens are most
homogeneous, and these are mixed, softly, into those that are retained; no parameter, no training. The original does so
within self-attention alone and goes on with all N tokens behind it; here tokens are reduced: what was mixed away is
gone. Not known, and chosen here: that similarity is the cosine of mean-head keys, the form of the votes and of the
weights and their temperature, how many tokens each is mixed into, that the hidden states between attention and MLP are
mixed, that sizes weigh, the schedule, and that prefix tokens take no part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..core.select import merged
from ..core.types import Geometry, Mix, Selection, TokenView, UnsupportedError
from .base import Cut, Method, MethodInfo, option, register
from .tome import schedule


@register(
    MethodInfo(
        name="vomix",
        paper="arXiv 2408.17062",
        idea=(
            "a reconstruction that reduces tokens, where the original thins self-attention alone: those with the most "
            "similarity votes are mixed softly into the others"
        ),
        kinds=("vision",),
        needs={"vision": frozenset({"projections"})},
        merges=True,
        even=True,
        score="minus the votes: the mean over all other tokens of exp((cosine of keys - 1) / temperature)",
        cases=({"keep": 0.8}, {"keep": 0.25}),
    )
)
@dataclass(frozen=True, kw_only=True)
class VoMix(Method):
    """Votes ``v_i = mean_{j != i} exp((cos(k_i, k_j) - 1) / tau)`` over mean-head keys; the r tokens of the most votes
    leave. A retained token t becomes ``(s_t x_t + sum_i s_i w_it x_i) / (s_t + sum_i s_i w_it)`` with ``w_it =
    softmax_t(cos(k_i, k_t) / tau)`` over ``into`` retained tokens and sizes s; the size of i goes to its nearest t. All
    of it is our reading (see the module)."""

    r: int | tuple[int, ...] | None = option(
        None,
        "tokens mixed away per block: an int, or a list with one entry per block; replaces keep=, which spreads them "
        "evenly over the blocks (the original takes the same share of all N tokens in every layer)",
        least=0,
    )
    temperature: float = option(
        0.1, "of votes and mixing weights; smaller: nearer to a merge into the nearest token (our choice)", least=1e-3
    )
    into: int = option(
        8,
        "how many retained tokens each one is mixed into: the nearest in each of so many interleaved groups of them, "
        "its nearest of all among these; all of them where there are no more (our choice: no map of all pairs is made)",
        least=1,
    )
    proportional: bool = option(
        True,
        "add the log of the sizes to the attention logits (our choice: the original's keys stay, so that similar "
        "tokens go on counting)",
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        n, count = geometry.tokens, geometry.vision_layers
        if self.r is None:
            assert keep is not None
            counts = [n - (n - keep) * (i + 1) // count for i in range(count)]
        else:
            counts = []
            for r in schedule(self.r, 0.0, count, "vomix"):
                n -= min(r, n - 1)
                counts.append(n)
        return tuple(
            Cut(site=f"vision.{i}", keep=n, inside=True, proportional=self.proportional) for i, n in enumerate(counts)
        )

    def select(self, view: TokenView, cut: Cut) -> Selection:
        if view.extent[0] < view.valid.shape[1]:
            raise UnsupportedError(
                "mixing needs the same number of tokens in every image; the stage before it kept different numbers"
            )
        keys = view.source("projections").keys().mean(1)
        b, n, _ = keys.shape
        r = max(n - max(cut.keep or 0, 1), 0)
        identity = torch.arange(n, device=keys.device).repeat(b, 1)
        votes = kernels.energy(keys, "exp", margin=1.0, alpha=self.temperature, itself=False)
        score = votes.neg().masked_fill(view.protected, torch.inf)
        rank = score.argsort(dim=1, stable=True)
        gone, left = rank[:, :r], rank[:, r:].sort(1).values  # [B, r], [B, n - r]
        kept = torch.ones_like(identity, dtype=torch.bool).scatter(1, gone, False)
        if not r:
            return replace(merged(kept, identity, span=(n, n)), score=votes.neg())
        parts = min(self.into, n - r)
        found = [kernels.match(keys, gone, left[:, part::parts]) for part in range(parts)]
        similar = torch.stack([best for best, _ in found], 2)  # [B, r, parts]
        slot = torch.stack([at * parts + part for part, (_, at) in enumerate(found)], 2)
        nearest = slot.gather(2, similar.argmax(2, keepdim=True))[..., 0]  # [B, r], columns of left
        chosen = merged(kept, identity.scatter(1, gone, left.gather(1, nearest)), span=(n - r, n - r))
        weight = ((similar - similar.amax(2, keepdim=True)) / self.temperature).softmax(2)
        return replace(chosen, mix=_mix(view.size, gone, left, slot, weight), score=votes.neg())


def _mix(size: Tensor, gone: Tensor, left: Tensor, slot: Tensor, weight: Tensor) -> Mix:
    """Means over the tokens ``left`` ``[B, K]``, each in its own slot, and over the tokens ``gone`` ``[B, r]``, each in
    the slots ``slot`` ``[B, r, M]`` by ``weight``; ``size`` ``[B, N]``."""
    b, k = left.shape
    token = torch.cat([left, gone.repeat_interleave(slot.shape[2], 1)], 1)
    slot = torch.cat([torch.arange(k, device=left.device).expand(b, k), slot.flatten(1)], 1)
    share = torch.cat([weight.new_ones(b, k), weight.flatten(1)], 1) * size.gather(1, token).to(weight.dtype)
    _, total = kernels.merge(share[..., None], slot, k, size=share)  # sums in the same order each time
    return Mix(token, slot, share / total.gather(1, slot))
