"""Bare Hugging Face vision towers: ``CLIPVisionModel``, ``SiglipVisionModel``, ``Dinov2Model``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..ledger import UndoLedger
from ..types import Geometry, UnsupportedError
from . import _hf_vit
from ._cost import Shapes
from ._tower import TowerEngine
from .base import ADAPTERS, AdapterInfo, PlannedCut


class HfVit:
    """One bound tower. Its output holds the surviving tokens only: ``[B, prefix + K, C]``."""

    def __init__(self, model: Any):
        self.model = model
        config = model.config
        arch = _hf_vit.arch(model)
        assert arch is not None
        depth, side = len(_hf_vit.layers(model)), config.image_size // config.patch_size
        prefix = _hf_vit.prefix(model)
        provides = frozenset({"projections", "prefix"} | ({"class_token"} if prefix else set()))
        self.geometry = Geometry(
            family="hf-vit",
            arch=arch,
            tokens=side * side,
            grid=(side, side),
            prefix=prefix,
            vision_layers=depth,
            vision_depth=depth,
            llm_layers=0,
            provides={"pixels": frozenset(), "vision": provides},
        )
        self.cost = Shapes(
            vd=config.hidden_size,
            vf=getattr(config, "intermediate_size", None) or int(config.hidden_size * config.mlp_ratio),
            vheads=config.num_attention_heads,
            vdepth=depth,
            patch=3 * config.patch_size**2 * config.hidden_size,
            prefix=prefix,
        )

    @property
    def tower_mask(self) -> str | None:
        return _hf_vit.mask_name(self.model)

    def tower_blocks(self) -> list[nn.Module]:
        return _hf_vit.layers(self.model)

    def decoder_layers(self) -> list[nn.Module]:
        return []

    def all_layers(self) -> list[nn.Module]:
        return self.tower_blocks()

    def branch(self, layer: int) -> nn.Module:
        raise UnsupportedError("a bare vision tower has no language model")

    def reseed(self, seed: int) -> None:
        self.engine.seed = seed

    def install(self, cuts: list[PlannedCut], ledger: UndoLedger, recorder: Any, *, positions: str, per: str, seed: int) -> None:
        tower = _hf_vit.describe(self.model, self.geometry.vision_layers)
        self.engine = TowerEngine(tower, cuts, ledger, seed=seed, done=recorder.vision, tokens=self.geometry.tokens)


def _tiny(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

    config_class, model_class = {
        "clip": (CLIPVisionConfig, CLIPVisionModel),
        "siglip": (SiglipVisionConfig, SiglipVisionModel),
        "dinov2": (Dinov2Config, Dinov2Model),
    }[kind]
    extra: dict[str, Any] = {} if kind == "dinov2" else {"intermediate_size": 64}
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = model_class(config_class(hidden_size=32, num_attention_heads=2, num_hidden_layers=4, image_size=32, patch_size=8, **extra)).eval()
    torch.random.set_rng_state(state)
    _hf_vit.randomise(model, 1)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


ADAPTERS.register(
    "hf-vit",
    AdapterInfo(
        name="hf-vit",
        idea="bare transformers towers: CLIPVisionModel, SiglipVisionModel, Dinov2Model",
        matches=lambda m: type(m).__name__ in _hf_vit.CLASSES,
        bind=HfVit,
        tiny={k: partial(_tiny, k) for k in ("clip", "siglip", "dinov2")},
    ),
)
