"""ApET: "ApET: Approximation-Error Guided Token Compression for Efficient VLMs" (arXiv 2602.19870, CVPR 2026)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..core.select import from_mask, marked, merged, ranks, top
from ..core.types import Geometry, Selection, TokenView, UnsupportedError, VtpruneError
from ..kernels.base import first, rows, wide
from .base import Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="apet",
        paper="arXiv 2602.19870",
        idea="keeps the tokens that a few far-apart ones reconstruct worst, and merges the rest into them",
        kinds=("vision", "projector", "llm"),
        keep=128 / 576,
        merges=True,
        score="error of the reconstruction from the basis tokens, which stay whatever theirs is",
        cases=({"keep": 0.75}, {"keep": 0.2}, {"keep": 0.25, "site": "projector", "layer": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class ApET(Method):
    """``basis`` tokens b are chosen by farthest-point sampling (Euclidean); every token is approximated by ridge least
    squares, ``min_w ||x - sum_m w_m b_m||^2 + ridge ||w||^2``, with the error ``e = ||x - sum_m w_m b_m||``. The basis
    and the tokens of the largest e stay, T together; each of the others is averaged into the nearest by cosine.

    The official code puts the basis tokens into the last of T places, at positions of other tokens; here everything
    stands at its own. A budget of no more than ``basis`` tokens keeps the first ones of the sampling."""

    basis: int = option(10, "basis tokens", least=1)
    ridge: float = option(1e-5, "weight of the coefficients' squares", above=0)
    start: str = option(
        "mean",
        "the first basis token: the one farthest from the 'mean', the 'first', or one drawn by the 'seed' (official "
        "code: at random)",
        choices=("mean", "first", "seed"),
    )
    into: str = option(
        "all",
        "what the others are averaged into: 'all' that stays, or what stays for its error, 'ranked' (official code)",
        choices=("all", "ranked"),
    )
    site: str = option(
        "auto",
        "where the first stage is: 'tower' (behind the last block that is used), 'projector', 'auto': the tower where "
        "stages can be placed on single patches",
        choices=("auto", "tower", "projector"),
    )
    layer: int | None = option(
        None,
        "a second stage in front of this decoder layer, which leaves keep= (official code: 16 of 32; default: none)",
    )
    multiple: float = option(
        3.0,
        "with layer=: what the first stage leaves, as a multiple of keep= (official code: 96 and 32 tokens)",
        least=1,
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        assert keep is not None
        inside = "vision" in geometry.provides and (geometry.fold == 1 or self.site == "tower")
        if self.site == "tower" and not inside:
            raise UnsupportedError(
                f"apet: site='tower' merges tokens in the tower, where {geometry.family} has no stages; use "
                "site='projector'"
            )
        if "projector" not in geometry.provides and (self.site == "projector" or not inside):
            raise UnsupportedError(f"apet: {geometry.family} has no projector; use site='tower'")
        site = f"vision.{geometry.vision_layers - 1}" if inside and self.site != "projector" else "projector"
        if self.layer is None:
            return (Cut(site=site, keep=keep),)
        (layer,) = layers("apet", self.layer, geometry, ())
        return (
            Cut(site=site, keep=min(int(self.multiple * keep), geometry.tokens)),
            Cut(site=f"llm.{layer}", keep=keep),
        )

    def select(self, view: TokenView, cut: Cut) -> Selection:
        keep, n = cut.keep or 0, view.valid.shape[1]
        x = wide(view.features)
        x = x.masked_fill(~(view.valid & x.isfinite().all(-1))[..., None], 0)
        chosen = farthest(x, min(self.basis, keep), self._first(x, view), view.valid)
        error = _errors(x, chosen, self.ridge)
        basis = marked(chosen, n)
        # ranks of the error, whole numbers, below those of the basis
        rank = ranks(error.argsort(dim=1, descending=True, stable=True))
        kept = top((n * basis.long() - rank).double(), keep, view.valid, view.protected, span=view.extent)
        marks = marked(kept.kept, n)
        absorbers = marks & ~basis if self.into == "ranked" else marks
        absorbers = torch.where(absorbers.any(1, keepdim=True), absorbers, marks)
        return replace(self._merge(x, marks, absorbers, view), score=error)

    def _first(self, x: Tensor, view: TokenView) -> Tensor:
        """``[B]``: the position of the first basis token among the tokens ``x`` ``[B, N, C]``."""
        if self.start == "first":
            return first(view.valid)
        if self.start == "mean":
            mean = x.sum(1, keepdim=True) / view.counts.clamp_min(1)[:, None, None]
            return (x - mean).square().sum(-1).masked_fill(~view.valid, -1).argmax(1)
        seeds = (view.seed,) if isinstance(view.seed, int) else view.seed
        if len(seeds) not in (1, len(x)):
            raise VtpruneError(
                f"{len(seeds)} seeds were given for {len(x)} images; inside the tower there must be one for each image "
                "or tile"
            )
        draws = [
            torch.rand(view.grid[0] * view.grid[1], generator=torch.Generator().manual_seed(s), dtype=torch.float64)
            for s in seeds
        ]
        draw = torch.stack(draws).to(x.device).expand(len(x), -1).gather(1, view.index.clamp_min(0))
        return draw.masked_fill(~view.valid, -1).argmax(1)

    @staticmethod
    def _merge(x: Tensor, kept: Tensor, absorbers: Tensor, view: TokenView) -> Selection:
        """Every token of ``x`` ``[B, N, C]`` that is not ``kept`` ``[B, N]`` goes into the nearest of the
        ``absorbers`` ``[B, N]``."""
        position = torch.arange(x.shape[1], device=x.device).expand_as(kept)
        targets = from_mask(absorbers).kept
        nearest = kernels.match(x, position, targets)[1]
        into = targets.gather(1, nearest.clamp_min(0))
        destination = torch.where(kept, position, torch.where(view.valid & (nearest >= 0), into, -1))
        return merged(kept, destination)


def farthest(x: Tensor, count: int, first: Tensor, valid: Tensor) -> Tensor:
    """``[B, count]``: of the tokens ``x`` ``[B, N, C]`` the one at ``first`` ``[B]``, then again and again the one
    farthest from its nearest chosen token; -1 behind the last of an image that has fewer."""
    image = torch.arange(len(x), device=x.device)
    near = x.new_full(x.shape[:2], torch.inf).masked_fill(~valid, -torch.inf)
    out: list[Tensor] = []
    for _ in range(min(count, x.shape[1])):
        pick = near.argmax(1) if out else first
        out.append(torch.where(near[image, pick] >= 0, pick, -1))
        near = torch.minimum(near, (x - x[image, pick][:, None]).square().sum(-1))
        near[image, pick] = -torch.inf
    return torch.stack(out, 1) if out else first.new_zeros(len(x), 0)


def _errors(x: Tensor, chosen: Tensor, ridge: float) -> Tensor:
    """``[B, N]``: how far each of ``x`` ``[B, N, C]`` is from its approximation by the tokens at ``chosen`` ``[B, k]``
    (-1: none). The ridge makes the basis one of C + k channels, independent whatever the tokens are, which is made
    orthogonal step by step; the first C channels of what is left of ``[x, 0]`` are the error."""
    k, c = chosen.shape[1], x.shape[2]
    basis = rows(x, chosen).masked_fill(chosen[..., None] < 0, 0)
    basis = torch.cat([basis, ridge**0.5 * torch.eye(k, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)], -1)
    rest = torch.nn.functional.pad(x, (0, k))
    for j in range(k):
        q = torch.nn.functional.normalize(basis[:, j : j + 1], dim=-1)  # [B, 1, C + k]
        basis = basis - (basis * q).sum(-1, keepdim=True) * q
        rest = rest - (rest * q).sum(-1, keepdim=True) * q
    return rest[..., :c].norm(dim=-1)
