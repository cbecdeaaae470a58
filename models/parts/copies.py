"""Copies of decoder layers, for side branches."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...core.types import UnsupportedError
from ..engine import host
from ..engine.adapted import adapted


def copied(source: Any, number: int, config: Any) -> nn.Module:
    """A copy of decoder layer ``source`` that belongs to nobody (its hooks are not copied). Raises
    :class:`UnsupportedError` for weights that cannot be read here, or are not those of its class."""
    parameter = next(source.parameters())
    if parameter.is_meta and any(hasattr(m, "_hf_hook") for m in source.modules()):
        raise UnsupportedError(
            f"decoder layer {number} cannot be copied: its weights are offloaded; give the model a device_map that "
            "keeps it in memory"
        )
    foreign = adapted(source)
    if foreign:
        raise UnsupportedError(
            f"decoder layer {number} cannot be copied: it holds {', '.join(foreign)}; merge adapters into the "
            "weights, or attach to the model as it was "
            "before they were added or it was quantised"
        )
    with torch.random.fork_rng(devices=[]):  # the throw-away initialisation must not move the user's random numbers
        fresh = type(source)(config, layer_idx=number).to(parameter.device, parameter.dtype)
    state = source.state_dict()
    if host.sharded(source):
        raise UnsupportedError(
            f"decoder layer {number} cannot be copied: its weights are sharded; attach before fully_shard()"
        )
    odd = sorted(set(state) ^ set(fresh.state_dict())) or [
        n for n, t in state.items() if type(t) is not Tensor or not t.is_floating_point()
    ]
    if odd:
        raise UnsupportedError(
            f"decoder layer {number} cannot be copied: its weights are not those of a {type(source).__name__} "
            f"({odd[0]})"
        )
    fresh.load_state_dict(state)
    return copy.deepcopy(fresh).train(source.training)
