"""Hugging Face PaliGemma and PaliGemma 2: ``PaliGemmaForConditionalGeneration``, a SigLIP tower, one linear layer, and
Gemma or Gemma 2 text.

Prompt and image see each other in both directions (``token_type_ids`` 0), the answer (1) what is before it; masks and
windows are the model's own, of which rows and columns are taken.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.ledger import UndoLedger
from ..core.types import Geometry, UnsupportedError
from .base import ADAPTERS, AdapterInfo, PlannedCut, named
from .engine.description import INSERT, LLM, MATRICES, PROJECTOR, RESIZE, TOWER
from .engine.layout import RasterSpan
from .engine.tower import TowerEngine
from .parts import hf_vit
from .parts.mllm import Mllm, tower_shapes
from .parts.tiny import tiny_build, tiny_prompts, tiny_text


class PaliGemma(Mllm):
    """One bound PaliGemma."""

    follows: ClassVar[dict[str, int]] = {"token_type_ids": 1}
    first_position = 1

    def __init__(self, model: Any):
        core, config = model.model, model.config
        self.tower, v = core.vision_tower, config.vision_config
        if hf_vit.arch(self.tower) != "siglip":
            raise UnsupportedError(
                f"PaliGemma with a {type(self.tower).__name__} tower is not supported; there is SigLIP"
            )
        self.tower_mask = hf_vit.mask_name(self.tower)
        side = v.image_size // v.patch_size
        geometry = Geometry(
            family="paligemma",
            arch="siglip",
            tokens=side * side,
            grid=(side, side),
            prefix=0,
            vision_layers=v.num_hidden_layers,
            vision_depth=v.num_hidden_layers,
            llm_layers=config.text_config.num_hidden_layers,
            notes=TOWER,
            seen_layers=v.num_hidden_layers,
            provides={
                "pixels": RESIZE,
                "vision": TOWER,
                "projector": PROJECTOR,
                "llm": LLM,
            },
            traits=frozenset({"layers", INSERT, MATRICES}),
        )
        vision = tower_shapes(v)
        lm, image = core.language_model, config.image_token_id
        super().__init__(
            model, geometry=geometry, projector=core.multi_modal_projector, lm=lm, image_token=image, vision=vision
        )

    def parts(self, ids: Tensor, inputs: dict[str, Any]) -> list[list[RasterSpan]]:
        if inputs.get("token_type_ids") is None:
            raise UnsupportedError(
                "PaliGemma without token_type_ids attends one way with sdpa and another with eager attention; pass "
                "what its processor returns"
            )
        return super().parts(ids, inputs)

    def tower_blocks(self) -> list[nn.Module]:
        return hf_vit.layers(self.tower)

    def tower_engine(self, cuts: list[PlannedCut], ledger: UndoLedger, *, seed: int, done: Any) -> TowerEngine:
        described = hf_vit.describe(self.tower, self.geometry.vision_layers)
        return TowerEngine(described, cuts, ledger, seed=seed, done=done, tokens=self.geometry.tokens)


def _tiny(text: str) -> tuple[nn.Module, dict[str, Any]]:
    """Random; 16 visual tokens an image, Gemma 2's window is 12: one prompt with two images, one with a single one,
    left-padded; two tokens of suffix."""
    from transformers import (
        Gemma2Config,
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )

    slide, full = "sliding_attention", "full_attention"
    words = tiny_text(head_dim=12)
    if text == "gemma2":
        capped = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 20.0}
        words |= {
            "query_pre_attn_scalar": 16,
            "sliding_window": 12,
            "layer_types": [slide, full, slide, full, slide, full],
            **capped,
        }
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            vision_use_head=False,
        ),
        text_config={"gemma": GemmaConfig, "gemma2": Gemma2Config}[text](**words),
        projection_dim=48,
        hidden_size=48,
        image_token_index=3,
    )
    prompts = tiny_prompts([[(3, 16), (3, 16)], [(3, 16)]])
    kinds = torch.zeros_like(prompts["input_ids"])
    kinds[:, -2:] = 1
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return tiny_build(PaliGemmaForConditionalGeneration, config), {
        **prompts,
        "token_type_ids": kinds,
        "pixel_values": pixels,
    }


ADAPTERS.register(
    "paligemma",
    AdapterInfo(
        name="paligemma",
        idea=(
            "PaliGemma and PaliGemma 2 on transformers: SigLIP tower, Gemma / Gemma 2 text, both directions within the "
            "prompt"
        ),
        matches=lambda m: named(m, "PaliGemmaForConditionalGeneration") is not None,
        bind=PaliGemma,
        tiny={t: partial(_tiny, t) for t in ("gemma", "gemma2")},
    ),
)
