"""Bare Hugging Face vision towers and classifiers: ``CLIPVisionModel``, ``CLIPVisionModelWithProjection``,
``SiglipVisionModel``, ViT, DeiT, DINOv2 (with registers) and DINOv3."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.ledger import UndoLedger
from ..core.types import UnsupportedError
from .base import ADAPTERS, AdapterInfo, named
from .engine.shapes import Shapes
from .parts import hf_vit
from .parts.vit import BareVit, mlp_shape

# Accepted only to say why not.
_MAPS = (
    "a {0}Backbone hands out whole feature maps, with a place for every patch; load the checkpoint as {0}Model, whose "
    "output holds the tokens that are left"
)
REFUSED = {
    "Dinov2Backbone": _MAPS.format("Dinov2"),
    "Dinov2WithRegistersBackbone": _MAPS.format("Dinov2WithRegisters"),
    "DINOv3ViTBackbone": _MAPS.format("DINOv3ViT"),
    "Siglip2VisionModel": "Siglip2 (NaFlex) gives every image a raster and a padding of its own, and recipes are planned for one raster; "  # noqa: E501
    "the SigLIP 2 "
    "checkpoints of one resolution load as SiglipVisionModel and are supported",
}
KNOWN = (*hf_vit.BARE, *hf_vit.CLASSIFIERS, *REFUSED)


class HfVit(BareVit):
    """One bound tower. Its output holds the surviving tokens only, ``[B, prefix + K, C]``; a classifier that averages
    the patches counts every original token that is still represented once. In DINOv3 a merged token stands at the
    position of the token that absorbed the others."""

    def __init__(self, model: Any):
        name = named(model, *KNOWN)
        assert name is not None
        if name in REFUSED:
            raise UnsupportedError(REFUSED[name])
        self.model = model
        self.base = getattr(model, hf_vit.CLASSIFIERS[name]) if name in hf_vit.CLASSIFIERS else model
        self.averages = name.startswith("Dinov2") and name in hf_vit.CLASSIFIERS
        config = self.base.config
        tower = hf_vit.describe(self.base, len(hf_vit.layers(self.base)), hf_vit.core(self.base), bare=True)
        block: Any = tower.blocks[0]
        cost = Shapes(
            vd=config.hidden_size,
            vheads=config.num_attention_heads,
            vdepth=len(tower.blocks),
            patch=sum(p.numel() for p in hf_vit.core(self.base).embeddings.parameters() if p.ndim == 4),
            prefix=tower.prefix,
            **mlp_shape(block.mlp, config.hidden_size),
        )
        arch = hf_vit.BARE[str(named(self.base, *hf_vit.BARE))]
        super().__init__(
            tower,
            family="hf-vit",
            arch=arch,
            class_token=tower.prefix > 0,
            cost=cost,
            class_readout=not self.averages,
            classifier=getattr(model, "classifier", None),
        )

    def head(self, ledger: UndoLedger) -> None:
        if self.tower.mask is None:
            ledger.before(self.tower.root, _no_maps)
        if self.averages:
            self._average(ledger)
        pool = getattr(hf_vit.core(self.model), "head", None)  # SigLIP's attention pooling
        if pool is not None:
            self.pooler(ledger, pool.attention, heads=pool.attention.num_heads, tokens=1)

    def _average(self, ledger: UndoLedger) -> None:
        """The classifier takes a plain mean of what its tower returns; whoever calls the tower itself gets the tokens
        as they are."""
        reading = threading.local()

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            reading.now = True

        def end(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            reading.now = False

        def weigh(module: nn.Module, args: tuple, kwargs: dict, x: Tensor) -> Tensor | None:
            run = self.engine.run
            return self.weighed(run, x) if run is not None and getattr(reading, "now", False) else None

        ledger.before(self.model, begin)
        ledger.after(self.model, end, first=False, always=True)
        ledger.after(self.base.layernorm, weigh)


def _no_maps(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Blocks that take no mask are composed of their halves, which make no attention maps."""
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise UnsupportedError(
            "attention maps of this tower need a newer transformers than 5.17 while it is attached; leave out "
            "output_attentions"
        )


def _tiny(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers as hf

    config_class, model_class, extra = {
        "clip": (hf.CLIPVisionConfig, hf.CLIPVisionModel, {"intermediate_size": 64}),
        "siglip": (hf.SiglipVisionConfig, hf.SiglipVisionModel, {"intermediate_size": 64}),
        "dinov2": (hf.Dinov2Config, hf.Dinov2Model, {}),
        "dinov3": (
            hf.DINOv3ViTConfig,
            hf.DINOv3ViTModel,
            {"intermediate_size": 64, "num_register_tokens": 4, "use_gated_mlp": True},
        ),
        "vit-classifier": (hf.ViTConfig, hf.ViTForImageClassification, {"intermediate_size": 64, "num_labels": 5}),
        "deit": (hf.DeiTConfig, hf.DeiTModel, {"intermediate_size": 64}),
        "dinov2-registers-classifier": (
            hf.Dinov2WithRegistersConfig,
            hf.Dinov2WithRegistersForImageClassification,
            {"num_register_tokens": 3, "use_swiglu_ffn": True, "num_labels": 5},
        ),
    }[kind]
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = config_class(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=4, image_size=32, patch_size=8, **extra
    )
    model: Any = model_class(config).eval()
    torch.random.set_rng_state(state)
    hf_vit.randomise(model, 1)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


ADAPTERS.register(
    "hf-vit",
    AdapterInfo(
        name="hf-vit",
        idea=(
            "bare transformers towers and classifiers: CLIP (also with projection), SigLIP, ViT, DeiT, DINOv2 (with "
            "registers), DINOv3"
        ),
        matches=lambda m: named(m, *KNOWN) is not None,
        bind=HfVit,
        tiny={
            k: partial(_tiny, k)
            for k in ("clip", "siglip", "dinov2", "dinov3", "vit-classifier", "deit", "dinov2-registers-classifier")
        },
    ),
)
