"""What methods may know of a prompt's text: its rows at a site, up to the end of the prompt, answers left out."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.types import Text
from .level import SequenceLength
from .request import Call


def up_to(call: Call, level: SequenceLength, asking: Tensor) -> Tensor:
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


def prompt_at(call: Call, level: SequenceLength) -> Tensor:
    """``[B, M]``: the rows of ``level`` that are a prompt's, visual tokens included: no padding, no answers. All that
    stands in front of the first answer is the prompt's, whatever its labels."""
    assert call.question is not None
    question = call.question.to(level.rows.device).gather(1, level.rows) & level.valid
    column = torch.arange(level.width, device=question.device)
    first = torch.where(question, column, level.width).amin(1, keepdim=True)
    return up_to(call, level, question) | (level.valid & (column <= first))


def columns(call: Call, level: SequenceLength, owner: Tensor) -> Tensor:
    """Of each of the G units, whose samples are ``owner`` ``[G]``, the columns of ``level`` that hold its prompt's
    text, ``[G, T]``, padded with -1."""
    assert call.question is not None
    question = call.question.to(level.rows.device).gather(1, level.rows) & level.valid
    text = (up_to(call, level, question) & ~level.visual)[owner]  # [G, M]
    if call.segments is not None:
        segments = call.segments.to(level.rows.device)
        text = text & (segments.gather(1, level.rows)[owner] == segment(call, owner)[:, None])
    m = level.width
    place = torch.where(text, torch.arange(m, device=text.device), m).sort(1).values
    place = place[:, : max(int(text.sum(1).max()), 1)]
    return torch.where(place < m, place, -1)


def segment(call: Call, owner: Tensor) -> Tensor:
    """``[G]``: which of the prompts packed into its row each unit belongs to."""
    assert call.request is not None and call.segments is not None
    return call.segments.to(owner.device)[owner, call.request.table[:, 0].to(owner.device)]


def text_at(call: Call, level: SequenceLength, owner: Tensor, x: Tensor, keys: Tensor | None = None) -> Text:
    """The text of each unit's prompt, of which ``x`` ``[B, M, C]`` are the rows at this site and ``keys`` ``[B, G, M,
    d]`` those of the layer that was asked for."""
    assert call.request is not None and call.tokens is not None
    where = columns(call, level, owner)
    at, valid = where.clamp_min(0), where >= 0
    place = level.rows[owner[:, None], at]
    last = call.request.table.to(x.device).amax(1, keepdim=True)
    hidden = x[owner[:, None], at].detach()
    mine = None if keys is None else keys.transpose(1, 2)[owner[:, None], at]
    ids = torch.where(valid, call.tokens.to(x.device)[owner[:, None], place], -1)
    return Text(hidden, valid, valid & (place > last), torch.where(valid, place, -1), mine, ids)


def marked(where: Tensor, mask: Tensor, width: int) -> Tensor:
    """``[G, width]``: the marks or weights ``mask`` ``[G, T' <= T]`` of the columns ``where`` ``[G, T]``."""
    where = where[:, : mask.shape[1]]
    place = torch.where((mask != 0) & (where >= 0), where, width)
    return mask.new_zeros(len(mask), width + 1).scatter(1, place, mask)[:, :width]
