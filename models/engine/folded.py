"""The engine for stages inside vision towers whose blocks see rasters of several sizes one behind the other, and behind
which squares of patches become one token: whole squares are dropped or merged between blocks.

Tokens are such squares. A method sees them raster by raster, in raster order; the blocks go on seeing patches in the
order of the tower's own packing (windows stay together), with fewer rows, segments and rotary positions. Behind the
last block, and wherever something reads the rows on the way, every row stands in its place again, with zeros for what
is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import Action, Projections, Seed, Selection, TokenView, UnsupportedError
from ..base import PlannedCut
from . import host
from .composed import compose
from .description import PackedTower
from .packed import PackedEngine, PackedRun, within
from .packing import Packing, squares_of
from .rows import rows_of, with_rows
from .run import Run
from .tower_replays import in_backward

AGAIN = (
    "gradient checkpointing runs blocks of this tower again in the backward pass, where tokens that were dropped in it "
    "could not be dropped again; train without it, or with stages behind the tower"
)


@dataclass
class FoldedRun(PackedRun):
    """One pass of G rasters, whose tokens are squares of patches; ``index``, ``size`` and ``slot`` are of those.

    Attributes:
        places: the rows of every token's patches in the whole sequence, ``[G, N, group]``; -1: padding.
        window: the window of each, counted over all rasters, ``[G, N]``.
        at: where the patches of the running tokens are in the sequence that runs, ``[G, n, group]``; -1: padding.
        left: which rows of the whole sequence they are, ``[S]``; ``None``: all of them.
        starts: where its rasters, and its windows, begin, and where the last one ends; ``None``: as the root says.
        met: the tokens that each raster's tokens attend to, summed, ``[G]``, within rasters and within windows.
        meets: of each block that has run, one of the two.
    """

    places: Tensor | None = None
    window: Tensor | None = None
    at: Tensor | None = None
    left: Tensor | None = None
    starts: tuple[Tensor, Tensor] | None = None
    met: tuple[Tensor, Tensor] | None = None
    meets: list[Tensor] = field(default_factory=list)

    @staticmethod
    def begin(packing: Packing) -> FoldedRun:
        counts = [r.tokens[0] * r.tokens[1] for r in packing.rasters]
        windows = [0, *accumulate(1 if r.windows is None else len(r.windows) for r in packing.rasters)]
        group = len(packing.rasters[0].place) // max(counts[0], 1)
        places = torch.full((len(counts), max(counts), group), -1)
        window = torch.full(places.shape[:2], -1)
        for kind in packing.kinds:
            own, inside = squares_of(kind.raster)
            numbers = torch.tensor(kind.numbers)
            begin, before = (torch.tensor([t[i] for i in kind.numbers])[:, None] for t in (packing.starts, windows))
            places[numbers, : len(own)] = own + begin[..., None]
            window[numbers, : len(own)] = inside + before
        places, window = places.to(packing.device), window.to(packing.device)
        plain = Run.start(len(counts), max(counts), packing.device, counts)
        run = FoldedRun(plain.images, plain.tokens, plain.index, plain.size, plain.slot, present=plain.present)
        run.packing, run.places, run.window, run.at = packing, places, window, places
        run.raster = run.slot
        run.meet(torch.bincount(window[window >= 0]))
        return run

    def meet(self, inside: Tensor) -> None:
        """Counts who attends to whom; ``inside``: how many tokens each window has."""
        assert self.window is not None
        each = torch.arange(self.images, device=self.index.device)[:, None]
        same = inside[self.window[each, self.index.clamp_min(0)].clamp_min(0)]
        self.met = self.valid.sum(1) ** 2, torch.where(self.valid, same, 0).sum(1)

    def seen_by(self, g: int) -> list[float]:
        counts = zip(self.counts, self.meets, strict=True)
        return [float(met[g]) * self.group / max(int((index[g] >= 0).sum()), 1) for index, met in counts]

    @property
    def group(self) -> int:
        assert self.places is not None
        return self.places.shape[2]

    @property
    def cut(self) -> bool:
        """Whether fewer rows run than the root has."""
        return self.starts is not None

    def noted_behind(self, stage: int, site: str) -> list[Tensor]:
        table = self.noted[stage, site]
        return [table[g, : self.handed_over(g)] for g in range(self.images)]

    def padded(self, values: Tensor) -> Tensor:
        """Rows ``[S, ...]`` of the running sequence as those of each raster's tokens, ``[G, n * group, ...]``."""
        assert self.at is not None
        return values[self.at.flatten(1).clamp_min(0)]

    def segments(self) -> Tensor:
        """Where what a row of the block that runs attends to begins, and where the last one ends."""
        inside = bool(self.captured["inside"])
        return (
            torch.tensor(self.seen.windows if inside else self.seen.starts)
            if self.starts is None
            else self.starts[inside]
        )

    def spread(self, x: Tensor) -> Tensor:
        """The running rows ``x`` ``[S, C]`` in their places among all that the root has, zeros elsewhere."""
        assert self.places is not None and self.at is not None
        there = self.valid
        places = self.places[torch.arange(self.images, device=there.device)[:, None], self.index.clamp_min(0)]
        out = x.new_zeros(self.seen.starts[-1], x.shape[1])
        return out.index_put((places[there].flatten().to(x.device),), x[self.at[there].flatten().to(x.device)])

    def pack(self, padded: Tensor) -> Tensor:
        """The tokens ``[G, n, group * C]`` that are left as a sequence of rows ``[S, C]``, in the order of the root's;
        from now on that is what runs."""
        assert self.places is not None and self.window is not None
        each = torch.arange(self.images, device=self.index.device)[:, None]
        index, valid, group = self.index.clamp_min(0), self.valid, self.group
        rows = self.places[each, index]
        order = torch.where(valid, rows[..., 0], self.seen.starts[-1]).flatten().argsort(stable=True)
        order = order[: int(valid.sum())]
        place = torch.full((valid.numel(),), -1, device=order.device)
        place[order] = torch.arange(len(order), device=order.device)
        at = place.view(valid.shape)[..., None] * group + torch.arange(group, device=order.device)
        self.left = rows.flatten(0, 1)[order].flatten()
        self.at = at.masked_fill(~valid[..., None], -1)
        counts = valid.sum(1)
        inside = torch.bincount(self.window[each, index].flatten()[order])
        self.meet(inside)
        self.starts = _starts(counts[counts > 0] * group), _starts(inside[inside > 0] * group)
        return padded.flatten(0, 1)[order].unflatten(1, (group, -1)).flatten(0, 1)


def _starts(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))


class FoldedEngine(PackedEngine):
    """Hooks one tower. ``done(run)`` is called at the end of each pass."""

    def __init__(
        self,
        tower: PackedTower,
        cuts: list[PlannedCut],
        ledger: UndoLedger,
        *,
        seed: Seed,
        done: Callable[[Run], None],
    ):
        super().__init__(tower, cuts, ledger, seed=seed, done=done)
        self.ahead = [c for c in cuts if c.cut.site == "pixels"]
        self.proportional = any(c.cut.proportional for c in cuts)
        if self.proportional or any(c.cut.inside for c in cuts):  # the blocks themselves take no mask
            for i, block in enumerate(tower.blocks):
                self._compose(block, i, ledger, [c for c in cuts if c.cut.site == f"vision.{i}" and c.cut.inside])
        for module in tower.readers:
            ledger.before(module, self._read)

    def _open(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        super()._open(module, args, kwargs)
        if self.ahead and isinstance(self.run, FoldedRun):
            assert self.tower.pixels is not None
            self.run.captured["pixels"] = self.tower.pixels(host.arguments(module, args, kwargs))

    def _start(self, packing: Packing) -> PackedRun:
        return FoldedRun.begin(packing)

    def _ahead(self, run: FoldedRun, block: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """The first block's arguments with what the cuts in front of the tower leave of its rows."""
        whole = inputs["hidden_states"]
        x = self._decide(run, block, self.ahead, whole.reshape(-1, whole.shape[-1]))
        run.captured.pop("pixels")
        run.counts[-1] = run.index  # what the block sees
        return {**inputs, "hidden_states": x.view(*whole.shape[:-2], *x.shape)}

    # one block --------------------------------------------------------------------------------------------------------

    def _enterer(self, block: nn.Module, caught: list[nn.Module] | None) -> Callable:
        check = super()._enterer(block, caught)

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if self.run is None and in_backward():
                raise UnsupportedError(AGAIN)
            check(module, args, kwargs)
            run = self.run
            assert isinstance(run, FoldedRun)
            inputs = host.arguments(block, args, kwargs)
            inside = within(run.seen, inputs, type(block).__name__)
            if self.ahead and block is self.tower.blocks[0]:
                inputs = self._ahead(run, block, inputs)
            inputs = self._shortened(run, inputs, inside) if run.cut else inputs
            assert run.met is not None
            run.meets.append(run.met[inside])
            run.captured.update(inputs=inputs, rope=inputs.get(host.ROTARY), inside=inside)
            return ((), inputs) if run.cut else None

        return enter

    @staticmethod
    def _shortened(run: FoldedRun, inputs: dict[str, Any], inside: bool) -> dict[str, Any]:
        """A block's arguments for the rows that are left."""
        assert run.starts is not None
        out = dict(inputs)
        for name in host.SEGMENTS:
            if inputs.get(name) is not None:
                out[name] = run.starts[inside].to(inputs[name])
        rows = run.left
        assert rows is not None
        table, mask = inputs.get(host.ROTARY), inputs.get(host.MASK)
        if table is not None:
            out[host.ROTARY] = tuple(t[rows.to(t.device)] for t in table)
        if mask is not None:
            rows = rows.to(mask.device)
            out[host.MASK] = mask[:, :, rows[:, None], rows]
        return out

    def _leaver(self, block: nn.Module, cuts: list[PlannedCut]) -> Callable:
        behind = [c for c in cuts if not c.cut.inside]
        last = block is self.tower.blocks[-1]

        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            run = self.run
            if run is not None:
                run.fed.append(run.index)
            if run is None or not (behind or last):
                return None
            assert isinstance(run, FoldedRun)
            x = rows_of(output)
            rows = self._decide(run, block, behind, x.reshape(-1, x.shape[-1]))
            if last and run.cut:
                rows = run.spread(rows)
            run.captured.clear()
            changed = rows.view(*x.shape[:-2], *rows.shape)
            return with_rows(output, changed)

        return leave

    def _decide(self, run: FoldedRun, block: Any, cuts: list[PlannedCut], x: Tensor) -> Tensor:
        """What ``cuts`` leave of the rows ``x`` ``[S, C]``."""
        for planned in cuts:
            patches = run.padded(x)  # [G, n * group, C]
            view = self._tokens(run, planned, block, patches)
            if planned.cut.action is Action.NOTE:
                run.note_down(planned, planned.note(view))
                continue
            selection = planned.select(view)
            if selection is not None:
                x = self._apply(run, selection, planned, patches, x)
        return x

    @staticmethod
    def _apply(run: FoldedRun, selection: Selection, planned: PlannedCut, patches: Tensor, x: Tensor) -> Tensor:
        before = run.index
        left = run.apply(patches.unflatten(1, (-1, run.group)).flatten(2), selection, planned)
        return x if run.index is before and not run.merges else run.pack(left)

    def _tokens(self, run: FoldedRun, planned: PlannedCut, block: Any, patches: Tensor) -> TokenView:
        """All rasters, each with its own size."""

        def projections(windows: bool = False) -> Projections:
            q, k, v, scale = self.tower.project(block, run.captured)
            q, k, v = (run.padded(t).transpose(1, 2) for t in (q, k, v))  # [G, H, n * group, d]
            return Projections(q, k, v, scale, 0, self.bias(run, q), run.group)

        sources: dict[str, Callable] = {"projections": projections, "prefix": lambda: patches[:, :0]}
        if any(r.windows is not None for r in run.seen.rasters):
            sources["windows"] = partial(windows_of, run)
        if "pixels" in run.captured:
            sources["pixel_blocks"] = partial(_blocks_of, run)
        sources |= run.noted_sources(planned.stage)
        seed = self.seed
        return run.view(
            patches.unflatten(1, (-1, run.group)).mean(2),
            planned,
            grid=run.seen.rasters[0].tokens,
            prefix=0,
            seed=seed,
            sources=sources,
            rasters=tuple((r.tokens,) for r in run.seen.rasters),
        )

    def bias(self, run: FoldedRun, x: Tensor) -> Tensor | None:
        """``[G, 1, 1, n * group]`` added to the logits: log sizes (proportional attention) and -inf on padding;
        ``None`` while it would be zero."""
        sizes = self.proportional and run.merges
        if not sizes and run.whole:
            return None
        size = run.size.to(torch.promote_types(x.dtype, torch.float32))
        bias = size.clamp_min(1).log() if sizes else torch.zeros_like(size)
        bias = bias.masked_fill(~run.valid, -torch.inf).to(x.dtype)
        return bias.repeat_interleave(run.group, 1)[:, None, None]

    # what reads the rows on the way -----------------------------------------------------------------------------------

    def _read(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        run = self.run
        if run is None or not isinstance(run, FoldedRun) or not run.cut or len(run.counts) == len(self.tower.blocks):
            return None
        return (run.spread(args[0]), *args[1:]), kwargs

    # blocks made of their halves --------------------------------------------------------------------------------------

    def _compose(self, block: nn.Module, number: int, ledger: UndoLedger, cuts: list[PlannedCut]) -> None:
        tower = self.tower

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            inputs = host.arguments(block, args, kwargs)
            whole, run = inputs["hidden_states"], self.run
            caught = {"rope": inputs.get(host.ROTARY)} if run is None else run.captured
            x = whole.reshape(-1, whole.shape[-1])
            x = tower.attend(block, x, caught, partial(self._attention, run, inputs))
            x = self._decide(run, block, cuts, x) if isinstance(run, FoldedRun) else x
            return tower.feed(block, x).view(*whole.shape[:-2], *x.shape)

        assert tower.sample is not None
        compose(block, number, ledger, forward, *tower.sample(block))

    def _attention(
        self, run: PackedRun | None, inputs: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        """Attention of the rows ``[S, H, d]`` each within its segment, with the log sizes of merged tokens."""
        starts = host.segments(inputs) if run is None else run.segments()
        starts = torch.tensor([0, len(q)]) if starts is None else starts
        lengths = starts.to(q.device).diff()
        row = torch.arange(int(lengths.max()), device=q.device)
        there = row < lengths[:, None]  # [segments, longest]
        table = torch.where(there, starts[:-1, None].to(q.device) + row, 0)
        bias = torch.zeros(table.shape, dtype=q.dtype, device=q.device)
        if isinstance(run, FoldedRun) and self.proportional and run.merges:
            sizes = torch.ones(len(q), dtype=q.dtype, device=q.device)
            assert run.at is not None
            sizes[run.at[run.valid].flatten()] = run.size[run.valid].to(q.dtype).repeat_interleave(run.group)
            bias = sizes.clamp_min(1).log()[table]
        bias = bias.masked_fill(~there, -torch.inf)[:, None, None]
        q, k, v = (t[table].transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)
        return mixed[there]


def packed_engine(
    tower: PackedTower, cuts: list[PlannedCut], ledger: UndoLedger, *, seed: Seed, done: Callable[[Run], None]
) -> PackedEngine:
    """The engine that serves ``cuts``: where nothing is dropped or merged, the one that only looks."""
    changes = any(c.cut.action is not Action.NOTE for c in cuts)
    return (FoldedEngine if changes else PackedEngine)(tower, cuts, ledger, seed=seed, done=done)


def _blocks_of(run: FoldedRun) -> Tensor:
    """``[G, n, group, channels, pixels of a patch]``: of the running tokens, as :attr:`PackedTower.pixels` tells."""
    blocks = run.captured["pixels"].unflatten(0, (-1, run.group))  # [tokens of all, group, channels, pixels]
    begin = torch.tensor(run.seen.starts[:-1], device=run.index.device)[:, None] // run.group
    return blocks[torch.where(run.valid, run.index + begin, 0).to(blocks.device)]


def windows_of(run: FoldedRun) -> Tensor | None:
    """``[G, W, m]``: the patches of the running tokens that see each other in the block, counted in the view's order;
    -1: padding. ``None`` where the block attends within whole rasters."""
    if not run.captured.get("inside"):
        return None
    assert run.window is not None
    each = torch.arange(run.images, device=run.index.device)[:, None]
    window = torch.where(run.valid, run.window[each, run.index.clamp_min(0)], -1)
    number = window - torch.where(run.valid, window, window.max() + 1).amin(1, keepdim=True)  # of the raster's own
    number = torch.where(run.valid, number, -1)
    counts = torch.zeros(run.images, int(number.max()) + 1, dtype=torch.long, device=number.device)
    counts.scatter_add_(1, number.clamp_min(0), run.valid.long())
    order = torch.where(run.valid, number, counts.shape[1]).argsort(dim=1, stable=True)
    sorted_ = number.gather(1, order)
    rank = torch.arange(order.shape[1], device=order.device) - (counts.cumsum(1) - counts).gather(
        1, sorted_.clamp_min(0)
    )
    table = torch.full((run.images, counts.shape[1], int(counts.max()) + 1), -1, device=order.device)
    there = sorted_ >= 0
    table[each.expand_as(order)[there], sorted_[there], rank[there]] = order[there]
    table = table[..., :-1]
    patches = table[..., None] * run.group + torch.arange(run.group, device=table.device)
    return patches.masked_fill((table < 0)[..., None], -1).flatten(2)
