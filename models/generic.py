"""Multimodal models without an adapter of their own, if they are decoder-shaped: a stack of layers that reads visual tokens at placeholders in the prompt.

Nothing is believed: at ``attach`` the language model is probed, with nothing dropped against itself and pruned against the dense model under masks. What the
tower does is not known, so stages work behind it, methods of the image plane are refused, a run of placeholders counts as one image, and reports count the
FLOPs of the language model alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..types import Geometry, UnsupportedError
from ._layout import Part
from ._mllm import LLM, Mllm, tiny_model, tiny_text
from ._probe import probe, probe_queries
from .base import ADAPTERS, AdapterInfo


def _stacks(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList) and hasattr(m, "embed_tokens") and hasattr(m, "rotary_emb")]


def _image_token(model: Any) -> int | None:
    config = getattr(model, "config", None)
    return next((found for n in ("image_token_id", "image_token_index") if (found := getattr(config, n, None)) is not None), None)


def matches(model: nn.Module) -> bool:
    """A transformers model that generates, has one decoder stack and says which token stands for an image, and that no other adapter takes."""
    mine = hasattr(model, "generate") and hasattr(model, "base_model") and _image_token(model) is not None and len(_stacks(model)) == 1
    return mine and not any(ADAPTERS.get(n).matches(model) for n in ADAPTERS if n != "generic")


class Generic(Mllm):
    """One bound model of an unknown family."""

    tested: ClassVar[Collection[str]] = ()

    def __init__(self, model: Any):
        lm, image = _stacks(model)[0], _image_token(model)
        assert image is not None
        text = lm.config
        name = type(model).__name__
        if "mrope_section" in (getattr(text, "rope_parameters", None) or {}):
            raise UnsupportedError(f"{name} places visual tokens by time, row and column, in a way that needs an adapter of its own")
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
        super().__init__(model, geometry=geometry, projector=nn.Identity(), lm=lm, image_token=image, vision=nothing)

    def probe(self) -> None:
        """Attention that cannot be recomputed takes away the methods that rank by it, anything else all of them."""
        try:
            probe_queries(self.describe())
        except UnsupportedError as e:
            without = {**self.geometry.provides, "llm": frozenset({"queried"})}
            self.geometry = replace(self.geometry, provides=without, refuses={**self.geometry.refuses, "query_attention": str(e)})
        probe(self.describe())

    def parts(self, ids: Tensor, inputs: dict[str, Any]) -> list[list[Part]]:
        out = []
        for marks in self.visual(ids):
            columns = marks.nonzero()[:, 0]
            runs = columns.tensor_split(((columns.diff() > 1).nonzero()[:, 0] + 1).tolist())
            out.append([Part(c, (len(c), 1), i, -1, (len(c),)) for i, c in enumerate(runs) if len(c)])
        return out


def _tiny(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Families that have no adapter here, with 16 visual tokens an image. Cohere's attention rotates neighbouring pairs: methods cannot rank by it."""
    from transformers import (
        AyaVisionConfig,
        AyaVisionForConditionalGeneration,
        CLIPVisionConfig,
        Cohere2Config,
        LlamaConfig,
        SiglipVisionConfig,
        VipLlavaConfig,
        VipLlavaForConditionalGeneration,
    )

    if kind == "aya-vision":
        tower = SiglipVisionConfig(
            hidden_size=32, num_attention_heads=2, num_hidden_layers=2, image_size=32, patch_size=4, intermediate_size=64, vision_use_head=False
        )
        words = Cohere2Config(**tiny_text(sliding_window=24))
        aya = AyaVisionConfig(vision_config=tower, text_config=words, image_token_index=3, vision_feature_layer=-1, vision_feature_select_strategy="full")
        return tiny_model(AyaVisionForConditionalGeneration, aya, image_token=3, tokens=16, images=(2, 1))
    vision = CLIPVisionConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=4, image_size=32, patch_size=8, intermediate_size=64)
    config = VipLlavaConfig(vision_config=vision, text_config=LlamaConfig(**tiny_text()), image_token_index=3, vision_feature_layers=[-2, -1])
    return tiny_model(VipLlavaForConditionalGeneration, config, image_token=3, tokens=16, images=(2, 1))


ADAPTERS.register(
    "generic",
    AdapterInfo(
        name="generic",
        idea="any other decoder-shaped multimodal transformers model that passes a probe: behind the projector and in the language model",
        matches=matches,
        bind=Generic,
        tiny={k: partial(_tiny, k) for k in ("vipllava", "aya-vision")},
    ),
)
