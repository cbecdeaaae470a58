"""Which passes of the vision tower made which images of a prompt, and which of its visual tokens they handed over."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.types import UnsupportedError
from . import host
from .encoder_call import EncoderCall
from .layout import present
from .request import Request
from .run import Run


def assign(request: Request, encoded: dict[str, EncoderCall]) -> list[list[tuple[Run, int]]]:
    """The tower's passes that made each sample's images and frames, in the prompt's order."""
    want = {
        kind: [[n for p in parts if (p.video >= 0) == (kind == "video") for n in p.passes] for parts in request.parts]
        for kind in ("image", "video")
    }
    made: dict[str, list[tuple[Run, int]]] = {kind: encoded[kind].passes if kind in encoded else [] for kind in want}
    out: list[list[tuple[Run, int]]] = []
    at = dict.fromkeys(want, 0)
    copies = {}
    for kind, samples in want.items():
        total, have = sum(map(len, samples)), len(made[kind])
        if total and (not have or total % have or len(samples) % (total // have)):
            raise UnsupportedError(
                f"the prompt's {kind}s need {total} passes of the vision tower, and {have} are known: encode them with "
                "this attachment, by the model's own "
                f"{host.ENCODERS[kind]}()"
            )
        copies[kind] = total // have if total else 1
    for b, parts in enumerate(request.parts):
        rows = []
        for kind in want:
            if b % copies[kind] == 0:
                start = at[kind]
                at[kind] += len(want[kind][b])
            else:
                start = at[kind] - len(want[kind][b])
            mine = made[kind][start : start + len(want[kind][b])]
            if [run.handed_over(g) for run, g in mine] != want[kind][b]:
                raise UnsupportedError(f"the vision tower's passes are of another size than the prompt's {kind}s")
            rows.append(iter(mine))
        out.append([next(rows[p.video >= 0]) for p in parts for _ in p.passes])
    return out


def arrived(request: Request, visual: Tensor) -> Tensor:
    """``[B, T]``: the visual tokens that the tower handed over, and the new-line tokens of rows that have one left."""
    assert request.vision is not None
    live: dict[int, Tensor] = {}
    for run, _ in (p for rows in request.vision for p in rows):
        if id(run) not in live:
            index = torch.where(run.index >= 0, run.index, run.tokens)
            live[id(run)] = torch.zeros(run.images, run.tokens + 1, dtype=torch.bool, device=index.device).scatter_(
                1, index, True
            )[:, :-1]
    there = []
    for b, (parts, rows, sources) in enumerate(zip(request.parts, request.vision, request.sources, strict=True)):
        if len(sources):
            none = [torch.zeros(1, dtype=torch.bool, device=visual.device)]
            mine = torch.cat([_flat(live[id(run)], run, g) for run, g in _by_run(rows)] or none).to(visual.device)
            held = None if request.held is None else request.held[b][visual[b]]
            there.append(present(parts, sources, mine[sources.to(visual.device).clamp_min(0)], held))
    return torch.zeros_like(visual).masked_scatter(visual, torch.cat(there)) if there else torch.zeros_like(visual)


def _by_run(rows: list[tuple[Run, int]]) -> list[tuple[Run, list[int]]]:
    """Passes, those of one run that follow each other together."""
    out: list[tuple[Run, list[int]]] = []
    for run, g in rows:
        if out and out[-1][0] is run:
            out[-1][1].append(g)
        else:
            out.append((run, [g]))
    return out


def _flat(table: Tensor, run: Run, rows: list[int]) -> Tensor:
    """Of ``table`` ``[G, N]`` the ``rows``, each without padding, one behind the other."""
    values, sizes = table[torch.tensor(rows, device=table.device)], [run.handed_over(g) for g in rows]
    if all(n == values.shape[1] for n in sizes):
        return values.flatten()
    n = torch.arange(values.shape[1], device=table.device)
    return values[n < torch.tensor(sizes, device=table.device)[:, None]]
