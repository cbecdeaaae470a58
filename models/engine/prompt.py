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
        mask = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].any(1)[:, :length].expand(batch, -1)
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
