"""What is known of one prefill while it runs, and what its decoding steps need afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.select import absorbing
from ...core.types import Selection
from .encoder_call import EncoderCall
from .layout import Blend, BudgetGroup, RasterSpan
from .level import SequenceLength, within
from .record import Record
from .rows import put
from .run import Run
from .shelf import Shelf
from .shown import Shown
from .steered import Steer


@dataclass(frozen=True)
class Standing:
    """Of every unit's original tokens ``[G, N]``: ``stands`` the index of the token that stands for each one (-1:
    gone), ``size`` how many each stands for."""

    stands: Tensor
    size: Tensor


@dataclass
class Request:
    """One prefill and what its decoding steps need.

    Attributes:
        length: T, of the caller's sequence.
        parts: per sample, the rasters in it.
        pictures: those of its images, where they are not what is pruned; ``None``: they are.
        units: what each budget applies to.
        real: which columns are no padding, ``[B, T]``.
        next: the position behind the prompt, ``[B]``.
        levels: the sequence lengths so far, the dense one first.
        notes: what was decided, told when somebody asks.
        layer_tokens: per layer, per sample, visual tokens.
        text_tokens: per sample.
        memory: what each stage's method remembers.
        branched: by stage, per sample, visual tokens that its side branch ran over.
        fused: layers that methods ran over visual tokens and the prompt's text before the first: the one each is a
            copy of, and of each sequence the tokens; ``rewritten``: rows in front of it were changed.
        cached: layers whose cache holds other rows than pass through them.
        evicted: by layer, per sample, visual tokens that its cache still holds after others were evicted.
        ahead: layers run before their turn: the first, the one that was asked, and per sample the tokens they read.
        keys_only: by layer, per sample, visual tokens that gave it keys and values only.
        skipped: halves of layers (number, ``"attention"`` or ``"mlp"``) that were left out, and for which samples.
        skipping: the same of the cache's samples, which may move.
        behind: how many tokens behind the prompt each of the cache's samples brought along with it, -1 where no MLP is
            watched; empty: in none.
        shown: by layer, what is watched.
        origin: which of the samples that were read each of the cache's is.
        gates: in training, by what each sample's half was multiplied, ``[B]``.
        borrows: which of the cache's samples have keys and values made of another layer's input.
        work: FLOPs of methods' own modules, in parts.
        arrived: visual tokens that the tower handed over, ``[B, T]``; ``None``: no stage there.
        held: visual tokens that must not go, ``[B, T]``; ``None``: none.
        entry: the books of the stages behind the projector.
        sources: per sample, per visual token: which token of its passes of the tower (-1: none).
        blends: per sample, if its visual tokens are weighted means of the tower's: of which; ``None``: each is the one
            in ``sources``.
        vision: per sample, per pass of the tower: where its books are; ``None``: no stage there.
        looked_at: per sample, the tower's passes that notes were taken in; ``None``: there are no notes.
        standing: who stands for whom, since the first merge inside the language model.
        packed: several prompts in one row.
        resumed: columns that were read before, in a turn that chooses again, and ``front`` the layers that are not read
            anew there.
        broken: such a turn has begun, and not ended.
        shelf: what such a turn will need.
        at: per layer what its cache holds, once the prompt has been read.
        first: the first layer of each level and attention type.
        pruned: layers that the model's own mask does not fit: their cache, or that of the first layer of their type, is
            shorter than the prompt.
        uneven: those of them that need a mask at every step: samples of different lengths, sliding windows.
    """

    length: int
    parts: list[list[RasterSpan]]
    units: list[BudgetGroup]
    real: Tensor
    next: Tensor
    levels: list[SequenceLength] = field(default_factory=list)
    pictures: list[list[RasterSpan]] | None = None
    notes: list[Record | Callable[[], Record]] = field(default_factory=list)
    layer_tokens: list[list[int]] = field(default_factory=list)
    text_tokens: list[int] = field(default_factory=list)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    branched: dict[int, list[int]] = field(default_factory=dict)
    fused: list[tuple[int, list[int]]] = field(default_factory=list)
    rewritten: bool = False
    cached: dict[int, SequenceLength] = field(default_factory=dict)
    evicted: dict[int, list[int]] = field(default_factory=dict)
    ahead: list[tuple[int, int, list[int]]] = field(default_factory=list)
    keys_only: dict[int, list[int]] = field(default_factory=dict)
    skipped: dict[tuple[int, str], list[bool]] = field(default_factory=dict)
    skipping: dict[tuple[int, str], list[bool]] = field(default_factory=dict)
    gates: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    behind: list[int] = field(default_factory=list)
    shown: dict[int, Shown] = field(default_factory=dict)
    origin: list[int] = field(default_factory=list)
    borrows: list[bool] = field(default_factory=list)
    work: list[Tensor] = field(default_factory=list)
    arrived: Tensor | None = None
    held: Tensor | None = None
    entry: Run | None = None
    sources: list[Tensor] = field(default_factory=list)
    blends: list[Blend | None] = field(default_factory=list)
    vision: list[list[tuple[Run, int]]] | None = None
    looked_at: list[list[tuple[Run, int]]] | None = None
    standing: Standing | None = None
    packed: bool = False
    resumed: int = 0
    front: int = 0
    broken: bool = False
    shelf: Shelf | None = None
    at: tuple[SequenceLength, ...] = ()
    first: dict[tuple[int, str], int] = field(default_factory=dict)
    pruned: frozenset[int] = frozenset()
    uneven: frozenset[int] = frozenset()

    def note_work(self, selection: Selection) -> None:
        if selection.work is not None:
            self.work.append(selection.work)

    @property
    def altered(self) -> bool:
        """Whether its cache is another than the dense model's."""
        learns = any(count >= 0 for count in self.behind)
        changed = bool(self.skipped) or learns or self.rewritten
        return changed or any(self.borrows) or any(not level.dense for level in self.levels)

    def idle(self, number: int, half: str) -> bool:
        """Whether a half of layer ``number`` was left out for all samples, so that it did not run."""
        left = self.skipped.get((number, half))
        return left is not None and all(left) and (number, half) not in self.gates

    @property
    def records(self) -> list[Record]:
        """The decisions inside the language model so far."""
        self.notes = [note() if callable(note) else note for note in self.notes]
        return self.notes  # type: ignore[return-value]

    @cached_property
    def table(self) -> Tensor:
        """The columns of every unit's placeholders, ``[G, N]``, padded with -1."""
        if not self.units:
            return torch.empty(0, 1, dtype=torch.long, device=self.real.device)
        return nn.utils.rnn.pad_sequence([u.columns for u in self.units], batch_first=True, padding_value=-1).to(
            self.real.device
        )

    @cached_property
    def owner(self) -> Tensor:
        """The sample of every unit, ``[G]``."""
        return torch.tensor([u.sample for u in self.units], dtype=torch.long).to(self.real.device)

    def standing_at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens ``index`` ``[G, n]`` (-1: padding): which are there, and how many each stands for."""
        there = index >= 0
        if self.standing is not None:
            return there, self.standing.size.to(index.device).gather(1, index.clamp_min(0))
        if self.entry is None or not self.entry.merges:
            return there, there.to(torch.float32)
        sizes = _table(self.entry, self.entry.size)
        return there, sizes.to(index.device).gather(1, index.clamp_min(0))

    def stand(self, index: Tensor, selection: Selection) -> None:
        """The tokens ``index`` ``[G, n]`` were merged by ``selection``."""
        there, size = self.standing_at(index)
        n, gone = self.table.shape[1], self.table.shape[1]
        place = torch.where(there, index, gone)
        if self.standing is not None:
            stands = self.standing.stands
        elif self.entry is not None and self.entry.merges:
            at = self.entry.index.gather(1, self.entry.slot.clamp_min(0))
            stands = torch.where(self.entry.slot >= 0, at, -1)[:, :n]
        else:
            stands = torch.arange(n, device=index.device).expand(len(index), -1)
        absorber = absorbing(selection, index.shape[1])  # [G, n] position in the view, -1: dropped
        into = torch.where(absorber >= 0, index.gather(1, absorber.clamp_min(0)), -1)
        after = index.new_full((len(index), n + 1), -1).scatter(1, place, into)  # the last entry: what is gone
        stands = after.gather(1, torch.where(stands >= 0, stands, gone))
        total = size.new_zeros(len(index), n + 1).scatter_add(1, torch.where(into >= 0, into, gone), size * there)
        self.standing = Standing(stands, total[:, :n])

    def notes_of(self, stage: int, visual: Tensor) -> dict[str, Callable[[], Tensor]]:
        """What the stage noted in the tower, by site: a call that tells it of the columns of :attr:`table`, ``[G, N,
        ...]``; NaN for tokens that the tower did not make. ``visual`` ``[B, T]`` marks the placeholders."""
        runs = [run for rows in self.looked_at or [] for run, _ in rows]
        sites = {site for run in runs for s, site in run.noted if s == stage}
        return {site: partial(self._noted, stage, site, visual) for site in sorted(sites)}

    def _noted(self, stage: int, site: str, visual: Tensor) -> Tensor:
        assert self.looked_at is not None
        tables = {id(run): run.noted_behind(stage, site) for rows in self.looked_at for run, _ in rows}
        told = next(iter(tables.values()))[0]
        nothing = told.new_full((1, *told.shape[1:]), torch.nan)
        values = []
        for rows, sources, blend in zip(self.looked_at, self.sources, self.blends, strict=True):
            mine = torch.cat([*(tables[id(run)][g] for run, g in rows), nothing])  # the last one is for -1
            if blend is None:
                values.append(mine[sources.to(mine.device)])
                continue
            tokens, weight = (t.to(mine.device) for t in blend)
            weight = weight.to(mine.dtype).view(*weight.shape, *[1] * (mine.ndim - 1))
            values.append((mine[tokens] * weight).sum(1))
        whole = told.new_full((*visual.shape, *told.shape[1:]), torch.nan)
        whole[visual.to(told.device)] = torch.cat(values)
        return whole.to(visual.device)[self.owner[:, None], self.table.clamp_min(0)]

    def move(self, index: Tensor) -> None:
        """The cache's samples ``index`` ``[B']`` take the places of all."""
        order = torch.arange(len(self.next))[index.cpu()].tolist()  # an index may be a mask
        self.next = self.next[index.to(self.next.device)]
        self.skipping = {key: [left[b] for b in order] for key, left in self.skipping.items()}
        self.borrows = [self.borrows[b] for b in order if self.borrows]
        self.behind, self.origin = ([some[b] for b in order if some] for some in (self.behind, self.origin))
        for shown in self.shown.values():
            shown.move(order)
        if self.shelf is not None and order != list(range(len(self.shelf.ids))):
            self.shelf.lost = "its samples were moved"
        for level in {id(level): level for level in (*self.levels, *self.at)}.values():
            level.move(index)

    def repeat(self, times: int) -> None:
        """Every sample of the cache stands there ``times`` times."""
        self.move(torch.arange(len(self.next)).repeat_interleave(times))

    def level_at(self, number: int) -> SequenceLength:
        if number in self.cached:
            return self.cached[number]
        return [level for level in self.levels if level.first <= number][-1]


@dataclass
class Stash:
    """The rows that a routing method takes out of the stack: those of ``hidden`` ``[B, M, C]`` of ``level`` that are
    put ``aside`` ``[B, M]`` (``None``: all visual ones); ``out`` what its side branch made of them; ``joined`` what a
    layer that they give only keys and values caches, and its mask and rotary table; ``passing``: they pass by a layer
    (:attr:`Cut.passing`)."""

    hidden: Tensor
    level: SequenceLength
    aside: Tensor | None = None
    out: Tensor | None = None
    joined: tuple[SequenceLength, dict[str, Any]] | None = None
    passing: bool = False

    def put(self, x: Tensor, level: SequenceLength, gone: Tensor) -> None:
        """Rows of ``x`` ``[B, m, C]`` of a later ``level`` that are ``gone`` ``[B, m]`` from now on join them."""
        place = torch.where(gone, within(self.level, level), self.level.width)  # the extra row takes the others
        self.hidden = put(nn.functional.pad(self.hidden, (0, 0, 0, 1)), place, x.to(self.hidden.device))[:, :-1]
        before = torch.zeros_like(self.level.valid) if self.aside is None else self.aside
        self.aside = nn.functional.pad(before, (0, 1)).scatter(1, place, True)[:, :-1]
        self.out = self.joined = None
        for name in ("rows", "alone"):
            self.__dict__.pop(name, None)

    @cached_property
    def rows(self) -> Tensor:
        """Columns of the visual rows put aside, ``[B, V]``, padded with -1."""
        columns = [
            r.nonzero()[:, 0] for r in (self.level.visual & self.level.valid if self.aside is None else self.aside)
        ]
        return nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=-1)

    @cached_property
    def alone(self) -> SequenceLength:
        """The visual rows as a level of their own."""
        real, index = self.rows >= 0, self.rows.clamp_min(0)
        return SequenceLength(self.level.first, self.level.rows.gather(1, index), real, real, self.level.shift)


@dataclass(eq=False)
class Loan:
    """In one forward, the rows ``[B, M, C]`` of which layers make their keys and values, for the samples ``who`` ``[B,
    1, 1]`` (``None``: all); ``given`` what the projections of the attention that runs now read, ``came`` which of them
    did, ``done`` the layers behind which that was so."""

    rows: Tensor
    who: Tensor | None
    given: Tensor | None = None
    came: list[str] = field(default_factory=list)
    done: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Call:
    """One forward of the root.

    Attributes:
        request: that it reads or goes on with.
        prefill: it reads a prompt with visual tokens.
        plain: the ids of a prompt without visual tokens.
        tokens: the ids of a prompt with some, ``[B, T]``.
        labels: a copy of the caller's, from which positions without a prediction are taken.
        visual: the placeholders, ``[B, T]`` bool.
        parts: per sample, what they stand for.
        pictures: as in :class:`Request`.
        sources, blends: as in :class:`Request`, where a stage looks at the tower.
        told: makes them where none does.
        encoded: by modality, what its encoder did for this forward.
        cache: the caller's.
        mask: the caller's.
        positions: the caller's.
        prompt: columns of the prompt where more follows, ``[B]``; ``None``: all of them.
        segments: which of several prompts packed into a row each token belongs to, ``[B, T]``; ``None``: one prompt a
            row.
        question: the rows that ask, ``[B, T]``: the last of the prompt, those in front of answers.
        ids: decoding: positions of the new tokens.
        tail: decoding: which tokens behind the prompt are real.
        serve: decoding: layers that need a mask or positions of their own.
        gone: visual tokens dropped before layer 0, ``[B, T]``.
        level: the sequence length that the next layer reads.
        ran: layers that came by.
        done: by layer, what its cut took, for checkpoints that run it again.
        dense: by attention type, what the model made for the whole sequence.
        served: what was made for a level and an attention type.
        inputs: by layer, what cuts behind it look at.
        stash: by stage, the rows that it has put aside.
        merged: rows of a layer's input are no rows of the one before.
        weights: by layer, by what its MLP's half of each token is multiplied, ``[B, T]``, until that comes by.
        halves: those of layers that came by, of which a method may leave some out.
        between: by layer, what stands between its attention and its MLP, ``[B, T, C]``.
        places: the how many-th token behind its prompt each row is, ``[B, T]`` on the CPU; -1: of none.
        loan: what lends other layers keys and values.
        maps: attention maps are asked for.
        aside: layers run before their turn, and are not the forward's.
        again: a turn that chooses again from the whole conversation.
        steering: what a steering does in it.
        retained: what is added to the logits of each column of the caller's sequence, ``[B, T]``, in training.
    """

    request: Request | None = None
    prefill: bool = False
    plain: Tensor | None = None
    tokens: Tensor | None = None
    labels: Tensor | None = None
    visual: Tensor | None = None
    parts: list[list[RasterSpan]] = field(default_factory=list)
    pictures: list[list[RasterSpan]] | None = None
    sources: list[Tensor] = field(default_factory=list)
    blends: list[Blend | None] = field(default_factory=list)
    told: Callable[[], list[Tensor]] = list
    encoded: dict[str, EncoderCall] = field(default_factory=dict)
    cache: Any = None
    mask: Any = None
    positions: Any = None
    prompt: Tensor | None = None
    segments: Tensor | None = None
    question: Tensor | None = None
    ids: Tensor | None = None
    tail: Tensor | None = None
    serve: frozenset[int] = frozenset()
    gone: Tensor | None = None
    level: SequenceLength | None = None
    ran: int = 0
    done: dict[int, tuple[Tensor | None, SequenceLength]] = field(default_factory=dict)
    dense: dict[str, dict[str, Any]] = field(default_factory=dict)
    served: dict[Any, dict[str, Any]] = field(default_factory=dict)
    inputs: dict[int, tuple[Tensor, SequenceLength]] = field(default_factory=dict)
    stash: dict[int, Stash] = field(default_factory=dict)
    merged: bool = False
    weights: dict[int, Tensor] = field(default_factory=dict)
    halves: set[tuple[int, str]] = field(default_factory=set)
    between: dict[int, Tensor] = field(default_factory=dict)
    places: Tensor | None = None
    loan: Loan | None = None
    maps: bool = False
    aside: bool = False
    again: bool = False
    steering: Steer | None = None
    retained: Tensor | None = None

    @property
    def held(self) -> Tensor | None:
        """``[B, T]`` visual tokens that must not go; ``None``: there are none."""
        return None if self.request is None else self.request.held

    @property
    def placed(self) -> bool:
        return self.positions is not None


def _table(run: Run, values: Tensor) -> Tensor:
    """``values`` ``[G, n]`` of the running tokens by their original index, ``[G, N]``, 0 for those that are gone."""
    place = torch.where(run.valid, run.index, run.tokens)
    return values.new_zeros(len(values), run.tokens + 1).scatter(1, place, values)[:, : run.tokens]
