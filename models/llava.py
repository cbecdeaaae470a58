"""Hugging Face LLaVA-1.5: ``LlavaForConditionalGeneration`` with a CLIP, SigLIP or DINOv2 tower and a Llama, Mistral or
Qwen2 language model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..core.ledger import UndoLedger
from ..core.types import Geometry, UnsupportedError
from .base import ADAPTERS, AdapterInfo, PlannedCut, named
from .engine.description import INSERT, LLM, MATRICES, PROJECTOR, RESIZE, TOWER
from .engine.tower import TowerEngine
from .parts import hf_vit
from .parts.mllm import Mllm
from .parts.tiny import tiny_model, tiny_text


class Llava(Mllm):
    """One bound LLaVA: one image, one raster."""

    family = "llava"
    per: tuple[str, ...] = ("image", "sample")

    def __init__(self, model: Any):
        core, config = model.model, model.config
        self.tower = core.vision_tower
        arch = hf_vit.arch(self.tower)
        if arch is None:
            raise UnsupportedError(
                f"{self.family} with a {type(self.tower).__name__} tower is not supported; there are CLIP, SigLIP and "
                "DINOv2"
            )
        depth = len(hf_vit.layers(self.tower))
        feature = config.vision_feature_layer
        # hidden_states[0] is the embedding, so index i is the output of block i - 1; a list of layers needs equal
        # lengths, so no block may cut.
        self.used = feature % (depth + 1) if isinstance(feature, int) else 0
        v = self.tower.config
        side, prefix = v.image_size // v.patch_size, hf_vit.prefix(self.tower)
        if (config.vision_feature_select_strategy == "default") != (prefix == 1):
            raise UnsupportedError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with a {arch} tower "
                "gives the language model something else than the patches"
            )
        self.tower_mask = hf_vit.mask_name(self.tower)
        image = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
        super().__init__(
            model,
            geometry=self._geometry(arch, depth, side, prefix, config.text_config.num_hidden_layers),
            projector=core.multi_modal_projector,
            lm=core.language_model,
            image_token=image,
            video_token=getattr(config, "video_token_id", None),
            vision={
                "vd": v.hidden_size,
                "vf": getattr(v, "intermediate_size", None) or int(v.hidden_size * v.mlp_ratio),
                "vheads": v.num_attention_heads,
                "vdepth": depth,
                "patch": 3 * v.patch_size**2 * v.hidden_size,
                "prefix": prefix,
            },
        )

    def _geometry(self, arch: str, depth: int, side: int, prefix: int, layers: int) -> Geometry:
        return Geometry(
            family=self.family,
            arch=arch,
            tokens=side * side,
            grid=(side, side),
            prefix=prefix,
            vision_layers=self.used,
            vision_depth=depth,
            llm_layers=layers,
            notes=TOWER if self.used else frozenset(),
            seen_layers=self.used,
            provides={
                "pixels": RESIZE,
                **({"vision": TOWER} if self.used else {}),
                "projector": PROJECTOR,
                "llm": LLM,
            },
            traits=frozenset({"layers", INSERT, MATRICES, *(("class_token",) if prefix else ())}),
            per=self.per,
            variable="tile" in self.per,
        )

    def tower_blocks(self) -> list[nn.Module]:
        return hf_vit.layers(self.tower)[: self.used]

    def tower_engine(self, cuts: list[PlannedCut], ledger: UndoLedger, *, seed: int, done: Any) -> TowerEngine:
        described = hf_vit.describe(self.tower, self.used if cuts else 0)
        described = replace(described, together=self.together)
        return TowerEngine(described, cuts, ledger, seed=seed, done=done, tokens=self.geometry.tokens)


# ----------------------------------------------------------------------------------------------------------- tiny
# models


def _tiny(tower: str, text: str, layers: int = 6) -> tuple[nn.Module, dict[str, Any]]:
    """A random LLaVA of a few thousand parameters with 16 visual tokens, and inputs: two left-padded prompts of unequal
    length with one image each."""
    from transformers import (
        CLIPVisionConfig,
        Dinov2Config,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
        Qwen2Config,
        SiglipVisionConfig,
    )

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 5, "image_size": 32, "patch_size": 8}
    visions = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig, "dinov2": Dinov2Config}
    extra: dict[str, Any] = {} if tower == "dinov2" else {"intermediate_size": 64}
    if tower == "siglip":
        extra["vision_use_head"] = False
    texts = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    words: dict[str, Any] = {"sliding_window": None} if text != "llama" else {}
    config = LlavaConfig(
        vision_config=visions[tower](**sizes, **extra),
        text_config=texts[text](**tiny_text(layers, **words)),
        image_token_index=3,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
    )
    return tiny_model(LlavaForConditionalGeneration, config, image_token=3, tokens=16)


def _matches(model: Any) -> bool:
    """LLaVA with a Pixtral tower has images of any size: another adapter's."""
    return (
        named(model, "LlavaForConditionalGeneration") is not None
        and named(model.model.vision_tower, "PixtralVisionModel") is None
    )


ADAPTERS.register(
    "llava",
    AdapterInfo(
        name="llava",
        idea="LLaVA-1.5 on transformers: CLIP / SigLIP / DINOv2 tower, Llama / Mistral / Qwen2 text",
        matches=_matches,
        bind=Llava,
        tiny={
            f"{v}-{t}": partial(_tiny, v, t)
            for v, t in (("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "mistral"), ("dinov2", "llama"))
        },
    ),
)
