"""The matrices of a vision tower's blocks by their usual names: which read the residual stream, which write into it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..engine.description import Matrices

# of an attention (in some classes one module deeper) and of an MLP
ATTENTION_READS = ("qkv", "q_proj", "k_proj", "v_proj", "gate")
ATTENTION_WRITES = ("proj", "o_proj", "out_proj", "projection_layer")
MLP_READS = ("fc1", "fc1_g", "fc1_x", "up_proj", "gate_proj", "weights_in")
MLP_WRITES = ("fc2", "down_proj", "weights_out")


def matrices(attention: Any, mlp: Any) -> Matrices:
    """Of a block's two halves. Raises :class:`AttributeError` if one of them lacks what it needs."""
    reads, write = _named(attention, ATTENTION_READS), _named(attention, ATTENTION_WRITES)
    if hasattr(attention, "attention"):  # DINOv2 before its rewrite in transformers (5.17)
        reads = _named(attention.attention, ("query", "key", "value"))
        write = [attention.output.dense]
    feeds, last = _named(mlp, MLP_READS), _named(mlp, MLP_WRITES)
    for what, found in ((attention, reads), (attention, write), (mlp, feeds), (mlp, last)):
        if not found:
            raise AttributeError(f"{type(what).__name__} has no matrix under the usual names")
    return Matrices(reads=(*reads, *feeds), attention=write[0], mlp=last[0])


def of_block(block: Any) -> Matrices:
    """Of a block with its halves under the usual names."""
    attention = next(getattr(block, name) for name in ("self_attn", "attention", "attn") if hasattr(block, name))
    return matrices(attention, block.mlp)


def _named(module: Any, names: tuple[str, ...]) -> list[nn.Module]:
    found = [getattr(module, name, None) for name in names]
    return [m for m in found if isinstance(m, nn.Module) and not isinstance(m, nn.Identity)]
