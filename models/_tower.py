"""The engine for vision towers: shared by every ViT family. It hooks a stack of residual blocks and applies selections behind a block or inside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ledger import UndoLedger
from ..select import combine, gather
from ..types import Projections, Seed, Selection, TokenView, UnsupportedError
from . import _host
from .base import PlannedCut

ONE_SIZE = "images must have the size that the model's configuration names, and patch dropout must be off"


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A family's description of its tower. ``root`` the module whose call is one pass; ``blocks`` those whose output is used; ``attend(block, x, mask,
    caught)`` and ``feed(block, x)`` the two residual halves made of the block's own children; ``capture(block)`` modules whose outputs :attr:`project`
    turns into q, k, v (``[B, H, n, d]`` each, as the attention uses them, rotated if it rotates) and a scale; ``mask`` the block's keyword for an additive
    mask (``None``: it takes none of the shape ``[B, 1, 1, n]``, so that every block has to be composed of its halves); ``resize(pixels, rows, columns)``
    fewer pixels in, as call keywords; ``pixels`` the root's keyword for them; ``width`` of the residual stream (``None``: that of the block's first norm).

    ``rope`` is the block's keyword for a rotary table with one row per patch (:func:`rotary_rows` says in which shapes); prefix tokens are not rotated.
    Behind a cut every block gets the rows of the tokens that are left, image by image; a merged token stands at the position of the token that absorbed
    the others. ``sample(block, n)`` makes a table for ``n`` patches, so that rotary blocks can be probed.

    ``caught`` is what one call of a block leaves for :attr:`project`: the block's input under ``"x"``, its rotary table under ``"rope"`` (None without), the
    captured outputs under their names; ``attend`` may add to it."""

    root: nn.Module
    blocks: Sequence[nn.Module]
    prefix: int
    grid: tuple[int, int]
    mask: str | None
    attend: Callable[[nn.Module, Tensor, Tensor | None, dict[str, Any]], Tensor]
    feed: Callable[[nn.Module, Tensor], Tensor]
    capture: Callable[[nn.Module], dict[str, nn.Module]]
    project: Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Tensor, Tensor, float]]
    resize: Callable[[Tensor, int, int], tuple[Tensor, dict[str, Any]]] | None = None
    pixels: str = "pixel_values"
    width: int | None = None
    rope: str | None = None
    sample: Callable[[nn.Module, int], Any] | None = None


@dataclass
class Record:
    """One applied decision: per image the original indices kept (ascending) and, for merges, the slot of every original token. ``ranked`` the original index
    and the score of each token ``[G, n]``; told per sample, ``scores`` and ``units`` as in :class:`vtprune.types.StageReport`."""

    site: str
    stage: int
    tokens_in: list[int]
    tokens_out: list[int]
    kept: list[Tensor]
    assignment: list[Tensor] | None
    ranked: tuple[Tensor, Tensor] | None = None
    scores: list[Tensor] | None = None
    units: list[Tensor] | None = None

    def scored(self, g: int, tokens: int) -> Tensor:
        """The scores of image ``g``'s original tokens, ``[tokens]`` float64, NaN where there is none."""
        out = torch.full((tokens,), torch.nan, dtype=torch.float64)
        if self.ranked is not None:
            self.ranked = self.ranked[0].cpu(), self.ranked[1].cpu()  # once for all images
            index, score = (t[g] for t in self.ranked)
            out[index[index >= 0]] = score[index >= 0].double()
        return out


@dataclass
class Run:
    """One pass of G images. ``index`` ``[G, n]`` original index of each running token (-1 padding), ``size`` ``[G, n]``, ``slot`` ``[G, N]`` running
    position of every original token (-1 dropped), ``raster`` ``[G, N]`` that position where the blocks begin (other than 0 .. N - 1 if the pixels were
    reduced), ``head`` whether the model's own head follows the blocks."""

    images: int
    tokens: int
    index: Tensor
    size: Tensor
    slot: Tensor
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    captured: dict[str, Any] = field(default_factory=dict)
    merges: bool = False
    raster: Tensor | None = None
    head: bool = True
    rotary: tuple[Any, Tensor, Any] | None = None  # the last table, for which tokens, and its rows
    present: tuple[Tensor, Tensor, bool] | None = None  # an index, which of it is a token, and whether all are
    counts: list[Tensor] = field(default_factory=list)  # per block, its index: lengths are read when somebody asks
    notes: list[Callable[[], Record]] = field(default_factory=list)  # what was decided, likewise
    told: list[Record] = field(default_factory=list)

    @staticmethod
    def start(images: int, tokens: int, device: torch.device, counts: Sequence[int] | None = None) -> Run:
        """``counts`` tokens of each image if they differ, ``tokens`` the largest."""
        index = torch.arange(tokens, device=device).repeat(images, 1)
        if counts is not None:
            index = torch.where(index < torch.tensor(counts, device=device)[:, None], index, -1)
        return Run(images, tokens, index, (index >= 0).to(torch.float32), index.clone())

    @property
    def valid(self) -> Tensor:
        return self._present()[1]

    @property
    def whole(self) -> bool:
        """Whether no image has padding."""
        return self._present()[2]

    def _present(self) -> tuple[Tensor, Tensor, bool]:
        if self.present is None or self.present[0] is not self.index:
            valid = self.index >= 0
            self.present = (self.index, valid, bool(valid.all()))
        return self.present

    @property
    def layer_tokens(self) -> list[list[int]]:
        """Per block that has run, per image, the tokens it processed."""
        return [(index >= 0).sum(1).tolist() for index in self.counts]

    @property
    def records(self) -> list[Record]:
        """The decisions so far."""
        while len(self.told) < len(self.notes):
            self.told.append(self.notes[len(self.told)]())
        return self.told

    def view(
        self,
        features: Tensor,
        cut: PlannedCut,
        *,
        grid: tuple[int, int],
        prefix: int,
        depth: int,
        seed: Seed,
        sources: dict[str, Callable],
        rasters: tuple = (),
    ) -> TokenView:
        return TokenView(
            features=features,
            valid=self.valid,
            index=self.index,
            size=self.size,
            protected=torch.zeros_like(self.valid),
            grid=grid,
            prefix=prefix,
            layer=cut.layer,
            depth=depth,
            seed=seed,
            memory=self.memory.setdefault(cut.memory_key, {}),
            sources=sources,
            rasters=rasters,
        )

    def apply(self, x: Tensor, selection: Selection, cut: PlannedCut) -> Tensor:
        """Applies a selection to the visual tokens ``x`` ``[G, n, C]`` and keeps the books."""
        before = self.index
        n, k = x.shape[1], selection.kept.shape[1]
        positions = torch.arange(n, device=x.device).expand_as(selection.kept) if n == k else None
        whole = positions is not None and torch.equal(selection.kept, positions) and selection.layout is None
        if not whole:
            x, self.size = combine(x, selection, self.size)
            if selection.target is None:
                column = torch.full((x.shape[0], n + 1), -1, device=x.device)
                where = torch.where(selection.kept >= 0, selection.kept, n)
                column.scatter_(1, where, torch.arange(k, device=x.device).expand_as(where))
                column = column[:, :n]
            else:
                column = selection.target
            self.index = gather(self.index + 1, selection.kept) - 1
            if selection.layout is not None:
                x = gather(x, selection.layout)
                self.index, self.size = self.index.gather(1, selection.layout), self.size.gather(1, selection.layout)
                back = selection.layout.argsort(1)
                column = torch.where(column >= 0, back.gather(1, column.clamp_min(0)), -1)
            self.slot = torch.where(self.slot >= 0, column.gather(1, self.slot.clamp_min(0)), -1)
        self.merges |= selection.target is not None
        self.note(cut, before, selection.score)
        return x

    def note(self, cut: PlannedCut, before: Tensor, score: Tensor | None = None) -> None:
        """Keeps the present state, and the index ``before`` with its ``score``, as the outcome of ``cut``."""
        self.notes.append(partial(_record, cut.site, cut.stage, self.tokens, before, self.index, self.slot, self.merges, score))

    def weights(self) -> Tensor | None:
        """``[G, n]``, ``None`` while all are 1: how often each running token counts in a mean. Every original token that is still represented counts once
        (ToMe, arXiv 2210.09461, MAE pooling: sum of size times token over N), padding does not."""
        if not self.merges and self.whole:
            return None
        return (self.size if self.merges else torch.ones_like(self.size)) * self.valid

    def rows(self, table: Any) -> Any:
        """The rows of a rotary table that belong to the running tokens."""
        if self.rotary is None or self.rotary[0] is not table or self.rotary[1] is not self.index:
            assert self.raster is not None
            self.rotary = (table, self.index, rotary_rows(table, self.raster.gather(1, self.index.clamp_min(0))))
        return self.rotary[2]


def _record(site: str, stage: int, tokens: int, before: Tensor, index: Tensor, slots: Tensor, merges: bool, score: Tensor | None) -> Record:
    kept, assignment = [], []
    for row, slot in zip(index.cpu(), slots.cpu(), strict=True):
        order = torch.where(row >= 0, row, tokens).argsort(stable=True)
        kept.append(row[order[: int((row >= 0).sum())]])
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        assignment.append(torch.where(slot >= 0, rank[slot.clamp_min(0)], -1))
    ranked = None if score is None else (before, score)
    return Record(site, stage, (before >= 0).sum(1).tolist(), [len(k) for k in kept], kept, assignment if merges else None, ranked)


class TowerEngine:
    """Hooks one tower. ``done(run)`` is called at the end of each pass."""

    def __init__(self, tower: Tower, cuts: list[PlannedCut], ledger: UndoLedger, *, seed: int, done: Callable[[Run], None], tokens: int):
        self.tower, self.done, self.tokens = tower, done, tokens
        self.seed: Seed = seed
        self.local = threading.local()
        self.decide = ledger.timed(self._decide)  # also called from within blocks, outside of any hook
        self.pixels = [c for c in cuts if c.site == "pixels"]
        self.proportional = any(c.proportional for c in cuts)
        self.mask = tower.mask or "attention_mask"  # a composed block takes any name
        ledger.before(tower.root, self._open)
        for i, block in enumerate(tower.blocks):
            mine = [c for c in cuts if c.site == f"vision.{i}"]
            ledger.before(block, self._enter)
            inside = [c for c in mine if c.inside]
            behind = [c for c in mine if not c.inside]
            if mine:
                for name, module in tower.capture(block).items():
                    ledger.after(module, self._catcher(name))
            if inside or (tower.mask is None and cuts):
                self._probe(block, i)
                ledger.replace(block, "forward", self._composed(block, inside))
            ledger.after(block, self._leaver(block, behind))
        ledger.after(tower.root, self._close, first=False, always=True)

    @property
    def run(self) -> Run | None:
        return getattr(self.local, "run", None)

    def _open(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pixels = args[0] if args else kwargs[self.tower.pixels]
        run = Run.start(pixels.shape[0], self.tokens, pixels.device)
        self.local.run = run
        for cut in self.pixels:
            view = run.view(pixels.new_zeros(run.images, run.tokens, 1), cut, grid=self.tower.grid, prefix=0, depth=1, seed=self.seed, sources={})
            selection = cut.select(view)
            if selection is None or selection.kept.shape[1] == run.tokens:
                run.note(cut, run.index)
                continue
            if self.tower.resize is None:
                raise UnsupportedError("this tower takes images of one size only, so it cannot be given fewer pixels")
            rows, columns = cell_grid(selection, self.tower.grid)
            run.apply(view.features, selection, cut)
            pixels, extra = self.tower.resize(pixels, rows, columns)
            kwargs = {**kwargs, **extra}
            args, kwargs = ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, self.tower.pixels: pixels})
        run.raster = run.slot
        return args, kwargs

    def alone(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the root that runs the blocks but is no call of the root: as a pass of its own unless it is part of one."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.run is not None:
                return function(*args, **kwargs)
            output = None
            try:
                args, kwargs = self._open(self.tower.root, args, kwargs)
                self.local.run.head = False
                output = function(*args, **kwargs)
            finally:
                self._close(self.tower.root, args, kwargs, output)
            return output

        return call

    def _close(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        run, self.local.run = self.run, None
        if run is not None and output is not None:
            self.done(run)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        run = self.run
        if run is None:
            return None
        if _host.checkpointed(module):
            raise UnsupportedError("stages in the tower need a newer transformers for gradient checkpointing, or gradient_checkpointing_disable()")
        x = args[0] if args else kwargs["hidden_states"]
        here, meant = x.shape[1] - self.tower.prefix, run.index.shape[1]
        if here != meant:
            raise UnsupportedError(f"a block got {here} patches where {meant} are left of {run.tokens}; {ONE_SIZE}")
        run.counts.append(run.index)
        run.captured["x"] = x
        if self.tower.rope is not None:
            table = kwargs.get(self.tower.rope)  # None: this model has no rotary positions
            if table is not None and run.slot is not run.raster:
                table = run.rows(table)
                kwargs = {**kwargs, self.tower.rope: table}
            run.captured["rope"] = table
        bias = self.bias(x)
        if bias is None:
            return args, kwargs
        given = args[1] if len(args) > 1 else kwargs.get(self.mask)
        if given is not None:
            raise UnsupportedError("the tower was given an attention mask of its own; pruning and merging inside it need unmasked images")
        return (args[0], bias, *args[2:]) if len(args) > 1 else args, kwargs if len(args) > 1 else {**kwargs, self.mask: bias}

    def bias(self, x: Tensor) -> Tensor | None:
        """``[G, 1, 1, P + n]`` added to the logits: log sizes (proportional attention) and -inf on padding; ``None`` while it would be zero."""
        run = self.run
        assert run is not None
        sizes = self.proportional and run.merges
        if not sizes and run.whole:
            return None
        size = run.size.double() if x.dtype == torch.float64 else run.size
        bias = size.clamp_min(1).log() if sizes else torch.zeros_like(size)
        bias = bias.masked_fill(~run.valid, -torch.inf).to(x.dtype)
        return F.pad(bias, (self.tower.prefix, 0))[:, None, None]

    def _catcher(self, name: str) -> Callable:
        def catch(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if self.run is not None:
                self.run.captured[name] = output

        return catch

    def _decide(self, block: Any, cuts: list[PlannedCut], x: Tensor) -> Tensor:
        run, p = self.run, self.tower.prefix
        if run is None:
            return x
        for cut in cuts:

            def projections(run: Run = run, x: Tensor = x) -> Projections:
                q, k, v, scale = self.tower.project(block, run.captured)
                return Projections(q, k, v, scale, p, self.bias(x))

            view = run.view(
                x[:, p:],
                cut,
                grid=self.tower.grid,
                prefix=p,
                depth=len(self.tower.blocks),
                seed=self.seed,
                sources={"projections": projections, "prefix": lambda x=x: x[:, :p]},
            )
            selection = cut.select(view)
            if selection is not None:
                x = torch.cat([x[:, :p], run.apply(x[:, p:], selection, cut)], dim=1) if p else run.apply(x, selection, cut)
        return x

    def _leaver(self, block: Any, cuts: list[PlannedCut]) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if self.run is None:
                return None
            x = output[0] if isinstance(output, tuple) else output
            changed = self.decide(block, cuts, x) if cuts else x
            self.run.captured.clear()
            if changed is x:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return leave

    def _composed(self, block: Any, cuts: list[PlannedCut]) -> Callable:
        name = self.mask

        def forward(x: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
            rotary = {} if self.tower.rope is None else {"rope": kwargs.get(self.tower.rope)}
            x = self.tower.attend(block, x, kwargs.get(name, mask), rotary if self.run is None else self.run.captured)
            return self.tower.feed(block, self.decide(block, cuts, x))

        return forward

    @torch.no_grad()
    def _probe(self, block: Any, number: int) -> None:
        """A composed block must equal the original; anything it does not know (another norm order, a scale, a gate) shows here, at attach time."""
        parameter = next(p for p in block.parameters() if p.ndim == 2)
        width = self.tower.width or next(m.normalized_shape[0] for m in block.modules() if isinstance(m, nn.LayerNorm))
        noise = torch.randn(2, self.tower.prefix + 7, width, generator=torch.Generator().manual_seed(0)).to(parameter.device, parameter.dtype)
        given: dict[str, Any] = {} if self.tower.mask is None else {self.tower.mask: None}
        caught: dict[str, Any] = {"x": noise}
        if self.tower.rope is not None:
            assert self.tower.sample is not None
            caught["rope"] = given[self.tower.rope] = self.tower.sample(block, 7)
        modes = {m: m.training for m in block.modules()}
        block.eval()
        want = block(noise, **given)
        want = want[0] if isinstance(want, tuple) else want
        got = self.tower.feed(block, self.tower.attend(block, noise, None, caught))
        for module, mode in modes.items():
            module.training = mode
        error = float((want - got).abs().max() / want.abs().max().clamp_min(1e-6))
        limit = 1e-5 if parameter.dtype in (torch.float32, torch.float64) else 2e-2
        if not error <= limit:
            raise UnsupportedError(
                f"block {number} ({type(block).__name__}) is not the pre-norm residual block this adapter knows: its parts give a result {error:.1e} off"
            )


def rotary_rows(table: Any, rows: Tensor) -> Any:
    """Rows ``[G, n]`` of a rotary table, image by image: ``[N, d]`` becomes ``[G, 1, n, d]``, ``[H, N, d]`` and ``[G or 1, H, N, d]`` become
    ``[G, H, n, d]``; a tuple of tables is taken one by one."""
    if isinstance(table, tuple):
        return tuple(rotary_rows(t, rows) for t in table)
    if table.ndim == 2:
        return table[rows][:, None]
    table = (table if table.ndim == 4 else table[None]).expand(len(rows), -1, -1, -1)
    return table.gather(2, rows[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, prefix: int, half: bool) -> Tensor:
    """``x`` ``[B, H, P + n, d]`` with its last n rows rotated by tables of n rows that broadcast over ``[B, H, n, d]``. ``half``: coordinate i pairs with
    i + d / 2, else 2i with 2i + 1."""
    front, x = x[:, :, :prefix], x[:, :, prefix:]
    if half:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([front, (x * cos + turned * sin).to(x.dtype)], dim=2)


def cell_grid(selection: Selection, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a selection whose slots are the cells of a regular raster (down-sampling)."""
    assert selection.target is not None
    cells = selection.target[0].reshape(grid)
    return len(cells[:, 0].unique()), len(cells[0].unique())
