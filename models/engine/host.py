"""What is known of transformers: the one place that names its conventions. What is not recognised is refused, never
guessed.

A release that renames something is mended here; ``tests/test_house_rules.py`` keeps the names out of every other file.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from ...core.ledger import UndoLedger, renew
from ...core.types import UnsupportedError

CACHES = ("cache", "past_key_values")  # the key-value cache: 5.24 and later, before
PIXELS = "pixel_values"  # what names of raw pictures and videos begin with
ENCODED = "mm_encoder_outputs"  # what generate() encoded before the forward (5.18 and later)
MOVES = {
    "reorder_cache": "move",
    "batch_select_indices": "move",
    "batch_repeat_interleave": "repeat",
}  # a cache's methods that move its samples, and ours
ENCODERS = {"image": "get_image_features", "video": "get_video_features"}
PLANES = "deepstack_visual_embeds"  # what DeepStack adds to early layers
# of an encoder's output: its rows, and what it made them of
ROWS = ("pooler_output", "last_hidden_state", "hidden_states", "attentions", "deepstack_features")
BESIDE = ("visual_indicator_features",)  # embeddings of Ovis 2's own tokens around a picture
PACKED = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)  # flash attention: where the sequences of a packed row begin
SEGMENTS = ("cu_seqlens", PACKED[0])  # the same of the blocks of a vision tower
MASK, ROTARY = "attention_mask", "position_embeddings"  # what blocks of a vision tower are given besides
HALVES = {"attention": "self_attn", "mlp": "mlp"}  # of a decoder layer, each adding to what passes by
# of a decoder layer, what its MLP's half adds to the residual stream: the first of these that it has
ADDED = ("post_feedforward_layernorm", "post_mlp_layernorm", HALVES["mlp"])
KEEP = "logits_to_keep"  # the last so many columns, or those of an index, are given logits; 0: all
# keywords of a forward that only say what it hands out
TOLD = ("output_attentions", "output_hidden_states", "return_dict")
REMEMBERED = ("rope_deltas",)  # what a model's core keeps of its last prompt
LENT = ("k_proj", "v_proj")  # of a decoder layer's attention: what makes its keys, and its values
ASKING = "q_proj"  # and its queries
PRIVATE = {"assistant": "_get_candidate_generator", "prefill": "_prefill"}


def release() -> str:
    """The installed transformers, ``"5.24.0"``."""
    return version("transformers")


@functools.cache
def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


@functools.cache
def _cache_name(kind: Any) -> str:
    names = [n for n in CACHES if n in _parameters(kind.forward)]
    if len(names) != 1:
        raise UnsupportedError(
            f"{kind.__name__} of transformers {release()} takes its key-value cache under none of the names this "
            "library knows "
            f"({', '.join(CACHES)}): its decoding steps could not be told apart, so it is not pruned"
        )
    return names[0]


def cache_name(module: Any) -> str:
    """The keyword under which ``module`` takes its key-value cache. Raises :class:`UnsupportedError` where it is none
    of :data:`CACHES`."""
    kind: Any = type(module)
    return _cache_name(kind)


def cached(module: Any, cache: Any) -> dict[str, Any]:
    """``cache`` as the keyword that ``module`` takes it by."""
    return {cache_name(module): cache}


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among ``kwargs``, under any name (deprecated ones too), or ``None``."""
    return next((kwargs[n] for n in CACHES if kwargs.get(n) is not None), None)


def uncached(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a layer's ``kwargs`` has to change so that it fills no cache."""
    return {**{n: None for n in CACHES if n in kwargs}, **({"use_cache": False} if "use_cache" in kwargs else {})}


def rotary(lm: Any, x: Tensor, ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A language model's rotary table for the positions ``ids``, of layers of this ``kind`` where these turn by other
    angles."""
    table = lm.rotary_emb
    return table(x, ids, kind) if "layer_type" in _parameters(type(table).forward) else table(x, position_ids=ids)


def takes_planes(lm: Any) -> bool:
    """Whether a language model adds planes of the image between its layers (DeepStack)."""
    return PLANES in _parameters(type(lm).forward)


def cache_of(output: Any) -> Any:
    """The cache that an output carries (also a tuple, ``return_dict=False``), or ``None``; :class:`UnsupportedError`
    where its class has no field for one."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    if isinstance(output, Tensor):
        return None
    names = [n for n in CACHES if n in getattr(output, "__dataclass_fields__", ())]
    if not names:
        raise UnsupportedError(
            f"{type(output).__name__} of transformers {release()} has none of the fields {', '.join(CACHES)}: the "
            "cache of a pruned prompt does not come back"
        )
    return getattr(output, names[0])


def new_cache() -> Any:
    """An empty key-value cache."""
    from transformers import DynamicCache

    return DynamicCache()


def held(cache: Any, layer: int = 0) -> int:
    """Tokens that layer ``layer`` of ``cache`` holds. Raises :class:`UnsupportedError` for caches that hold several
    requests (continuous batching)."""
    if not hasattr(cache, "get_seq_length"):
        raise UnsupportedError(
            f"a {type(cache).__name__} does not tell how many tokens it holds for which prompt: use generate(), one "
            "prompt per row"
        )
    return int(cache.get_seq_length(layer))


def columns(cache: Any, queries: int, layer: int) -> tuple[int, int]:
    """Columns that layer ``layer`` of ``cache`` will show for ``queries`` more tokens, and the first one's place in all
    it has seen."""
    size, offset = cache.get_mask_sizes(queries, layer)
    return int(size), int(offset)


def stored(cache: Any, layer: int) -> tuple[int, int, int]:
    """What layer ``layer`` of ``cache`` holds: numbers per token in keys and in values, over all heads, and the tokens
    that it keeps at most (0: all)."""
    cached_layer = cache.layers[layer]
    window = getattr(cached_layer, "sliding_window", None) if getattr(cached_layer, "is_sliding", False) else None
    sizes = [t.numel() // (t.shape[0] * t.shape[-2]) for t in (cached_layer.keys, cached_layer.values)]
    return sizes[0], sizes[1], window - 1 if window else 0


def shorten(cache: Any, layer: int, columns: Tensor) -> None:
    """Keeps of layer ``layer`` of ``cache`` only the ``columns`` ``[B, M]`` of each sample. Raises
    :class:`UnsupportedError` for caches that do not simply grow (static, sliding, quantised)."""
    held = cache.layers[layer]
    if type(held).__name__ != "DynamicLayer":
        raise UnsupportedError(
            f"rows cannot be evicted from a {type(held).__name__}: use a dynamic cache, or truncate nothing"
        )
    rows: dict[str, Tensor] = {"keys": held.keys, "values": held.values}  # [B, H, T, d]
    at = columns.to(held.keys.device)[:, None, :, None]
    renew(held, **{name: t.gather(2, at.expand(-1, t.shape[1], -1, t.shape[3])) for name, t in rows.items()})


def added(layer: nn.Module) -> nn.Module | None:
    """The module of a decoder layer whose output its MLP's half adds to the residual stream, ``None`` where no name is
    known."""
    return next((getattr(layer, name) for name in ADDED if hasattr(layer, name)), None)


def head_of(model: Any) -> nn.Module | None:
    """The module that makes logits of final hidden states, ``None`` where there is none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def columns_kept(inputs: Mapping[str, Any]) -> Any:
    """The index of the columns for which a forward with these ``inputs`` makes logits."""
    keep = inputs.get(KEEP)
    return slice(-(keep or 0), None) if keep is None or isinstance(keep, int) else keep


def pictured(inputs: Mapping[str, Any]) -> bool:
    """Whether a forward is given pictures, raw or encoded."""
    given = (v for k, v in inputs.items() if k.startswith(PIXELS) or k == ENCODED)
    return any(v is not None and len(v) for v in given)


def measuring(model: Any, inputs: Mapping[str, Any], mask: Tensor | None) -> dict[str, Any]:
    """What a forward of ``model`` is called with that reads the prompt of ``inputs`` once more, into a cache of its
    own. ``mask``: in the place of the caller's, if there is one."""
    rest = {k: v for k, v in inputs.items() if k not in (*CACHES, *TOLD, KEEP) and v is not None}
    last = {KEEP: 1} if KEEP in _parameters(type(model).forward) else {}
    return {**rest, **({} if mask is None else {"attention_mask": mask}), **last, "use_cache": True}


@contextmanager
def remembered(core: Any) -> Iterator[None]:
    """Within it ``core`` knows of no prompt before; behind it, of the one that it knew of."""
    ledger = UndoLedger()
    try:
        for name in REMEMBERED:
            if hasattr(core, name):
                ledger.replace(core, name, None)
        yield
    finally:
        ledger.undo()


def without_cache(module: nn.Module) -> bool:
    """Whether ``module`` is a layer that will be run without the cache it is given: gradient checkpointing takes it
    away."""
    return module.training and getattr(module, "gradient_checkpointing", False)


def empty(cache: Any, first: int) -> None:
    """Takes everything out of the layers of ``cache`` from ``first`` on. Raises :class:`UnsupportedError`, and takes
    nothing, for caches that do not simply grow (static, sliding, quantised, offloaded)."""
    layers = cache.layers[first:]
    strange = next((type(layer).__name__ for layer in layers if type(layer).__name__ != "DynamicLayer"), None)
    if strange is not None or offloads(cache):
        raise UnsupportedError(
            f"a {strange or 'cache that is offloaded'} cannot be read anew: use a dynamic cache, or start a new prompt "
            "with the whole conversation"
        )
    for layer in layers:
        renew(layer, keys=layer.keys[:, :, :0], values=layer.values[:, :, :0])


def stretches(config: Any) -> bool:
    """Whether a language model's rotary positions depend on how long the sequence is."""
    told = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    groups = [told, *(group for group in told.values() if isinstance(group, Mapping))]
    return any(group.get("rope_type", group.get("type")) in ("dynamic", "longrope") for group in groups)


def rounds(cache: Any, layer: int) -> bool:
    """Whether layer ``layer`` of ``cache`` gives back less than it was given, from the second time on (quantised)."""
    layers = getattr(cache, "layers", ())
    return layer < len(layers) and hasattr(layers[layer], "_quantize")


def arguments(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a forward of ``module`` was given, by name, also what came by position."""
    if not args:
        return kwargs
    names = [n for n in _parameters(type(module).forward) if n != "self"]
    if len(args) > len(names):
        raise TypeError(f"{type(module).__name__} takes {len(names)} arguments, {len(args)} were given")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def segments(inputs: Mapping[str, Any]) -> Tensor | None:
    """Where the sequences begin that a block of a vision tower attends within, and where the last one ends, ``[s +
    1]``; ``None`` where it is not told."""
    return next((inputs[n] for n in SEGMENTS if inputs.get(n) is not None), None)


def backend(config: Any) -> str:
    """The name of a model's attention backend."""
    return getattr(config, "_attn_implementation", None) or "eager"


def offloads(cache: Any) -> bool:
    """Whether ``cache`` keeps its layers elsewhere and brings each back while the one in front of it is read."""
    return bool(getattr(cache, "offloading", False))


def maps_asked(inputs: Mapping[str, Any], *configs: Any) -> bool:
    """Whether a forward with these ``inputs`` hands out attention maps."""
    asked = inputs.get("output_attentions")
    return any(getattr(c, "output_attentions", False) for c in configs) if asked is None else bool(asked)


def in_backward() -> bool:
    """Whether a backward pass is running in this thread: what is called there is a checkpoint's."""
    import torch

    return torch._C._current_graph_task_id() != -1


def checkpointed(module: nn.Module) -> bool:
    """Whether ``module`` is a layer whose checkpoints run its hooks again in the backward pass, as in transformers up
    to 5.17."""
    return without_cache(module) and type(module).__call__ is not nn.Module.__call__


def features(output: Any) -> Any:
    """The rows for the language model that an encoder's output carries, or the output itself where it is a tensor or a
    list."""
    return getattr(output, "pooler_output", output)


def takes_encoded(model: Any) -> bool:
    """Whether the forward of ``model`` takes images that were encoded before."""
    return ENCODED in _parameters(type(model).forward)


def form(output: Any) -> tuple[str, ...]:
    """How a family hands the rows of its images over, and with DeepStack each of the planes that are added later: one
    tensor for each image (``"each"``), all in one (``"rows"``, ``[sum K, C]``), or in one with a dimension in front
    (``"stack"``, ``[images, K, C]``)."""

    def of(rows: Any) -> str:
        return "each" if isinstance(rows, tuple | list) else {2: "rows", 3: "stack"}[rows.ndim]

    planes = getattr(output, "deepstack_features", None) or ()
    return (of(features(output)), *(of(plane) for plane in planes))


def beside(output: Any) -> dict[str, Tensor]:
    """What an encoder's output carries besides rows and planes that the model's forward reads. Raises
    :class:`UnsupportedError` for what this library does not know."""
    fields = dict(output.items()) if isinstance(output, Mapping) else {}
    rest = {name: value for name, value in fields.items() if name not in ROWS and value is not None}
    strange = [name for name, value in rest.items() if name not in BESIDE or not isinstance(value, Tensor)]
    if strange:
        raise UnsupportedError(
            f"it is not known what {strange[0]} of a {type(output).__name__} is, or how to shorten it"
        )
    return rest


def encoded(
    rows: Sequence[Tensor],
    planes: Sequence[Sequence[Tensor]],
    forms: Sequence[str],
    more: Mapping[str, Tensor],
) -> Any:
    """An encoder's output: ``rows`` ``[K, C]`` of each image and the ``planes`` of each, in their :func:`form`, and
    what stands :func:`beside` them."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def together(parts: Sequence[Tensor], how: str) -> Any:
        if how == "each":
            return tuple(parts)
        if how == "stack" and len({len(p) for p in parts}) == 1:
            return torch.stack(list(parts))
        return torch.cat(list(parts)) if how == "rows" else torch.cat(list(parts))[None]

    out = BaseModelOutputWithPooling(pooler_output=together(rows, forms[0]))
    for name, value in more.items():
        out[name] = value
    if forms[1:]:
        out["deepstack_features"] = [
            together(p, how) for p, how in zip(zip(*planes, strict=True), forms[1:], strict=True)
        ]
    return out


def private(model: Any, what: str) -> Callable | None:
    """A private method of ``generate`` (a key of :data:`PRIVATE`), ``None`` where this release has none of the name."""
    return getattr(model, PRIVATE[what], None)


def sharded(module: nn.Module) -> bool:
    """Whether weights of ``module`` are shared out among processes, and not gathered now."""
    return any(hasattr(p, "full_tensor") for p in module.parameters())


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within it, ``module`` holds whole weights, also where FSDP2 (``fully_shard``) has shared them out and does not
    gather them now."""
    opened: list[Any] = []
    try:
        part: Any
        # the inner ones first: what is then left of an outer one is its own
        for part in reversed(list(module.modules())):
            if hasattr(part, "unshard") and sharded(part):
                part.unshard()
                opened.append(part)
        if sharded(module):
            raise UnsupportedError(
                f"the weights of a {type(module).__name__} are sharded, and it has no unshard() of its own: they "
                "cannot be read here"
            )
        yield
    finally:
        for part in opened:
            part.reshard()


def forget_compiled() -> None:
    """Throws away what ``torch.compile`` has made in this process: compiled code does not look whether hooks have come
    or gone, so it would run on as if they had not. What is needed again is compiled again."""
    import sys

    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset_code_caches()
