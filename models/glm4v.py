"""Hugging Face GLM-4.1V, GLM-4.5V and GLM-4.6V: images and videos of any size, 2 x 2 merger, positions with three axes
(M-RoPE), dense or with experts.

A video's frames are marked by the image token too, and come without images beside them. Rotary tables turn a part of
each head only, in the dense language model every channel with its neighbour. Stages work behind the merger and in the
language model; notes of patches travel there as the mean over those of a token.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..core.types import UnsupportedError
from .base import ADAPTERS, AdapterInfo, named
from .parts.mllm import Mllm
from .parts.tiny import tiny_build, tiny_prompts, tiny_text
from .qwen_vl import QwenVL, folded

CLASSES = ("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration", "Glm46VForConditionalGeneration")


class Glm4V(QwenVL):
    """One bound GLM-4V."""

    def __init__(self, model: Any):
        core, config = model.model, model.config
        v = config.vision_config
        self.fold = v.spatial_merge_size
        self.pairs = named(core.language_model, "Glm4vTextModel") is not None
        self.tower = tower = core.visual
        vision = {
            "vd": v.hidden_size,
            "vf": v.out_hidden_size,
            "vheads": v.num_heads,
            "vdepth": v.depth,
            "vmlp": 3,
            "patch": tower.patch_embed.proj.weight.numel(),
            "prefix": 0,
            "group": self.fold**2,
        }
        Mllm.__init__(
            self,
            model,
            geometry=folded("glm4v", config),
            projector=tower.merger,
            lm=core.language_model,
            image_token=config.image_token_id,
            vision=vision,
        )
        self.cost = replace(self.cost, proj=self.cost.proj + tower.downsample.weight.numel())

    def mlp(self, layer: Any) -> int:
        """A layer of experts sends each token to some of them, chosen by a matrix, and to the shared ones."""
        text = self.lm.config
        if not hasattr(layer.mlp, "experts"):
            return Mllm.mlp(self, layer)
        return text.hidden_size * (
            3 * text.moe_intermediate_size * (text.num_experts_per_tok + text.n_shared_experts) + text.n_routed_experts
        )

    def moving(self, inputs: dict[str, Any]) -> int | None:
        if inputs.get("video_grid_thw") is None:
            return None
        if inputs.get("image_grid_thw") is not None:
            raise UnsupportedError(
                "GLM-4V marks the frames of videos like images: pass images or videos, not both in one batch"
            )
        return self.image_token


def _tiny(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Random. Images: three of 16, 8 and 12 tokens in two left-padded prompts; video: one of 4 x 4 tokens with a word
    between its frames in the first, one of 2 x 6 in the second."""
    import transformers as hf

    name = {"dense": "Glm4v", "experts": "Glm4vMoe", "video": "Glm46V"}[kind]
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    text = tiny_text(rope_parameters=rope)
    if kind == "experts":  # behind a dense layer
        text |= {
            "head_dim": 12,
            "moe_intermediate_size": 24,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
        }
    vision = {
        "depth": 3,
        "num_heads": 2,
        "patch_size": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 48,
        "image_size": 32,
    }
    tokens = {
        "image_token_id": 3,
        "video_token_id": 4,
        "image_start_token_id": 5,
        "image_end_token_id": 6,
        "video_start_token_id": 7,
        "video_end_token_id": 8,
    }
    config = getattr(hf, f"{name}Config")(vision_config=vision, text_config=text, **tokens)
    moving = kind == "video"
    inputs: dict[str, Any] = tiny_prompts(
        [[(3, 4)] * 4, [(3, 6)] * 2] if moving else [[(3, 16), (3, 8)], [(3, 12)]], opening=5
    )
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 3).int() * (2 if moving else 1)
    thw = [[4, 4, 4], [2, 4, 6]] if moving else [[1, 8, 8], [1, 4, 8], [1, 4, 12]]
    inputs["video_grid_thw" if moving else "image_grid_thw"] = torch.tensor(thw)
    patches = sum(t * h * w for t, h, w in thw)
    pixels = torch.randn(patches, 3 * 2 * 16, generator=torch.Generator().manual_seed(3))
    inputs["pixel_values_videos" if moving else "pixel_values"] = pixels
    return tiny_build(getattr(hf, f"{name}ForConditionalGeneration"), config), inputs


ADAPTERS.register(
    "glm4v",
    AdapterInfo(
        name="glm4v",
        idea=(
            "GLM-4.1V, GLM-4.5V (experts) and GLM-4.6V on transformers: images and video of any size; "
            "squares of patches in the tower, behind the merger, language model"
        ),
        matches=lambda m: named(m, *CLASSES) is not None,
        bind=Glm4V,
        tiny={k: partial(_tiny, k) for k in ("dense", "experts", "video")},
    ),
)
