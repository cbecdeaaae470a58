"""Scores of visual tokens by the rows that ask about them, at a cut in the language model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.types import Products, Text, UnsupportedError
from ...kernels.base import rotate, wide
from ..base import PlannedCut
from . import host
from .ahead import read_ahead
from .candidates import Candidates
from .description import Decoder
from .level import SequenceLength
from .request import Call
from .scores import attention_to, keys_of, query_rows, question
from .serving import Serving
from .text import columns, marked, segment, text_at, up_to


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
        query: str | Tensor = "last",
        keys: str = "all",
        rope: bool | str = True,
        heads: str = "mean",
        visual: Tensor | None = None,
    ) -> Tensor:
        """Attention of the query rows (mean over rows and heads) to each candidate: ``[G, N]``.

        ``query``: ``"last"`` the last prompt token (with labels: every token in front of an answer), ``"all"`` every
        row, ``"visual"`` those of the unit itself that are left, or a mask ``[G, T]`` over the rows of the source
        ``text``; or their weights, which ``visual`` ``[G, N]`` goes on with over the unit's own tokens. ``layer``:
        projections of the layer about to run on this cut's input (``"next"``) or the real attention of the layer
        before it (``"previous"``). ``keys``: softmax over all keys that the row sees or over the visual ones alone.
        ``rope``: whether queries and keys are rotated; ``"corrected"``: they are, and every probability is divided by
        the scaled product of the two places' all-ones vectors, rotated alike (SparseVLM+). ``heads``: ``"mean"``,
        ``"max"`` of each row, ``"most"`` of any row (0 where no row asks; not corrected), or ``"each"``: ``[G, N, H]``.
        """
        if heads == "most" and rope == "corrected":
            raise ValueError('heads="most" has no correction')
        number, x, level = self._asked(call, planned, x, layer)
        dense = call.dense[self.decoder.kinds[number]]
        rotary = self.serving.prefill(call, level, number, dense, x)["position_embeddings"] if rope else None
        how: dict[str, Any] = {"each_head": heads, "corrected": rope == "corrected"}
        if isinstance(query, Tensor) or query == "visual":
            where, marks = candidates.where, candidates.valid
            if isinstance(query, Tensor):
                where, marks = columns(call, level, candidates.owner.to(x.device)), query
            asking = marked(where.to(x.device), marks.to(x.device), level.width)
            if visual is not None:
                asking = asking + marked(candidates.where.to(x.device), visual.to(x.device), level.width)
            return self._asked_by(call, asking, number, x, level, rotary, keys, how, candidates)
        asking = self._asking(call, level, query)
        one = query == "last" and call.labels is None
        segments = None if call.segments is None else call.segments.to(x.device).gather(1, level.rows)
        where, owner = candidates.where, candidates.owner
        out: Tensor | None = None
        block = self.decoder.layers[number]
        with host.gathered(block):
            for part in (None,) if segments is None else range(int(segments.max()) + 1):
                rows, weight = query_rows(asking if part is None else asking & (segments == part), 1 if one else None)
                own, pairs = dense.get("attention_mask"), self.decoder.pairs
                score = attention_to(block, x, rows, weight, level, rotary, own, keys, segments, pairs, **how)
                score = candidates.rows(score.to(where.device))
                if out is not None and part is not None:
                    score = torch.where(_like(segment(call, owner) == part, score), score, out)
                out = score
        assert out is not None
        return out.masked_fill(_like(where < 0, out), -torch.inf)

    @torch.no_grad()
    def products(
        self,
        call: Call,
        planned: PlannedCut,
        x: Tensor,
        candidates: Candidates,
        *,
        layer: str | int = "previous",
    ) -> Products:
        """What the last token of each prompt (with labels: those in front of answers, their mean) gives to all tokens
        of the prompt that are left: the scaled products of its query and their keys, rotated, before any softmax, mean
        over heads.

        ``layer`` as for :meth:`query_attention`; a number: a later layer, read ahead of its turn.
        """
        if isinstance(layer, int):
            assert call.level is not None
            number, level = layer, call.level.on(x.device)
            x = read_ahead(self.decoder, self.serving, call, planned.cut.layer, number, x, level)
        else:
            number, x, level = self._asked(call, planned, x, layer)
        block, pairs, owner = self.decoder.layers[number], self.decoder.pairs, candidates.owner.to(x.device)
        asking = self._asking(call, level, "last")
        rows, weight = query_rows(asking, 1 if call.labels is None and call.segments is None else None)
        dense = call.dense[self.decoder.kinds[number]]
        rotary = self.serving.prefill(call, level, number, dense, x)["position_embeddings"]
        with host.gathered(block):
            q, k, how = question(block, x, rows, rotary, pairs)  # [B, H, R, d], [B, G, M, d]
        q, k = wide(q), wide(rotate(k, *how["rotary"]))
        with torch.autocast(x.device.type, enabled=False):  # it would multiply in 16 bits
            both = (q.unflatten(1, (k.shape[1], -1)).mean(2) * how["scale"]) @ k.transpose(2, 3)
        both = both.mean(1)[owner]  # [G, R, M]: the mean over heads
        mine, asks = up_to(call, level, asking)[owner], (weight > 0)[owner]
        if call.segments is not None:
            segments = call.segments.to(x.device).gather(1, level.rows)
            own = segment(call, owner)[:, None]
            mine, asks = mine & (segments[owner] == own), asks & (segments.gather(1, rows)[owner] == own)
        score = (both * asks[..., None]).sum(1) / asks.sum(1).clamp_min(1)[:, None]
        width = level.width
        column = torch.arange(width, device=x.device)
        order = torch.where(mine, column, width).sort(1).values[:, : max(int(mine.sum(1).max()), 1)]
        told = score.gather(1, order.clamp_max(width - 1)).masked_fill(order == width, -torch.inf)
        at = (mine.cumsum(1) - 1).gather(1, candidates.where.clamp_min(0).to(x.device))
        return Products(told, torch.where(candidates.where.to(x.device) < 0, -1, at))

    def _asked_by(
        self,
        call: Call,
        asking: Tensor,
        number: int,
        x: Tensor,
        level: SequenceLength,
        rotary: tuple[Tensor, Tensor] | None,
        keys: str,
        how: dict[str, Any],
        candidates: Candidates,
    ) -> Tensor:
        """As :meth:`query_attention`, by the rows that ``asking`` ``[G, M]`` marks for each unit; ``how`` as for
        :func:`~.scores.attention_to`."""
        where, owner = candidates.where, candidates.owner
        segments = None if call.segments is None else call.segments.to(x.device).gather(1, level.rows)
        own, pairs = call.dense[self.decoder.kinds[number]].get("attention_mask"), self.decoder.pairs
        block, out = self.decoder.layers[number], None
        # how many units of its sample stand in front of each
        rank = (owner[:, None] == owner).tril(-1).sum(1)
        with host.gathered(block):
            for n in range(int(rank.max()) + 1):
                mine = (rank == n).to(x.device)
                rows, weight = query_rows(asking.new_zeros(len(x), level.width).index_put((owner[mine],), asking[mine]))
                score = attention_to(block, x, rows, weight, level, rotary, own, keys, segments, pairs, **how)
                score = candidates.rows(score.to(where.device))
                out = score if out is None else torch.where(_like(rank == n, score), score, out)
        assert out is not None
        return out.masked_fill(_like(where < 0, out), -torch.inf)

    def states(
        self,
        call: Call,
        planned: PlannedCut,
        x: Tensor,
        candidates: Candidates,
        *,
        layer: str = "previous",
        norm: bool | str = False,
    ) -> Tensor:
        """Hidden states of each candidate, ``[G, N, C]``: what the layer in front of the cut was given
        (``"previous"``), or the one behind it (``"next"``); ``norm``: after the language model's final norm, or,
        ``"layer"``, that layer's own input norm."""
        number, x, _ = self._asked(call, planned, x, layer)
        rows = candidates.rows(x.detach())
        if norm == "layer":
            return self._normed(rows, self.decoder.layers[number].input_layernorm)
        return self._normed(rows, self.decoder.lm.norm) if norm else rows

    def text(
        self,
        call: Call,
        planned: PlannedCut,
        x: Tensor,
        candidates: Candidates,
        *,
        keys: str | None = None,
        norm: bool = False,
    ) -> Text:
        """The prompt's text at this cut; ``keys``: with the keys of the layer in front (``"previous"``) or behind
        (``"next"``), as its attention uses them; ``norm``: its states after the language model's final norm."""
        # (behind another cut at this site the layer in front cannot be asked for, so columns are those of now)
        made = None if keys is None else self._keys(call, planned, x, keys)
        told = text_at(call, self._asked(call, planned, x, "next")[2], candidates.owner, x, made)
        return replace(told, hidden=self._normed(told.hidden, self.decoder.lm.norm)) if norm else told

    @staticmethod
    def _normed(rows: Tensor, norm: Any) -> Tensor:
        with host.gathered(norm):
            return norm(rows).to(rows.device)

    def keys(
        self, call: Call, planned: PlannedCut, x: Tensor, candidates: Candidates, *, layer: str = "previous"
    ) -> Tensor:
        """Keys of each candidate as the attention uses them, ``[G, N, H, d]``: of the layer in front of the cut, or
        behind it (``"next"``)."""
        return candidates.rows(self._keys(call, planned, x, layer).transpose(1, 2))

    def _keys(self, call: Call, planned: PlannedCut, x: Tensor, layer: str) -> Tensor:
        number, x, level = self._asked(call, planned, x, layer)
        dense = call.dense[self.decoder.kinds[number]]
        rotary = self.serving.prefill(call, level, number, dense, x)["position_embeddings"]
        block = self.decoder.layers[number]
        with host.gathered(block):
            return keys_of(block, x.detach(), rotary, self.decoder.pairs)

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
        return asking if query == "last" else up_to(call, level, asking)

    @staticmethod
    def queried(call: Call, owner: Tensor) -> Tensor:
        """``[G]`` bool: the unit's prompt has a row that asks; with labels only prompts that are answered have one."""
        assert call.question is not None
        question = call.question.to(owner.device)
        if call.segments is None:
            return question.any(1)[owner]
        same = call.segments.to(owner.device)[owner] == segment(call, owner)[:, None]
        return (question[owner] & same).any(1)


def _like(mask: Tensor, score: Tensor) -> Tensor:
    """``mask`` with as many dimensions as ``score``."""
    return mask.view(*mask.shape, *[1] * (score.ndim - mask.ndim))
