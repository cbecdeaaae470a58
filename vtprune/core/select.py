"""The only place that turns scores into indices, and assignments into merged tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels.base import wide
from .types import Mix, Products, Projections, Selection, TokenView, extent


def top(
    score: Tensor,
    keep: int | Tensor,
    valid: Tensor,
    protected: Tensor | None = None,
    *,
    span: tuple[int, int] | None = None,
) -> Selection:
    """Keeps the ``keep`` best tokens of each image, positions ascending; ties go to the lower position.

    score ``[B, N]`` (higher is better) · keep: int or ``[B]`` · valid, protected ``[B, N]`` bool. Protected tokens come
    first whatever their score. NaN ranks last. ``span``: the fewest and the most valid tokens of an image, if known
    (:attr:`TokenView.extent`): then the device need not be asked.
    """
    ranked_by = score
    kept = (min(keep, span[0]), min(keep, span[1])) if span is not None and isinstance(keep, int) else None
    score = score.float() if score.dtype in (torch.float16, torch.bfloat16) else score
    if protected is not None:
        score = torch.where(protected, torch.inf, score)
    counts = valid.sum(1)
    keep = torch.as_tensor(keep, device=score.device).expand(score.shape[0])
    keep = torch.minimum(keep, counts)
    return replace(from_mask(placed(score, valid) < keep[:, None], kept), score=ranked_by)


def placed(score: Tensor, able: Tensor | None = None) -> Tensor:
    """``[..., N]``: how many have a higher ``score`` ``[..., N]`` than each, ties to the lower position, NaN last;
    those that are not ``able`` ``[..., N]`` stand behind the others."""
    order = torch.where(torch.isnan(score), -torch.inf, score).argsort(dim=-1, descending=True, stable=True)
    if able is not None:  # a second key: the sort is stable
        order = order.gather(-1, able.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True))
    return ranks(order)


def ranks(order: Tensor) -> Tensor:
    """``[..., N]``: where in ``order`` ``[..., N]``, positions that each stand there once, each position stands."""
    column = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, column)


def from_mask(mask: Tensor, span: tuple[int, int] | None = None) -> Selection:
    """``[B, N]`` bool to a :class:`Selection`; rows with fewer tokens end in -1. ``span``: the fewest and the most of a
    row, if known; else the device is asked, once."""
    n = mask.shape[1]
    span = extent(mask) if span is None else span
    position = torch.where(mask, torch.arange(n, device=mask.device), n)
    kept = position.sort(dim=1).values[:, : span[1]]
    return Selection(kept if span[0] == span[1] else torch.where(kept == n, -1, kept), span=span)


def merged(
    kept_mask: Tensor, destination: Tensor, weight: Tensor | None = None, *, span: tuple[int, int] | None = None
) -> Selection:
    """A merge: ``kept_mask`` ``[B, N]``, ``destination`` ``[B, N]`` position of the token that absorbs each one (itself
    if kept, -1 if dropped); ``span`` as in :func:`from_mask`."""
    plain = from_mask(kept_mask, span)
    column = (kept_mask.long().cumsum(1) - 1).clamp_min(0)  # position -> column of kept
    target = torch.where(destination >= 0, column.gather(1, destination.clamp_min(0)), -1)
    return Selection(plain.kept, target, weight, span=plain.span)


def absorbing(selection: Selection, n: int) -> Tensor:
    """``[B, n]``: of every token of the view the position of the one that stands for it behind ``selection``: itself
    if it is kept, -1 if it is dropped."""
    kept = selection.kept
    if selection.target is not None:
        target = selection.target
        at = kept.gather(1, target.clamp_min(0))
        return torch.where(target >= 0, at, -1)
    place = torch.where(kept >= 0, kept, n)
    return kept.new_full((len(kept), n + 1), -1).scatter(1, place, kept)[:, :n]


def marked(places: Tensor, n: int) -> Tensor:
    """``[B, n]`` bool: the ``places`` ``[B, K]``, -1 is padding."""
    marks = torch.zeros(len(places), n + 1, dtype=torch.bool, device=places.device)  # the last takes the padding
    return marks.scatter_(1, torch.where(places >= 0, places, n), True)[:, :n]


def gather(x: Tensor, kept: Tensor) -> Tensor:
    """Rows ``kept`` ``[B, K]`` (-1: zeros) of ``x`` ``[B, N, ...]``."""
    return kernels.gather(kept, x)[0]


def combine(x: Tensor, selection: Selection, size: Tensor) -> tuple[Tensor, Tensor]:
    """The kept rows of ``x`` ``[B, N, C]`` and their sizes ``[B, K]``. With a target each row is the weighted mean of
    the tokens it absorbs (``size`` ``[B, N]`` are the default weights) and sizes add up; pruned tokens vanish. With a
    mix the rows are what that says. A gate multiplies the tokens first."""
    x = gated(x, selection)
    if selection.mix is not None:
        return mixed(x, selection.mix, selection.kept.shape[1]), _sizes(selection, size)
    if selection.target is None:
        rows, sizes = kernels.gather(selection.kept, x, size)
        return rows, sizes
    return kernels.merge(x, selection.target, selection.kept.shape[1], weight=selection.weight, size=size)


def gated(x: Tensor, selection: Selection) -> Tensor:
    """The tokens ``x`` ``[B, N, C]`` times the gate of ``selection``, if there is one."""
    return x if selection.gate is None else x * selection.gate[..., None].to(x.dtype)


def mixed(x: Tensor, mix: Mix, slots: int) -> Tensor:
    """The ``[B, slots, C]`` that ``mix`` makes of ``x`` ``[B, N, C]``, summed in at least 32 bits."""
    y = wide(x)
    b, n, _ = y.shape
    place = torch.where(mix.slot >= 0, mix.slot, slots) * n + mix.token  # the extra slot takes the padding
    share = y.new_zeros(b, (slots + 1) * n).scatter_add_(1, place, mix.weight.to(y.dtype))
    return (share.view(b, slots + 1, n)[:, :slots] @ y).to(x.dtype)


def _sizes(selection: Selection, size: Tensor) -> Tensor:
    """``[B, K]``: how many tokens each slot stands for."""
    if selection.target is None:
        return gather(size, selection.kept)
    return kernels.merge(size[..., None], selection.target, selection.kept.shape[1], size=size)[1]


def bands(rows: int, columns: int, keep: int) -> Tensor:
    """Splits a ``rows x columns`` raster into exactly ``keep`` near-square cells; returns the cell number of every
    token, ``[rows * columns]``, raster order.

    The rows form ``round(sqrt(keep * rows / columns))`` bands and each band is cut into as many columns as an even
    share of ``keep`` gives.
    """
    if not 1 <= keep <= rows * columns:
        raise ValueError(f"keep must be in 1..{rows * columns}, got {keep}")
    count = min(max(round(math.sqrt(keep * rows / columns)), -(-keep // columns)), rows, keep)
    first = torch.arange(count + 1) * keep // count  # the first cell of each band
    band = torch.arange(rows) * count // rows
    return (first[band][:, None] + torch.arange(columns)[None] * first.diff()[band][:, None] // columns).flatten()


def subview(view: TokenView, rows: Sequence[int], grid: tuple[int, int], shared: dict[Any, Any]) -> TokenView:
    """The images ``rows`` of ``view``, without padding that they do not need. What sources compute for all images goes
    through ``shared``."""
    if len(rows) == len(view.valid):
        return replace(view, grid=grid, rasters=(), frames=())
    at = torch.tensor(rows, device=view.valid.device)
    width = int(view.valid[at].sum(1).max())

    def only(name: str, source: Callable[..., Any]) -> Callable[..., Any]:
        def call(**kwargs: Any) -> Any:
            masks = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}  # of the sub-view's images alone
            if masks:
                values = source(**{**kwargs, **{k: _spread(v, at, len(view.valid)) for k, v in masks.items()}})[at]
            else:
                key = (name, *sorted(kwargs.items()))
                if key not in shared:
                    shared[key] = source(**kwargs)
                values = None if shared[key] is None else shared[key][at]
            if isinstance(values, Projections | Products):
                return values.first(width)
            return values[:, :width] if isinstance(values, Tensor) and values.ndim > 1 else values

        return call

    return replace(
        view,
        features=view.features[at, :width],
        valid=view.valid[at, :width],
        index=view.index[at, :width],
        size=view.size[at, :width],
        protected=view.protected[at, :width],
        grid=grid,
        rasters=(),
        frames=(),
        seed=view.seed if isinstance(view.seed, int) else tuple(view.seed[r] for r in rows),
        memory=view.memory.setdefault(str(rows), {}),
        sources={name: only(name, source) for name, source in view.sources.items()},
    )


def _spread(mask: Tensor, at: Tensor, images: int) -> Tensor:
    """``mask`` ``[b, T]`` of the images ``at`` as one of all ``images``, which nothing marks elsewhere."""
    return mask.new_zeros(images, *mask.shape[1:]).index_copy(0, at, mask)


def join(view: TokenView, parts: Sequence[tuple[Sequence[int], Selection | None]]) -> Selection | None:
    """One selection for all images of ``view`` from those of its sub-views; ``None`` where a sub-view is left as it is
    (for all: ``None``)."""
    if all(s is None for _, s in parts):
        return None
    full = [(rows, from_mask(view.valid[list(rows)]) if s is None else s) for rows, s in parts]
    b, n = view.valid.shape
    if len(full) == 1 and len(full[0][0]) == b:
        return full[0][1]
    kept = torch.full((b, max(s.kept.shape[1] for _, s in full)), -1, device=view.valid.device)
    target, weight, layout, score, mix = None, None, None, None, None
    gate, retention, mlp = (_factors(full, name, view.valid) for name in ("gate", "retention", "mlp"))
    if any(s.mix is not None for _, s in full):
        mixes = [(rows, as_mix(s, view.size[list(rows)])) for rows, s in full]
        most = max(m.token.shape[1] for _, m in mixes)
        token, slot = torch.zeros(b, most, dtype=torch.long, device=kept.device), kept.new_full((b, most), -1)
        widest = max((m.weight.dtype for _, m in mixes), key=lambda dtype: torch.finfo(dtype).bits)
        mix = Mix(token, slot, torch.zeros(b, most, dtype=widest, device=kept.device))
        for rows, m in mixes:
            for whole, part in ((mix.token, m.token), (mix.slot, m.slot), (mix.weight, m.weight)):
                whole[list(rows), : part.shape[1]] = part.to(whole.dtype)
    if any(s.target is not None for _, s in full):
        target, weight = torch.full((b, n), -1, device=kept.device), view.size.clone()
    if any(s.layout is not None for _, s in full):
        layout = torch.arange(kept.shape[1], device=kept.device).repeat(b, 1)
    if any(s.score is not None for _, s in full):
        score = torch.full((b, n), torch.nan, dtype=torch.float64, device=kept.device)
    for rows, s in full:
        at = torch.tensor(rows, device=kept.device)
        kept[at, : s.kept.shape[1]] = s.kept
        if target is not None and weight is not None:
            own = s.target
            if own is None:  # kept tokens are their own slot
                slot = torch.arange(s.kept.shape[1], device=kept.device).expand_as(s.kept)
                own = torch.full((len(rows), n + 1), -1, device=kept.device).scatter(
                    1, torch.where(s.kept >= 0, s.kept, n), slot
                )[:, :n]
            target[at, : own.shape[1]] = own
            if s.weight is not None:
                weight[at, : s.weight.shape[1]] = s.weight.to(weight.dtype)
        if layout is not None and s.layout is not None:
            layout[at, : s.layout.shape[1]] = s.layout
        if score is not None and s.score is not None:
            score[at, : s.score.shape[1]] = s.score.double()
    return Selection(
        kept,
        target,
        weight,
        layout,
        score,
        mix=mix,
        gate=gate,
        retention=retention,
        mlp=mlp,
        work=_work(full, view.valid),
    )


def _work(parts: Sequence[tuple[Sequence[int], Selection]], valid: Tensor) -> Tensor | None:
    """``[B]``: the FLOPs of all ``parts``; ``None``: none tells."""
    told = [(list(rows), s.work) for rows, s in parts if s.work is not None]
    if not told:
        return None
    out = torch.zeros(len(valid), dtype=torch.long, device=valid.device)
    for rows, work in told:
        out[rows] = work.to(out)
    return out


def _factors(parts: Sequence[tuple[Sequence[int], Selection]], name: str, valid: Tensor) -> Tensor | None:
    """``[B, N]``: the factors ``name`` of the tokens of all ``parts``, 1 where a part has none; ``None``: none has."""
    told = [(list(rows), values) for rows, s in parts if (values := getattr(s, name)) is not None]
    if not told:
        return None
    out = torch.ones(valid.shape, dtype=told[0][1].dtype, device=valid.device)
    for rows, values in told:
        out[rows, : values.shape[1]] = values.to(out.dtype)
    return out


def as_mix(selection: Selection, size: Tensor) -> Mix:
    """What any selection puts into its slots, as a mix; ``size`` ``[B, N]`` of its view, or of more tokens."""
    if selection.mix is not None:
        return selection.mix
    if selection.target is None:
        slot = torch.arange(selection.kept.shape[1], device=size.device).expand_as(selection.kept)
        there = selection.kept >= 0
        return Mix(selection.kept.clamp_min(0), torch.where(there, slot, -1), there.to(wide(size).dtype))
    target = selection.target
    weight = wide(size[:, : target.shape[1]] if selection.weight is None else selection.weight)
    k = selection.kept.shape[1]
    place = torch.where(target >= 0, target, k)
    total = weight.new_zeros(len(target), k + 1).scatter_add_(1, place, weight)
    share = weight / total.gather(1, place).clamp_min(torch.finfo(weight.dtype).tiny)
    return Mix(torch.arange(target.shape[1], device=size.device).expand_as(target), target, share)
