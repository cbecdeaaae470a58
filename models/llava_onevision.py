"""Hugging Face LLaVA-OneVision: ``LlavaOnevisionForConditionalGeneration``, SigLIP tower, Qwen2 text; one image in
tiles, several images whole, video frames.

Large images and video frames are interpolated behind the projector, so stages inside the tower are for images that are
not; others are refused. Notes taken in the tower are interpolated with a video's frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.types import UnsupportedError
from .base import ADAPTERS, AdapterInfo, named
from .engine.layout import Blend, Raster, RasterSpan, per_sample
from .llava_next import LlavaNext
from .parts.tiny import tiny_build, tiny_prompts, tiny_text


class LlavaOnevision(LlavaNext):
    """One bound LLaVA-OneVision."""

    family = "llava-onevision"
    per: tuple[str, ...] = ("image", "tile", "video", "sample")

    def pack(self, features: Tensor, size: Tensor) -> Tensor:
        newline = torch.full((1,), -1.0, dtype=features.dtype)
        ratio = self.model.config.vision_aspect_ratio
        packed, _ = self.model.model.pack_image_features(
            [features], [size], image_newline=newline, vision_aspect_ratio=ratio
        )
        return packed[0]

    def tiles(self, inputs: dict[str, Any]) -> list[tuple[Tensor, bool]]:
        """An image that shares its sample with others stays whole."""
        sizes, counts = inputs.get("image_sizes"), inputs.get("batch_num_images")
        if sizes is None:
            return []
        alone = [True] * len(sizes) if counts is None else [int(n) == 1 for n in counts for _ in range(int(n))]
        return list(zip(sizes, alone, strict=True))

    def videos(self, inputs: dict[str, Any]) -> Iterator[list[Raster]]:
        """Frames at half the resolution and one new-line token."""
        pixels, n = inputs.get("pixel_values_videos"), self.geometry.tokens
        half = (-(-self.geometry.grid[0] // 2), -(-self.geometry.grid[1] // 2))
        for frames in () if pixels is None else pixels:
            yield [Raster(half, (n,))] * len(frames) + [Raster((1, 1), (), joins=True)]

    def sources(self, inputs: dict[str, Any], samples: list[list[RasterSpan]]) -> list[Tensor]:
        maps = [self.packed(size, tiled) for size, tiled in self.tiles(self.noted(inputs))]
        if any(bool((m != m.round()).any()) for m in maps):
            raise UnsupportedError(
                "LLaVA-OneVision interpolates large images behind the projector, where no token is one of the tower's "
                "any more: what a stage drops, merges or notes in the tower has no place there; use one that works at "
                "the projector or in the language model alone, or an image that fits its tiles"
            )
        still = [[p for p in sample if p.video < 0] for sample in samples]
        images = super().sources(inputs, still)
        return [self._with_videos(sample, made) for sample, made in zip(samples, images, strict=True)]

    def _with_videos(self, sample: list[RasterSpan], images: Tensor) -> Tensor:
        """Per visual token of a ``sample`` the tower's token it was made of, that of the largest weight in a video's
        frame; ``images``: those of its images alone, counted over them."""
        rows, start, at, shift = [], 0, 0, 0
        for part in sample:
            n = len(part.columns)
            if part.video < 0:
                mine = images[at : at + n]
                rows.append(torch.where(mine >= 0, mine + shift, -1))
                at += n
            elif part.passes:
                tokens, weight = self.pooled
                rows.append(tokens.gather(1, weight.argmax(1, keepdim=True))[:, 0] + start)
                shift += sum(part.passes)
            else:
                rows.append(torch.full((n,), -1))
            start += sum(part.passes)
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)

    @cached_property
    def pooled(self) -> Blend:
        """Of which of a frame's tokens each of those behind the pooling is a weighted mean, and the weights, ``[n, m]``
        each: what the model's own pooling makes of each token alone."""
        n = self.geometry.tokens
        one = torch.eye(n, dtype=torch.float64)[None]  # [1, tokens, channels]: a channel for each
        table = self.model.model.apply_pooling(one)[0]  # [pooled, tokens]
        most = int((table != 0).sum(1).max())
        weight, tokens = table.topk(most, dim=1)
        return tokens, weight

    def blends(self, sources: list[Tensor], samples: list[list[RasterSpan]]) -> list[Blend | None]:
        return [self._blend(sample, made) for sample, made in zip(samples, sources, strict=True)]

    def _blend(self, sample: list[RasterSpan], sources: Tensor) -> Blend | None:
        if not any(p.video >= 0 for p in sample):
            return None
        own, weights = self.pooled
        tokens, weight = sources[:, None].repeat(1, own.shape[1]), torch.zeros(len(sources), own.shape[1]).double()
        weight[:, 0] = 1
        at = start = 0
        for part in sample:
            here, at = slice(at, at + len(part.columns)), at + len(part.columns)
            if part.video >= 0 and part.passes:
                tokens[here], weight[here] = own + start, weights
            start += sum(part.passes)
        return tokens, weight

    def slice_(self, inputs: dict[str, Any], samples: list[list[RasterSpan]], b: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        images, videos = per_sample(samples), per_sample(samples, videos=True)
        if images[b]:
            rows = slice(sum(images[:b]), sum(images[: b + 1]))
            out |= {name: inputs[name][rows] for name in ("pixel_values", "image_sizes")}
            if inputs.get("batch_num_images") is not None:
                having = [i for i, n in enumerate(images) if n]
                out["batch_num_images"] = inputs["batch_num_images"][having.index(b) : having.index(b) + 1]
        if videos[b]:
            out["pixel_values_videos"] = inputs["pixel_values_videos"][sum(videos[:b]) : sum(videos[: b + 1])]
        return out


def _tiny(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Random; tiles of 16 tokens in two left-padded prompts: two whole images beside one in tiles, one that is
    interpolated, or a video beside an image."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "image_size": 32,
        "patch_size": 8,
        "intermediate_size": 64,
    }
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=Qwen2Config(**tiny_text()),
        image_token_id=3,
        video_token_id=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2" if kind == "interpolated" else "anyres_max_9",
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    model = tiny_build(LlavaOnevisionForConditionalGeneration, config)
    bound, generator = LlavaOnevision(model), torch.Generator().manual_seed(3)
    if kind == "video":
        video = torch.randn(1, 3, 3, 32, 32, generator=generator)
        size = torch.tensor([[60, 40]])
        inputs: dict[str, Any] = tiny_prompts([[(4, 3 * 4 + 1)], [(3, len(bound.packed(size[0], True)))]])
        return model, {
            **inputs,
            "pixel_values": torch.randn(1, 5, 3, 32, 32, generator=generator),
            "image_sizes": size,
            "pixel_values_videos": video,
        }
    sizes = torch.tensor([[40, 64], [64, 20], [60, 60]])
    counts = torch.tensor([2, 1])
    n = [
        len(bound.packed(size, tiled))
        for size, tiled in bound.tiles({"image_sizes": sizes, "batch_num_images": counts})
    ]
    pixels = torch.randn(3, 5, 3, 32, 32, generator=generator)  # the processor pads images of fewer tiles
    prompts = tiny_prompts([[(3, n[0]), (3, n[1])], [(3, n[2])]])
    return model, {**prompts, "pixel_values": pixels, "image_sizes": sizes, "batch_num_images": counts}


ADAPTERS.register(
    "llava-onevision",
    AdapterInfo(
        name="llava-onevision",
        idea=(
            "LLaVA-OneVision on transformers: one image in tiles, several images, video frames; SigLIP tower, Qwen2 "
            "text"
        ),
        matches=lambda m: named(m, "LlavaOnevisionForConditionalGeneration") is not None,
        bind=LlavaOnevision,
        tiny={k: partial(_tiny, k) for k in ("images", "video", "interpolated")},
    ),
)
