"""Tokens that are neither kept nor dropped yet, while what decides is being trained: every layer behind the decision
attends to them by the share that is retained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.types import Selection, UnsupportedError, VtpruneError
from ...kernels.base import wide
from . import host
from .request import Call

TRAINED = (
    "gradient checkpointing asks what decides again in the backward pass, or not at all, and it is being trained: "
    "gradient_checkpointing_disable()"
)


def retain(call: Call, selection: Selection, owner: Tensor, column: Tensor, valid: Tensor) -> None:
    """From here on the log of the retention ``[G, N]`` is added to the logits of the tokens that stand in the caller's
    ``column`` ``[G, N]`` of the samples ``owner`` ``[G]``; of a token that was retained before, to what is there."""
    share = selection.retention
    assert share is not None and call.visual is not None
    if not share.requires_grad:
        raise VtpruneError("tokens are retained softly in training alone, where what decides wants gradients")
    if selection.target is not None or selection.mix is not None or not bool((selection.counts == valid.sum(1)).all()):
        raise VtpruneError("tokens that are retained softly all stay")
    share = wide(share)
    logs = share.clamp_min(torch.finfo(share.dtype).tiny).log()
    width = call.visual.shape[1]
    place = torch.where(valid, column, width)  # the extra column takes the padding
    added = logs.new_zeros(len(call.visual), width + 1).index_put((owner[:, None].expand_as(place), place), logs)
    added = added[:, :width]
    call.retained = added if call.retained is None else call.retained.to(added) + added
    call.served.clear()


def check(call: Call, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raises :class:`UnsupportedError` where a layer, given ``kwargs``, cannot read what is retained softly."""
    if call.retained is None:
        return
    if host.without_cache(module):
        raise UnsupportedError(TRAINED)
    if host.cache_in(kwargs) is not None:
        raise UnsupportedError(
            "what decides which tokens stay is being trained, where all of them do, and a cache would be another than "
            "in use: use_cache=False"
        )
