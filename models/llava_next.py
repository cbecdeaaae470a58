"""Hugging Face LLaVA-NeXT (1.6): ``LlavaNextForConditionalGeneration``, tiles of any resolution behind a small version
of the image, new-line tokens.

An image is two rasters, the small version and the unpadded tiles with a new-line token at the end of each row; both are
visual tokens. Budgets are per image, per raster (``per="tile"``) or per sample; stages inside the tower see single
tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.types import Recent
from .base import ADAPTERS, AdapterInfo, named
from .engine.layout import Raster, RasterSpan, per_sample
from .llava import Llava
from .parts.tiny import tiny_build, tiny_prompts, tiny_text


class LlavaNext(Llava):
    """One bound LLaVA-NeXT."""

    family = "llava-next"
    per: tuple[str, ...] = ("image", "tile", "sample")

    def __init__(self, model: Any):
        super().__init__(model)
        self.known: Recent[tuple[int, int, bool], Tensor] = Recent(256)
        self.geometry = replace(self.geometry, unmade=self._unmade())

    def _unmade(self) -> tuple[tuple[float, float], ...]:
        """Of the shapes that images are cut into, the share of new-line tokens, one behind each row, and the patches in
        a row."""
        rows, columns = self.geometry.grid
        side, out = self.model.config.vision_config.image_size, []
        for height, width in self.model.config.image_grid_pinpoints:
            lines, patches = rows * (height // side), columns * (width // side)
            out.append((lines / (rows * columns + lines * (1 + patches)), float(patches)))
        return tuple(out)

    def pack(self, features: Tensor, size: Tensor) -> Tensor:
        """The model's own packing of one image's ``features`` ``[tiles, N, 1]``, with -1 for new-line tokens: ``[n,
        1]``."""
        newline = torch.full((1,), -1.0, dtype=features.dtype)
        packed, _ = self.model.model.pack_image_features(
            [features], [size], vision_feature_select_strategy="full", image_newline=newline
        )
        return packed[0]

    def tiles(self, inputs: dict[str, Any]) -> list[tuple[Tensor, bool]]:
        """Size and whether it is cut into tiles, per image of the batch."""
        return [(size, True) for size in inputs.get("image_sizes", ())]

    def packed(self, size: Tensor, tiled: bool) -> Tensor:
        """For each visual token of an image of ``size`` (height, width) the tower's token that it is, counted over its
        tiles (-1: new line): ``[n]``."""
        key = (int(size[0]), int(size[1]), tiled)
        if key not in self.known:
            count, n = 1 + self.cuts(size, tiled), self.geometry.tokens
            self.known[key] = self.pack(torch.arange(count * n, dtype=torch.float64).view(count, n, 1), size)[:, 0]
        return self.known[key]

    def cuts(self, size: Tensor, tiled: bool) -> int:
        """Into how many tiles an image of ``size`` (height, width) is cut."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        return (
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) - 1
            if tiled
            else 0
        )

    def images(self, inputs: dict[str, Any]) -> Iterator[list[Raster]]:
        n = self.geometry.tokens
        for size, tiled in self.tiles(inputs):
            rest, count = self.packed(size, tiled)[n:], self.cuts(size, tiled)
            rows = int((rest == -1).sum())
            if rows:
                yield [Raster(self.geometry.grid), Raster((rows, len(rest) // rows), (n,) * count)]
            else:  # so long and thin that the padding took all rows of the tiles; the tower has read them nevertheless
                yield [Raster(self.geometry.grid, (n,) * (1 + count))]

    def sources(self, inputs: dict[str, Any], samples: list[list[RasterSpan]]) -> list[Tensor]:
        known, n, out = (
            [self.packed(size, tiled) for size, tiled in self.tiles(self.noted(inputs))],
            self.geometry.tokens,
            [],
        )
        images = sum(per_sample(samples))
        # Beam search repeats every prompt, but not the sizes of its images.
        copies = images // len(known) if known and images % len(known) == 0 else 1
        maps = iter(known)
        for sample in samples[::copies]:
            start, rows = 0, []
            for image in sorted({p.image for p in sample}):
                origin = next(maps).long()
                rows.append(torch.where(origin >= 0, origin + start, -1))
                start += n * sum(len(p.passes) for p in sample if p.image == image)
            out.append(torch.cat(rows) if rows else torch.empty(0, dtype=torch.long))
        return [rows for rows in out for _ in range(copies)]

    def slice_(self, inputs: dict[str, Any], samples: list[list[RasterSpan]], b: int) -> dict[str, Any]:
        counts = per_sample(samples)
        rows = slice(sum(counts[:b]), sum(counts[: b + 1]))
        return {name: inputs[name][rows] for name in ("pixel_values", "image_sizes")} if counts[b] else {}


def _tiny(tower: str, text: str) -> tuple[nn.Module, dict[str, Any]]:
    """Random; tiles of 16 tokens, images of three sizes in two left-padded prompts."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        MistralConfig,
        SiglipVisionConfig,
    )

    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "image_size": 32,
        "patch_size": 8,
        "intermediate_size": 64,
    }
    vision: Any = CLIPVisionConfig(**sizes) if tower == "clip" else SiglipVisionConfig(**sizes, vision_use_head=False)
    words: Any = LlamaConfig(**tiny_text()) if text == "llama" else MistralConfig(**tiny_text(sliding_window=24))
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=words,
        image_token_index=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    model = tiny_build(LlavaNextForConditionalGeneration, config)
    image_sizes = torch.tensor([[40, 64], [64, 20], [60, 60]])
    bound = LlavaNext(model)
    counts = [len(bound.packed(size, True)) for size in image_sizes]
    # the processor pads images of fewer tiles
    pixels = torch.randn(3, 5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    prompts = tiny_prompts([[(3, counts[0]), (3, counts[1])], [(3, counts[2])]])
    return model, {**prompts, "pixel_values": pixels, "image_sizes": image_sizes}


ADAPTERS.register(
    "llava-next",
    AdapterInfo(
        name="llava-next",
        idea=(
            "LLaVA-NeXT (1.6) on transformers: tiles of any resolution, new-line tokens; tower, projector and language "
            "model"
        ),
        matches=lambda m: named(m, "LlavaNextForConditionalGeneration") is not None,
        bind=LlavaNext,
        tiny={
            "clip-llama": partial(_tiny, "clip", "llama"),
            "siglip-mistral-window": partial(_tiny, "siglip", "mistral"),
        },
    ),
)
