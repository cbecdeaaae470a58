"""Decoder layers written out, head by head, for methods that give them keys and values of other rows than their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtprune.check.case import Case
from vtprune.core.planning import load_recipe

EXACT = {"llama", "clip-llama"}  # their norms are computed in double precision here


def double(tiny: Any, method: str, family: str, variant: str) -> tuple[Any, Any, Case]:
    """A model in double precision, its language model, and its prompts, alone and in a batch."""
    model, inputs = tiny(family, variant)
    model = model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    case = Case(model, load_recipe(method), inputs, {})
    return model, case.adapter.lm, case


def limit(variant: str) -> float:
    return 1e-9 if variant in EXACT else 1e-5


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` ``[n, d]`` at the places of the tables ``[n, d]``: half against half."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def attended(
    layer: Any, own: Tensor, lent: Tensor, tables: Any, kept: dict[str, Tensor], parts: dict[str, Any] | None = None
) -> Tensor:
    """Attention with queries of the rows ``own`` ``[n, C]`` and keys and values of ``lent``, head by head; ``parts``:
    weights and biases of other projections than the layer's, by ``q``, ``k``, ``v``."""
    attention, n = layer.self_attn, len(own)
    cos, sin = (t[0] for t in tables)
    d, window = attention.head_dim, getattr(attention, "sliding_window", None)
    if parts is None:
        q, k, v = attention.q_proj(own), attention.k_proj(lent), attention.v_proj(lent)
    else:
        q, k, v = (
            x @ weight.T + (0 if bias is None else bias)
            for x, (weight, bias) in ((own, parts["q"]), (lent, parts["k"]), (lent, parts["v"]))
        )
    group = q.shape[1] // k.shape[1]
    place = torch.arange(n)
    seen = place <= place[:, None]
    if window is not None:
        seen = seen & (place > place[:, None] - window)
    out, keys = [], []
    for head in range(q.shape[1] // d):
        mine, other = q[:, head * d : (head + 1) * d], slice(head // group * d, (head // group + 1) * d)
        key, value = k[:, other], v[:, other]
        if hasattr(attention, "q_norm"):
            mine, key = attention.q_norm(mine), attention.k_norm(key)
        mine, key = turned(mine, cos, sin), turned(key, cos, sin)
        weight = (mine @ key.T * attention.scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(weight @ value)
        keys.append(key)
    kept["keys"], kept["values"] = torch.stack(keys[::group]), v.view(n, -1, d).transpose(0, 1)
    return attention.o_proj(torch.cat(out, -1))


def behind(layer: Any, x: Tensor, out: Tensor) -> Tensor:
    """What a layer hands on of its rows ``x`` ``[n, C]``, of which its attention made ``out``."""
    if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma
        x = x + layer.post_attention_layernorm(out)
        return x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    x = x + out
    return x + layer.mlp(layer.post_attention_layernorm(x))


def entered(model: Any, lm: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Any]]:
    """What layer 0 is given of one prompt, ``[n, C]``, and every layer's rotary tables."""
    rows: list[Tensor] = []
    tables = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        rows.append(args[0] if args else kwargs["hidden_states"])
        tables.append(kwargs["position_embeddings"])

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in lm.layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return rows[0][0], tables
