"""Asks a method for its decision at one cut, unit by unit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

from ..methods.base import Method
from .planning import budget, for_rasters, frame_grid
from .recipe import Stage
from .select import as_mix, from_mask, gather, join, merged, subview
from .types import NOTE, Action, Cut, Geometry, Mix, Nesting, Recent, Selection, TokenView, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

Rasters = tuple[tuple[int, int], ...]
Frames = tuple[int, ...]
K = TypeVar("K")


class Decider:
    """Asks a method for its decision at one cut. Units of other sizes than the model's typical one have plans of their
    own: the method is called once per kind of unit. Decisions carry no gradient: it flows through what is kept
    (PyramidDrop, arXiv 2410.17247, trains this way). Only a ``module`` that decides, of a method that has one, gets
    some while it is being trained, by what the decision does with the tokens (:attr:`Selection.gate`, mixes) and by
    what it tells for the losses: ``tell(site, name, values)``."""

    def __init__(
        self,
        geometry: Geometry,
        stage: Stage,
        method: Method,
        cuts: tuple[Cut, ...],
        number: int,
        module: Any = None,
        tell: Callable[[str, str, Tensor], None] = lambda site, name, values: None,
    ):
        self.geometry, self.stage, self.method, self.cuts, self.number = geometry, stage, method, cuts, number
        self.module, self.tell = module, tell
        self.plans: Recent[tuple[Rasters, Frames], Cut] = Recent(256)
        self.plans[(geometry.grid,), ()] = cuts[number]
        self.whole = False  # an image has come to a method of videos

    def note(self, view: TokenView) -> Tensor:
        """What the method notes of each token of the view of a tower's pass, ``[B, N]``."""
        import torch

        view = self._promised(view, self.geometry.notes)
        with torch.set_grad_enabled(self.learning):
            if not view.rasters:
                return self.method.note(view, self.cuts[self.number])
            kinds = _rows_by(view.rasters)
            if len(kinds) == 1:  # grid= is that of their patches
                return self.method.note(replace(view, rasters=()), self._cut(view.rasters[0]))
            shared: dict[Any, Any] = {}
            told: Tensor | None = None
            for rasters, rows in kinds.items():
                part = self.method.note(subview(view, rows, rasters[0], shared), self._cut(rasters))
                if told is None:
                    told = part.new_full((*view.valid.shape, *part.shape[2:]), torch.nan)
                told[torch.tensor(rows, device=told.device), : part.shape[1]] = part
            assert told is not None
            return told

    def nest(self, view: TokenView) -> Nesting:
        """On which part of the width each token of a tower's pass runs; its images have one size."""
        import torch

        view = self._promised(view, frozenset())
        with torch.set_grad_enabled(self.learning):
            cut = self._cut(view.rasters[0]) if view.rasters else self.cuts[self.number]
            return self.method.nest(replace(view, rasters=()), cut)

    def insert(self, view: TokenView) -> Tensor | None:
        """The rows ``[B, M, C]`` that the method adds to the tokens of a tower's pass: no decision, gradients flow
        through them."""
        return self.method.insert(replace(view, rasters=(), module=self.module), self.cuts[self.number])

    def answer(self, view: TokenView) -> Tensor | None:
        """The classes' logits ``[B, classes]`` that the method makes behind the last block."""
        return self.method.answer(replace(view, rasters=(), module=self.module), self.cuts[self.number])

    def trains(self) -> bool:
        """Whether the module that decides wants gradients."""
        return self.module is not None and any(p.requires_grad for p in self.module.parameters())

    @property
    def learning(self) -> bool:
        """Whether it gets some, in this forward."""
        import torch

        return torch.is_grad_enabled() and self.trains()

    def _promised(self, view: TokenView, names: frozenset[str]) -> TokenView:
        """``view`` with the sources of these ``names``, and the notes, none of which carries gradients; with the module
        that decides."""
        kept = {
            name: _without_gradient(call)
            for name, call in view.sources.items()
            if name in names or name.startswith(NOTE)
        }
        view = replace(view, sources=kept, features=view.features.detach())
        if self.module is None:
            return view
        self.module.to(view.features.device)
        if not self.learning:
            return replace(view, module=self.module)
        return replace(view, module=self.module, tell=partial(self.tell, self.cuts[self.number].site))

    def __call__(self, view: TokenView) -> Selection | None:
        import torch

        view = self._promised(view, self.geometry.provides.get(self.cuts[self.number].kind, frozenset()))
        with torch.set_grad_enabled(self.learning):
            if not view.rasters:
                return self._select(view, self.cuts[self.number])
            if self.method.info.video:
                return self._videos(view)
            groups: dict[tuple[Rasters, tuple[int, ...]], list[int]] = {}
            apart = self.method.info.raster and not self.cuts[self.number].joint
            for rasters, rows in _rows_by(view.rasters).items():
                left = self._left(view, rasters, rows) if apart and len(rasters) > 1 else [()] * len(rows)
                for row, counts in zip(rows, left, strict=True):
                    groups.setdefault((rasters, counts), []).append(row)
            shared: dict[Any, Any] = {}
            parts = []
            for (rasters, counts), rows in groups.items():
                cut, whole = self._cut(rasters), len(rasters) == 1
                part = subview(view, rows, rasters[0] if whole else (sum(r * c for r, c in rasters), 1), shared)
                if not whole:
                    part = replace(part, rasters=(rasters,) * len(rows))
                parts.append((rows, self._rasters(part, cut, rasters, counts) if counts else self._select(part, cut)))
            return join(view, parts)

    def _videos(self, view: TokenView) -> Selection:
        """The decision of a method of videos: images stay whole. Raises :class:`UnsupportedError` for images of several
        sizes as the frames of one."""
        shared: dict[Any, Any] = {}
        parts: list[tuple[list[int], Selection | None]] = []
        for (rasters, frames), rows in _rows_by(zip(view.rasters, view.frames, strict=True)).items():
            if not frames:
                if not self.whole and not any(c.action is not Action.NOTE for c in self.cuts[: self.number]):
                    warnings.warn(
                        f"{self.method.info.name} prunes videos: images of their own, as this prompt has, stay whole",
                        stacklevel=2,
                    )
                self.whole = True
                parts.append((rows, None))
                continue
            if len(set(frames)) > 1:
                raise UnsupportedError(
                    f"{self.method.info.name} compares the frames of a video, and those of this prompt (its images, "
                    "where one budget is for all of them) differ in size: "
                    f"{', '.join(map(str, sorted(set(frames))))} tokens"
                )
            part = subview(view, rows, frame_grid(rasters, frames), shared)
            part = replace(part, frames=(frames,) * len(rows))
            parts.append((rows, self._select(part, self._cut(rasters, frames))))
        chosen = join(view, parts)
        return from_mask(view.valid) if chosen is None else chosen

    def _select(self, view: TokenView, cut: Cut) -> Selection | None:
        """The method's decision; where an earlier stage left nothing it is not asked."""
        return self.method.select(view, cut) if view.valid.shape[1] else from_mask(view.valid)

    def _cut(self, rasters: Rasters, frames: Frames = ()) -> Cut:
        """The cut as planned for a unit made of ``rasters``, which are a video of ``frames``."""
        if (rasters, frames) not in self.plans:
            geometry = for_rasters(self.geometry, rasters, frames)
            cuts = self.method.plan(geometry, budget(geometry, self.stage, self.method))
            if [c.site for c in cuts] != [c.site for c in self.cuts]:
                raise UnsupportedError(
                    f"{self.method.info.name} would cut elsewhere for an image of {geometry.tokens} tokens than for "
                    f"one of {self.geometry.tokens}"
                )
            self.plans[rasters, frames] = cuts[self.number]
        return self.plans[rasters, frames]

    @staticmethod
    def _left(view: TokenView, rasters: Rasters, rows: list[int]) -> list[tuple[int, ...]]:
        """How many tokens are left in each of the ``rasters`` of the units ``rows``."""
        import torch

        at = torch.tensor(rows, device=view.index.device)
        ends = torch.tensor([r * c for r, c in rasters], device=at.device).cumsum(0)
        valid = view.valid[at]
        number = torch.bucketize(torch.where(valid, view.index[at], 0), ends, right=True)
        counts = torch.zeros(len(rows), len(rasters), dtype=torch.long, device=at.device).scatter_add_(
            1, number, valid.long()
        )
        return [tuple(row) for row in counts.tolist()]

    def _rasters(self, view: TokenView, cut: Cut, rasters: Rasters, left: tuple[int, ...]) -> Selection:
        """A method of the image plane on units of several rasters, of which ``left`` tokens are there: each raster's
        share of the budget is that of its tokens (largest remainders); an adaptive cut has every raster decided for
        itself."""
        import torch

        b, n = view.index.shape
        starts = [0, *accumulate(r * c for r, c in rasters)]
        shares = list(left) if cut.adaptive else _shares(min(cut.keep or 0, sum(left)), left)
        keep = torch.zeros(b, n + 1, dtype=torch.bool, device=view.valid.device)  # the last column takes the padding
        target, weight, merges = torch.full_like(view.index, -1), view.size.clone(), False
        score: Tensor | None = None
        work: Tensor | None = None
        factors: dict[str, Tensor] = {}
        pieces: list[tuple[Selection | None, Tensor, Tensor, Tensor]] = []
        for grid, m, start, share in zip(rasters, left, starts, shares, strict=False):
            if not share:
                continue
            at = (
                (view.valid & (view.index >= start) & (view.index < start + grid[0] * grid[1]))
                .nonzero()[:, 1]
                .view(b, m)
            )
            small = replace(
                view,
                features=gather(view.features, at),
                valid=torch.ones_like(at, dtype=torch.bool),
                index=view.index.gather(1, at) - start,
                size=view.size.gather(1, at),
                protected=view.protected.gather(1, at),
                grid=grid,
                rasters=(),
                memory=view.memory.setdefault(f"raster {start}", {}),
                sources={name: _rows(source, at) for name, source in view.sources.items()},
            )
            selection = self.method.select(small, replace(cut, keep=share))
            if selection is not None and selection.retention is not None:
                raise UnsupportedError("retention is told unit by unit, not raster by raster")
            if selection is not None and selection.work is not None:
                work = selection.work if work is None else work + selection.work
            chosen = (
                at
                if selection is None
                else torch.where(selection.kept >= 0, at.gather(1, selection.kept.clamp_min(0)), n)
            )
            keep.scatter_(1, chosen, True)
            pieces.append((selection, at, chosen, small.size))
            if selection is not None and selection.score is not None:
                score = (
                    torch.full(view.valid.shape, torch.nan, dtype=torch.float64, device=keep.device)
                    if score is None
                    else score
                )
                score.scatter_(1, at, selection.score.double())
            for name in ("gate", "mlp"):
                if selection is not None and (own := getattr(selection, name)) is not None:
                    every = factors.get(name, torch.ones_like(view.size))
                    factors[name] = every.scatter(1, at, own.to(every))
            if selection is None or selection.target is None:  # what stays is its own slot
                target.scatter_(1, at, torch.where(keep.gather(1, at), at, -1))
                continue
            merges = True
            target.scatter_(
                1, at, torch.where(selection.target >= 0, chosen.gather(1, selection.target.clamp_min(0)), -1)
            )
            if selection.weight is not None:
                weight.scatter_(1, at, selection.weight)
        keep = keep[:, :n]
        selection = merged(keep, target, weight) if merges else from_mask(keep)
        mixes = any(piece is not None and piece.mix is not None for piece, *_ in pieces)
        return replace(
            selection,
            score=score,
            mix=_joined(pieces, keep) if mixes else None,
            gate=factors.get("gate"),
            mlp=factors.get("mlp"),
            work=work,
        )


def _without_gradient(source: Callable[..., Any]) -> Callable[..., Any]:
    """``source`` computed without gradients."""

    def call(**kwargs: Any) -> Any:
        import torch

        with torch.no_grad():
            return source(**kwargs)

    return call


def _rows_by(kinds: Iterable[K]) -> dict[K, list[int]]:
    """The rows of a view by what they are made of."""
    out: dict[K, list[int]] = {}
    for row, kind in enumerate(kinds):
        out.setdefault(kind, []).append(row)
    return out


def _shares(budget: int, left: tuple[int, ...]) -> list[int]:
    """``budget`` shared among rasters by what is ``left`` of each (largest remainders)."""
    exact = [budget * m / max(sum(left), 1) for m in left]
    shares = [int(x) for x in exact]
    for i in sorted(range(len(left)), key=lambda i: shares[i] - exact[i])[: budget - sum(shares)]:
        shares[i] += 1
    return shares


def _joined(pieces: list[tuple[Selection | None, Tensor, Tensor, Tensor]], keep: Tensor) -> Mix:
    """One mix of those of several rasters: each with its selection, the positions of its tokens and of those it keeps
    in the unit, and sizes; ``keep`` ``[B, N]`` what is kept of all."""
    import torch

    column = keep.long().cumsum(1) - 1  # position -> column of kept
    parts = []
    for selection, at, chosen, size in pieces:
        mix = as_mix(from_mask(torch.ones_like(at, dtype=torch.bool)) if selection is None else selection, size)
        place = chosen.gather(1, mix.slot.clamp_min(0)).clamp_max(keep.shape[1] - 1)
        slot = torch.where(mix.slot >= 0, column.gather(1, place), -1)
        parts.append((at.gather(1, mix.token), slot, mix.weight))
    return Mix(*(torch.cat(p, 1) for p in zip(*parts, strict=True)))


def _rows(source: Callable[..., Any], at: Tensor) -> Callable[..., Any]:
    """``source`` for the tokens ``at`` ``[B, m]``: tensors have a row for each token, everything else stays."""

    def call(**kwargs: Any) -> Any:
        values = source(**kwargs)
        if not hasattr(values, "ndim") or values.ndim < 2:
            return values
        return values[at.new_tensor(range(len(at)))[:, None], at]

    return call
