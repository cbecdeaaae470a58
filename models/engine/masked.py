"""The dense model under the masks that a pruned run is equal to: the reference of the correctness contract. Nothing is
dropped, columns are only hidden."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from . import host
from .arguments import LAYER
from .description import Matrices, PackedTower
from .packing import Packing
from .rows import rows_of, with_rows


def hide_in_decoder(ledger: UndoLedger, layers: Sequence[nn.Module], hidden: Sequence[Tensor]) -> None:
    """Layer i hides the prompt columns ``hidden[i]`` ``[B, T]`` (bool) from every other query, on top of the model's
    own mask. Works at prefill and, by the cache's length, at decoding."""

    def make(number: int) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = LAYER.first(args, kwargs)
            cache, own, q = host.cache_in(kwargs), kwargs.get("attention_mask"), x.shape[1]
            size, offset, past = q, 0, 0
            if cache is not None:
                size, offset = host.columns(cache, q, number)
                past = host.held(cache, number)
            place = torch.arange(size, device=x.device) + offset  # the position of each of the cache's columns
            query = torch.arange(past, past + q, device=x.device)
            prompt = nn.functional.pad(
                hidden[number].to(x.device), (0, max(int(place[-1]) + 1 - hidden[number].shape[1], 0))
            )
            lost = prompt[:, place][:, None] & (place != query[:, None])  # every row sees itself
            if own is None:
                own = (place <= query[:, None])[None, None]
            elif own.dtype != torch.bool:
                own = own == 0
            seen = own & ~lost[:, None]
            mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, torch.finfo(x.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return enter

    for i, layer in enumerate(layers):
        ledger.before(layer, make(i))


def block_in_decoder(ledger: UndoLedger, layers: Mapping[int, nn.Module], blocked: Tensor) -> None:
    """In each of ``layers`` (by number) row b of a prompt must not read column a where ``blocked`` ``[B, T, T]`` (bool)
    says so at ``[b, a]``, on top of the model's own mask; the other weights sum to one again. A prompt is read at once,
    and a row that would be left without anything to read is refused."""

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = LAYER.first(args, kwargs)
        own, q = kwargs.get("attention_mask"), x.shape[1]
        if q != blocked.shape[1] or (own is not None and (own.ndim != 4 or own.shape[-1] != q)):
            raise UnsupportedError("attention is knocked out in a prompt that is read at once, without a cache")
        place = torch.arange(q, device=x.device)
        if own is None:
            own = (place <= place[:, None])[None, None]
        elif own.dtype != torch.bool:
            own = own == 0
        seen = own & ~blocked[:, None].to(x.device)
        if bool((own.any(-1) & ~seen.any(-1)).any()):
            raise UnsupportedError("a row would be left without anything to read")
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, torch.finfo(x.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    for layer in layers.values():
        ledger.before(layer, enter)


def silence_in_decoder(
    ledger: UndoLedger,
    layers: Sequence[nn.Module],
    skipped: Sequence[Collection[str]],
    scales: Mapping[tuple[int, str], float],
) -> None:
    """The halves of layers that ``skipped`` names sample by sample, as ``"llm.5.attention"``, run and give zeros; what
    passes by goes on times their ``scales`` (1 where there is none)."""

    def times(gone: Tensor, scale: float, x: Tensor) -> Tensor:
        factor = torch.ones(len(gone), dtype=torch.float64).masked_fill(gone, scale)
        return (x.double() * factor.to(x.device)[:, None, None]).to(x.dtype)

    def scale_in(gone: Tensor, scale: float) -> Callable:
        return lambda module, args, kwargs: LAYER.put_first(args, kwargs, times(gone, scale, LAYER.first(args, kwargs)))

    def scale_out(gone: Tensor, scale: float) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            x = times(gone, scale, rows_of(output))
            return with_rows(output, x)

        return leave

    def make(gone: Tensor) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            first = rows_of(output)
            rows = gone.to(first.device).view(-1, *[1] * (first.ndim - 1))
            first = torch.where(rows, torch.zeros_like(first), first)
            return with_rows(output, first)

        return leave

    for i, layer in enumerate(layers):
        for half, name in host.HALVES.items():
            gone = torch.tensor([f"llm.{i}.{half}" in halves for halves in skipped])
            if not bool(gone.any()):
                continue
            ledger.after(getattr(layer, name), make(gone))
            scale = scales.get((i, half), 1.0)
            if half == "attention" and scale != 1:
                ledger.before(layer, scale_in(gone, scale))
            elif scale != 1:
                ledger.after(layer, scale_out(gone, scale))


def learn_in_decoder(
    ledger: UndoLedger,
    layers: Mapping[int, tuple[nn.Module, nn.Module]],
    watch: int,
    learn: Mapping[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]],
    asked: Tensor,
) -> None:
    """Each of ``layers`` (by number, with its part that reads what stands in front of its MLP) notes of the first
    ``watch`` tokens that are decoded behind the prompts ``asked`` ``[B, T]`` (visual tokens, bool) how similar its MLP
    leaves them, and by how much longer; from then on ``learn`` says for whom it stands for nothing, and what takes its
    place."""

    def make(number: int, reads: nn.Module, layer: nn.Module) -> None:
        between: list[Tensor] = []
        seen: list[tuple[Tensor, Tensor]] = []

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            between[:] = [LAYER.first(args, kwargs)]

        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            y, z = between[0], rows_of(output)
            if z.shape[1] != 1:  # the prompt
                return None
            if len(seen) < watch:
                a, b = y[:, 0].double(), z[:, 0].double()
                seen.append((nn.functional.cosine_similarity(a, b), b.norm(dim=1) / a.norm(dim=1)))
                return None
            left, scale = learn[number](*(torch.stack(told, 1) for told in zip(*seen, strict=True)))
            gone = (left & asked.any(1).to(left.device))[:, None, None]
            return with_rows(output, torch.where(gone, y * scale.to(y.dtype)[:, None, None], z))

        ledger.before(reads, note)
        ledger.after(layer, leave)

    for number, (layer, reads) in layers.items():
        make(number, reads, layer)


def hide_in_tower(
    ledger: UndoLedger,
    blocks: Sequence[nn.Module],
    name: str,
    prefix: int,
    hidden: Sequence[Tensor],
    form: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Block i hides the patches ``hidden[i]`` ``[G, N]`` (bool); ``form`` makes of a mask ``[G, 1, 1, P + N]`` what the
    blocks take."""

    def make(number: int) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not bool(hidden[number].any()):
                return None
            x = LAYER.first(args, kwargs)
            mask = torch.zeros(hidden[number].shape, dtype=x.dtype, device=x.device).masked_fill(
                hidden[number], -torch.inf
            )
            mask = nn.functional.pad(mask, (prefix, 0))[:, None, None]
            own = args[1] if len(args) > 1 else kwargs.get(name)  # what the model hides itself
            if own is not None:
                mask = mask.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else mask + own
            mask = mask if form is None else form(mask)
            rest: Any = (args[0], mask, *args[2:]) if len(args) > 1 else args
            return rest, kwargs if len(args) > 1 else {**kwargs, name: mask}

        return enter

    for i, block in enumerate(blocks):
        ledger.before(block, make(i))


def narrow_in_tower(
    ledger: UndoLedger, blocks: Sequence[Matrices], features: Tensor, gain: Sequence[Tensor] | None
) -> None:
    """What reads the residual stream is given zeros behind the first ``features`` ``[G, T]`` of each row, and what
    writes into it gives as many; the MLP of block i gives ``gain[i]`` ``[G, T]`` times as much."""

    def cut(x: Tensor) -> Tensor:
        return x * (torch.arange(x.shape[-1], device=x.device) < features.to(x.device)[..., None]).to(x.dtype)

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (cut(args[0]), *args[1:]), kwargs

    def leave(times: Tensor | None) -> Callable:
        def give(module: nn.Module, args: tuple, kwargs: dict, x: Tensor) -> Tensor:
            return cut(x) if times is None else cut(x) * times.to(x.device, x.dtype)[..., None]

        return give

    for i, found in enumerate(blocks):
        for module in found.reads:
            ledger.before(module, enter)
        ledger.after(found.attention, leave(None))
        ledger.after(found.mlp, leave(None if gain is None else gain[i]))


def hide_in_packed(ledger: UndoLedger, tower: PackedTower, hidden: Callable[[Packing], Sequence[Tensor]]) -> None:
    """Block i hides the rows ``hidden(packing)[i]`` ``[S]`` (bool) of what a call of the tower sees: attention is that
    of all rows under one mask, ``[S, S]``."""
    now: list[Sequence[Tensor]] = []

    def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
        packing = tower.pack(host.arguments(module, args, kwargs))
        assert packing is not None
        now[:] = [hidden(packing)]

    def make(number: int, block: nn.Module) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            inputs = host.arguments(block, args, kwargs)
            whole, starts, mask = inputs["hidden_states"], host.segments(inputs), inputs.get(host.MASK)
            x = whole.reshape(-1, whole.shape[-1])
            row = torch.arange(len(x), device=x.device)
            if starts is not None:
                owner = torch.bucketize(row, starts[1:].to(row), right=True)
                seen = owner[:, None] == owner
            else:
                seen = (
                    torch.ones(len(x), len(x), dtype=torch.bool, device=x.device) if mask is None else mask[0, 0] == 0
                )
            seen = (seen & ~now[0][number].to(x.device)) | (row[:, None] == row)  # every row sees itself

            def mix(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
                q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
                return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)[0].transpose(
                    0, 1
                )

            x = tower.feed(block, tower.attend(block, x, {"rope": inputs.get(host.ROTARY)}, mix))
            return x.view(whole.shape)

        return forward

    ledger.before(tower.root, start)
    for i, block in enumerate(tower.blocks):
        ledger.replace(block, "forward", make(i, block))
