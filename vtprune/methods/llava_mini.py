"""LLaVA-Mini: "LLaVA-Mini: Efficient Image and Video Large Multimodal Models with One Vision Token" (arXiv 2501.03895,
ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.select import merged
from ..core.types import Geometry, Mix, Selection, TokenView, UnsupportedError, VtpruneError
from ..kernels.base import wide
from ._sites import cells
from ._started import STARTS, started
from ._weights import load_weights
from .base import Action, Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="llava-mini",
        paper="arXiv 2501.03895",
        idea="trained queries make a few tokens of each image; the text is read beside all of it before the model",
        kinds=("llm",),
        needs={"llm": frozenset({"layers"})},
        keep=None,
        budgeted=False,
        merges=True,
        fuses=True,
        learns=True,
        raster=True,
        whole=True,
        cases=({"grid": 2, "fusion": 2}, {"fusion": 1, "init": "random", "pe": "upsampled"}),
    )
)
@dataclass(frozen=True, kw_only=True)
class LlavaMini(Method):
    """With the rows ``H_v`` ``[n, d]`` of an image as the language model is given them and C x C queries ``Q``, ``A =
    softmax((Q + PE(Q)) (H_v + PE(H_v))^T)`` ``[C^2, n]``, PE two-dimensional sines and cosines; the model reads ``A
    H_v`` instead of ``H_v`` (compression). In front of it the text ``H_q`` of the prompt becomes the last rows of
    ``f([H_v ; H_q])``, f ``fusion`` layers built like the model's own, causal (modality pre-fusion).

    Every image, tile and frame of a video is compressed by itself, into the places of the central tokens of C x C
    cells; one of fewer tokens stays as it is. The text of a prompt is fused with all its images at once, with a video
    frame by frame, which is averaged. Answers (labels), generated tokens and later turns go in as they are; so does a
    prompt without an image.

    The code's attention (layer norms, eight heads with projections of their own) is not built, nor are compressed
    tokens that go through the pre-fusion: both are the code's, not the paper's. Ours: the positions that the tokens
    have in the prompt (``numbering``), where the queries stand (``pe``), and how the layers begin (``init``).

    Train with ``vtprune train llava-mini``; the part is ``handle.modules["llava-mini"]``."""

    grid: int = option(1, "C: each image becomes C x C tokens", least=1)
    fusion: int = option(4, "layers of the pre-fusion; 0: the text stays as it is", least=0)
    init: str = option(
        "copy",
        "pre-fusion before training: 'copy' of the model's first layers (ours: the paper does not say), 'identity' "
        "(outputs zeroed) or 'random' (the official code)",
        choices=STARTS,
    )
    pe: str = option(
        "grid",
        "of the image's tokens: 'grid' sines and cosines of their own rows and columns, queries stand at the middle of "
        "their cells; 'upsampled' the official code's: those of C x C enlarged, which for C = 1 tells nothing apart",
        choices=("grid", "upsampled"),
    )
    scaled: bool = option(
        False,
        "divide the products by sqrt(d), as attention does (the paper's equation does not)",
    )
    numbering: str = option(
        "original",
        "positions in the pre-fusion: 'original' those in the prompt, or 'running' (the official code): counted there, "
        "visual tokens first",
        choices=("original", "running"),
    )
    weights: str | None = option(None, "trained queries and layers (safetensors)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        rasters = geometry.rasters or (geometry.grid,)
        n = self.grid**2
        if geometry.tokens < n and not geometry.variable:
            raise VtpruneError(f"llava-mini: grid={self.grid} makes {n} tokens of images that have {geometry.tokens}")
        if self.fusion > geometry.llm_layers:
            raise VtpruneError(
                f"llava-mini: fusion={self.fusion} is more than the {geometry.llm_layers} layers there are"
            )
        if self.numbering == "running" and geometry.mrope:
            raise UnsupportedError(
                f"llava-mini: numbering='running': {geometry.family} places tokens by time, row and column, which "
                "counting them anew does not define"
            )
        left = sum(min(n, rows * columns) for rows, columns in rasters)
        recount = self.numbering == "running"
        return (Cut(site="llm.0", keep=left, action=Action.FUSE, joint=True, recount=recount),)

    def build(self, branch: Any, geometry: Geometry) -> Mini:
        if geometry.width % 4:
            raise UnsupportedError(
                f"llava-mini: sines and cosines of two axes need a width of 4 k, not {geometry.width}"
            )
        copies: list[Any] = [branch(i) for i in range(self.fusion)]
        started(copies, self.init)
        mini = Mini(self.grid, geometry.width, copies)
        if self.weights is not None:
            told = {name: str(value) for name, value in self.belongs().items()}
            fits = f"{self.grid} x {self.grid} queries and {self.fusion} layers of this model"
            load_weights("llava-mini", self.weights, mini, told, fits, must_tell=True)
        return mini.requires_grad_(False)

    def belongs(self) -> dict[str, Any]:
        """The options that trained weights belong to."""
        return {name: getattr(self, name) for name in ("grid", "fusion", "pe", "scaled", "numbering")}

    def work(self, tokens: Any, text: Any, cut: Cut, geometry: Geometry) -> Any:
        return sum(self._flops(r * c, geometry.width) for r, c in geometry.rasters or (geometry.grid,))

    def _flops(self, n: int, width: int) -> int:
        """Of the compression of ``n`` tokens, two per multiply-add: ``A``, and ``A H_v``."""
        return 4 * n * self.grid**2 * width if n > self.grid**2 else 0

    def select(self, view: TokenView, cut: Cut) -> Selection:
        rasters = view.rasters[0] if view.rasters else (view.grid,)  # the same of all units of a view
        total = sum(rows * columns for rows, columns in rasters)
        if view.extent[0] != total:
            raise UnsupportedError(
                "llava-mini needs the whole raster; it cannot follow a stage that drops or merges tokens"
            )
        b, device = len(view.index), view.features.device
        kept, destination, entries = [], [], []
        start = slots = 0
        for rows, columns in rasters:
            end, n = start + rows * columns, min(self.grid**2, rows * columns)
            mine, into = cells(rows, columns, n)
            kept.append(mine)
            destination.append(into + start)
            if n == self.grid**2:
                part = wide(view.features[:, start:end])
                weight = view.module(part, rows, columns, self.pe, self.scaled)  # [B, rows * columns, n]
            else:
                weight = wide(view.features.new_ones(n)).diag().expand(b, -1, -1)
            token = torch.arange(start, end, device=device)[:, None].expand(-1, n)
            slot = torch.arange(slots, slots + n, device=device).expand(end - start, -1)
            entries.append((token.flatten(), slot.flatten(), weight.flatten(1)))
            start, slots = end, slots + n
        mask, target = (torch.cat(parts).to(device).expand(b, -1) for parts in (kept, destination))
        token, slot = (torch.cat([entry[k] for entry in entries]).expand(b, -1) for k in (0, 1))
        mix = Mix(token, slot, torch.cat([weight for *_, weight in entries], 1))
        work = sum(self._flops(rows * columns, view.features.shape[2]) for rows, columns in rasters)
        return replace(merged(mask, target, span=(slots, slots)), mix=mix, work=view.counts.new_full((b,), work))

    def fuse(self, hidden: Tensor, run: Any, module: Mini) -> Tensor:
        for layer in module.fusion:
            hidden = run(layer, hidden)
        return hidden


class Mini(nn.Module):
    """``grid`` x ``grid`` queries of ``width`` channels, drawn as the official code's, and the layers ``fusion``."""

    def __init__(self, grid: int, width: int, fusion: list[Any]):
        super().__init__()
        self.grid = grid
        self.queries = nn.Parameter(torch.randn(grid**2, width, generator=torch.Generator().manual_seed(0)) * 0.02)
        self.fusion = nn.ModuleList(fusion)

    def forward(self, rows: Tensor, height: int, columns: int, pe: str, scaled: bool) -> Tensor:
        """``A`` transposed, ``[B, n, C^2]``, for the ``rows`` ``[B, n, d]`` of a raster; at least 32 bits."""
        width, c = rows.shape[-1], self.grid
        if pe == "grid":
            own = sines(middles(height, c), middles(columns, c), width)
            its = sines(torch.arange(height), torch.arange(columns), width)
        else:
            own = sines(torch.arange(c), torch.arange(c), width)
            image = own.T.view(1, width, c, c)
            large = nn.functional.interpolate(image, (height, columns), mode="bicubic", align_corners=False)
            its = large.view(width, height * columns).T
        with torch.autocast(rows.device.type, enabled=False):
            queries = self.queries.to(rows) + own.to(rows)
            scores = nn.functional.linear(rows + its.to(rows), queries)
            return (scores / width**0.5 if scaled else scores).softmax(1)


def middles(size: int, parts: int) -> Tensor:
    """Where along an axis of ``size`` tokens the middles of so many equal ``parts`` are, ``[parts]``."""
    return (torch.arange(parts, dtype=torch.float64) + 0.5) * size / parts - 0.5


def sines(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Two-dimensional sines and cosines ``[R * K, width]`` of the places ``rows`` ``[R]`` and ``columns`` ``[K]``: half
    of the channels is of the row, half of the column, each first sines, then cosines of ``place / 10000^(k / (width /
    4))``. float64."""
    rate = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    axes = []
    for place in (rows, columns):
        angle = place.double()[:, None] * rate
        axes.append(torch.cat([angle.sin(), angle.cos()], 1))
    y, x = axes
    whole = [y[:, None].expand(-1, len(x), -1), x[None].expand(len(y), -1, -1)]
    return torch.cat(whole, 2).flatten(0, 1)
