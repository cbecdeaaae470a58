"""VTW: "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference" (arXiv 2405.05803,
AAAI 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from .base import MethodInfo, option, register
from .drop_all import DropAll


@register(
    MethodInfo(
        name="vtw",
        paper="arXiv 2405.05803",
        idea="withdraws every visual token before a layer K, from which on text alone goes on",
        kinds=("llm",),
        keep=None,
        budgeted=False,
        cases=({"layer": 5}, {"layer": 1}),
    )
)
@dataclass(frozen=True, kw_only=True)
class VTW(DropAll):
    """Section 3.3: layers 0 to K - 1 see every visual token, layers K and later none. K is the first layer at which
    the next token's distribution stays as it was, on a few prompts: ``vtprune fit vtw`` finds it."""

    layer: int | None = option(
        None, "K: first decoder layer without visual tokens (default: the middle one, 16 of 32 as in the paper)"
    )
