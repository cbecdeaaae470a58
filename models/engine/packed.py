"""The engine for vision towers whose blocks see rasters of several sizes one behind the other: it takes notes, kind by
kind of raster, and changes nothing."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.ledger import UndoLedger, live
from ...core.types import NOTE, Projections, Seed, TokenView, UnsupportedError
from ..base import PlannedCut
from . import host
from .captured import catcher
from .description import PackedTower
from .packing import Kind, Packing
from .passes import COPY, check_blocks
from .rows import rows_of
from .run import Run
from .tower_replays import BY_ITSELF, in_backward

UNKNOWN = (
    "a {block} was told to attend to something else than the patches of one image, tile or frame (or, where it has "
    "some, their windows): this library does not know its attention"
)
WITHIN = (
    "this block attends within windows, which a bias of the keys does not tell: source('projections', windows=True) "
    "gives what it compares, source('windows') which patches see each other"
)


@dataclass
class PackedRun(Run):
    """One pass of G rasters of several sizes. What is noted stands raster behind raster, ``[patches of all, ...]``.

    Attributes:
        packing: what it sees.
    """

    packing: Packing | None = None

    @staticmethod
    def of(packing: Packing, fold: int) -> PackedRun:
        counts = torch.tensor([len(r.place) for r in packing.rasters])
        most = int(counts.max())
        index = torch.arange(most).expand(len(counts), -1)
        index = torch.where(index < counts[:, None], index, -1).to(packing.device)
        size = (index >= 0).to(torch.float32)
        return PackedRun(len(counts), most, index, size, index, fold=fold, packing=packing)

    @property
    def seen(self) -> Packing:
        assert self.packing is not None
        return self.packing

    def put(self, planned: PlannedCut, kind: Kind, values: Tensor) -> None:
        """Keeps ``values`` ``[g, n, ...]`` of the rasters ``kind`` as what ``planned`` noted."""
        key = planned.stage, planned.cut.site
        if key not in self.noted:
            self.noted[key] = values.new_full((self.seen.patches[-1], *values.shape[2:]), torch.nan)
        self.noted[key][kind.flat] = values

    def told(self, stage: int, kind: Kind) -> dict[str, Callable[[], Tensor]]:
        """What a view of the rasters ``kind`` tells of the stage's notes so far: ``[g, n, ...]`` each."""
        return {
            NOTE + site: functools.partial(table.__getitem__, kind.flat)
            for (s, site), table in self.noted.items()
            if s == stage
        }

    def segments(self) -> Tensor:
        """Where what a row of the block that runs attends to begins, and where the last one ends."""
        raise NotImplementedError("blocks of which only notes are taken run as they are")

    def handed_over(self, g: int) -> int:
        rows, columns = self.seen.rasters[g].tokens
        return rows * columns

    def noted_behind(self, stage: int, site: str) -> Sequence[Tensor]:
        """NaN for tokens of which no patch was seen; of the others the mean over those that were."""
        table = self.noted[stage, site]
        out: dict[int, Tensor] = {}
        for kind in self.seen.kinds:
            out.update(zip(kind.numbers, folded(table[kind.flat], kind, self.fold), strict=True))
        return [out[g] for g in range(self.images)]


def folded(values: Tensor, kind: Kind, fold: int) -> Tensor:
    """``values`` ``[g, n, ...]`` of patches as means of the squares of ``fold`` x ``fold`` that become one token, ``[g,
    tokens, ...]``."""
    (rows, columns), tokens = kind.raster.grid, kind.raster.tokens
    shape = values.shape[2:]
    plane = values.reshape(len(values), rows, columns, -1)
    missing = tokens[0] * fold - rows, tokens[1] * fold - columns
    if any(missing):
        plane = F.pad(plane, (0, 0, 0, missing[1], 0, missing[0]), value=torch.nan)  # negative: cut off
    squares = plane.reshape(len(values), tokens[0], fold, tokens[1], fold, -1)
    mean = squares.nanmean((2, 4)) if max(missing) > 0 else squares.mean((2, 4))
    return mean.reshape(len(values), tokens[0] * tokens[1], *shape)


class PackedEngine:
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
        self.tower, self.cuts, self.seed, self.done = tower, cuts, seed, done
        self.local = threading.local()
        self.catch = catcher(tower.capture, ledger, lambda: self.run)
        ledger.before(tower.root, self._open)
        for i, block in enumerate(tower.blocks):
            mine = [c for c in cuts if c.cut.site == f"vision.{i}"]
            caught: list[nn.Module] = []
            if mine:
                self.catch(block, caught)
            ledger.before(block, self._enterer(block, caught if mine else None))
            ledger.after(block, self._leaver(block, mine))
        ledger.after(tower.root, self._close, first=False, always=True)

    @property
    def run(self) -> PackedRun | None:
        """The pass that this thread is in."""
        return getattr(self.local, "run", None)

    @run.setter
    def run(self, run: PackedRun | None) -> None:
        self.local.run = run

    def _open(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.run = None
        live()
        packing = self.tower.pack(host.arguments(module, args, kwargs))
        if packing is None or not packing.rasters:
            return  # the model's own message is the better one
        if module is not self.tower.root:
            raise UnsupportedError(COPY)
        self.run = self._start(packing)

    def _start(self, packing: Packing) -> PackedRun:
        return PackedRun.of(packing, self.tower.fold)

    def _close(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        run, self.run = self.run, None
        if run is None or output is None:
            return
        run.captured.clear()
        run.memory.clear()
        check_blocks(len(run.counts), len(self.tower.blocks))
        self.done(run)

    # one block --------------------------------------------------------------------------------------------------------

    def _enterer(self, block: nn.Module, caught: list[nn.Module] | None) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            run = self.run
            if run is None:
                if in_backward():  # a checkpoint runs it again: its notes are taken
                    return None
                raise UnsupportedError(BY_ITSELF)
            if module is not block:
                raise UnsupportedError(COPY)
            run.counts.append(run.index)
            if caught is not None:
                self.catch(block, caught)
                run.captured["inputs"] = inputs = host.arguments(block, args, kwargs)
                run.captured["rope"] = inputs.get(host.ROTARY)
            return None

        return enter

    def _leaver(self, block: nn.Module, cuts: list[PlannedCut]) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            run = self.run
            if run is None or not cuts:
                return None
            x = rows_of(output).detach()
            x = x.reshape(-1, x.shape[-1]).to(run.seen.device)  # [S, C]
            if len(x) != run.seen.starts[-1]:
                raise UnsupportedError(
                    f"a {type(block).__name__} saw {len(x)} patches, and the images that the tower was given have "
                    f"{run.seen.starts[-1]}"
                )
            look = self._looker(run, block)
            for planned in cuts:
                for kind in run.seen.kinds:
                    run.put(planned, kind, planned.note(self._view(run, planned, kind, x, look)))
            run.captured.clear()
            return None

        return leave

    def _looker(self, run: PackedRun, block: nn.Module) -> Callable[[], tuple[tuple, bool]]:
        """A call that tells, once for all rasters, what ``block`` compares, and whether only within windows."""

        @functools.cache
        def look() -> tuple[tuple, bool]:
            q, k, v, scale = self.tower.project(block, run.captured)
            q, k, v = (t.detach().to(run.seen.device) for t in (q, k, v))
            return (q, k, v, scale), within(run.seen, run.captured["inputs"], type(block).__name__)

        return look

    def _view(self, run: PackedRun, planned: PlannedCut, kind: Kind, x: Tensor, look: Callable) -> TokenView:
        """The rasters ``kind`` of the patches ``x`` ``[S, C]``, planned for as they are."""
        (g, n), raster, device = kind.at.shape, kind.raster, kind.at.device
        valid = torch.ones(g, n, dtype=torch.bool, device=device)

        def projections(windows: bool = False) -> Projections:
            (q, k, v, scale), inside = look()
            if inside and not windows:
                raise UnsupportedError(WITHIN)
            q, k, v = (t[kind.at].transpose(1, 2) for t in (q, k, v))  # [g, H, n, d]
            return Projections(q, k, v, scale, 0)

        def windows() -> Tensor | None:
            inside = look()[1]
            return raster.windows.to(device).expand(g, -1, -1) if inside and raster.windows is not None else None

        sources: dict[str, Callable] = {"projections": projections, "prefix": lambda: x[kind.at][:, :0]}
        if raster.windows is not None:
            sources["windows"] = windows
        memory = run.memory.setdefault(planned.stage, {})
        seed = self.seed
        if not isinstance(seed, int) and len(seed) == run.images:
            seed = tuple(seed[i] for i in kind.numbers)
        return TokenView(
            features=x[kind.at],
            valid=valid,
            index=torch.arange(n, device=device).expand(g, n),
            size=valid.to(torch.float32),
            protected=torch.zeros_like(valid),
            grid=raster.grid,
            seed=seed,
            memory=memory.setdefault(str(kind.numbers), {}),
            sources=sources | run.told(planned.stage, kind),
            rasters=((raster.tokens,),) * g,
            known=(valid, n, n),
        )


def within(packing: Packing, inputs: dict[str, Any], block: str) -> bool:
    """Whether a block with these arguments attends within windows (``False``: within whole rasters). Raises
    :class:`UnsupportedError` for anything else."""
    starts, mask = host.segments(inputs), inputs.get(host.MASK)
    told = starts if starts is not None else mask
    for known, answer in packing.known:  # all blocks are given the same
        if known is told:
            return answer
    answer = False
    if starts is not None:
        here = starts.tolist()
        if here != packing.starts:
            answer = here == packing.windows
            if not answer:
                raise UnsupportedError(UNKNOWN.format(block=block))
    elif not seen(packing, mask):
        raise UnsupportedError(UNKNOWN.format(block=block))
    if told is not None:
        packing.known.append((told, answer))
    return answer


def seen(packing: Packing, mask: Any) -> bool:
    """Whether ``mask`` lets every patch see those of its raster, and no others: ``[1, 1, S, S]`` of one sequence; where
    rasters are rows of a batch ``[G, 1, 1 or n, n]`` or ``[G, n]``, or ``None``: they see everything. Additive, or what
    may be seen."""
    owner = torch.full((packing.starts[-1],), -1, device=packing.device)  # of each row; -1: nothing attends to it
    for kind in packing.kinds:
        owner[kind.at] = torch.tensor(kind.numbers, device=packing.device)[:, None]
    if packing.batched and mask is None:
        return bool((owner >= 0).all())
    if not isinstance(mask, Tensor):
        return False
    mask = mask.to(packing.device)
    there = mask if mask.dtype == torch.bool else mask == 0 if mask.ndim == 4 else mask != 0
    if not packing.batched:
        same = (owner[:, None] == owner) & (owner >= 0)
        return there.shape == (1, 1, *same.shape) and torch.equal(there[0, 0], same)
    want = owner.view(len(packing.rasters), -1) >= 0
    if there.ndim == 2:
        return torch.equal(there, want)
    fits = there.ndim == 4 and there.shape[::3] == want.shape
    return fits and bool((there == want[:, None, None]).all())
