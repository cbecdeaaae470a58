"""The reference: the dense model with what a method dropped hidden from it, by masks and, where asked, by positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.models.engine.masked import hide_in_decoder, hide_in_tower

from ..core.ledger import UndoLedger
from ..core.report import Report
from .case import Case, attention_mask
from .outcome import Skip


def masks(c: Case, report: Report, passes: list[tuple[Any, int]]) -> tuple[list[Tensor], Tensor, UndoLedger]:
    """Hooks that hide from the dense model what was dropped, and the columns hidden at each layer. Also ``present``
    ``[B, T]``: rows left at the end."""
    ledger = UndoLedger()
    if passes:
        _hide_in_tower(ledger, c, passes)
    if not c.mllm:
        return [], torch.empty(0), ledger
    padding, hidden = attention_mask(c.inputs), _hidden(c, report)
    hide_in_decoder(ledger, c.adapter.decoder_layers(), hidden)
    if c.options.get("positions") == "compact":
        _renumber(ledger, c, [padding.bool() & ~h if bool(h.any()) else None for h in hidden])
    return hidden, padding.bool() & ~hidden[-1], ledger


def _hide_in_tower(ledger: UndoLedger, c: Case, passes: list[tuple[Any, int]]) -> None:
    """Hides from every block of the tower what the blocks before it dropped; ``passes`` are the handle's: a run of the
    tower and the number of a picture in it."""
    blocks = c.adapter.tower_blocks()
    if c.adapter.tower_mask is None:
        raise Skip("this tower's blocks take no mask, so nothing can be hidden from the dense model")
    gone = torch.zeros(len(passes), passes[0][0].tokens, dtype=torch.bool)
    per_block = []
    for i in range(len(blocks)):
        for j, (run, g) in enumerate(passes):
            for record in run.records:
                if record.site == f"vision.{i - 1}":
                    gone = gone.clone()
                    gone[j] = True
                    gone[j, record.kept[g]] = False
        per_block.append(gone)
    form = getattr(c.adapter, "mask_form", None)
    hide_in_tower(ledger, blocks, c.adapter.tower_mask, c.geometry.prefix, per_block, form)


def _hidden(c: Case, report: Report) -> list[Tensor]:
    """Per layer of the language model, the columns ``[B, T]`` of visual tokens that were dropped before it."""
    ids = c.inputs["input_ids"]
    visual = c.adapter.visual(ids)

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
            x = args[0] if args else kwargs["hidden_states"]
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
