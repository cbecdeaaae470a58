"""Multimodal models without an adapter of their own, if they are decoder-shaped: a stack of layers that reads visual
tokens at placeholders in the prompt.

Nothing is believed: at ``attach`` the language model is probed, with nothing dropped against itself and pruned against
the dense model under masks. What the tower does is not known, so stages work behind it, methods of the image plane are
refused, a run of placeholders counts as one image, and reports count the FLOPs of the language model alone. A model
that reads its images in another way, or whose layers keep more of a token than its keys and values, is refused
with the reason: :mod:`~vtprune.models.parts.hindrance`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import ADAPTERS, AdapterInfo, named
from .engine.description import LLM, PROJECTOR
from .engine.layout import RasterSpan, some
from .parts.hindrance import REFUSED, placeholder, stack_of
from .parts.mllm import NO_TOWER, Mllm, untowered
from .parts.tiny import tiny_build, tiny_model, tiny_prompts, tiny_text


def matches(model: nn.Module) -> bool:
    """A transformers model that generates and says which token stands for an image, or one that is known and refused;
    any other adapter that takes it goes before."""
    return (
        hasattr(model, "generate")
        and hasattr(model, "base_model")
        and (placeholder(model, "image") is not None or named(model, *REFUSED) is not None)
    )


class Generic(Mllm):
    """One bound model of an unknown family."""

    tested: ClassVar[Collection[str]] = ()
    ranks = False
    follows: ClassVar[dict[str, int]] = {"token_type_ids": 0, "mm_token_type_ids": 0}

    def __init__(self, model: Any):
        lm, image = stack_of(model), placeholder(model, "image")
        assert image is not None
        unknown = "the tower of this model is not known"
        geometry = untowered(
            "generic",
            model,
            lm,
            provides={"projector": PROJECTOR, "llm": LLM},
            refuses={"vision": unknown, "pixels": unknown, "layers": "copies of its layers have not been tried"},
            traits=frozenset(),
        )
        video = placeholder(model, "video")
        super().__init__(
            model,
            geometry=geometry,
            projector=nn.Identity(),
            lm=lm,
            image_token=image,
            video_token=video,
            vision=NO_TOWER,
        )
        self.unspoken += tuple(getattr(model.config, "visual_indicator_token_ids", None) or ())  # Ovis

    def parts(self, ids: Tensor, inputs: dict[str, Any]) -> list[list[RasterSpan]]:
        out = []
        for marks in self.visual(ids):
            columns = marks.nonzero()[:, 0]
            runs = columns.tensor_split(((columns.diff() > 1).nonzero()[:, 0] + 1).tolist())
            out.append([RasterSpan(c, (len(c), 1), i, -1, (len(c),)) for i, c in enumerate(runs) if len(c)])
        return out

    def slice_(self, inputs: dict[str, Any], samples: list[list[RasterSpan]], b: int) -> dict[str, Any]:
        """One row of pixels per run of placeholders, or one row per patch where sizes in patches come along."""
        grids = inputs.get("image_grid_thw")
        if grids is None:
            return super().slice_(inputs, samples, b)
        first, count = sum(len(sample) for sample in samples[:b]), len(samples[b])
        return (
            dict(
                zip(("image_grid_thw", "pixel_values"), some(grids, inputs["pixel_values"], first, count), strict=True)
            )
            if count
            else {}
        )


def _vipllava() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

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


def _aya_vision() -> tuple[nn.Module, dict[str, Any]]:
    """Sliding windows."""
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, SiglipVisionConfig

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


def _ovis2() -> tuple[nn.Module, dict[str, Any]]:
    """Tokens of its own around each image."""
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration

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


def _kimi() -> tuple[nn.Module, dict[str, Any]]:
    """Latent attention, experts, images of any size."""
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

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


ADAPTERS.register(
    "generic",
    AdapterInfo(
        name="generic",
        priority=-1,
        idea=(
            "any other decoder-shaped multimodal transformers model that passes a probe: behind the projector and in "
            "the language model"
        ),
        matches=matches,
        bind=Generic,
        tiny={"vipllava": _vipllava, "aya-vision": _aya_vision, "ovis2": _ovis2, "kimi-k2.5": _kimi},
    ),
)
