"""The reference: the dense model with what a method dropped hidden from it, by masks and, where asked, by positions;
with tokens on a part of its tower's width, by zeros."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.models.engine.arguments import LAYER
from vtprune.models.engine.folded import FoldedRun
from vtprune.models.engine.masked import (
    hide_in_decoder,
    hide_in_packed,
    hide_in_tower,
    learn_in_decoder,
    narrow_in_tower,
    silence_in_decoder,
)
from vtprune.models.engine.online import reads_between
from vtprune.models.engine.packing import Packing
from vtprune.models.parts.matrices import of_block

from ..core.ledger import UndoLedger
from ..core.planning import positions_of
from ..core.report import Report
from .case import Case, attention_mask
from .outcome import Skip


def masks(c: Case, report: Report, passes: list[tuple[Any, int]]) -> tuple[list[Tensor], Tensor, UndoLedger]:
    """Hooks that hide from the dense model what was dropped, and the columns hidden at each layer. Also ``present``
    ``[B, T]``: rows left at the end."""
    ledger = UndoLedger()
    if passes and any(i.nests for i in c.infos):
        _narrow_in_tower(ledger, c, passes)
    elif passes:
        _hide_in_tower(ledger, c, passes)
    if not c.mllm:
        return [], torch.empty(0), ledger
    padding, hidden = attention_mask(c.inputs), _hidden(c, report)
    hide_in_decoder(ledger, c.adapter.decoder_layers(), hidden)
    scales = {(cut.layer, cut.half): cut.scale for *_, cuts in c.plan() for cut in cuts if cut.half}
    silence_in_decoder(ledger, c.adapter.decoder_layers(), report.skipped, scales)
    _learn(ledger, c)
    if positions_of(c.geometry, c.recipe, c.options.get("positions")) == "compact":
        _renumber(ledger, c, [padding.bool() & ~h if bool(h.any()) else None for h in hidden])
    return hidden, padding.bool() & ~hidden[-1], ledger


def _learn(ledger: UndoLedger, c: Case) -> None:
    """MLPs that stand for nothing in an answer behind its first tokens."""
    watched = [(method, cut) for _, method, cuts in c.plan() for cut in cuts if cut.watch]
    if not watched:
        return
    layers, names = c.adapter.decoder_layers(), reads_between(c.adapter.describe())
    rules = {cut.layer: partial(method.learn, cut=cut) for method, cut in watched}
    learn_in_decoder(
        ledger,
        {i: (layers[i], getattr(layers[i], names[i])) for i in rules},
        watched[0][1].watch,
        rules,
        c.adapter.prunable(c.inputs),
    )


def _hide_in_tower(ledger: UndoLedger, c: Case, passes: list[tuple[Any, int]]) -> None:
    """Hides from every block of the tower what the blocks before it dropped; ``passes`` are the handle's: a run of the
    tower and the number of a picture in it."""
    run = passes[0][0]
    if isinstance(run, FoldedRun):
        return hide_in_packed(ledger, c.adapter.packed(), _rows_gone(passes, len(c.adapter.tower_blocks())))
    blocks = c.adapter.masked_modules()
    if c.adapter.tower_mask is None:
        raise Skip("this tower's blocks take no mask, so nothing can be hidden from the dense model")
    per_block = _gone(passes, len(blocks))
    if run.squares is not None:  # patches in the raster's order
        order = run.squares.flatten().cpu().argsort()
        per_block = [gone.repeat_interleave(run.group, 1)[:, order] for gone in per_block]
    form = getattr(c.adapter, "mask_form", None)
    hide_in_tower(ledger, blocks, c.adapter.tower_mask, c.geometry.prefix, per_block, form)


def _narrow_in_tower(ledger: UndoLedger, c: Case, passes: list[tuple[Any, int]]) -> None:
    """Every token on its part of the width, by zeros; nothing was dropped."""
    features, gains = [], []
    for run, g in passes:
        place, prefix = slice(None), c.geometry.prefix
        rows = run.widths.features[g]
        if run.squares is not None:  # patches in the raster's order
            place = run.squares.flatten().argsort()
        features.append(torch.cat([rows[:prefix], rows[prefix:][place]]))
        if run.widths.gain is not None:
            gain = run.widths.gain[:, g].detach()
            gains.append(torch.cat([gain[:, :prefix], gain[:, prefix:][:, place]], 1))
    blocks = [of_block(block) for block in c.adapter.tower_blocks()]
    gain = list(torch.stack(gains, 1)) if gains else None
    narrow_in_tower(ledger, blocks, torch.stack(features), gain)


def _gone(passes: list[tuple[Any, int]], blocks: int) -> list[Tensor]:
    """Of each of so many blocks which tokens ``[passes, N]`` the ones before it dropped."""
    gone, out = torch.zeros(len(passes), passes[0][0].tokens, dtype=torch.bool), []
    for i in range(blocks):
        for j, (run, g) in enumerate(passes):
            for record in run.records:
                if record.site == (f"vision.{i - 1}" if i else "pixels"):
                    gone = gone.clone()
                    gone[j] = True
                    gone[j, record.kept[g]] = False
        out.append(gone)
    return out


def _rows_gone(passes: list[tuple[Any, int]], blocks: int) -> Callable[[Packing], list[Tensor]]:
    """Of the call of the tower that saw a packing the rows that each block must not see."""
    runs = list({id(run): run for run, _ in passes}.values())
    used: list[Any] = []

    def hidden(packing: Packing) -> list[Tensor]:
        alike = [run for run in runs if run.seen.starts == packing.starts]
        run = next((r for r in alike if all(r is not u for u in used)), alike[0])
        used.append(run)
        out = []
        for gone in _gone([(run, g) for g in range(run.images)], blocks):
            rows = run.places.cpu()[gone].flatten()
            out.append(torch.zeros(packing.starts[-1], dtype=torch.bool).index_fill(0, rows[rows >= 0], True))
        return out

    return hidden


def _hidden(c: Case, report: Report) -> list[Tensor]:
    """Per layer of the language model, the columns ``[B, T]`` of visual tokens that were dropped before it."""
    ids = c.inputs["input_ids"]
    visual = c.adapter.prunable(c.inputs)

    def columns(kept: list[Tensor]) -> Tensor:
        out = visual.clone()
        for b, k in enumerate(kept):
            out[b, visual[b].nonzero()[:, 0][k.to(ids.device)]] = False
        return out

    lost = torch.zeros_like(visual)
    hidden = []
    for i in range(c.geometry.llm_layers):
        for stage in report.stages:
            if stage.site == f"llm.{i}" or (i == 0 and not stage.site.startswith("llm.")):
                lost = columns(stage.kept)
        hidden.append(lost)
    return hidden


def _renumber(ledger: UndoLedger, c: Case, present: list[Tensor | None]) -> None:
    """Hooks that give the columns ``present[i]`` ``[B, T]`` of layer i the positions 0, 1, 2 ..., and what is decoded
    the ones behind; ``None``: its own."""
    kinds = c.adapter.kinds()
    fallen: dict[int, Tensor] = {}  # per layer [B, 1], by how much the prompt's last position fell

    def make(number: int, there: Tensor) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = LAYER.first(args, kwargs)
            mine = there.to(x.device)
            own = kwargs["position_ids"].to(x.device).expand(len(mine), -1)
            if x.shape[1] == mine.shape[1]:  # the prompt
                ids = (mine.long().cumsum(1) - 1).clamp_min(0)
                last = torch.where(mine, torch.arange(mine.shape[1], device=x.device), -1).argmax(1, keepdim=True)
                fallen[number] = own.gather(1, last) - ids.gather(1, last)
            else:
                ids = own - fallen[number]
            return args, {**kwargs, "position_ids": ids, "position_embeddings": c.adapter.rotary(x, ids, kinds[number])}

        return enter

    for i, (layer, there) in enumerate(zip(c.adapter.decoder_layers(), present, strict=True)):
        if there is not None:
            ledger.before(layer, make(i, there))
