"""A processor without files for the tiny LLaVA (16 visual tokens on a 4 x 4 grid), and generated pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

import moulds

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
    return moulds.tiny("llava", "clip-llama")[0], FakeProcessor()


def picture(seed: int = 0, side: int = 40) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (side, side, 3), dtype=np.uint8))


def video_model():
    """The tiny LLaVA-OneVision and a processor for it: one word, one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        PreTrainedTokenizerFast,
    )

    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<image>",
        "<video>",
        "<unk>",
        "user",
        "what",
        "is",
        "it",
        *(f"w{i}" for i in range(10, 64)),
    ]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<image>", "<video>"],
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
    template = (
        "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
        "{% if c['type'] == 'text' %}{{ c['text'] }} {% else %}<{{ c['type'] }}> {% endif %}{% endfor %}{% endfor %}"
    )
    side = {"height": 32, "width": 32}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=side, crop_size=side, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=side, crop_size=side, do_center_crop=False),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    return moulds.tiny("llava-onevision", "video")[0], processor


def film(path: Path, shade: int, frames: int = 9) -> str:
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = np.full((64, 64, 3), (shade + 20 * i) % 255, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return str(path)
