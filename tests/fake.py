"""A processor without files for the tiny LLaVA (16 visual tokens on a 4 x 4 grid), and generated pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vtprune.models.base import ADAPTERS

IMAGE, PAD, START, WORDS = 3, 0, 1, 60


class ImagePart:
    image_mean, image_std = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]

    def __call__(self, images, return_tensors):
        pixels = [(np.asarray(i.convert("RGB").resize((32, 32)), np.float32) / 255 - 0.5) / 0.5 for i in images]
        stacked = np.stack(pixels).transpose(0, 3, 1, 2)
        return {"pixel_values": torch.from_numpy(stacked) if return_tensors == "pt" else stacked}


class FakeProcessor:
    """One word, one token; pads on the left."""

    chat_template, video_processor = "yes", None

    def __init__(self):
        self.image_processor = ImagePart()

    def apply_chat_template(self, messages, add_generation_prompt):
        assert add_generation_prompt
        return messages[0]["content"][1]["text"]

    def __call__(self, images, text, padding, padding_side, return_tensors, add_special_tokens):
        assert padding and padding_side == "left" and add_special_tokens
        rows = [[START, *[IMAGE] * 16, *(4 + sum(map(ord, w)) % WORDS for w in t.split())] for t in text]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(r)) + r for r in rows])
        return BatchFeature(
            {"input_ids": ids, "attention_mask": (ids != PAD).long(), **self.image_processor(images, "pt")}
        )

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(f"w{i}" for i in row if i > IMAGE) + " " for row in ids.tolist()]


def tiny():
    """``(model, processor)``."""
    return ADAPTERS.get("llava").tiny["clip-llama"]()[0], FakeProcessor()


def picture(seed: int = 0, side: int = 40) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (side, side, 3), dtype=np.uint8))
