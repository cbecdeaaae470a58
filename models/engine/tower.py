"""The engine for vision towers: shared by every ViT family. It hooks a stack of residual blocks and applies selections
behind a block or inside it."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...core.ledger import UndoLedger, live
from ...core.select import combine, gather
from ...core.types import Projections, Seed, Selection, TokenView, UnsupportedError, extent
from ..base import PlannedCut
from . import host

ONE_SIZE = "images must have the size that the model's configuration names, and patch dropout must be off"
REPLAYS = 64  # passes whose blocks may still be run again by gradient checkpointing


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A family's description of its tower. ``root`` the module whose call is one pass; ``blocks`` those whose output is
    used; ``attend(block, x, mask, caught)`` and ``feed(block, x)`` the two residual halves made of the block's own
    children; ``capture(block)`` modules whose outputs :attr:`project` turns into q, k, v (``[B, H, n, d]`` each, as the
    attention uses them, rotated if it rotates) and a scale; ``mask`` the block's keyword for an additive mask
    (``None``: it takes none of the shape ``[B, 1, 1, n]``, so that every block has to be composed of its halves);
    ``resize(pixels, rows, columns)`` fewer pixels in, as call keywords; ``pixels`` the root's keyword for them;
    ``width`` of the residual stream (``None``: that of the block's first norm); ``raster(pixels)`` the rows and columns
    of patches that the root makes of them (``None``: always ``grid``), it raises for images that the root cannot take;
    ``variable`` whether it takes images of any size.

    ``rope`` is the block's keyword for a rotary table with one row per patch (:func:`rotary_rows` says in which
    shapes); prefix tokens are not rotated. Behind a cut every block gets the rows of the tokens that are left, image by
    image; a merged token stands at the position of the token that absorbed the others. ``sample(block, n)`` makes a
    table for ``n`` patches, so that rotary blocks can be probed.

    ``caught`` is what one call of a block leaves for :attr:`project`: the block's input under ``"x"``, its rotary table
    under ``"rope"`` (None without), the captured outputs under their names; ``attend`` may add to it."""

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
    raster: Callable[[Tensor], tuple[int, int]] | None = None
    variable: bool = False


@dataclass
class Record:
    """One applied decision: per image the original indices kept (ascending) and, for merges, the slot of every original
    token. ``ranked`` the original index and the score of each token ``[G, n]``; told per sample, ``scores`` and
    ``units`` as in :class:`vtprune.core.report.StageReport`."""

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
    """One pass of G images. ``index`` ``[G, n]`` original index of each running token (-1 padding), ``size`` ``[G,
    n]``, ``slot`` ``[G, N]`` running position of every original token (-1 dropped), ``raster`` ``[G, N]`` that position
    where the blocks begin (other than 0 .. N - 1 if the pixels were reduced), ``grid`` the original rows and columns,
    ``cells`` those where the blocks begin, ``early`` whether it may end in front of the last block, ``again`` whether
    gradient checkpointing runs a block of it once more (``decided``: what was decided the first time)."""

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
    rotary: tuple[Any, Tensor, Any] | None = None  # the last table, for which tokens, and its rows
    present: tuple[Tensor, Tensor, int, int] | None = (
        None  # an index, which of it is a token, the fewest and most tokens of an image
    )
    counts: list[Tensor] = field(default_factory=list)  # per block, its index: lengths are read when somebody asks
    slots: list[Tensor] = field(default_factory=list)  # per block, ``slot`` behind it
    notes: list[Callable[[], Record]] = field(default_factory=list)  # what was decided, likewise
    told: list[Record] = field(default_factory=list)

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
        while len(self.told) < len(self.notes):
            self.told.append(self.notes[len(self.told)]())
        return self.told

    def view(
        self,
        features: Tensor,
        planned: PlannedCut,
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
            layer=planned.cut.layer,
            depth=depth,
            seed=seed,
            memory=self.memory.setdefault(planned.stage, {}),
            sources=sources,
            rasters=rasters,
            known=self._present()[1:],
        )

    def apply(self, x: Tensor, selection: Selection, planned: PlannedCut) -> Tensor:
        """Applies a selection to the visual tokens ``x`` ``[G, n, C]`` and keeps the books."""
        before = self.index
        n, k = x.shape[1], selection.kept.shape[1]
        whole = n == k and selection.layout is None
        if whole and selection.span is not None:
            whole = selection.span[0] == n  # ascending positions, as many as there are
        elif whole:
            whole = torch.equal(selection.kept, torch.arange(n, device=x.device).expand_as(selection.kept))
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
            if selection.span is not None:
                self.present = (self.index, self.index >= 0, *selection.span)
        self.merges |= selection.target is not None
        self.note(planned, before, selection.score)
        return x

    def note(self, planned: PlannedCut, before: Tensor, score: Tensor | None = None) -> None:
        """Keeps the present state, and the index ``before`` with its ``score``, as the outcome of ``cut``."""
        self.notes.append(
            partial(
                _record, planned.cut.site, planned.stage, self.tokens, before, self.index, self.slot, self.merges, score
            )
        )

    def weights(self) -> Tensor | None:
        """``[G, n]``, ``None`` while all are 1: how often each running token counts in a mean. Every original token
        that is still represented counts once (ToMe, arXiv 2210.09461, MAE pooling: sum of size times token over N),
        padding does not."""
        if not self.merges and self.whole:
            return None
        return (self.size if self.merges else torch.ones_like(self.size)) * self.valid

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


def _record(
    site: str, stage: int, tokens: int, before: Tensor, index: Tensor, slots: Tensor, merges: bool, score: Tensor | None
) -> Record:
    kept, assignment = [], []
    for row, slot in zip(index.cpu(), slots.cpu(), strict=True):
        order = torch.where(row >= 0, row, tokens).argsort(stable=True)
        kept.append(row[order[: int((row >= 0).sum())]])
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        assignment.append(torch.where(slot >= 0, rank[slot.clamp_min(0)], -1))
    ranked = None if score is None else (before, score)
    return Record(
        site, stage, (before >= 0).sum(1).tolist(), [len(k) for k in kept], kept, assignment if merges else None, ranked
    )


def _in_backward() -> bool:
    """Whether the autograd engine runs, so that a block called now is one that gradient checkpointing runs again."""
    return torch._C._current_graph_task_id() != -1


class TowerEngine:
    """Hooks one tower. ``done(run)`` is called at the end of each pass."""

    def __init__(
        self,
        tower: Tower,
        cuts: list[PlannedCut],
        ledger: UndoLedger,
        *,
        seed: int,
        done: Callable[[Run], None],
        tokens: int,
    ):
        self.tower, self.done, self.tokens, self.ledger, self.cuts = tower, done, tokens, ledger, cuts
        self.seed: Seed = seed
        self.local = threading.local()
        self.decide = ledger.timed(self._decide)  # also called from within blocks, outside of any hook
        self.pixels = [c for c in cuts if c.cut.site == "pixels"]
        self.proportional = any(c.cut.proportional for c in cuts)
        # features that were handed out, and the pass that made them
        self.made: WeakIdKeyDictionary = WeakIdKeyDictionary()
        # what a block found when it ran, by the place of its input
        self.replays: OrderedDict[Any, tuple[Run, tuple]] = OrderedDict()
        self.names = list(inspect.signature(type(tower.blocks[0]).forward).parameters)[1:] if tower.blocks else []
        own = (n for n in ("attn_mask", "attention_mask") if n in self.names)
        self.mask = tower.mask or next(own, "attention_mask")  # a composed block takes any name
        ledger.before(tower.root, self._open)
        for i, block in enumerate(tower.blocks):
            mine = [c for c in cuts if c.cut.site == f"vision.{i}"]
            inside = [c for c in mine if c.cut.inside]
            behind = [c for c in mine if not c.cut.inside]
            if inside or (tower.mask is None and cuts):
                self._compose(block, i, inside)
            caught: list[nn.Module] = []
            if mine:
                self._catch(block, caught)
            ledger.before(block, self._enterer(i, block, caught if mine else None))
            ledger.after(block, self._leaver(i, block, behind))
        ledger.after(tower.root, self._close, first=False, always=True)

    @property
    def run(self) -> Run | None:
        """The pass that this thread is in."""
        run = getattr(self.local, "run", None)
        return None if run is not None and run.again and not _in_backward() else run

    # the pass
    # ------------------------------------------------------------------------------------------------------------

    def _open(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.local.run = None
        live()
        pixels = args[0] if args else kwargs.get(self.tower.pixels)
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            return None  # the model's own message is the better one
        if module is not self.tower.root:
            raise UnsupportedError(_COPY)
        grid = self.tower.grid if self.tower.raster is None else self.tower.raster(pixels)
        tokens = self.tokens if grid == self.tower.grid else grid[0] * grid[1]
        run = Run.start(pixels.shape[0], tokens, pixels.device)
        run.grid = run.cells = grid
        if self.cuts and torch.is_grad_enabled():
            run.decided = {}
        self.local.run = run
        for planned in self.pixels:
            view = run.view(
                pixels.new_zeros(run.images, run.tokens, 1),
                planned,
                grid=grid,
                prefix=0,
                depth=1,
                seed=self.seed,
                sources={},
                rasters=self._rasters(run),
            )
            selection = planned.select(view)
            if selection is None or selection.kept.shape[1] == run.tokens:
                run.note(planned, run.index)
                continue
            if self.tower.resize is None:
                raise UnsupportedError("this tower takes images of one size only, so it cannot be given fewer pixels")
            rows, columns = run.cells = cell_grid(selection, grid)
            run.apply(view.features, selection, planned)
            pixels, extra = self.tower.resize(pixels, rows, columns)
            kwargs = {**kwargs, **extra}
            args, kwargs = ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, self.tower.pixels: pixels})
        run.raster = run.slot
        return args, kwargs

    def _rasters(self, run: Run) -> tuple:
        """Images of another size than the typical one are planned for as they are."""
        return () if run.grid == self.tower.grid else ((run.grid,),) * run.images

    def alone(
        self, function: Callable[..., Any], *, early: bool = False, finish: Callable[[Run, Any], Any] | None = None
    ) -> Callable:
        """A method of the root that runs the blocks but is no call of the root: as a pass of its own unless it is part
        of one. ``early``: it may leave out the last blocks; ``finish(run, output)`` makes the output."""

        def call(*args: Any, **kwargs: Any) -> Any:
            outer, output = self.run, None
            if outer is not None:
                return self._remember(outer, function(*args, **kwargs))
            try:
                args, kwargs = self._open(self.tower.root, args, kwargs) or (args, kwargs)
                run: Run | None = self.local.run
                if run is not None:
                    run.early = early
                output = function(*args, **kwargs)
                if run is not None:
                    output = self._remember(run, output if finish is None else finish(run, output))
            finally:
                self._close(self.tower.root, args, kwargs, output)
            return output

        return call

    def _remember(self, run: Run, output: Any) -> Any:
        """Notes whose tokens the features in ``output`` are, for a head that reads them later."""
        features = (
            output.get("image_features")
            if isinstance(output, dict)
            else output[0]
            if isinstance(output, tuple)
            else output
        )
        if isinstance(features, Tensor):
            self.made[features] = run
        return output

    @contextmanager
    def reading(self, x: Tensor) -> Iterator[Run]:
        """The pass that made the tokens ``x`` ``[G, P + n, C]``, as the one that this thread is in. Raises
        :class:`UnsupportedError` if it is not known."""
        outer = self.run
        run = self.made.get(x)
        if run is None and outer is not None and x.shape[1] == self.tower.prefix + outer.index.shape[1]:
            run = outer
        if run is None:
            raise UnsupportedError(
                "this head weighs tokens by what was merged into them, and these are not the tokens that "
                "forward_features or forward_intermediates returned "
                "since attach(): hand it their output as it is, or call the model"
            )
        self.local.run = run
        try:
            yield run
        finally:
            self.local.run = outer

    def _close(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        run, self.local.run = self.run, None
        if run is None or output is None:
            return
        run.captured.clear()
        run.memory.clear()
        run.rotary = None
        ran, there = len(run.counts), len(self.tower.blocks)
        if self.cuts and ran != there and not (run.early and ran < there):
            raise UnsupportedError(
                f"{ran} of the {there} blocks ran that the tower had at attach(): blocks were taken out, replaced or "
                "skipped since; remove() and attach again"
            )
        self.done(run)

    # one block
    # -----------------------------------------------------------------------------------------------------------

    def _catch(self, block: nn.Module, caught: list[nn.Module]) -> None:
        """Hooks the modules whose outputs are captured; those that took their places since (adapters, quantised layers)
        too."""
        try:
            found = self.tower.capture(block)
        except AttributeError as e:
            raise UnsupportedError(
                f"the attention of a {type(block).__name__} was replaced by something this adapter does not know: {e}"
            ) from e
        for name, module in found.items():
            if not any(module is m for m in caught):
                self.ledger.after(module, self._catcher(name))
                caught.append(module)

    def _find(self, args: tuple, kwargs: dict, name: str) -> Any:
        place = self.names.index(name) if name in self.names else len(args)
        return args[place] if place < len(args) else kwargs.get(name)

    def _put(self, args: tuple, kwargs: dict, name: str, value: Any) -> tuple[tuple, dict]:
        place = self.names.index(name) if name in self.names else len(args)
        return (
            ((*args[:place], value, *args[place + 1 :]), kwargs)
            if place < len(args)
            else (args, {**kwargs, name: value})
        )

    def _enterer(self, number: int, block: nn.Module, caught: list[nn.Module] | None) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self.cuts and self.run is None:
                return None
            if module is not block:
                raise UnsupportedError(_COPY)
            x = args[0] if args else kwargs[self.names[0]]
            run = self._current(number, x)
            here, meant = x.shape[1] - self.tower.prefix, run.index.shape[1]
            if here != meant:
                raise UnsupportedError(f"a block got {here} patches where {meant} are left of {run.tokens}; {ONE_SIZE}")
            run.counts.append(run.index)
            run.captured["x"] = x
            if caught is not None:
                self._catch(block, caught)
            if self.cuts and (self._find(args, kwargs, self.mask) is not None or kwargs.get("is_causal")):
                raise UnsupportedError(
                    "the tower was given an attention mask of its own; pruning and merging inside it need unmasked "
                    "images"
                )
            if self.tower.rope is not None:
                table = self._find(args, kwargs, self.tower.rope)  # None: this model has no rotary positions
                if table is not None and run.slot is not run.raster:
                    table = run.rows(table)
                    args, kwargs = self._put(args, kwargs, self.tower.rope, table)
                run.captured["rope"] = table
            bias = self.bias(x)
            return (args, kwargs) if bias is None else self._put(args, kwargs, self.mask, bias)

        return enter

    def _current(self, number: int, x: Tensor) -> Run:
        """The pass that block ``number`` with the input ``x`` belongs to, which may be one that gradient checkpointing
        goes through again."""
        run = self.run
        if run is None or run.again:
            found = self.replays.get(_place(number, x)) if _in_backward() else None
            if found is None:
                raise UnsupportedError(_FORGOTTEN if _in_backward() else _BY_ITSELF)
            first, (index, size, slot, merges, present) = found
            run = Run(
                first.images,
                first.tokens,
                index,
                size,
                slot,
                merges=merges,
                raster=first.raster,
                decided=first.decided,
                present=present,
                again=True,
            )
            self.local.run = run
        if run.decided is not None:
            self._expect(number, x, run)
        return run

    def _expect(self, number: int, x: Tensor, run: Run) -> None:
        """Keeps what block ``number`` finds: a checkpoint runs it again in the backward pass with the same input, which
        it holds until then."""
        place = _place(number, x)
        if place is not None:
            self.replays[place] = (run, (run.index, run.size, run.slot, run.merges, run.present))
            self.replays.move_to_end(place)
            while len(self.replays) > REPLAYS * len(self.tower.blocks):
                self.replays.popitem(last=False)

    def bias(self, x: Tensor) -> Tensor | None:
        """``[G, 1, 1, P + n]`` added to the logits: log sizes (proportional attention) and -inf on padding; ``None``
        while it would be zero."""
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
            run = self.run
            if run is not None:
                run.captured[name] = output

        return catch

    def _decide(self, block: Any, cuts: list[PlannedCut], x: Tensor) -> Tensor:
        run, p = self.run, self.tower.prefix
        if run is None:
            return x
        for planned in cuts:
            if run.again and run.decided is not None:
                selection = run.decided[id(planned)]
                if selection is not None:
                    x = (
                        torch.cat([x[:, :p], run.apply(x[:, p:], selection, planned)], dim=1)
                        if p
                        else run.apply(x, selection, planned)
                    )
                continue

            def projections(run: Run = run, x: Tensor = x) -> Projections:
                q, k, v, scale = self.tower.project(block, run.captured)
                return Projections(q, k, v, scale, p, self.bias(x))

            view = run.view(
                x[:, p:],
                planned,
                grid=run.grid or self.tower.grid,
                prefix=p,
                depth=len(self.tower.blocks),
                seed=self.seed,
                sources={"projections": projections, "prefix": lambda x=x: x[:, :p]},
                rasters=self._rasters(run),
            )
            selection = planned.select(view)
            if run.decided is not None:
                run.decided[id(planned)] = selection
            if selection is not None:
                x = (
                    torch.cat([x[:, :p], run.apply(x[:, p:], selection, planned)], dim=1)
                    if p
                    else run.apply(x, selection, planned)
                )
        return x

    def _leaver(self, number: int, block: Any, cuts: list[PlannedCut]) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            run = self.run
            if run is None:
                return None
            x = output[0] if isinstance(output, tuple) else output
            changed = self.decide(block, cuts, x) if cuts else x
            run.captured.clear()
            run.slots.append(run.slot)
            if run.again:
                self._expect(number + 1, changed, run)
            if changed is x:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return leave

    def _compose(self, block: Any, number: int, cuts: list[PlannedCut]) -> None:
        """Gives ``block`` a forward made of its own children, with a decision between its halves. It must equal the
        original; anything that it does not know (another norm order, a scale, a gate) shows here, at attach time."""
        sizes = [p for p in block.parameters() if p.ndim == 2]
        # matrices may be stored in integers: then the norms'
        dtype = next(p.dtype for p in (*sizes, *block.parameters()) if p.is_floating_point())
        width = self.tower.width or next(m.normalized_shape[0] for m in block.modules() if isinstance(m, nn.LayerNorm))
        noise = torch.randn(2, self.tower.prefix + 7, width, generator=torch.Generator().manual_seed(0)).to(
            sizes[0].device, dtype
        )
        given: dict[str, Any] = {} if self.tower.mask is None else {self.tower.mask: None}
        if self.tower.rope is not None:
            assert self.tower.sample is not None
            table = self.tower.sample(block, 7)
            given[self.tower.rope] = tuple(t.to(dtype) for t in table) if isinstance(table, tuple) else table.to(dtype)
        modes = {m: m.training for m in block.modules()}
        try:
            block.eval()
            with torch.no_grad(), host.gathered(block):
                want = block.forward(noise, **given)
                self.ledger.replace(block, "forward", self._composed(block, cuts))
                got = block.forward(noise, **given)
        finally:
            for module, mode in modes.items():
                module.training = mode
        want = want[0] if isinstance(want, tuple) else want
        error = float((want - got).abs().max() / want.abs().max().clamp_min(1e-6))
        exact = noise.dtype in (torch.float32, torch.float64) and all(p.is_floating_point() for p in sizes)
        if not error <= (1e-5 if exact else 2e-2):
            raise UnsupportedError(
                f"block {number} ({type(block).__name__}) is not the pre-norm residual block this adapter knows: its "
                f"parts give a result {error:.1e} off"
            )

    def _composed(self, block: Any, cuts: list[PlannedCut]) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            x = args[0] if args else kwargs[self.names[0]]
            rotary = {} if self.tower.rope is None else {"rope": self._find(args, kwargs, self.tower.rope)}
            run = self.run
            x = self.tower.attend(
                block, x, self._find(args, kwargs, self.mask), rotary if run is None else run.captured
            )
            return self.tower.feed(block, self.decide(block, cuts, x))

        return forward


_FORGOTTEN = f"gradient checkpointing runs a block again whose pass is not known any more (the last {REPLAYS} are)"
_BY_ITSELF = (
    "a block of the attached tower was called by itself; blocks and encoders are pruned within a call of the tower "
    "only: call the model, or remove()"
)
_COPY = (
    "this is a copy of the tower that was attached (nn.DataParallel makes one per device): its blocks would compute "
    "with the original's weights; "
    "attach to the copy itself, or use one process per device"
)


def _place(number: int, x: Tensor) -> tuple | None:
    """Names the input of block ``number`` by where it lies; ``None`` for tensors that lie nowhere."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or not x.data_ptr():
        return None
    return number, x.device, x.data_ptr(), tuple(x.shape)


def rotary_rows(table: Any, rows: Tensor) -> Any:
    """Rows ``[G, n]`` of a rotary table, image by image: ``[N, d]`` becomes ``[G, 1, n, d]``, ``[H, N, d]`` and ``[G or
    1, H, N, d]`` become ``[G, H, n, d]``; a tuple of tables is taken one by one."""
    if isinstance(table, tuple):
        return tuple(rotary_rows(t, rows) for t in table)
    if table.ndim == 2:
        return table[rows][:, None]
    table = (table if table.ndim == 4 else table[None]).expand(len(rows), -1, -1, -1)
    return table.gather(2, rows[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, prefix: int, half: bool) -> Tensor:
    """``x`` ``[B, H, P + n, d]`` with its last n rows rotated by tables of n rows that broadcast over ``[B, H, n, d]``.
    ``half``: coordinate i pairs with i + d / 2, else 2i with 2i + 1."""
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
