"""Why a multimodal model without an adapter of its own cannot be pruned: by its name, or by how it is built."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ...core.types import UnsupportedError
from ..base import named
from ..engine import host

CROSS = (
    "its language model reads the image through cross-attention layers, at every position, so no visual tokens stand "
    "in the sequence that could be dropped"
)
CODED = (
    "it is an encoder-decoder: the image is read by the encoder, and the decoder, through cross-attention, sees no "
    "visual tokens of its own"
)
ALONE = (
    "its generate() runs the language model by itself, past the model's forward, where pruned tokens could not be told "
    "from others"
)
STATE = (
    "carry a state from token to token, in which a token that was read stays; dropping it later, or hiding it by a "
    "mask, is not what the model computes"
)
QWEN = f"three of four layers of its language model (gated linear attention) {STATE}"
LFM = f"the convolution layers of its language model {STATE}"

# Families that were looked at: class name -> why they are not pruned. What is built alike under another name is found
# by `hindrance`.
REFUSED = {
    "MllamaForConditionalGeneration": CROSS,
    "IdeficsForVisionText2Text": CROSS,
    "Florence2ForConditionalGeneration": CODED,
    "Blip2ForConditionalGeneration": ALONE,
    "InstructBlipForConditionalGeneration": ALONE,
    "InstructBlipVideoForConditionalGeneration": ALONE,
    "Qwen3_5ForConditionalGeneration": QWEN,
    "Qwen3_5MoeForConditionalGeneration": QWEN,
    "MiniCPMV4_6ForConditionalGeneration": f"its language model is Qwen3.5: {QWEN}",
    "MiniCPMV4_7ForConditionalGeneration": f"its language model is Qwen3.5: {QWEN}",
    "Lfm2VlForConditionalGeneration": LFM,
    "Lfm3VlForConditionalGeneration": LFM,
    "Gemma3nForConditionalGeneration": (
        "its layers work on four streams of hidden states (AltUp), take inputs of their own per layer and token, and "
        "the last ones read keys and values of earlier layers: a cut would have to shorten all of them"
    ),
    "Llama4ForConditionalGeneration": (
        "it attends in chunks that are counted in cached tokens, of which pruning leaves fewer, and scales the queries "
        "of layers without rotary positions by that count"
    ),
}

KINDS = ("full_attention", "sliding_attention")
RECURRENT = ("linear", "conv", "mamba", "recurrent", "hybrid")  # in the names of layers that carry a state
TAKES = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache", "cache_position", *host.CACHES}
MORE = {
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_to_keep",
}  # what a forward may take and does not read


def stacks_of(model: nn.Module) -> list[Any]:
    return [
        m
        for m in model.modules()
        if isinstance(getattr(m, "layers", None), nn.ModuleList)
        and hasattr(m, "embed_tokens")
        and hasattr(m, "rotary_emb")
    ]


def stack_of(model: Any) -> Any:
    """The one stack of decoder layers that reads the prompt. Raises :class:`UnsupportedError`, with the
    :func:`hindrance`, for a model that is not of the shape that is pruned here."""
    why = hindrance(model)
    if why is not None:
        raise UnsupportedError(f"{type(model).__name__} cannot be pruned: {why}")
    return stacks_of(model)[0]


def placeholder(model: Any, kind: str) -> int | None:
    """The placeholder of an ``"image"`` or a ``"video"``, by the names that configurations have for it."""
    config = getattr(model, "config", None)
    return next(
        (found for n in (f"{kind}_token_id", f"{kind}_token_index") if (found := getattr(config, n, None)) is not None),
        None,
    )


def hindrance(model: Any) -> str | None:
    """Why a multimodal model is not of the shape that is pruned here, ``None`` if nothing speaks against it: what
    stands in the way is found in how it is built, since a toy prompt without an image does not show it."""
    known = named(model, *REFUSED)
    if known is not None:
        return REFUSED[known]
    if getattr(model.config, "is_encoder_decoder", False) or getattr(
        model.config.get_text_config(), "is_encoder_decoder", False
    ):
        return CODED
    owner = next(c for c in type(model).__mro__ if "generate" in vars(c))
    if owner.__module__.startswith("transformers.models."):
        return ALONE
    stacks = stacks_of(model)
    if len(stacks) != 1:
        return (
            f"it has {len(stacks) or 'no'} stacks of decoder layers with embed_tokens and rotary_emb, where one has to "
            "read the prompt"
        )
    lm = stacks[0]
    if any(_crosses(name, m) for name, m in lm.named_modules()):
        return CROSS
    if lm.embed_tokens is not model.get_input_embeddings():
        return (
            f"its stack of decoder layers, {type(lm).__name__}, is not what reads the prompt: the model's own "
            "embeddings are others"
        )
    if hasattr(model.base_model, "get_rope_index") or "mrope_section" in (
        getattr(lm.config, "rope_parameters", None) or {}
    ):
        return "it places visual tokens by time, row and column, in a way that needs an adapter of its own"
    return _layers(lm)


def _crosses(name: str, module: nn.Module) -> bool:
    """Whether a module is cross-attention, by the names that it goes by."""
    said = f"{name.rsplit('.', 1)[-1]} {' '.join(c.__name__ for c in type(module).__mro__)}".lower()
    return any(
        word in said
        for word in (
            "cross_attn",
            "crossattn",
            "cross_attention",
            "crossattention",
            "encoder_attn",
            "encoder_attention",
        )
    )


def _layers(lm: Any) -> str | None:
    """What a decoder stack does besides attention over the tokens that it is given."""
    text, name = lm.config, type(lm).__name__
    more = sorted(set(inspect.signature(lm.forward).parameters) - TAKES - MORE - {"kwargs", "args"})
    if getattr(text, "hidden_size_per_layer_input", None):
        return (
            f"the layers of its language model ({name}) take an input of their own per token, which a cut would have "
            "to shorten with it"
        )
    if more and (more != ["per_layer_inputs"] or getattr(text, "hidden_size_per_layer_input", None) is None):
        return (
            f"its language model ({name}) also takes {', '.join(more)}, of which is not known how to shorten it with "
            "the sequence"
        )
    if getattr(text, "num_kv_shared_layers", 0):
        return (
            f"the last {text.num_kv_shared_layers} layers of its language model ({name}) read keys and values of "
            "earlier layers, also of tokens dropped since"
        )
    kinds = sorted(set(getattr(text, "layer_types", None) or KINDS[:1]) - set(KINDS))
    state = sorted(
        {
            type(m).__name__
            for layer in lm.layers
            for m in layer.modules()
            if isinstance(m, nn.Conv1d) or hasattr(m, "A_log")
        }
    )
    bare = [i for i, layer in enumerate(lm.layers) if not hasattr(layer, "self_attn")]
    if kinds and "chunked_attention" in kinds:
        return (
            f"its language model ({name}) attends in chunks that are counted in cached tokens, of which pruning leaves "
            "fewer"
        )
    other = [k for k in kinds if not any(word in k for word in RECURRENT)]
    if other and not state and not bare:
        return f"layers of its language model ({name}) attend in a way that is not known here ({', '.join(other)})"
    if state or kinds or bare:
        what = ", ".join(kinds or state) or f"no self_attn in layers {', '.join(map(str, bare[:4]))}"
        return f"layers of its language model ({name}: {what}) {STATE}"
    return None
