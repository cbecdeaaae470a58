"""Hugging Face Mistral Small 3.1 and later (``Mistral3ForConditionalGeneration``) and Pixtral 12B
(``LlavaForConditionalGeneration`` with a Pixtral tower).

Images keep their size, told by ``image_sizes``, and a break token stands behind every row of visual tokens. The tower
sees all images of a batch as one sequence, of which Mistral 3 merges 2 x 2 patches into one visual token: stages in it
work on those squares (Pixtral: on patches).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.ledger import UndoLedger
from ..core.types import Geometry, VtpruneError
from .base import ADAPTERS, AdapterInfo, PlannedCut, named
from .engine.composed import noise_for
from .engine.description import TOWER, PackedTower
from .engine.folded import packed_engine
from .engine.layout import Raster, RasterSpan
from .engine.packed import PackedEngine
from .engine.packing import Packing, in_order
from .engine.rotary import rotate
from .parts import hf_vit
from .parts.mllm import BEHIND, Mllm, known, tower_shapes
from .parts.tiny import tiny_build, tiny_prompts, tiny_text


def matches(model: Any) -> bool:
    """Mistral 3, or a LLaVA whose tower is Pixtral's."""
    name = named(model, "Mistral3ForConditionalGeneration", "LlavaForConditionalGeneration")
    return name == "Mistral3ForConditionalGeneration" or (
        name is not None and named(model.model.vision_tower, "PixtralVisionModel") is not None
    )


class Mistral3(Mllm):
    """One bound Mistral 3 or Pixtral."""

    def __init__(self, model: Any):
        core, config = model.model, model.config
        v = config.vision_config
        self.tower, self.fold = core.vision_tower, getattr(config, "spatial_merge_size", 1)
        # hidden_states[0] is the embedding; of a list of layers no block is the last one whose output is used
        feature, depth = config.vision_feature_layer, v.num_hidden_layers
        used = feature % (depth + 1) if isinstance(feature, int) else 0
        inside = used == depth  # blocks behind would find the whole raster again
        self.cell = v.patch_size * self.fold  # pixels along one side of a visual token
        side = v.image_size // self.cell
        geometry = Geometry(
            family="mistral3",
            arch="pixtral",
            tokens=side * side,
            grid=(side, side),
            prefix=0,
            vision_layers=used if inside else 0,
            vision_depth=depth,
            notes=TOWER if used else frozenset(),
            seen_layers=used,
            llm_layers=config.text_config.num_hidden_layers,
            provides={"vision": TOWER, **BEHIND} if inside else BEHIND,
            refuses={
                "vision": "its features are those of several blocks, or of one in the middle of the tower",
                "pixels": "images keep their size: set the processor's longest_edge",
            },
            fold=self.fold,
            variable=True,
        )
        vision = tower_shapes(v, vmlp=3, group=self.fold**2)
        lm, image = core.language_model, config.image_token_id
        super().__init__(
            model, geometry=geometry, projector=core.multi_modal_projector, lm=lm, image_token=image, vision=vision
        )

    def tower_blocks(self) -> list[nn.Module]:
        return list(self.tower.transformer.layers)[: self.geometry.seen_layers]

    def packed(self) -> PackedTower:
        blocks = self.tower_blocks()
        known(blocks, "PixtralAttentionLayer")
        return PackedTower(
            root=self.tower,
            blocks=blocks,
            pack=self.pack,
            capture=hf_vit.capture,
            project=_project,
            fold=self.fold,
            attend=_attend,
            feed=_feed,
            sample=_sample,
        )

    def tower_engine(self, cuts: list[PlannedCut], ledger: UndoLedger, *, seed: int, done: Any) -> PackedEngine:
        return packed_engine(self.packed(), cuts, ledger, seed=seed, done=done)

    def pack(self, inputs: dict[str, Any]) -> Packing | None:
        """All patches of an image, row by row, without what only fills its pixels up."""
        pixels, sizes, side = inputs.get("pixel_values"), inputs.get("image_sizes"), self.tower.patch_size
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            return None
        shapes = [tuple(pixels.shape[2:])] * len(pixels) if sizes is None else torch.as_tensor(sizes).tolist()
        return Packing([in_order(h // side, w // side, self.fold) for h, w in shapes], pixels.device)

    def images(self, inputs: dict[str, Any]) -> Iterator[list[Raster]]:
        if inputs.get("image_sizes") is None:
            raise VtpruneError("images of any size need image_sizes; pass what the processor returns")
        for height, width in torch.as_tensor(inputs["image_sizes"]).tolist():
            yield [Raster((height // self.cell, width // self.cell))]

    def slice_(self, inputs: dict[str, Any], samples: list[list[RasterSpan]], b: int) -> dict[str, Any]:
        at = sum(len(sample) for sample in samples[:b])
        return {k: inputs[k][at : at + len(samples[b])] for k in ("pixel_values", "image_sizes")} if samples[b] else {}


def _project(block: Any, caught: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    a, (cos, sin) = block.attention, caught["rope"]
    q, k, v = (caught[n].unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for n in "qkv")  # [1, H, S, d] each
    q, k = (rotate(t, cos, sin, prefix=0, half=True) for t in (q, k))
    return *(t[0].transpose(0, 1) for t in (q, k, v)), a.scaling


def _attend(block: Any, x: Tensor, caught: dict[str, Any], mix: Callable) -> Tensor:
    z = block.attention_norm(x[None])
    caught.update({name: m(z) for name, m in hf_vit.capture(block).items()})
    return x + block.attention.o_proj(mix(*_project(block, caught)).flatten(1))


def _feed(block: Any, x: Tensor) -> Tensor:
    return x + block.feed_forward(block.ffn_norm(x))


def _sample(block: Any) -> tuple[Tensor, dict[str, Any]]:
    rows, width = 12, block.attention.head_dim
    noise = noise_for(block, 1, rows, block.attention_norm.weight.numel())
    angle = torch.linspace(0, 3, rows * (width // 2), device=noise.device).view(rows, -1).tile(2)
    return noise, {"attention_mask": None, "position_embeddings": (angle.cos().to(noise), angle.sin().to(noise))}


def _tiny(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Random; images of 4 x 3, 2 x 4 and 3 x 3 visual tokens with a break behind each row: one prompt with two images,
    one with a single one, left-padded."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
    )

    patch = 8 if kind == "pixtral" else 4
    common: dict[str, Any] = {
        "vision_config": PixtralVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            head_dim=16,
            image_size=32,
            patch_size=patch,
        ),
        "text_config": MistralConfig(**tiny_text(sliding_window=12 if kind == "sliding" else None)),
        "image_token_index": 3,
        "vision_feature_layer": -1,
    }
    grids: Any = [[(4, 3), (2, 4)], [(3, 3)]]
    prompts = tiny_prompts([[(3, columns) for rows, columns in sample for _ in range(rows)] for sample in grids])
    sizes = torch.tensor([(8 * rows, 8 * columns) for sample in grids for rows, columns in sample])
    pixels = torch.zeros(len(sizes), 3, 32, 32)
    generator = torch.Generator().manual_seed(3)
    for image, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    if kind == "pixtral":
        model = tiny_build(LlavaForConditionalGeneration, LlavaConfig(**common, vision_feature_select_strategy="full"))
    else:
        model = tiny_build(Mistral3ForConditionalGeneration, Mistral3Config(**common, spatial_merge_size=2))
    return model, {**prompts, "pixel_values": pixels, "image_sizes": sizes}


ADAPTERS.register(
    "mistral3",
    AdapterInfo(
        name="mistral3",
        idea=(
            "Mistral Small 3.1+ and Pixtral 12B on transformers (images of any size; in the tower, behind the "
            "projector, language model)"
        ),
        matches=matches,
        bind=Mistral3,
        tiny={k: partial(_tiny, k) for k in ("sliding", "pixtral")},
    ),
)
