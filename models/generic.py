"""Multimodal models without an adapter of their own, if they are decoder-shaped: a stack of layers that reads visual
tokens at placeholders in the prompt.

Nothing is believed: at ``attach`` the language model is probed, with nothing dropped against itself and pruned against
the dense model under masks. What the tower does is not known, so stages work behind it, methods of the image plane are
refused, a run of placeholders counts as one image, and reports count the FLOPs of the language model alone. A model
that reads its images in another way, or whose layers keep more of a token than its keys and values, is refused
with the reason: by its name (:data:`REFUSED`) or by how it is built (:func:`hindrance`).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.types import Geometry, UnsupportedError
from .base import ADAPTERS, AdapterInfo, named
from .engine import host
from .engine.layout import Part, some
from .engine.probe import probe, probe_queries
from .parts.mllm import LLM, Mllm
from .parts.tiny import tiny_build, tiny_model, tiny_prompts, tiny_text

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
    "Gemma3nForConditionalGeneration": "its layers work on four streams of hidden states (AltUp), take inputs of their own per layer and token, and "  # noqa: E501
    "the last "
    "ones read keys and values of earlier layers: a cut would have to shorten all of them",
    "Llama4ForConditionalGeneration": "it attends in chunks that are counted in cached tokens, of which pruning leaves fewer, and scales the queries "  # noqa: E501
    "of layers "
    "without rotary positions by that count",
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


def _stacks(model: nn.Module) -> list[Any]:
    return [
        m
        for m in model.modules()
        if isinstance(getattr(m, "layers", None), nn.ModuleList)
        and hasattr(m, "embed_tokens")
        and hasattr(m, "rotary_emb")
    ]


def _token(model: Any, kind: str) -> int | None:
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
    stacks = _stacks(model)
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


def matches(model: nn.Module) -> bool:
    """A transformers model that generates and says which token stands for an image, or one that is known and refused;
    any other adapter that takes it goes before."""
    return (
        hasattr(model, "generate")
        and hasattr(model, "base_model")
        and (_token(model, "image") is not None or named(model, *REFUSED) is not None)
    )


class Generic(Mllm):
    """One bound model of an unknown family."""

    tested: ClassVar[Collection[str]] = ()
    follows: ClassVar[dict[str, int]] = {"token_type_ids": 0, "mm_token_type_ids": 0}

    def __init__(self, model: Any):
        name, why = type(model).__name__, hindrance(model)
        if why is not None:
            raise UnsupportedError(f"{name} cannot be pruned: {why}")
        lm, image = _stacks(model)[0], _token(model, "image")
        assert image is not None
        unknown = "the tower of this model is not known"
        geometry = Geometry(
            family="generic",
            arch=name,
            tokens=256,
            grid=(256, 1),
            prefix=0,
            vision_layers=0,
            vision_depth=0,
            llm_layers=len(lm.layers),
            provides={"projector": frozenset(), "llm": LLM},
            refuses={"vision": unknown, "pixels": unknown, "layers": "copies of its layers have not been tried"},
            traits=frozenset(),
            variable=True,
            raster=False,
        )
        nothing = dict.fromkeys(("vd", "vf", "vheads", "vdepth", "patch", "prefix"), 0)
        video = _token(model, "video")
        super().__init__(
            model,
            geometry=geometry,
            projector=nn.Identity(),
            lm=lm,
            image_token=image,
            video_token=video,
            vision=nothing,
        )
        self.unspoken += tuple(getattr(model.config, "visual_indicator_token_ids", None) or ())  # Ovis

    def probe(self) -> None:
        """Attention that cannot be recomputed takes away the methods that rank by it, anything else all of them."""
        try:
            probe_queries(self.describe())
        except UnsupportedError as e:
            without = {**self.geometry.provides, "llm": frozenset({"queried"})}
            self.geometry = replace(
                self.geometry, provides=without, refuses={**self.geometry.refuses, "query_attention": str(e)}
            )
        probe(self.describe())

    def parts(self, ids: Tensor, inputs: dict[str, Any]) -> list[list[Part]]:
        out = []
        for marks in self.visual(ids):
            columns = marks.nonzero()[:, 0]
            runs = columns.tensor_split(((columns.diff() > 1).nonzero()[:, 0] + 1).tolist())
            out.append([Part(c, (len(c), 1), i, -1, (len(c),)) for i, c in enumerate(runs) if len(c)])
        return out

    def slice_(self, inputs: dict[str, Any], found: list[list[Part]], b: int) -> dict[str, Any]:
        """One row of pixels per run of placeholders, or one row per patch where sizes in patches come along."""
        grids = inputs.get("image_grid_thw")
        if grids is None:
            return super().slice_(inputs, found, b)
        first, count = sum(len(sample) for sample in found[:b]), len(found[b])
        return (
            dict(
                zip(("image_grid_thw", "pixel_values"), some(grids, inputs["pixel_values"], first, count), strict=True)
            )
            if count
            else {}
        )


def _tiny(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Families that have no adapter here, most with 16 visual tokens an image. Cohere's attention rotates neighbouring
    pairs, and Kimi's is latent: methods cannot rank by it. Kimi's layers send tokens to experts; Ovis adds embeddings
    of its own around each image."""
    from transformers import (
        AyaVisionConfig,
        AyaVisionForConditionalGeneration,
        CLIPVisionConfig,
        Cohere2Config,
        Kimi_K25Config,
        Kimi_K25ForConditionalGeneration,
        LlamaConfig,
        Ovis2Config,
        Ovis2ForConditionalGeneration,
        SiglipVisionConfig,
        VipLlavaConfig,
        VipLlavaForConditionalGeneration,
    )

    if kind == "aya-vision":
        tower = SiglipVisionConfig(
            hidden_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            image_size=32,
            patch_size=4,
            intermediate_size=64,
            vision_use_head=False,
        )
        words = Cohere2Config(**tiny_text(sliding_window=24))
        aya = AyaVisionConfig(
            vision_config=tower,
            text_config=words,
            image_token_index=3,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        return tiny_model(AyaVisionForConditionalGeneration, aya, image_token=3, tokens=16, images=(2, 1))
    if kind == "ovis2":
        sizes = {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 64,
        }
        words = {"model_type": "qwen2", **tiny_text()}
        sizes |= {"vocab_size": 40, "num_visual_indicator_tokens": 4}
        ovis = Ovis2Config(
            vision_config=sizes,
            text_config=words,
            image_token_id=3,
            visual_indicator_token_ids=[4, 5, 6, 7],
            vocab_size=64,
            hidden_size=48,
        )
        return tiny_model(Ovis2ForConditionalGeneration, ovis, image_token=3, tokens=16, images=(2, 1), opening=4)
    if kind == "kimi-k2.5":
        tower = {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 4,
            "intermediate_size": 64,
        }
        latent = {
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 6,
            "v_head_dim": 10,
            "head_dim": 8,
        }
        experts = {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 2,
            "n_group": 2,
            "topk_group": 1,
        }
        words = {"model_type": "deepseek_v3", **tiny_text(num_key_value_heads=4), **latent, **experts}
        places = {"pos_emb_height": 8, "pos_emb_width": 8}
        kimi = Kimi_K25Config(
            vision_config={**tower, **places},
            text_config=words,
            image_token_id=3,
            video_token_id=4,
            projection_hidden_size=32,
        )
        inputs = tiny_prompts([[(3, 16), (3, 8)], [(3, 12)]])
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 8], [1, 4, 8], [1, 4, 12]])
        inputs["pixel_values"] = torch.randn(144, 3, 4, 4, generator=torch.Generator().manual_seed(3))
        return tiny_build(Kimi_K25ForConditionalGeneration, kimi), inputs
    vision = CLIPVisionConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=4, image_size=32, patch_size=8, intermediate_size=64
    )
    config = VipLlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**tiny_text()),
        image_token_index=3,
        vision_feature_layers=[-2, -1],
    )
    return tiny_model(VipLlavaForConditionalGeneration, config, image_token=3, tokens=16, images=(2, 1))


ADAPTERS.register(
    "generic",
    AdapterInfo(
        name="generic",
        idea=(
            "any other decoder-shaped multimodal transformers model that passes a probe: behind the projector and in "
            "the language model"
        ),
        matches=matches,
        bind=Generic,
        tiny={k: partial(_tiny, k) for k in ("vipllava", "aya-vision", "ovis2", "kimi-k2.5")},
        priority=-1,
    ),
)
