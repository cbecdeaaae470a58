"""Scores of visual tokens by the rows that ask about them, at a cut in the language model."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.types import UnsupportedError
from ..base import PlannedCut
from . import host
from .candidates import Candidates
from .description import Decoder
from .level import SequenceLength
from .request import Call
from .scores import attention_to, query_rows
from .serving import Serving


class Ranking:
    """Answers what methods ask of a cut in the language model."""

    def __init__(self, decoder: Decoder, serving: Serving):
        self.decoder, self.serving = decoder, serving

    def query_attention(
        self,
        call: Call,
        planned: PlannedCut,
        x: Tensor,
        candidates: Candidates,
        *,
        layer: str = "next",
        query: str = "last",
        keys: str = "all",
        rope: bool = True,
    ) -> Tensor:
        """Attention of the query rows (mean over rows and heads) to each candidate: ``[G, N]``.

        ``query``: ``"last"`` the last prompt token (with labels: every token in front of an answer), ``"all"`` every
        row. ``layer``: projections of the layer about to run on this cut's input (``"next"``) or the real attention of
        the layer before it (``"previous"``). ``keys``: softmax over all keys that the row sees or over the visual ones
        alone.
        """
        number, x, level = self._asked(call, planned, x, layer)
        dense = call.dense[self.decoder.kinds[number]]
        rotary = self.serving.prefill(call, level, number, dense, x)["position_embeddings"] if rope else None
        asking = self._asking(call, level, query)
        one = query == "last" and call.labels is None
        segments = None if call.segments is None else call.segments.to(x.device).gather(1, level.rows)
        where, owner = candidates.where, candidates.owner
        out = torch.empty_like(where, dtype=torch.float32)
        block = self.decoder.layers[number]
        with host.gathered(block):
            for part in (None,) if segments is None else range(int(segments.max()) + 1):
                rows, weight = query_rows(asking if part is None else asking & (segments == part), 1 if one else None)
                own, pairs = dense.get("attention_mask"), self.decoder.pairs
                score = attention_to(block, x, rows, weight, level, rotary, own, keys, segments, pairs)
                score = candidates.rows(score.to(where.device))
                if part is not None:
                    score = torch.where(_segment(call, owner)[:, None] == part, score.to(out.dtype), out)
                out = score
        return out.masked_fill(where < 0, -torch.inf)

    @staticmethod
    def _asked(call: Call, planned: PlannedCut, x: Tensor, layer: str) -> tuple[int, Tensor, SequenceLength]:
        """The number of the layer whose attention is meant, its input, and the level of that."""
        assert call.level is not None
        if layer == "next":
            return planned.cut.layer, x, call.level.on(x.device)
        number = planned.cut.layer - 1
        if layer == "previous":
            x, level = call.inputs[number]
            if level is not call.level:
                raise UnsupportedError(
                    f"two stages cut before layer {planned.cut.layer}; the second cannot use the attention of the "
                    "layer before"
                )
        return number, x, call.level.on(x.device)

    def _asking(self, call: Call, level: SequenceLength, query: str) -> Tensor:
        """``[B, M]``: the level's rows that rank."""
        assert call.question is not None and call.request is not None
        if call.labels is None and call.prompt is None and self.decoder.root.training:
            raise UnsupportedError(
                "ranking goes by the prompt's last token, which a training forward without labels does not tell from "
                "the answer's: pass labels to the "
                "model (label smoothing and loss functions outside of it take them away), or choose a method that does "
                "not rank by the text"
            )
        question = call.question.to(level.rows.device)
        asking = question.gather(1, level.rows) & level.valid
        if call.held is not None and bool((asking.sum(1) != question.sum(1)).any()):
            raise UnsupportedError(
                "an answer begins right behind an image whose last token is gone, which ranks for it: put text between "
                "them"
            )
        return asking if query == "last" else _up_to(call, level, asking)

    @staticmethod
    def queried(call: Call, owner: Tensor) -> Tensor:
        """``[G]`` bool: the unit's prompt has a row that asks; with labels only prompts that are answered have one."""
        assert call.question is not None
        question = call.question.to(owner.device)
        if call.segments is None:
            return question.any(1)[owner]
        same = call.segments.to(owner.device)[owner] == _segment(call, owner)[:, None]
        return (question[owner] & same).any(1)


def _up_to(call: Call, level: SequenceLength, asking: Tensor) -> Tensor:
    """``[B, M]``: every row up to the last of its prompt that is ``asking``, without answers."""
    column = torch.arange(level.width, device=asking.device)
    upto = torch.where(asking, column, -1)
    if call.segments is not None:
        parts = call.segments.to(level.rows.device).gather(1, level.rows)
        same = parts[:, :, None] == parts[:, None]  # [B, M, M]
        upto = torch.where(same, upto[:, None], -1).amax(2)
    else:
        upto = upto.amax(1, keepdim=True)
    every = level.valid & (column <= upto)
    if call.labels is not None:
        answers = (call.labels.to(level.rows.device) != -100).gather(1, level.rows) & ~level.visual
        every = every & ~answers
    return every


def _segment(call: Call, owner: Tensor) -> Tensor:
    """``[G]``: which of the prompts packed into its row each unit belongs to."""
    assert call.request is not None and call.segments is not None
    return call.segments.to(owner.device)[owner, call.request.table[:, 0].to(owner.device)]
