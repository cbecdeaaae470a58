"""Copies of decoder layers, for side branches."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...core import backbone
from ...core.types import UnsupportedError
from ..engine import host
from ..engine.adapted import adapted


def copied(source: Any, number: int, config: Any) -> nn.Module:
    """A copy of decoder layer ``source`` that belongs to nobody (its hooks are not copied); what LoRA adapters at work
    add to its weights is in them. Raises :class:`UnsupportedError` for weights that cannot be read here, or are not
    those of its class."""
    parameter = next(source.parameters())
    if parameter.is_meta and any(hasattr(m, "_hf_hook") for m in source.modules()):
        raise UnsupportedError(
            f"decoder layer {number} cannot be copied: its weights are offloaded; give the model a device_map that "
            "keeps it in memory"
        )
    beside = backbone.tuners(source)
    foreign = adapted(source)
    if foreign and not all(_is_lora(module) for _, module in beside) or len(foreign) > bool(beside):
        raise UnsupportedError(
            f"decoder layer {number} cannot be copied: it holds {', '.join(foreign)}; merge adapters into the "
            "weights, or attach to the model as it was "
            "before they were added or it was quantised"
        )
    with torch.random.fork_rng(devices=[]):  # the throw-away initialisation must not move the user's random numbers
        fresh = type(source)(config, layer_idx=number).to(parameter.device, parameter.dtype)
    state = _merged(source.state_dict(), beside) if beside else source.state_dict()
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


def _is_lora(module: Any) -> bool:
    """Whether a layer of peft's is plain LoRA beside a plain linear layer."""
    plain = type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear"
    return plain and not any(module.use_dora.values()) and type(module.base_layer) is nn.Linear


def _merged(state: dict[str, Tensor], beside: list[tuple[str, Any]]) -> dict[str, Tensor]:
    """The state of a layer as it would be with its adapters merged."""
    out = {}
    for name, values in state.items():
        owner = next((n for n, _ in beside if name.startswith(f"{n}.")), None)
        if owner is None:
            out[name] = values
        elif name.startswith(f"{owner}.base_layer."):
            out[name.replace(".base_layer.", ".")] = values
    for name, module in beside:
        if not module.disable_adapters:
            for active in module.active_adapters:
                if active in module.lora_A and active not in module.merged_adapters:
                    delta = module.get_delta_weight(active).detach()
                    out[f"{name}.weight"] = out[f"{name}.weight"] + delta.to(out[f"{name}.weight"].dtype)
    return out
