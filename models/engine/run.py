"""One pass of the vision tower: which tokens run, what became of the others, and the decisions on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.select import combine, gather, ranks
from ...core.types import NOTE, Seed, Selection, TokenView, UnsupportedError, extent
from ..base import PlannedCut
from .record import Record
from .rotary import rotary_rows
from .rows import put
from .widths import Widths


@dataclass
class Run:
    """One pass of G images.

    Attributes:
        images: G.
        tokens: N, of the largest image.
        index: ``[G, n]`` original index of each running token (-1: padding).
        size: ``[G, n]`` tokens merged into each.
        slot: ``[G, N]`` running position of every original token (-1: dropped).
        memory: what each stage's method remembers.
        captured: what the block that runs has left so far.
        merges: whether tokens were merged.
        raster: ``[G, N]`` the slots where the blocks begin (other than 0 .. N - 1 if the pixels were reduced).
        grid: the original rows and columns.
        cells: those where the blocks begin.
        early: whether it may end in front of the last block.
        again: whether gradient checkpointing runs a block of it once more.
        decided: what was decided the first time, by the cut's id.
        rotary: the last rotary table, for which tokens, and its rows.
        present: an index, which of it is a token, the fewest and most tokens of an image.
        counts: per block, its index: lengths are read when somebody asks.
        slots: per block, ``slot`` behind it.
        fed: per block, the index in front of what is decided behind it.
        notes: the decisions, each as a call that makes its record.
        noted: by stage and site, what a method noted of every original token, ``[G, N, ...]``; NaN where it was gone.
        fold: the side of the square of tokens that become one behind the tower; 1 where tokens are such squares.
        squares: where a token is such a square itself: the places of its patches in the raster of patches, ``[N,
            fold^2]``. They stand together while the blocks run, and behind the last one in the raster's order again,
            with zeros for what is gone.
        mask: the one that the root gave to the blocks.
        hidden: the patches of each token that nothing attends to, ``[G, N, group]``; ``None``: there are none.
        widths: on which part of the blocks' width each row runs; ``None``: all on the whole.
        spared: the multiply-adds that this spares an image.
        inserted: tokens of each image that joined, numbered from N on.
        exchanged: per exchange between inserted tokens, how many each image has and how many one sees.
        work: FLOPs of methods' own modules, of each image, in parts.
        answer: of the classes behind the tower, where a method gives it.
        made: the records so far.
    """

    images: int
    tokens: int
    index: Tensor
    size: Tensor
    slot: Tensor
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    captured: dict[str, Any] = field(default_factory=dict)
    merges: bool = False
    raster: Tensor | None = None
    grid: tuple[int, int] | None = None
    cells: tuple[int, int] | None = None
    early: bool = False
    again: bool = False
    decided: dict[int, Selection | None] | None = None
    rotary: tuple[Any, Tensor, Any] | None = None
    present: tuple[Tensor, Tensor, int, int] | None = None
    counts: list[Tensor] = field(default_factory=list)
    slots: list[Tensor] = field(default_factory=list)
    fed: list[Tensor] = field(default_factory=list)
    notes: list[Callable[[], Record]] = field(default_factory=list)
    made: list[Record] = field(default_factory=list)
    noted: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    fold: int = 1
    squares: Tensor | None = None
    mask: Any = None
    hidden: Tensor | None = None
    widths: Widths | None = None
    spared: int = 0
    inserted: int = 0
    answer: Tensor | None = None
    exchanged: list[tuple[int, list[int]]] = field(default_factory=list)
    work: list[Tensor] = field(default_factory=list)

    @staticmethod
    def start(images: int, tokens: int, device: torch.device, counts: Sequence[int] | None = None) -> Run:
        """``counts`` tokens of each image if they differ, ``tokens`` the largest."""
        index = torch.arange(tokens, device=device).repeat(images, 1)
        span = (tokens, tokens)
        if counts is not None:
            index = torch.where(index < torch.tensor(counts, device=device)[:, None], index, -1)
            span = (min(counts), max(counts))
        valid = index >= 0
        return Run(images, tokens, index, valid.to(torch.float32), index.clone(), present=(index, valid, *span))

    @property
    def valid(self) -> Tensor:
        return self._present()[1]

    @property
    def whole(self) -> bool:
        """Whether no image has padding."""
        return self._present()[2] == self.index.shape[1]

    def _present(self) -> tuple[Tensor, Tensor, int, int]:
        if self.present is None or self.present[0] is not self.index:
            valid = self.index >= 0
            self.present = (self.index, valid, *extent(valid))
        return self.present

    @property
    def layer_tokens(self) -> list[list[int]]:
        """Per block that has run, per image, the tokens it processed."""
        return [(index >= 0).sum(1).tolist() for index in self.counts]

    @property
    def records(self) -> list[Record]:
        """The decisions so far."""
        while len(self.made) < len(self.notes):
            self.made.append(self.notes[len(self.made)]())
        return self.made

    def view(
        self,
        features: Tensor,
        planned: PlannedCut,
        *,
        grid: tuple[int, int],
        prefix: int,
        seed: Seed,
        sources: dict[str, Callable],
        rasters: tuple = (),
        frames: tuple = (),
    ) -> TokenView:
        return TokenView(
            features=features,
            valid=self.valid,
            index=self.index,
            size=self.size,
            protected=torch.zeros_like(self.valid),
            grid=grid,
            prefix=prefix,
            seed=seed,
            memory=self.memory.setdefault(planned.stage, {}),
            sources=sources,
            rasters=rasters,
            frames=frames,
            known=self._present()[1:],
        )

    def apply(self, x: Tensor, selection: Selection, planned: PlannedCut) -> Tensor:
        """Applies a selection to the visual tokens ``x`` ``[G, n, C]`` and keeps the books."""
        if selection.retention is not None:
            raise UnsupportedError("retention is told behind the projector and in the language model alone")
        if selection.work is not None:
            self.work.append(selection.work)
        before = self.index
        n, k = x.shape[1], selection.kept.shape[1]
        whole = n == k and all(t is None for t in (selection.layout, selection.mix, selection.gate, selection.places))
        if whole and selection.span is not None:
            whole = selection.span[0] == n  # ascending positions, as many as there are
        elif whole:
            whole = torch.equal(selection.kept, torch.arange(n, device=x.device).expand_as(selection.kept))
        if not whole:
            x, self.size = combine(x, selection, self.size)
            column = _columns(selection, n)
            self.index = gather(self.index + 1, selection.kept) - 1 if selection.places is None else selection.places
            if selection.layout is not None:
                x = gather(x, selection.layout)
                self.index, self.size = self.index.gather(1, selection.layout), self.size.gather(1, selection.layout)
                back = ranks(selection.layout)
                column = torch.where(column >= 0, back.gather(1, column.clamp_min(0)), -1)
            self.slot = torch.where(self.slot >= 0, column.gather(1, self.slot.clamp_min(0)), -1)
            if selection.places is not None:
                self.slot = self._slots_at(selection.places)
            if selection.span is not None:
                self.present = (self.index, self.index >= 0, *selection.span)
        self.merges |= selection.target is not None
        self.note(planned, before, selection.score)
        return x

    def _slots_at(self, places: Tensor) -> Tensor:
        """:attr:`slot` where the running tokens stand at ``places`` ``[G, K]``."""
        where = torch.where(places >= 0, places, self.tokens)
        column = torch.arange(places.shape[1], device=places.device).expand_as(places)
        return places.new_full((self.images, self.tokens + 1), -1).scatter_(1, where, column)[:, :-1]

    def insert(self, x: Tensor, rows: Tensor) -> Tensor:
        """The tokens ``x`` ``[G, P + n, C]`` with the ``rows`` ``[G, M, C]`` behind them."""
        if not self.whole:
            raise UnsupportedError("tokens can join images of equal numbers of tokens only")
        g, m = rows.shape[:2]
        fresh = torch.arange(m, device=self.index.device) + self.tokens + self.inserted
        self.index = torch.cat([self.index, fresh.expand(g, -1)], 1)
        self.size = torch.cat([self.size, self.size.new_ones(g, m)], 1)
        self.inserted += m
        self.present = None
        return torch.cat([x, rows.to(x.dtype)], 1)

    @property
    def own(self) -> Tensor:
        """``[G, n]`` bool: which running tokens have a place in the image."""
        return self.valid & (self.index < self.tokens)

    def note(self, planned: PlannedCut, before: Tensor, score: Tensor | None = None) -> None:
        """Keeps the present state, and the index ``before`` with its ``score``, as the outcome of ``planned``."""
        self.notes.append(
            partial(
                _record, planned.cut.site, planned.stage, self.tokens, before, self.index, self.slot, self.merges, score
            )
        )

    def note_down(self, planned: PlannedCut, values: Tensor) -> None:
        """Keeps ``values`` ``[G, n, ...]``, of the running tokens, as what ``planned`` noted."""
        place = torch.where(self.own, self.index, self.tokens)
        table = values.new_full((self.images, self.tokens + 1, *values.shape[2:]), torch.nan)
        table[torch.arange(self.images, device=place.device)[:, None], place] = values
        self.noted[planned.stage, planned.cut.site] = table[:, : self.tokens]

    def noted_sources(self, stage: int) -> dict[str, Callable[[], Tensor]]:
        """What a view of the running tokens tells of the stage's notes: ``[G, n, ...]`` each."""
        return {
            NOTE + site: partial(noted_at, table, self.index) for (s, site), table in self.noted.items() if s == stage
        }

    @property
    def group(self) -> int:
        """Rows of a block's input that one token is."""
        return 1 if self.squares is None else self.squares.shape[1]

    def gathered(self, x: Tensor) -> Tensor:
        """Patches ``x`` ``[G, N * group, C]`` in the order of the raster, square by square."""
        return x if self.squares is None else x[:, self.squares.flatten()]

    def hide(self, mask: Any) -> None:
        """Learns from the blocks' ``mask``, ``[G, 1, 1 or n, n]`` or ``[G, n]``, additive or what may be seen, which
        patches nothing attends to."""
        if self.mask is mask:
            return
        assert self.squares is not None
        n = self.squares.numel()
        if not isinstance(mask, Tensor) or mask.shape[-1] != n or mask.ndim not in (2, 4):
            raise UnsupportedError("the tower was given an attention mask of a shape that this library does not know")
        hidden = ~mask if mask.dtype == torch.bool else mask != 0 if mask.ndim == 4 else mask == 0
        hidden = hidden[:, None, None] if hidden.ndim == 2 else hidden
        if hidden.shape[1] != 1 or bool((hidden != hidden[:, :, :1]).any()):
            raise UnsupportedError("the tower was given an attention mask that is not the same for every patch")
        gone = hidden[:, 0, 0].expand(self.images, -1)[:, self.squares]
        self.mask, self.hidden = mask, gone if bool(gone.any()) else None

    def unseen(self) -> Tensor:
        """``[G, n * group]``: which patches of the running tokens nothing attends to, padding among them."""
        assert self.hidden is not None
        rows = torch.arange(self.images, device=self.index.device)[:, None]
        return (self.hidden[rows, self.index.clamp_min(0)] | ~self.valid[..., None]).flatten(1)

    def scattered(self, x: Tensor) -> Tensor:
        """What is left of them, ``[G, n * group, C]``, in the order of the raster, zeros for what is gone: ``[G, N *
        group, C]``."""
        if self.squares is None:
            return x
        places = self.squares.numel()
        where = self.squares[self.index.clamp_min(0)].masked_fill((self.index < 0)[..., None], places)
        return put(x.new_zeros(len(x), places + 1, x.shape[2]), where.flatten(1), x)[:, :places]

    def handed_over(self, g: int) -> int:
        """How many visual tokens image ``g`` becomes behind the tower, before any is dropped."""
        return self.tokens // self.fold**2

    def noted_behind(self, stage: int, site: str) -> Sequence[Tensor]:
        """Per image the notes of the tokens behind the tower, ``[N / fold^2, ...]``: of those folded into one, their
        mean."""
        table = self.noted[stage, site]
        if self.fold == 1:
            return table.unbind()
        assert self.grid is not None
        rows, columns = (n // self.fold for n in self.grid)
        squares = table.view(len(table), rows, self.fold, columns, self.fold, *table.shape[2:])
        return squares.mean((2, 4)).flatten(1, 2).unbind()

    def fed_tokens(self, g: int) -> list[int]:
        """How many tokens of image ``g`` the MLP of each block read."""
        return [int((index[g] >= 0).sum()) for index in self.fed]

    def seen_by(self, g: int) -> list[float] | None:
        """How many patches one of image ``g`` attends to, block by block; ``None``: all, or the model's window."""
        return None

    def weights(self) -> Tensor | None:
        """``[G, n]``, ``None`` while all are 1: how often each running token counts in a mean. Every original token
        that is still represented counts once (ToMe, arXiv 2210.09461, MAE pooling: sum of size times token over N),
        padding does not."""
        if not self.merges and self.whole and not self.inserted:
            return None
        return (self.size if self.merges else torch.ones_like(self.size)) * self.own

    def positions(self, block: int) -> Tensor:
        """``[G, cells]``: for every cell of the raster at which the blocks begin, where the token that holds it stands
        behind ``block`` (-1: dropped)."""
        assert self.raster is not None and self.cells is not None
        # Original tokens of one cell share their fate, so any of them tells; those that have no cell write to a place
        # that is cut off.
        n = self.cells[0] * self.cells[1]
        where = torch.where(self.raster >= 0, self.raster, n)
        return self.slots[block].new_full((self.images, n + 1), -1).scatter_(1, where, self.slots[block])[:, :n]

    def maps(self, block: int, x: Tensor) -> Tensor:
        """Patches ``x`` ``[G, n, C]`` behind ``block`` as feature maps ``[G, C, rows, columns]``: every cell holds the
        token that stands for it, its own or the one that absorbed it, and zeros where it was dropped."""
        assert self.cells is not None
        return gather(x, self.positions(block)).unflatten(1, self.cells).permute(0, 3, 1, 2).contiguous()

    def rows(self, table: Any) -> Any:
        """The rows of a rotary table that belong to the running tokens."""
        if self.rotary is None or self.rotary[0] is not table or self.rotary[1] is not self.index:
            assert self.raster is not None
            self.rotary = (table, self.index, rotary_rows(table, self.raster.gather(1, self.index.clamp_min(0))))
        return self.rotary[2]


def noted_later(tell: Callable[[], Tensor], index: Tensor) -> Tensor:
    """:func:`noted_at` of what ``tell()`` answers."""
    return noted_at(tell(), index)


def noted_at(table: Tensor, index: Tensor) -> Tensor:
    """Of notes ``[G, N, ...]`` those of the tokens ``index`` ``[G, n]`` (-1: NaN)."""
    index = torch.where(index < table.shape[1], index, -1)
    rows = table[torch.arange(len(table), device=index.device)[:, None], index.clamp_min(0)]
    return rows.masked_fill((index < 0).view(*index.shape, *[1] * (rows.ndim - 2)), torch.nan)


def _columns(selection: Selection, n: int) -> Tensor:
    """``[G, n]``: where each of n running tokens goes (-1: dropped)."""
    if selection.target is not None:
        return selection.target
    kept = selection.kept
    column = torch.full((kept.shape[0], n + 1), -1, device=kept.device)
    where = torch.where(kept >= 0, kept, n)
    column.scatter_(1, where, torch.arange(kept.shape[1], device=kept.device).expand_as(where))
    return column[:, :n]


def _record(
    site: str, stage: int, tokens: int, before: Tensor, index: Tensor, slots: Tensor, merges: bool, score: Tensor | None
) -> Record:
    kept, assignment = [], []
    for row, slot in zip(index.cpu(), slots.cpu(), strict=True):
        there = (row >= 0) & (row < tokens)  # what was inserted has no number in the image
        order = torch.where(there, row, tokens).argsort(stable=True)
        kept.append(row[order[: int(there.sum())]])
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        assignment.append(torch.where(slot >= 0, rank[slot.clamp_min(0)], -1))
    ranked = None if score is None else (before, score)
    return Record(
        site,
        stage,
        ((before >= 0) & (before < tokens)).sum(1).tolist(),
        [len(k) for k in kept],
        kept,
        assignment if merges else None,
        ranked,
    )
