"""FocusLLaVA: "FocusLLaVA: A Coarse-to-Fine Approach for Efficient and Effective Visual Token Compression" (arXiv
2411.14228); a reconstruction, the paper's text and code are not public."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..core.select import merged, top
from ..core.types import Geometry, Selection, TokenView, UnsupportedError, VtpruneError
from ..kernels.base import wide
from ._weights import load_weights
from .base import Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="focusllava",
        paper="arXiv 2411.14228",
        idea="pools each block of the image as coarsely as a trained gate says; in the language model the text prunes",
        kinds=("projector", "llm"),
        needs={"projector": frozenset({"origin"}), "llm": frozenset({"query_attention", "text"})},
        keep=None,
        exact=False,
        budgeted=False,
        merges=True,
        learns=True,
        raster=True,
        whole=True,
        dial=("ratio", 0.01, 1.0),
        score="in the language model the attention of the text behind the image in the layer in front, mean over heads",
        cases=({"init": "random"}, {"init": "random", "ratio": 0.3, "scales": (1, 2)}, {"ratio": 0.5}),
    )
)
@dataclass(frozen=True, kw_only=True)
class FocusLLaVA(Method):
    """A reconstruction: what is public of the paper (abstract and reviews) names blocks, a gate that picks one of
    several granularities for each, a balance loss, and a text-guided sampler in the language model that is trained with
    a stochastic technique. All numbers and formulas here are ours.

    Vision-guided, behind the projector: the plane of each raster is cut into blocks of b x b tokens, b the largest of
    ``scales``; the last of a row or column are smaller. At scale r a block of h x w tokens becomes min(r, h) times
    min(r, w) means: row i goes to row floor(i min(r, h) / h) of them, columns alike; at b it stays as it is. The gate
    ``g = softmax(W x + c)`` of the block's mean token x says which, ``r* = argmax g``. A mean stands at its central
    token (of two the first). Reviews speak of max pooling; here it is the mean. New-line tokens stay, and so do blocks
    with a token that an answer follows at once. While the gate is trained the block's tokens are multiplied by
    ``g_{r*}`` over its own value: 1, with the gate's gradient (straight through).

    Text-guided, in front of ``layers``: of n tokens that are there ``ceil(ratio n)`` stay, those of the highest
    attention in the layer in front, mean over heads and the rows of the text behind the image. Without such text all
    stay. While the gate is trained the share is drawn from ``[ratio_min, 1]``, for each of these layers by the seed
    (``handle.reseed``, one for each step).

    Gates as they are before training leave every block as it is. They are ``handle.modules["focusllava"]``, ``w``
    ``[scales, C]`` and ``c`` ``[scales]`` float32, trained by ``vtprune train focusllava``; ``handle.told()`` then
    gives, for each image or raster, ``tokens``, those of its blocks, ``left`` of them (with the gradient of the
    expected number), and of each scale r the blocks that ``chosen.r`` it and their sum of ``gate.r``."""

    scales: tuple[int, ...] = option(
        (1, 2, 4),
        "rows and columns of tokens that a block may become, ascending; blocks have the last one's size",
        least=1,
    )
    init: str = option(
        "finest",
        "gates before training: 'finest' (every block stays as it is), 'coarsest' or 'random'",
        choices=("finest", "coarsest", "random"),
    )
    text: bool = option(True, "whether the text-guided sampler runs")
    layers: tuple[int, ...] | None = option(
        None, "text-guided: first layer of each shortened stage (default: 8, 16 and 24 of 32, in proportion)"
    )
    ratio: float = option(
        0.7, "text-guided: share of the tokens found in front of each of these layers that stays", above=0, most=1
    )
    ratio_min: float = option(0.5, "text-guided, in training: the share is drawn between this and 1", above=0, most=1)
    weights: str | None = option(None, "trained gates (safetensors; metadata: scales=1,2,4)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        if len(self.scales) < 2 or list(self.scales) != sorted(set(self.scales)):
            raise VtpruneError(f"focusllava: scales={list(self.scales)} must be two ascending numbers or more")
        if self.scales[-1] > 64:
            raise VtpruneError(f"focusllava: scales={list(self.scales)}: blocks have a side of at most 64 tokens")
        rasters = geometry.rasters or (geometry.grid,)
        least = sum(_coarsest(rows, columns, self.scales) for rows, columns in rasters)
        most = geometry.tokens
        cuts = [Cut(site="projector", keep=min(least, most), adaptive=True)]
        for i in self._layers(geometry):
            least, most = kept_of(least, self.ratio), kept_of(most, self.ratio)
            cuts.append(Cut(site=f"llm.{i}", keep=least, adaptive=True, most=most, joint=True, observe=(i - 1,)))
        return tuple(cuts)

    def _layers(self, geometry: Geometry) -> tuple[int, ...]:
        """In front of which the text-guided sampler runs."""
        if not self.text:
            if self.layers is not None:
                raise VtpruneError("focusllava: layers= are those of the text-guided sampler, and text=False")
            return ()
        depth = geometry.llm_layers
        default = tuple(sorted({depth // 4, depth // 2, 3 * depth // 4} - {0}))
        chosen = layers("focusllava", self.layers, geometry, default)
        if not chosen or chosen[0] == 0:
            raise VtpruneError(
                "focusllava: the text-guided sampler reads the layer in front: layers >= 1, or text=False"
            )
        return chosen

    def build(self, branch: Any, geometry: Geometry) -> Gate:
        gate = Gate(self.scales, geometry.width, self.init)
        if self.weights is not None:
            told = {"scales": ",".join(map(str, self.scales))}
            fits = f"a gate of {len(self.scales)} scales in this model"
            load_weights("focusllava", self.weights, gate, told, fits, must_tell=True)
        return gate.requires_grad_(False)

    def work(self, tokens: Any, text: Any, cut: Cut, geometry: Geometry) -> Any:
        if cut.kind == "llm":
            return 0
        side = self.scales[-1]
        many = sum(-(-rows // side) * -(-columns // side) for rows, columns in geometry.rasters or (geometry.grid,))
        return flops(many, len(self.scales), geometry.width)

    def select(self, view: TokenView, cut: Cut) -> Selection | None:
        return self._asked(view, cut) if cut.kind == "llm" else self._pooled(view)

    def _asked(self, view: TokenView, cut: Cut) -> Selection | None:
        """The tokens that the text attends to most."""
        ratio: float | Tensor = self.ratio
        if torch.is_grad_enabled():  # the gate is being trained
            ratio = self.ratio_min + (1 - self.ratio_min) * drawn(view, cut.layer)
        text = view.source("text")
        rows = text.valid & text.after
        score = view.source("query_attention", layer="previous", query=rows)
        keep = torch.where(rows.any(1), kept_of(view.counts, ratio), view.counts)
        return top(score, keep, view.valid, view.protected)

    def _pooled(self, view: TokenView) -> Selection:
        """Every block at the scale of its gate."""
        rows, columns = view.grid
        b, n = view.index.shape
        if n != rows * columns:
            raise UnsupportedError(
                "focusllava needs the whole raster; it cannot follow a stage that drops or merges tokens"
            )
        lines = view.source("origin")[..., 1] < 0  # [B, n] new lines
        made = plane(lines, rows, columns)
        cells = blocks(rows, columns, made, self.scales)
        block, into, members, counts = (t.to(view.features.device) for t in cells)
        many, finest = len(members), len(self.scales) - 1
        free = torch.ones(b, many + 1, dtype=torch.bool, device=block.device)
        free = free.scatter_reduce(1, block.expand(b, -1), ~view.protected, "amin")[:, :many]
        g = view.module(pooled(view.features, members))  # [B, blocks, R]
        chosen = torch.where(free, g.argmax(-1), finest)  # [B, blocks]
        every = torch.nn.functional.pad(chosen, (0, 1), value=finest)[:, block]  # [B, n]
        destination = into.t().expand(b, -1, -1).gather(2, every[..., None])[..., 0]
        kept = destination == torch.arange(n, device=block.device)
        selection = merged(kept, destination, torch.ones_like(view.size))
        work = flops(many, len(self.scales), view.features.shape[2])
        selection = replace(selection, work=view.counts.new_full((b,), work))
        if not torch.is_grad_enabled():
            return selection
        self._tell(view, g, chosen, counts, free)
        won = g.gather(-1, chosen[..., None])[..., 0]
        factor = torch.where(free, won / won.detach(), 1.0)
        return replace(selection, gate=torch.nn.functional.pad(factor, (0, 1), value=1.0)[:, block])

    def _tell(self, view: TokenView, g: Tensor, chosen: Tensor, counts: Tensor, free: Tensor) -> None:
        """What the losses read; ``counts`` ``[R, blocks]`` tokens of each block at each scale."""
        counts = counts.t().to(g)  # [blocks, R]
        hard = torch.nn.functional.one_hot(chosen, g.shape[-1]).to(g)
        straight = hard + g - g.detach()
        view.tell("tokens", (counts[:, -1] * free).sum(1))
        view.tell("left", (straight * counts * free[..., None]).sum((1, 2)))
        for i, r in enumerate(self.scales):
            view.tell(f"chosen.{r}", (hard[..., i] * free).sum(1))
            view.tell(f"gate.{r}", (g[..., i] * free).sum(1))


def flops(blocks: int, scales: int, width: int) -> int:
    """What the gate runs for so many ``blocks``, two per multiply-add."""
    return 2 * blocks * scales * width


class Gate(nn.Module):
    """Which of the ``scales`` a block has, by its mean token of ``width`` channels."""

    def __init__(self, scales: tuple[int, ...], width: int, init: str = "finest"):
        super().__init__()
        self.scales = scales
        w, c = torch.zeros(len(scales), width), torch.zeros(len(scales))
        if init == "random":
            nn.init.normal_(w, generator=torch.Generator().manual_seed(0))
        else:
            c[-1 if init == "finest" else 0] = 1.0
        self.w, self.c = nn.Parameter(w), nn.Parameter(c)

    def forward(self, mean: Tensor) -> Tensor:
        """``[B, blocks, R]``: the softmax over the scales, of the blocks' means ``[B, blocks, C]``."""
        logits = [(mean * w).sum(-1) for w in self.w.to(mean)]
        return (torch.stack(logits, -1) + self.c.to(mean)).softmax(-1)


def kept_of(count: Any, ratio: Any) -> Any:
    """``ceil(ratio count)``, one at least, of a number or a tensor of them; 0 of 0."""
    if isinstance(count, Tensor):
        return torch.minimum((count.double() * ratio - 1e-6).ceil().long().clamp_min(1), count)
    return int(kept_of(torch.tensor(count), ratio))


def drawn(view: TokenView, layer: int) -> Tensor:
    """``[B]``, or one for all: numbers from 0 to 1 by the seed of the run or of each sample, and the layer."""
    seeds = (view.seed,) if isinstance(view.seed, int) else view.seed
    numbers = [
        torch.rand(layer + 1, generator=torch.Generator().manual_seed(s), dtype=torch.float64)[-1] for s in seeds
    ]
    return torch.stack(numbers).to(view.valid.device)


def plane(lines: Tensor, rows: int, columns: int) -> int:
    """How many columns of the raster the tower made, of the tokens ``lines`` ``[B, rows * columns]`` that it did not:
    new lines stand at the end of rows. Raises :class:`UnsupportedError` for any other order."""
    whole = lines.reshape(-1, columns)
    made = columns - int(whole[0].sum())
    if not torch.equal(whole, (torch.arange(columns, device=lines.device) >= made).expand_as(whole)):
        raise UnsupportedError("focusllava: tokens that the tower did not make stand elsewhere than at the end of rows")
    return made


def pooled(x: Tensor, members: Tensor) -> Tensor:
    """``[B, blocks, C]``: the means of the tokens ``x`` ``[B, n, C]`` of each block, in at least 32 bits; ``members``
    ``[blocks, b * b]``, padded with n."""
    there = members < x.shape[1]
    rows = torch.nn.functional.pad(wide(x), (0, 0, 0, 1))[:, members]  # [B, blocks, b * b, C]
    return rows.sum(2) / there.sum(1, keepdim=True)


def parts(length: int, side: int, scale: int) -> list[tuple[int, int, int]]:
    """Of each of ``length`` places in a line its block, of which each has ``side`` places, the last maybe fewer, the
    first place of its part of that block at this ``scale``, and the part's length."""
    out = []
    for i in range(length):
        start = i // side * side
        size = min(side, length - start)
        count = min(scale, size)
        mine = [j for j in range(size) if j * count // size == (i - start) * count // size]
        out.append((i // side, start + mine[0], len(mine)))
    return out


def _coarsest(rows: int, columns: int, scales: tuple[int, ...]) -> int:
    """The fewest tokens that a raster can become."""
    down, across = (len({start for _, start, _ in parts(m, scales[-1], scales[0])}) for m in (rows, columns))
    return down * across


@lru_cache(maxsize=256)
def blocks(rows: int, columns: int, made: int, scales: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a raster of n tokens whose first ``made`` columns are cut into blocks: ``block`` ``[n]``, each token's (those
    of the other columns: one too many); ``into`` ``[R, n]``, the token at which it stands at each scale; ``members``
    ``[blocks, b * b]``, padded with n; ``counts`` ``[R, blocks]``, tokens of each at each scale. Made once: read
    only."""
    side, n = scales[-1], rows * columns
    many = -(-rows // side) * -(-made // side)
    block, into = torch.full((n,), many), torch.arange(n).repeat(len(scales), 1)
    for k, scale in enumerate(scales):
        down, across = parts(rows, side, scale), parts(made, side, scale)
        for i, (band, top_, height) in enumerate(down):
            for j, (column, left, width) in enumerate(across):
                block[i * columns + j] = band * -(-made // side) + column
                into[k, i * columns + j] = (top_ + (height - 1) // 2) * columns + left + (width - 1) // 2
    members = torch.full((many, side * side), n)
    for number in range(many):
        mine = (block == number).nonzero()[:, 0]
        members[number, : len(mine)] = mine
    stands = into == torch.arange(n)
    counts = torch.stack([torch.bincount(block[s], minlength=many + 1)[:many] for s in stands])
    return block, into, members, counts
