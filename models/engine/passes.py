"""Passes of a vision tower, opened and closed, and which one a thread is in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...core.ledger import UndoLedger, live
from ...core.types import Action, Seed, Selection, TokenView, UnsupportedError
from ..base import PlannedCut
from .description import Tower
from .run import Run
from .tower_replays import in_backward

COPY = (
    "this is a copy of the tower that was attached (nn.DataParallel makes one per device): its blocks would compute "
    "with the original's weights; "
    "attach to the copy itself, or use one process per device"
)


class Passes:
    """Every call of a tower's root.

    Attributes:
        tower: its description.
        cuts: all that there are.
        pixels: those of them in front of the tower.
        tokens: of an image of the typical size.
        folded: whether a token is a square of patches that is folded into one behind the tower.
        seed: of the next passes.
        done: called at the end of each pass.
        made: features that were handed out, and the pass that made them.
        answer: what the classifier behind the tower is to answer, of this thread's last pass; ``None``: its own.
    """

    def __init__(self, tower: Tower, cuts: list[PlannedCut], *, tokens: int, seed: Seed, done: Callable[[Run], None]):
        self.tower, self.cuts, self.tokens, self.seed, self.done = tower, cuts, tokens, seed, done
        self.pixels = [c for c in cuts if c.cut.site == "pixels"]
        self.folded = tower.fold > 1 and any(c.cut.action is not Action.NOTE for c in cuts)
        self.made: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.local = threading.local()

    def hook(self, ledger: UndoLedger, blocks: Callable[[], None]) -> None:
        """Hooks the root around what ``blocks()`` hooks."""
        ledger.before(self.tower.root, self._open)
        blocks()
        ledger.after(self.tower.root, self._close, first=False, always=True)

    @property
    def run(self) -> Run | None:
        """The pass that this thread is in."""
        run = getattr(self.local, "run", None)
        return None if run is not None and run.again and not in_backward() else run

    @run.setter
    def run(self, run: Run | None) -> None:
        self.local.run = run

    def view(
        self, run: Run, features: Tensor, planned: PlannedCut, *, prefix: int, sources: dict[str, Callable]
    ) -> TokenView:
        """What a method may look at. Images of another size than the typical one are planned for as they are."""
        rasters = () if run.grid == self.grid else ((run.grid,),) * run.images
        return run.view(
            features,
            planned,
            grid=run.grid or self.grid,
            prefix=prefix,
            seed=self.seed,
            sources=sources,
            rasters=rasters,
        )

    @property
    def answer(self) -> Tensor | None:
        """What a method answers behind the pass that this thread is in, or has just left."""
        return self.local.run.answer if self.run is not None else getattr(self.local, "answer", None)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of the typical size."""
        rows, columns = self.tower.grid
        return (rows // self.tower.fold, columns // self.tower.fold) if self.folded else (rows, columns)

    def _open(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.run = None
        live()
        pixels = args[0] if args else kwargs.get(self.tower.pixels)
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            return None  # the model's own message is the better one
        if module is not self.tower.root:
            raise UnsupportedError(COPY)
        grid = self.tower.grid if self.tower.raster is None else self.tower.raster(pixels)
        tokens = self.tokens if grid == self.tower.grid else grid[0] * grid[1]
        squares = None
        if self.folded:
            squares = _squares(grid, self.tower.fold, pixels.device)
            tokens, grid = len(squares), self.grid
        run = Run.start(pixels.shape[0], tokens, pixels.device)
        run.grid = run.cells = grid
        run.fold, run.squares = 1 if self.folded else self.tower.fold, squares
        if self.cuts and torch.is_grad_enabled():
            run.decided = {}
        self.run = run
        for planned in self.pixels:
            args, kwargs = self._reduce(run, planned, args, kwargs)
        run.raster = run.slot
        return args, kwargs

    def _reduce(self, run: Run, planned: PlannedCut, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A cut in front of the tower: what the root is called with, fewer pixels."""
        pixels = args[0] if args else kwargs[self.tower.pixels]
        features = pixels.new_zeros(run.images, run.tokens, 1)
        view = self.view(run, features, planned, prefix=0, sources={})
        selection = planned.select(view)
        if selection is None or selection.kept.shape[1] == run.tokens:
            run.note(planned, run.index)
            return args, kwargs
        if self.tower.resize is None:
            raise UnsupportedError("this tower takes images of one size only, so it cannot be given fewer pixels")
        assert run.grid is not None
        rows, columns = run.cells = _cells(selection, run.grid)
        run.apply(view.features, selection, planned)
        pixels, extra = self.tower.resize(pixels, rows, columns)
        kwargs = {**kwargs, **extra}
        return ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, self.tower.pixels: pixels})

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
        features = output
        if isinstance(output, dict):
            features = output.get("image_features")
        elif isinstance(output, tuple):
            features = output[0]
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
        self.run = run
        try:
            yield run
        finally:
            self.run = outer

    def _close(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        run, self.run = self.run, None
        if run is None or output is None:
            return
        run.captured.clear()
        run.memory.clear()
        self.local.answer = run.answer
        run.rotary = None
        ran, there = len(run.counts), len(self.tower.blocks)
        if self.cuts and not (run.early and ran < there):
            check_blocks(ran, there)
        self.done(run)


def _squares(grid: tuple[int, int], fold: int, device: torch.device) -> Tensor:
    """``[N, fold^2]``: the places in the raster ``grid`` of the patches that each visual token is made of."""
    if grid[0] % fold or grid[1] % fold:
        raise UnsupportedError(f"{grid[0]} x {grid[1]} patches are no whole squares of {fold} x {fold}")
    place = torch.arange(grid[0] * grid[1], device=device).view(grid[0] // fold, fold, grid[1] // fold, fold)
    return place.transpose(1, 2).reshape(-1, fold * fold)


def check_blocks(ran: int, there: int) -> None:
    """Raises :class:`UnsupportedError` unless all blocks of a pass ran."""
    if ran != there:
        raise UnsupportedError(
            f"{ran} of the {there} blocks ran that the tower had at attach(): blocks were taken out, replaced or "
            "skipped since; remove() and attach again"
        )


def _cells(selection: Selection, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a selection whose slots are the cells of a regular raster (down-sampling)."""
    assert selection.target is not None
    cells = selection.target[0].reshape(grid)
    return len(cells[:, 0].unique()), len(cells[0].unique())
