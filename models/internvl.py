"""Hugging Face InternVL (InternVL 2.5, 3, 3.5): ``InternVLForConditionalGeneration``, tiles of one size, pixel shuffle,
Qwen2, Qwen3 or Llama text.

The tiles of an image follow each other in the prompt, so budgets are per image or per tile. Pixel shuffle folds 2 x 2
patches into one visual token, so stages in the tower work on such squares.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.ledger import UndoLedger
from ..core.types import Geometry, UnsupportedError
from .base import ADAPTERS, AdapterInfo, PlannedCut, named
from .engine.description import MATRICES, TOWER, Tower
from .engine.tower import TowerEngine
from .parts.matrices import of_block
from .parts.mllm import BEHIND, Mllm
from .parts.tiny import tiny_build, tiny_prompts, tiny_text


class InternVL(Mllm):
    """One bound InternVL."""

    runs = True
    tower_mask = "attention_mask"  # of its attention; the blocks take none

    def __init__(self, model: Any):
        core, config = model.model, model.config
        v = config.vision_config
        (height, width), (ph, pw) = v.image_size, v.patch_size
        fold = round(1 / config.downsample_ratio)
        if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
            raise UnsupportedError(
                "InternVL is known with one vision_feature_layer and vision_feature_select_strategy='default' only"
            )
        grid = (height // ph // fold, width // pw // fold)
        used = config.vision_feature_layer % (v.num_hidden_layers + 1)
        inside = used == v.num_hidden_layers  # blocks behind would find the whole raster again
        geometry = Geometry(
            family="internvl",
            arch="internvl",
            tokens=grid[0] * grid[1],
            grid=grid,
            prefix=1,
            vision_layers=used if inside else 0,
            vision_depth=v.num_hidden_layers,
            notes=TOWER,
            seen_layers=used,
            llm_layers=config.text_config.num_hidden_layers,
            provides={"vision": TOWER, **BEHIND} if inside else BEHIND,
            refuses={
                "vision": "its features are those of a block in the middle of the tower",
                "pixels": "pixel shuffle needs the whole raster",
            },
            per=("image", "tile", "sample"),
            overview=-1,
            fold=fold,
            traits=frozenset({"layers", "class_token", MATRICES}),
        )
        vision = {
            "vd": v.hidden_size,
            "vf": v.intermediate_size,
            "vheads": v.num_attention_heads,
            "vdepth": v.num_hidden_layers,
            "patch": v.num_channels * ph * pw * v.hidden_size,
            "prefix": 1,
            "group": fold * fold,
        }
        self.tower, self.fold, self.patches = core.vision_tower, fold, (height // ph, width // pw)
        lm, image = core.language_model, config.image_token_id
        super().__init__(
            model, geometry=geometry, projector=core.multi_modal_projector, lm=lm, image_token=image, vision=vision
        )

    def tower_blocks(self) -> list[nn.Module]:
        return list(self.tower.encoder.layer)[: self.geometry.seen_layers]

    def masked_modules(self) -> list[nn.Module]:
        blocks: list[Any] = self.tower_blocks()
        return [block.attention for block in blocks]

    def tower_engine(self, cuts: list[PlannedCut], ledger: UndoLedger, *, seed: int, done: Any) -> TowerEngine:
        described = Tower(
            root=self.tower,
            blocks=self.tower_blocks(),
            prefix=1,
            grid=self.patches,
            mask=None,
            attend=_attend,
            feed=_feed,
            width=self.model.config.vision_config.hidden_size,
            capture=_capture,
            project=_project,
            fold=self.fold,
            matrices=of_block,
        )
        tokens = self.patches[0] * self.patches[1]
        return TowerEngine(described, cuts, ledger, seed=seed, done=done, tokens=tokens)


def _attend(block: Any, x: Tensor, mask: Tensor | None, caught: dict[str, Any]) -> Tensor:
    return block.lambda_1 * block.attention(block.layernorm_before(x), attention_mask=mask)[0] + x


def _feed(block: Any, x: Tensor) -> Tensor:
    return block.lambda_2 * block.dropout(block.mlp(block.layernorm_after(x))) + x


def _capture(block: Any) -> dict[str, nn.Module]:
    a = block.attention
    return {"q": a.q_norm, "k": a.k_norm, "v": a.v_proj}


def _project(block: Any, caught: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    a = block.attention
    q, k, v = (caught[n].unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for n in "qkv")
    return q, k, v, a.scale


def _tiny(text: str, frames: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Random; 16 visual tokens a tile: one prompt with an image of two tiles and one of one, one with a single tile;
    ``frames``: three frames of a video, and two; left-padded."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, LlamaConfig, Qwen2Config, Qwen3Config
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

    classes = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[32, 32],
            patch_size=[4, 4],
        ).to_dict(),
        text_config=classes[text](**tiny_text(**({"head_dim": 12} if text == "qwen3" else {}))).to_dict(),
        image_token_id=3,
        image_seq_length=16,
    )
    prompts = tiny_prompts([[(3, 16)] * 3, [(3, 16)] * 2] if frames else [[(3, 32), (3, 16)], [(3, 16)]])
    pixels = torch.randn(5 if frames else 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return tiny_build(InternVLForConditionalGeneration, config), {**prompts, "pixel_values": pixels}


ADAPTERS.register(
    "internvl",
    AdapterInfo(
        name="internvl",
        idea=(
            "InternVL on transformers (tiles; squares of patches in the tower, behind the projector, language model), "
            "Qwen2 / Qwen3 / Llama text"
        ),
        matches=lambda m: named(m, "InternVLForConditionalGeneration") is not None,
        bind=InternVL,
        tiny={**{t: partial(_tiny, t) for t in ("qwen2", "qwen3")}, "frames": partial(_tiny, "qwen2", True)},
    ),
)
