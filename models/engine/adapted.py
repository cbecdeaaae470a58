"""Modules that adapter and quantisation libraries put in the place of a layer's own."""

from __future__ import annotations

from torch import nn

LIBRARIES = (
    "peft.",
    "bitsandbytes.",
    "torchao.",
    "torch.ao.",
    "auto_gptq.",
    "awq.",
    "gptqmodel.",
    "optimum.",
)


def adapted(module: nn.Module) -> list[str]:
    """The names of such classes in ``module``, each once."""
    return sorted({type(m).__name__ for m in module.modules() if type(m).__module__.startswith(LIBRARIES)})
