"""FALCON: "Resolving Visual Redundancy and Fragmentation in High-resolution MLLMs via Visual Registers" (arXiv
2501.16297)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.select import from_mask
from ..core.types import Geometry, Selection, TokenView, UnsupportedError, VtpruneError
from ._sites import cells
from ._weights import load_weights
from .base import Action, Cut, Method, MethodInfo, option, register

HEAD = 64  # channels of a head of ReAtten, as in the tower that the paper uses


@register(
    MethodInfo(
        name="falcon",
        paper="arXiv 2501.16297",
        idea="trained registers read the patches in every block of the tower and go on instead of them",
        kinds=("vision",),
        needs={"vision": frozenset({"insert"})},
        keep=None,
        budgeted=False,
        learns=True,
        whole=True,
        count="registers",
        cases=({"registers": 6}, {"registers": 2, "reatten": False}, {"registers": 4, "init": "zeros"}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Falcon(Method):
    """Sections 3.2 and 3.3: M ``registers`` join the patches of each pass of the tower (image, or tile) in front of its
    first block: ``[patches ; registers]``, no mask. Behind the last block that is used the registers go on and the
    patches are left behind (ReCompact).

    ReAtten: what a block's attention adds to the registers, ``u``, becomes ``u + IA(u)`` with a self-attention IA over
    the registers of all tiles of a picture, without norm or positions in front of it.

    A register stands for no place of the picture. In the prompt the j-th takes the place of the token in the middle of
    the j-th of M near-square cells, so that positions still tell an order (ours: the official model renumbers). Tiles
    share the registers, and nothing tells a register which tile it is in: the official crop embedding is a table for
    crops of its own cutting, and is left out.

    A model reads nothing of use in registers that nobody trained together with it. They begin as ``N(0, 1)``, as in the
    official code, or alike (``init="zeros"``). IA begins with an output projection of zeros, so that tiles are
    independent of each other (ours; the official IA begins as a copy of the block's attention).

    The trained part is ``handle.modules["falcon"]``: ``registers`` ``[M, C]`` and ``exchanges``, one IA a block."""

    registers: int | None = option(
        None, "M, of each image or tile (default: a ninth of its tokens, 64 of 576)", least=1
    )
    reatten: bool = option(True, "ReAtten: registers of all tiles of a picture attend to each other in every block")
    init: str = option("random", "registers before training: 'random' or 'zeros'", choices=("random", "zeros"))
    weights: str | None = option(None, "trained registers (safetensors; metadata: registers=64)")

    def _count(self, geometry: Geometry) -> int:
        m = max(1, geometry.tokens // 9) if self.registers is None else self.registers
        if m >= geometry.tokens:
            raise VtpruneError(f"falcon: registers={m} do not compress the {geometry.tokens} tokens of an image")
        return m

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        depth, m = geometry.vision_layers, self._count(geometry)
        meets = tuple(Cut(site=f"vision.{i}", action=Action.EXCHANGE) for i in range(depth)) if self.reatten else ()
        join = Cut(site="vision.0", action=Action.INSERT)
        return (join, *meets, Cut(site=f"vision.{depth - 1}", keep=m))

    def build(self, branch: Any, geometry: Geometry) -> Registers:
        m = self._count(geometry)
        module = Registers(m, geometry.vision_width, geometry.vision_layers if self.reatten else 0)
        if self.init == "random":
            nn.init.normal_(module.registers, generator=torch.Generator().manual_seed(0))
        if self.weights is not None:
            told = {"registers": str(m)}
            load_weights("falcon", self.weights, module, told, "the tower of this model", must_tell=True)
        return module.requires_grad_(False)

    def insert(self, view: TokenView, cut: Cut) -> Tensor:
        registers = view.module.registers
        if len(registers) >= view.features.shape[1]:
            raise UnsupportedError(
                f"falcon: {len(registers)} registers do not compress an image of {view.features.shape[1]} tokens"
            )
        return registers.expand(len(view.valid), *registers.shape)

    def exchange(self, rows: Tensor, images: Tensor, cut: Cut, module: Registers) -> Tensor:
        return rows + module.exchanges[cut.layer](rows, images)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        rows, columns = view.grid
        kept = from_mask(view.index >= rows * columns).kept
        places = cells(rows, columns, kept.shape[1])[0].nonzero()[:, 0].to(kept.device)
        return Selection(kept, places=places.expand_as(kept))


class Registers(nn.Module):
    """``m`` registers ``width`` wide, and self-attentions among them for ``depth`` blocks."""

    def __init__(self, m: int, width: int, depth: int):
        super().__init__()
        self.registers = nn.Parameter(torch.zeros(m, width))
        self.exchanges = nn.ModuleList([Exchange(width) for _ in range(depth)])


class Exchange(nn.Module):
    """IA: multi-head self-attention over the registers of a picture."""

    def __init__(self, width: int):
        super().__init__()
        # without biases torch takes the same way in training and in use
        self.attention = nn.MultiheadAttention(width, max(1, width // HEAD), bias=False, batch_first=True)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            into = self.attention.in_proj_weight
            into.copy_(torch.randn(into.shape, generator=generator) * width**-0.5)
            self.attention.out_proj.weight.zero_()

    def forward(self, rows: Tensor, images: Tensor) -> Tensor:
        """``rows`` ``[B, M, C]``, of which those with the same number in ``images`` ``[B]``, ascending, see each
        other."""
        _, m, c = rows.shape
        x, valid, at = _together(rows.to(self.attention.in_proj_weight), images)
        mixed, _ = self.attention(x, x, x, key_padding_mask=~valid, need_weights=False)
        return mixed.reshape(-1, m, c)[at]


def _together(rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rows`` ``[B, M, C]`` picture by picture, ``[P, T * M, C]`` for pictures of at most T tiles; which of them
    are no padding, ``[P, T * M]``; and where each tile is among the P * T, ``[B]``."""
    counts = images.unique_consecutive(return_counts=True)[1]
    most, m = int(counts.max()), rows.shape[1]
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    picture = torch.repeat_interleave(torch.arange(len(counts), device=rows.device), counts)
    at = picture * most + torch.arange(len(rows), device=rows.device) - first
    x = rows.new_zeros(len(counts) * most, *rows.shape[1:]).index_copy(0, at, rows)
    valid = torch.arange(most, device=rows.device) < counts[:, None]
    return x.view(len(counts), most * m, -1), valid.repeat_interleave(m, 1), at
