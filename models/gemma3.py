"""Hugging Face Gemma 3: ``Gemma3ForConditionalGeneration``, a SigLIP tower whose patches are averaged into 256 visual
tokens an image; sliding and full layers.

The image's tokens see each other in both directions where ``token_type_ids`` says so; that, like the windows, is in the
model's own masks, of which rows and columns are taken. Pan-and-scan crops are images of their own. Squares of patches
are averaged into one visual token, so stages in the tower work on such squares.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..core.ledger import UndoLedger
from ..core.types import Geometry, UnsupportedError
from .base import ADAPTERS, AdapterInfo, PlannedCut, named
from .engine.description import MATRICES, TOWER
from .engine.tower import TowerEngine
from .parts import hf_vit
from .parts.mllm import BEHIND, Mllm, tower_shapes
from .parts.tiny import tiny_build, tiny_prompts, tiny_text


class Gemma3(Mllm):
    """One bound Gemma 3."""

    follows: ClassVar[dict[str, int]] = {"token_type_ids": 0}

    def __init__(self, model: Any):
        core, config = model.model, model.config
        v, text, projector = config.vision_config, config.text_config, core.multi_modal_projector
        if getattr(text, "use_bidirectional_attention", False):
            raise UnsupportedError("Gemma 3 as an encoder (use_bidirectional_attention) has no prompt to prune for")
        grid = (projector.tokens_per_side, projector.tokens_per_side)
        inside = hf_vit.arch(core.vision_tower) is not None
        geometry = Geometry(
            family="gemma3",
            arch="siglip",
            tokens=grid[0] * grid[1],
            grid=grid,
            prefix=0,
            vision_layers=v.num_hidden_layers if inside else 0,
            vision_depth=v.num_hidden_layers,
            notes=TOWER if inside else frozenset(),
            seen_layers=v.num_hidden_layers,
            llm_layers=text.num_hidden_layers,
            provides={"vision": TOWER, **BEHIND} if inside else BEHIND,
            refuses={
                "vision": f"its tower is a {type(core.vision_tower).__name__}, which this library does not know",
                "pixels": "average pooling needs the whole raster",
            },
            fold=projector.kernel_size,
            traits=frozenset({"layers", MATRICES}),
        )
        self.tower, self.fold = core.vision_tower, projector.kernel_size
        self.tower_mask = hf_vit.mask_name(self.tower) if inside else None
        vision = tower_shapes(v, group=projector.kernel_size**2)
        super().__init__(
            model,
            geometry=geometry,
            projector=projector,
            lm=core.language_model,
            image_token=config.image_token_id,
            vision=vision,
        )
        # a bare matrix, not a linear layer
        self.cost = replace(self.cost, proj=projector.mm_input_projection_weight.numel())

    def tower_blocks(self) -> list[nn.Module]:
        return hf_vit.layers(self.tower)

    def tower_engine(self, cuts: list[PlannedCut], ledger: UndoLedger, *, seed: int, done: Any) -> TowerEngine:
        described = replace(hf_vit.describe(self.tower, self.geometry.seen_layers), fold=self.fold)
        tokens = described.grid[0] * described.grid[1]
        return TowerEngine(described, cuts, ledger, seed=seed, done=done, tokens=tokens)


def _tiny() -> tuple[nn.Module, dict[str, Any]]:
    """Random; 16 visual tokens an image, more than the sliding window's 12: one prompt with two images, one with a
    single one, left-padded."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    slide, full = "sliding_attention", "full_attention"
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            vision_use_head=False,
        ),
        text_config=Gemma3TextConfig(
            **tiny_text(
                head_dim=12,
                query_pre_attn_scalar=16,
                sliding_window=12,
                layer_types=[slide, full, slide, slide, slide, full],
            )
        ),
        mm_tokens_per_image=16,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
    )
    prompts = tiny_prompts([[(3, 16), (3, 16)], [(3, 16)]])
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    inputs = {**prompts, "token_type_ids": (prompts["input_ids"] == 3).long(), "pixel_values": pixels}
    return tiny_build(Gemma3ForConditionalGeneration, config), inputs


ADAPTERS.register(
    "gemma3",
    AdapterInfo(
        name="gemma3",
        idea=(
            "Gemma 3 on transformers (squares of patches in the tower, behind the projector, language model; sliding "
            "windows, both directions within an image)"
        ),
        matches=lambda m: named(m, "Gemma3ForConditionalGeneration") is not None,
        bind=Gemma3,
        tiny={"sliding": _tiny},
    ),
)
