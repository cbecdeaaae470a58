"""SparseVLM: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (arXiv 2410.04417,
ICML 2025), and SparseVLM+, version 2.0 of its code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..core.select import from_mask, merged, ranks, top
from ..core.types import Geometry, Mix, Selection, TokenView, VtpruneError
from ..kernels.base import CHUNK, squares, wide
from .base import Cut, Method, MethodInfo, layers, option, register

TOKENS, DEPTH = 576, 32  # of the model that the official numbers are for
STAGES = (3, 7, 16)  # first layers with a shorter sequence: behind layers 2, 6 and 15
# Tokens behind each of them, recycled ones included, in the official settings "64", "96", "128" and "192".
OFFICIAL = {
    "1.5": ((82, 32, 18), (249, 55, 27), (312, 117, 39), (309, 204, 113)),
    "2.0": ((66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118)),
}


@register(
    MethodInfo(
        name="sparsevlm",
        paper="arXiv 2410.04417",
        idea="the words that the image speaks to rate the visual tokens; what goes is recycled into a few clusters",
        kinds=("llm",),
        needs={"llm": frozenset({"query_attention", "text"})},
        keep=113 / 576,
        merges=True,
        score="attention of the rating words in the layer before the cut",
        cases=({"keep": 0.75}, {"keep": 3}, {"keep": 2, "version": "2.0"}),
    )
)
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Method):
    """Section 3. Raters, once, on embeddings: ``P_t = mean over v of softmax over t (H_v . H_t)``, t behind the image,
    rates if P_t is above the mean; where none is, all of them do, and where no text stands behind the image the
    prompt's last row. A cut keeps the tokens to which raters and heads attend most in the layer before it, on average.

    Version 1.5 recycles: of the dropped tokens the best ``recycle`` share forms clusters (density peaks), each of which
    becomes one token at the place of its centre (official code: behind the image). ``keep`` and ``ratios`` count these;
    they are at most half of what a cut leaves. The official code's random 1e-6 on densities is left out: of equal ones
    the better rated is the denser. It renumbers positions (``positions="compact"``).

    Version 2.0 merges nothing, divides probabilities by what rotary positions alone would give, and averages the
    ``heads`` that have most of what is left on visual tokens.

    The settings "192", "128", "96" and "64" of 576 tokens are ``keep`` 113, 39, 27 and 18 (2.0: 118, 60, 28 and 20);
    the cuts of other budgets lie on straight lines between these, nothing and everything.
    """

    version: str = option("1.5", "'1.5': recycles; '2.0': SparseVLM+", choices=("1.5", "2.0"))
    layers: tuple[int, ...] | None = option(
        None,
        "first layer of each shortened stage, >= 1 (default: 3, 7 and 16 of 32, in proportion); fewer than three have "
        "the last ones' budgets",
        least=1,
    )
    ratios: tuple[float, ...] | None = option(
        None, "tokens left after each cut as fractions of the original number; replaces keep=", above=0, most=1
    )
    raters: str = option(
        "above", "P_t 'above' its mean (official code), or at 'least' that (paper)", choices=("above", "least")
    )
    recycle: float = option(0.3, "1.5: share of the dropped tokens that is recycled; 0: none", least=0, most=1)
    cluster: int = option(10, "1.5: recycled tokens per cluster", least=1)
    reconstruct: str = option(
        "mean",
        "1.5: the 'mean' of what is nearest to a centre (official code), or the 'sum' of what is nearest by cosine "
        "(paper)",
        choices=("mean", "sum"),
    )
    heads: float = option(0.5, "2.0: share of the heads that is averaged (14 of 28)", above=0, most=1)

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        n = geometry.tokens
        usual = [max(1, math.floor(i * geometry.llm_layers / DEPTH + 0.5)) for i in STAGES]  # two may fall together
        chosen = layers("sparsevlm", self.layers, geometry, tuple(sorted(set(usual))))
        if self.ratios is not None:
            if len(self.ratios) != len(chosen) or list(self.ratios) != sorted(self.ratios, reverse=True):
                raise VtpruneError(
                    f"sparsevlm: ratios={list(self.ratios)} must be {len(chosen)} falling fractions in (0, 1], one per "
                    f"layer of {list(chosen)}"
                )
            counts = dict(zip(chosen, (max(1, int(n * r + 1e-9)) for r in self.ratios), strict=True))
        elif len(chosen) > len(STAGES):
            raise VtpruneError(f"sparsevlm: for {len(chosen)} layers give ratios= as well, one per layer")
        else:
            assert keep is not None
            places = chosen if self.layers is not None else usual  # of two in one place the last holds
            counts = dict(zip(places, schedule(keep, n, self.version)[-len(places) :], strict=True))
        cuts = [Cut(site=f"llm.{i}", keep=k, observe=(i - 1,)) for i, k in counts.items()]
        return (Cut(site="llm.0", keep=n), *cuts)  # the first one looks at the words

    def select(self, view: TokenView, cut: Cut) -> Selection | None:
        if cut.layer == 0:
            view.memory["raters"] = self._raters(view)
            return None
        score = self._score(view)
        # a training sample without an answer stays whole
        keep = torch.where(view.source("queried"), view.counts.clamp_max(cut.keep or 0), view.counts)
        if self.version == "2.0":
            return top(score, keep, view.valid, view.protected)
        return self._recycled(view, score, keep)

    def _raters(self, view: TokenView) -> tuple[Tensor, bool]:
        """``[B, T]`` bool, of the text's rows those that rate, and whether a unit has none."""
        text = view.source("text")
        weight = view.valid.to(wide(text.hidden).dtype) / view.counts.clamp_min(1)[:, None]
        p = kernels.query_scores(
            view.features[:, None],
            text.hidden[:, None],
            scale=1.0,
            weight=weight,
            seen=text.after[:, None],
            backend="reference",  # rows as wide as the model are too much for a program on a GPU
        )
        mean = p.sum(1, keepdim=True) / text.after.sum(1, keepdim=True).clamp_min(1)
        rates = text.after & (p > mean if self.raters == "above" else p >= mean)
        rates = torch.where(rates.any(1, keepdim=True), rates, text.after)
        return rates, not bool(rates.any(1).all())

    def _score(self, view: TokenView) -> Tensor:
        """``[B, N]``: how the raters rate each token."""
        (rates, silent), plus = view.memory["raters"], self.version == "2.0"
        how: dict[str, Any] = {"rope": "corrected", "heads": "each"} if plus else {}
        score = view.source("query_attention", layer="previous", query=rates, **how)
        if silent:
            last = view.source("query_attention", layer="previous", query="last", **how)
            score = torch.where(rates.any(1).view(-1, *[1] * (score.ndim - 1)), score, last)
        if not plus:
            return score
        mass = score.masked_fill(~view.valid[..., None], 0).sum(1)  # [B, H]
        best = mass.argsort(dim=1, descending=True, stable=True)[:, : max(1, int(mass.shape[1] * self.heads))]
        return score.gather(2, best[:, None].expand(-1, score.shape[1], -1)).mean(2)

    def _recycled(self, view: TokenView, score: Tensor, keep: Tensor) -> Selection:
        """The best tokens, and the centres of clusters of the next best."""
        order = _order(score, view)
        kept, destination = torch.zeros_like(view.valid), torch.full_like(order, -1)
        kinds: dict[tuple[int, ...], list[int]] = {}  # images that are cut alike
        for b, numbers in enumerate(torch.stack([view.counts, keep, view.protected.sum(1)], 1).tolist()):
            kinds.setdefault(tuple(numbers), []).append(b)
        for numbers, images in kinds.items():
            first, pool, clusters = split(*numbers, self.recycle, self.cluster)
            mine = torch.tensor(images, device=order.device)
            best, rest = order[mine, :first], order[mine, first : first + pool]
            kept[mine[:, None], best], destination[mine[:, None], best] = True, best
            if clusters:
                features = view.features[mine[:, None], rest]
                centre, member = density_peaks(features, clusters, cosine=self.reconstruct == "sum")
                centre = rest.gather(1, centre)
                kept[mine[:, None], centre] = True
                destination[mine[:, None], rest] = centre.gather(1, member)
        if all(left >= there for there, left, _ in kinds):
            return replace(from_mask(kept), score=score)
        one = torch.ones_like(view.size)
        chosen = merged(kept, destination, one)
        mix = None
        if self.reconstruct == "sum" and chosen.target is not None:
            mix = Mix(torch.arange(order.shape[1], device=order.device).expand_as(order), chosen.target, one)
        return replace(chosen, score=score, mix=mix)


def schedule(keep: int, tokens: int, version: str) -> list[int]:
    """Tokens of ``tokens`` behind each of the three cuts, ``keep`` behind the last."""
    known = [(0, 0, 0), *OFFICIAL[version], (TOKENS,) * 3]
    wanted = keep * TOKENS / tokens
    low, high = next(pair for pair in zip(known, known[1:], strict=False) if wanted <= pair[1][-1] + 1e-9)
    share = (wanted - low[-1]) / (high[-1] - low[-1])
    counts = [math.floor((a + (b - a) * share) * tokens / TOKENS + 1e-6) for a, b in zip(low, high, strict=True)]
    return [max(keep, count) for count in counts[:-1]] + [keep]


@lru_cache(maxsize=1024)
def split(there: int, left: int, forced: int, share: float, size: int) -> tuple[int, int, int]:
    """How many of ``there`` tokens stay, are recycled, and how many clusters become of these, ``left`` tokens in all;
    ``forced`` must stay. Of n dropped ones ``int(share * n) + 1`` are recycled, of m recycled ones ``m // size + 1``
    clusters become."""

    def recycled(first: int) -> tuple[int, int]:
        pool = min(int(share * (there - first)) + 1, there - first) if share else 0
        return pool, min(pool // size + 1, pool, left // 2)

    if left >= there:
        return there, 0, 0
    first = next(k for k in range(left, -1, -1) if k + recycled(k)[1] <= left)
    first = max(first, min(forced, left))
    return first, recycled(first)[0], left - first


def _order(score: Tensor, view: TokenView) -> Tensor:
    """``[B, N]`` positions by falling score, what must be kept first, NaN behind the others, padding last."""
    ranked = score.nan_to_num(-torch.inf).masked_fill(view.protected, torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    return order.gather(1, view.valid.gather(1, order).int().argsort(dim=1, descending=True, stable=True))


def density_peaks(x: Tensor, count: int, *, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """``count`` clusters of tokens ``x`` ``[B, M, C]``, given by falling rank: the positions of their centres
    ``[B, count]``, and the cluster of every token ``[B, M]``, the nearest centre's (``cosine``: the most similar's).

    ``d`` = L2 distance over the root of C; density = ``exp(-mean d^2)`` of the ``count`` nearest, the token itself
    among them; centres have the largest density times distance to the nearest denser token (the densest: to the
    farthest). Compared in logarithms; of equal densities the first is the denser.
    """
    x = wide(x)
    b, m, c = x.shape
    step = max(1, CHUNK // (b * m))  # rows whose distances are made at once

    def distances(i: int) -> Tensor:
        """``[B, step, M]``: d^2, without rounding's sides: of two that are nearest to one another none is denser."""
        d = squares(x if step >= m else x[:, i : i + step], x) / c
        d.diagonal(i, 1, 2).zero_()
        return d

    whole = distances(0) if step >= m else None
    parts = [(i, whole) for i in range(0, m, step)]
    nearest = [(distances(i) if d is None else d).topk(count, largest=False).values.mean(2) for i, d in parts]
    density = -torch.cat(nearest, 1)
    rank = ranks(density.argsort(dim=1, descending=True, stable=True))
    apart = []
    for i, d in parts:
        d, mine = distances(i) if d is None else d, rank[:, i : i + step, None]
        ahead = d.masked_fill(rank[:, None] >= mine, torch.inf).amin(2)
        apart.append(torch.where(mine[..., 0] == 0, d.amax(2), ahead))
    # the logarithm of a distance is half that of its square
    centre = (density + torch.cat(apart, 1).log() / 2).argsort(dim=1, descending=True, stable=True)[:, :count]
    if cosine:
        member = kernels.match(x, torch.arange(m, device=x.device), centre)[1]
    else:
        member = squares(x, x[torch.arange(b, device=x.device)[:, None], centre]).argmin(2)
    return centre, member.scatter(1, centre, torch.arange(count, device=x.device).expand(b, -1))
