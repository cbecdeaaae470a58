"""Whose visual tokens are whose: passes of the tower matched with the images of a prompt, and what a stage kept told
per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .layout import present
from .record import Record
from .request import Request
from .run import Run

Pass = tuple[Run, int]  # one image's row in one pass of the tower


def order(request: Request) -> list[Tensor]:
    """Per sample the columns of its visual tokens, ascending: a token's place there is its index in reports."""
    return [
        torch.cat([p.columns for p in parts]).cpu() if parts else torch.empty(0, dtype=torch.long)
        for parts in request.parts
    ]


def passes(request: Request) -> list[list[tuple[int, Tensor, Tensor]]]:
    """Per sample and pass of the tower: its number of tokens, which of them are in the prompt ``[v]``, and their visual
    indices ``[v]``."""
    out = []
    for parts, sources in zip(request.parts, request.sources, strict=True):
        start, sample_passes = 0, []
        for n in (n for p in parts for n in p.passes):
            index = ((sources >= start) & (sources < start + n)).nonzero()[:, 0]
            sample_passes.append((n, sources[index] - start, index))
            start += n
        out.append(sample_passes)
    return out


def _present(run: Run, g: int) -> Tensor:
    """``[N]`` bool: the original tokens that are still there."""
    row = run.index[g].cpu()
    return torch.zeros(run.tokens, dtype=torch.bool).scatter_(0, row[row >= 0], True)


def carry(request: Request) -> Run:
    """The books of the stages behind the projector, begun with what the tower has dropped and merged: one row per
    unit."""
    groups = request.units
    counts = [len(u.columns) for u in groups]
    device = request.real.device
    run = Run.start(len(groups), max(counts), device, counts)
    if request.arrived is None:
        return run
    columns = order(request)
    sizes = [torch.ones(len(c)) for c in columns]
    absorber = [torch.arange(len(c)) for c in columns]  # visual index of the token that took each one in
    for b, (rows, there) in enumerate(zip(request.vision or [], passes(request), strict=False)):
        for (tower, g), (n, token, index) in zip(rows, there, strict=True):
            at = torch.full((n,), -1).scatter_(0, token, index)
            row = tower.index[g].cpu()
            live = row >= 0
            size = torch.zeros(n).scatter_(0, row[live], tower.size[g].cpu()[live].float())
            sizes[b][index] = size[token]
            slot = tower.slot[g].cpu()[token]
            absorber[b][index] = torch.where(slot >= 0, at[row[slot.clamp_min(0)].clamp_min(0)], -1)
            run.merges |= tower.merges
    index, size, slots = torch.full_like(run.index, -1), torch.zeros_like(run.size), torch.full_like(run.slot, -1)
    for u, unit in enumerate(groups):
        here = torch.searchsorted(columns[unit.sample], unit.columns.cpu())
        left = request.arrived[unit.sample].cpu()[unit.columns.cpu()]
        running = torch.full((len(columns[unit.sample]),), -1).scatter_(0, here[left], torch.arange(int(left.sum())))
        index[u, : int(left.sum())] = left.nonzero()[:, 0].to(device)
        size[u, : int(left.sum())] = sizes[unit.sample][here[left]].to(device)
        into = absorber[unit.sample][here]
        slots[u, : len(here)] = torch.where(into >= 0, running[into.clamp_min(0)], -1).to(device)
    width = int((index >= 0).sum(1).max())
    run.index, run.size, run.slot = index[:, : max(width, 1)], size[:, : max(width, 1)], slots
    return run


def tower_record(request: Request, number: int) -> Record:
    """What the tower's stage ``number`` kept, per sample."""
    kept, assignment, before, after, scores, owners = [], [], [], [], [], []
    merges = ranks = False
    first: Record | None = None
    assert request.vision is not None
    books = zip(request.parts, request.vision, passes(request), order(request), request.sources, strict=True)
    for b, (parts, rows, there, columns, sources) in enumerate(books):
        keep, was, into = (
            torch.zeros(len(columns), dtype=torch.bool),
            torch.zeros(len(columns), dtype=torch.bool),
            torch.full((len(columns),), -1),
        )
        score, owner = torch.full((len(columns),), torch.nan, dtype=torch.float64), torch.full((len(columns),), -1)
        for i, ((run, g), (n, token, index)) in enumerate(zip(rows, there, strict=True)):
            record = first = run.records[number]
            at = torch.full((n,), -1).scatter_(0, token, index)
            visible = at[record.kept[g]]
            keep[visible[visible >= 0]] = True
            earlier = at[run.records[number - 1].kept[g]] if number else index
            was[earlier[earlier >= 0]] = True
            if record.assignment is not None:
                merges = True
                slot = record.assignment[g][token]
                into[index] = torch.where(slot >= 0, at[record.kept[g][slot.clamp_min(0)]], -1)
            ranks |= record.ranked is not None
            score[index], owner[index] = record.scored(g, n)[token], i
        held = None if request.held is None else request.held[b].cpu()[columns]
        keep, was = present(parts, sources, keep, held), present(parts, sources, was, held)
        lines = (keep & (sources < 0)).nonzero()[:, 0]
        into[lines] = lines
        scores.append(score)
        owners.append(torch.where(score.isnan(), -1, owner))
        kept.append(keep.nonzero()[:, 0])
        assignment.append(_slots(into, kept[-1]))
        before.append(int(was.sum()))
        after.append(len(kept[-1]))
    assert first is not None
    ranking = (scores, owners) if ranks else (None, None)
    return Record(first.site, first.stage, before, after, kept, assignment if merges else None, None, *ranking)


def _slots(into: Tensor, kept: Tensor) -> Tensor:
    """The absorbing tokens ``into`` ``[n]`` (-1: none) as places in ``kept``."""
    return (
        torch.where(into >= 0, torch.searchsorted(kept, into.clamp_min(0)), -1)
        if len(kept)
        else torch.full_like(into, -1)
    )


def by_sample(request: Request, record: Record, rasters: bool = False) -> Record:
    """A record told per unit, told per sample. ``rasters``: each raster of a unit had a share of its budget, and its
    tokens were ranked among themselves."""
    columns = order(request)
    samples = len(columns)
    kept: list[list[Tensor]] = [[] for _ in range(samples)]
    into = [torch.full((len(c),), -1) for c in columns]
    scores = [torch.full((len(c),), torch.nan, dtype=torch.float64) for c in columns]
    owners = [torch.full((len(c),), -1) for c in columns]
    for u, unit in enumerate(request.units):
        place = torch.searchsorted(columns[unit.sample], unit.columns.cpu())
        mine = place[record.kept[u]]
        kept[unit.sample].append(mine)
        if record.assignment is not None:
            slot = record.assignment[u][: len(place)]
            into[unit.sample][place] = torch.where(slot >= 0, mine[slot.clamp_min(0)], -1) if len(mine) else -1
        score = record.scored(u, len(place))
        scores[unit.sample][place] = score
        owners[unit.sample][place] = torch.where(score.isnan(), -1, u)
    if rasters:
        own = [
            torch.cat([torch.full((len(p.columns),), i) for i, p in enumerate(parts)]) if parts else owner
            for parts, owner in zip(request.parts, owners, strict=True)
        ]
        owners = [torch.where(owner >= 0, number, -1) for owner, number in zip(owners, own, strict=True)]
    merged = [torch.cat(k).sort().values if k else torch.empty(0, dtype=torch.long) for k in kept]
    assignment = None if record.assignment is None else [_slots(i, k) for i, k in zip(into, merged, strict=True)]
    ranking = (scores, owners) if record.ranked is not None else (None, None)
    return Record(
        record.site,
        record.stage,
        _add(request, record.tokens_in),
        _add(request, record.tokens_out),
        merged,
        assignment,
        None,
        *ranking,
    )


def per_image(record: Record, tokens: int) -> Record:
    """A record of a bare tower, whose images are the samples."""
    if record.ranked is None:
        return record
    scores = [record.scored(g, tokens) for g in range(len(record.kept))]
    return replace(record, scores=scores, units=[torch.where(s.isnan(), -1, 0) for s in scores])


def _add(request: Request, counts: Sequence[int]) -> list[int]:
    rows = [0] * len(request.parts)
    for unit, c in zip(request.units, counts, strict=True):
        rows[unit.sample] += c
    return rows
