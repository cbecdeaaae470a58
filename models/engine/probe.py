"""The probe for language models that nobody has tested here: what the engine does to them is compared with the dense
model under masks, on a toy prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ... import kernels
from ...core.ledger import UndoLedger
from ...core.select import from_mask
from ...core.types import Cut, Selection, TokenView, UnsupportedError, VtpruneError
from ..base import PlannedCut
from . import host
from .books import carry
from .count import Products, fit
from .decoder import DecoderEngine
from .description import Decoder
from .layout import Part
from .level import dense_level
from .masked import hide_in_decoder
from .rows import take
from .scores import heads, question, visible
from .shapes import Layer

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
ADAPTED = (
    "peft.",
    "bitsandbytes.",
    "torchao.",
    "torch.ao.",
    "auto_gptq.",
    "awq.",
    "gptqmodel.",
    "optimum.",
)  # whose modules are not a layer's own
TEXT, IMAGE = 5, 6  # tokens in front of the toy image, and of it


class _Root(nn.Module):
    """The language model alone, called as a multimodal model calls it."""

    def __init__(self, lm: Any):
        super().__init__()
        self.__dict__["lm"] = lm  # not a submodule: nothing of it is registered here

    lm: Any

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.lm(inputs_embeds=self.lm.get_input_embeddings()(input_ids), use_cache=True, **kwargs)


def _cut(layer: int, number: int, keep: int) -> PlannedCut:
    def select(view: TokenView) -> Selection:
        return from_mask(view.valid & (view.index % (2 * number + 2) == 0)) if keep else from_mask(view.valid)

    return PlannedCut(cut=Cut(site=f"llm.{layer}"), stage=number, select=select)


_passed: WeakKeyDictionary[Any, set[tuple[str, str]]] = WeakKeyDictionary()  # language model -> probes it has passed


@dataclass(frozen=True)
class _Toy:
    """A prompt of two samples, the second padded, with six tokens that count as visual."""

    root: _Root
    decoder: Decoder
    ids: Tensor
    mask: Tensor
    marks: Tensor
    limit: float

    @property
    def name(self) -> str:
        return type(self.decoder.lm).__name__


@contextmanager
def _toy(decoder: Decoder, what: str) -> Iterator[_Toy | None]:
    """The toy for a probe in evaluation mode without gradients; ``None`` if the language model has passed it before."""
    lm, name = decoder.lm, type(decoder.lm).__name__
    lacks = [n for n in ("layers", "rotary_emb", "norm") if not hasattr(lm, n)]
    if lacks:
        raise UnsupportedError(
            f"{name} is not shaped like the decoders this library knows: it has no {', '.join(lacks)}"
        )
    weight = next(p for p in lm.parameters() if p.ndim == 2)
    if weight.is_meta:
        raise UnsupportedError(f"{name} is not known here and cannot be probed while its weights are offloaded")
    key = (what, host.backend(lm.config))
    if key in _passed.setdefault(lm, set()):
        yield None
        return
    ids = torch.randint(
        1, lm.get_input_embeddings().num_embeddings, (2, TEXT + IMAGE + 4), generator=torch.Generator().manual_seed(0)
    ).to(weight.device)
    mask, marks = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    mask[1, :3] = 0
    marks[:, TEXT : TEXT + IMAGE] = True
    found = [[Part(torch.arange(TEXT, TEXT + IMAGE, device=ids.device), (1, IMAGE), 0, -1, (IMAGE,))] for _ in ids]
    root = _Root(lm)
    toy = replace(
        decoder,
        root=root,
        visual=lambda given: marks if given.shape == marks.shape else torch.zeros_like(given, dtype=torch.bool),
        parts=lambda given, inputs: found,
        sources=lambda inputs, parts: [],
        mrope=False,
        core=None,
        encoded=lambda inputs: {},
    )
    modes = {m: m.training for m in lm.modules()}
    lm.eval()
    try:
        with torch.no_grad():
            yield _Toy(root, toy, ids, mask, marks, TOLERANCE[weight.dtype])
    except VtpruneError:
        raise
    except (
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:  # what a model that is built otherwise may answer to a probe
        raise UnsupportedError(f"{name} cannot be probed, so it cannot be pruned: {type(e).__name__}: {e}") from e
    finally:
        for module, mode in modes.items():
            module.training = mode
    _passed[lm].add(key)


def probe(decoder: Decoder) -> None:
    """Prunes a toy prompt before layer 0 and in the middle, prefill and cached steps.

    Raises:
        UnsupportedError: the results are not those of the dense model under the same masks.
    """
    with _toy(decoder, "cuts") as toy:
        if toy is None:
            return
        count = len(decoder.layers)
        middle = count // 2
        dense = _run(toy)
        if not torch.equal(_pruned(toy, [_cut(0, 0, 0), _cut(middle, 1, 0)]), dense):
            raise UnsupportedError(
                f"{toy.name}: with nothing dropped the hooks change its output, so it cannot be pruned here"
            )
        got = _pruned(toy, [_cut(0, 0, 1), _cut(middle, 1, 1)])
        ledger, hidden = UndoLedger(), []
        for i in range(count):
            lost = toy.marks.clone()
            lost[:, TEXT : TEXT + IMAGE : 2 if i < middle else 4] = False
            hidden.append(lost)
        hide_in_decoder(ledger, list(decoder.layers), hidden)
        try:
            want = _run(toy)
        finally:
            ledger.undo()
        there = torch.cat([toy.mask.bool() & ~hidden[-1], torch.ones_like(toy.mask[:, :2], dtype=torch.bool)], 1)
        error = float((got - want)[there].abs().max() / want[there].abs().max())
        if not error <= toy.limit:
            raise UnsupportedError(
                f"{toy.name}: pruned on a toy prompt it is {error:.1e} off the dense model under the same masks: it "
                "cannot be pruned here"
            )


def probe_queries(decoder: Decoder) -> None:
    """The attention that methods rank by, recomputed and times the values, must be what each layer gives to its own
    output projection.

    Raises:
        UnsupportedError: it is not, or the projections have other names.
    """
    with _toy(decoder, "queries") as toy:
        if toy is None:
            return
        for number, block in enumerate(decoder.layers):
            attention: Any = getattr(block, "self_attn", None)
            lacks = [
                n for n in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling") if not hasattr(attention, n)
            ]
            if lacks or not hasattr(block, "input_layernorm"):
                raise UnsupportedError(
                    f"{toy.name}: its attention has no {', '.join(lacks) or 'input_layernorm'} under the usual names"
                )
            seen: dict[str, Any] = {}
            ledger = UndoLedger()
            ledger.before(block, lambda m, a, k, seen=seen: seen.update(x=a[0] if a else k["hidden_states"], kwargs=k))
            ledger.before(attention.o_proj, lambda m, a, k, seen=seen: seen.update(mixed=a[0]))
            try:
                toy.root(toy.ids, attention_mask=toy.mask)
            finally:
                ledger.undo()
            x, kwargs = seen["x"], seen["kwargs"]
            level = dense_level(toy.mask.bool(), toy.marks)
            rows = torch.full((len(toy.ids), 1), toy.ids.shape[1] - 1, device=toy.ids.device)
            rotary = kwargs.get("position_embeddings")
            tables = None if rotary is None else (take(rotary[0], level.rows), take(rotary[1], level.rows))
            q, k, how = question(block, x, rows, tables, decoder.pairs)
            seen_keys = visible(level, rows, kwargs.get("attention_mask"), "all")
            group = q.shape[1] // k.shape[1]
            each = [
                kernels.query_scores(q[:, i : i + 1], k[:, i // group : i // group + 1], seen=seen_keys, **how)
                for i in range(q.shape[1])
            ]
            p = torch.stack(each, 1)[:, :, None]  # [B, H, 1, M]
            v = heads(attention, "v", block.input_layernorm(x))
            mixed = (p.to(v.dtype) @ v.repeat_interleave(p.shape[1] // v.shape[1], 1)).transpose(1, 2).flatten(2)
            error = float((mixed - seen["mixed"][:, -1:]).abs().max() / seen["mixed"].abs().max())
            if not error <= toy.limit:
                raise UnsupportedError(
                    f"{toy.name}: layer {number}'s attention is not what its projections and rotary table give in the "
                    "usual layout"
                )


def count(decoder: Decoder, said: tuple[Layer, ...] | None) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """What each layer does with a token, and the tokens that its cache keeps at most (0: all): counted on toy prompts.
    ``said`` by the configuration, ``None`` where it does not tell: it holds where the count agrees, and where quantised
    or adapted modules do work that cannot be counted.

    Raises:
        UnsupportedError: the work cannot be told.
    """
    lm, name = decoder.lm, type(decoder.lm).__name__
    with _toy(decoder, "work") as toy:
        if toy is None:
            return _counted[lm]
        foreign = sorted({type(m).__name__ for m in lm.modules() if type(m).__module__.startswith(ADAPTED)})
        if foreign and (said is None or not all(_plain(layer) for layer in decoder.layers)):
            raise UnsupportedError(
                f"{name} with {', '.join(foreign)}: what its layers do with a token cannot be counted; attach to the "
                "model as it was before"
            )
        work: list[list[tuple[int, int]]] = [[] for _ in decoder.layers]
        for n in (3, 6, 11):
            ledger, mode = UndoLedger(), Products()
            for i, layer in enumerate(decoder.layers):
                ledger.before(layer, lambda m, a, k, i=i, n=n, mode=mode: work[i].append((n, -mode.total)))
                ledger.after(
                    layer, lambda m, a, k, o, i=i, n=n, mode=mode: work[i].append((n, work[i].pop()[1] + mode.total))
                )
            try:
                with mode:
                    cache = host.cache_of(toy.root(toy.ids[:1, :n], attention_mask=torch.ones_like(toy.ids[:1, :n])))
            finally:
                ledger.undo()
        layers, held = [], []
        for i, runs in enumerate(work):
            key, value, most = host.stored(cache, i)
            held.append(most)
            if foreign and said is not None:
                layers.append(replace(said[i], kept=key + value))
                continue
            row, pair = fit(name, i, runs)
            if mode.blind:  # every query head meets keys and values of the width that the cache has
                heads = lm.config.num_attention_heads
                pair = (key + value) * heads // (getattr(lm.config, "num_key_value_heads", None) or heads)
            known = None if said is None else said[i]
            agrees = known is not None and (known.row + known.key, known.pair, known.kept) == (row, pair, key + value)
            layers.append(known if known is not None and agrees else Layer(row, 0, pair, key + value))
        _counted[lm] = tuple(layers), tuple(held)
    return _counted[lm]


_counted: WeakKeyDictionary[Any, tuple[tuple[Layer, ...], tuple[int, ...]]] = WeakKeyDictionary()


def _plain(layer: Any) -> bool:
    """Whether a decoder layer is made of the projections that the usual configuration names."""
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    return all(hasattr(getattr(layer, part, None), name) for part, names in parts.items() for name in names)


def _run(toy: _Toy) -> Tensor:
    """Hidden states of the prompt and of two more tokens, ``[B, T + 2, C]``."""
    mask = toy.mask
    out = toy.root(toy.ids, attention_mask=mask)
    rows = [out.last_hidden_state]
    for step in range(2):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        places = mask.shape[1] - 1 + torch.zeros_like(mask[:, :1])
        out = toy.root(
            toy.ids[:, step : step + 1],
            attention_mask=mask,
            position_ids=places,
            **host.cached(toy.decoder.lm, host.cache_of(out)),
        )
        rows.append(out.last_hidden_state)
    return torch.cat(rows, 1).double()


def _pruned(toy: _Toy, cuts: list[PlannedCut]) -> Tensor:
    ledger = UndoLedger()
    options: dict[str, Any] = {"positions": "original", "per": "image", "tower": False, "entry": [], "seed": 0}
    try:
        DecoderEngine(toy.decoder, cuts, ledger, **options, done=lambda request: None, arrived=carry)
        return _run(toy)
    finally:
        ledger.undo()
