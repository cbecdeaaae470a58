"""The dense model under the masks that a pruned run is equal to: the reference of the correctness contract. Nothing is dropped, columns are only hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ledger import UndoLedger


def hide_in_decoder(ledger: UndoLedger, layers: Sequence[nn.Module], padding: Tensor, hidden: Sequence[Tensor]) -> None:
    """Layer i hides the prompt columns ``hidden[i]`` ``[B, T]`` (bool) from every query; ``padding`` ``[B, T]`` (1 real). Works at prefill and, by the
    cache's length, at decoding."""

    def make(number: int) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = args[0] if args else kwargs["hidden_states"]
            q, t = x.shape[1], padding.shape[1]
            cache = kwargs.get("past_key_values")
            past = cache.get_seq_length(number) if cache is not None else 0
            total = past + q
            seen = torch.ones(q, total, dtype=torch.bool, device=x.device).tril(past)[None]
            prompt = padding.bool() & ~hidden[number]
            columns = torch.cat([prompt, prompt.new_ones(len(prompt), max(total - t, 0))], dim=1)[:, :total]
            seen = seen & columns[:, None]
            itself = torch.arange(total, device=x.device) == torch.arange(past, total, device=x.device)[:, None]
            seen = (seen | itself)[:, None]
            mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, torch.finfo(x.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return enter

    for i, layer in enumerate(layers):
        ledger.before(layer, make(i))


def hide_in_tower(
    ledger: UndoLedger, blocks: Sequence[nn.Module], name: str, prefix: int, hidden: Sequence[Tensor], form: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Block i hides the patches ``hidden[i]`` ``[G, N]`` (bool); ``form`` makes of a mask ``[G, 1, 1, P + N]`` what the blocks take."""

    def make(number: int) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not bool(hidden[number].any()):
                return None
            x = args[0] if args else kwargs["hidden_states"]
            mask = torch.zeros(hidden[number].shape, dtype=x.dtype, device=x.device).masked_fill(hidden[number], -torch.inf)
            mask = nn.functional.pad(mask, (prefix, 0))[:, None, None]
            mask = mask if form is None else form(mask)
            rest: Any = (args[0], mask, *args[2:]) if len(args) > 1 else args
            return rest, kwargs if len(args) > 1 else {**kwargs, name: mask}

        return enter

    for i, block in enumerate(blocks):
        ledger.before(block, make(i))
