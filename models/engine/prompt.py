"""What a forward is given, read as prompts: which tokens are real, which of several packed ones each belongs to, which
rows rank the visual tokens, and the position behind the last one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.types import UnsupportedError
from . import host
from .level import SequenceLength
from .request import Call
from .scores import answer_starts

ENDS = (
    "the prompt ends with an image token that this recipe drops, so that nothing is left to answer from: put text "
    "behind the image, or choose a method that "
    "keeps it"
)


def real_tokens(mask: Any, batch: int, length: int) -> Tensor:
    """Which tokens of the prompt are not padding, ``[B, T]``: the caller's 2-D mask, or what the prepared 4-D one lets
    anybody see."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UnsupportedError("pruning shortens the attention masks; pass a 2-D attention_mask [batch, sequence]")
    if mask.ndim == 4:
        if mask.is_floating_point() and bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any()):
            raise UnsupportedError(
                "an additive mask with other values than 0 and -inf cannot be shortened; pass a 2-D attention_mask "
                "[batch, sequence]"
            )
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, :length]
        if seen.shape[1:] == (length, length):
            alone = (seen.sum(1) == 1) & seen.diagonal(dim1=1, dim2=2)
            if bool((alone.sum(1) > 1).any()):
                raise UnsupportedError(
                    "in this 4-D attention_mask several tokens of a row are seen by themselves alone, so that it "
                    "cannot be told which of them are padding and where prompts end; pass a 2-D attention_mask "
                    "[batch, sequence]"
                )
        mask = seen.any(1).expand(batch, -1)
    if mask.shape != (batch, length):
        raise UnsupportedError(f"the attention_mask is {list(mask.shape)} for a prompt of {[batch, length]} tokens")
    return mask.bool()


def prompts_in_rows(inputs: dict[str, Any], call: Call) -> Tensor | None:
    """Which of the prompts packed into its row each token belongs to ``[B, T]``; ``None`` where a row is one prompt.
    Packs carry no mask: their positions begin anew, or flash attention is told where they begin."""
    if call.mask is not None:
        return None
    assert call.visual is not None
    starts = inputs.get(host.PACKED[0])
    if starts is not None:
        if len(call.visual) != 1:
            raise UnsupportedError("sequences packed into one row are known; these are several rows")
        first = torch.zeros(call.visual.shape[1] + 1, dtype=torch.long, device=call.visual.device)
        first[starts.long().to(first.device)] = 1
        return first[:-1].cumsum(0)[None] - 1
    ids = call.positions
    if ids is None or (ids.ndim == 3 and len(ids) == 3):
        return None
    ids = ids[0] if ids.ndim == 3 else ids
    seams = nn.functional.pad(ids[:, 1:] != ids[:, :-1] + 1, (1, 0))
    return seams.long().cumsum(1).expand(len(call.visual), -1) if bool(seams.any()) else None


def asking_rows(call: Call, level: SequenceLength) -> Tensor:
    """The rows that rank, ``[B, T]``: with labels those in front of an answer (placeholders are never an answer), else
    the prompt's last."""
    if call.labels is not None:
        return answer_starts(call.labels.to(level.rows.device), level)
    column = level.rows
    real = level.valid if call.prompt is None else level.valid & (column < call.prompt.to(column.device)[:, None])
    if call.segments is None:
        last = torch.where(real, column, -1).amax(1, keepdim=True)
        return real & (column == last)
    ends = nn.functional.pad(call.segments[:, 1:] != call.segments[:, :-1], (0, 1), value=True)
    return real & ends.to(real.device)


def prunable_tokens(call: Call, ids: Tensor, head: int, tail: int) -> Tensor:
    """:func:`prompt_tokens` of ``ids`` ``[B, T]``, of which the call's mask says which are real."""
    return prompt_tokens(call, real_tokens(call.mask, *ids.shape).to(ids.device), head, tail)


def prompt_tokens(call: Call, real: Tensor, head: int, tail: int) -> Tensor:
    """``[B, T]``: of the ``real`` tokens of each prompt, which ends where an answer begins if there is one, all but the
    first ``head`` and the last ``tail``.

    Raises :class:`UnsupportedError` for labels that leave no prompt in front of an answer."""
    first = _seams(real, call.segments)
    last = nn.functional.pad(first[:, 1:], (0, 1), value=True)
    if call.labels is not None:
        answer = (call.labels.to(real.device) != -100) & real
        real = real & (_numbers(answer, first) == 0)
        if bool((answer & (_numbers(answer | real, first) == 1)).any()):
            raise UnsupportedError(
                "the labels leave no prompt in front of the answer, so there is nothing to prune: mark the prompt's "
                "tokens with -100"
            )
    elif call.prompt is not None:
        real = real & (torch.arange(real.shape[1], device=real.device) < call.prompt.to(real.device)[:, None])
    behind = _numbers(real.flip(1), last.flip(1)).flip(1)
    return real & (_numbers(real, first) > head) & (behind > tail)


def _seams(real: Tensor, segments: Tensor | None) -> Tensor:
    """``[B, T]``: where prompts begin, several in a row if ``segments`` tell them apart."""
    first = torch.zeros_like(real)
    if segments is not None:
        first[:, 1:] = (segments[:, 1:] != segments[:, :-1]).to(real.device)
    first[:, :1] = True
    return first


def _numbers(marks: Tensor, first: Tensor) -> Tensor:
    """``[B, T]``: how many tokens are marked from the beginning of each prompt (``first``) up to each one, from 1."""
    number = marks.cumsum(1)
    return number - torch.where(first, number - marks.long(), 0).cummax(1).values


def next_positions(ids: Tensor | None, level: SequenceLength) -> Tensor:
    """The position behind the prompt ``[B]``; ids ``[B, T]``, or ``[3 or 4, B, T]`` with three axes (four: the text's
    own in front)."""
    b, t = level.rows.shape
    if ids is None:
        return torch.full((b,), t, device=level.rows.device)
    ids = ids.to(level.rows.device)
    if ids.ndim == 3:
        ids = ids[-3:].amax(0)
    return torch.where(level.valid, ids.expand(b, -1), -1).amax(1) + 1
