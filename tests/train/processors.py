"""Processors without files for the tiny models of several families, and a tokenizer of 64 words."""

from __future__ import annotations

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SIDE = {"height": 32, "width": 32}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }} {% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} {% else %}IMAGE {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}assistant"
)
MARKS = ["<pad>", "<s>", "</s>", "<image>", "<video>", "<open>", "<close>"]


def tokenizer(template: bool = True, image: str = "<image>"):
    words = [*MARKS, "<unk>", "user", "what", *(f"w{i}" for i in range(10, 60)), "is", "it", "assistant", "tile"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not template:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    out = hf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=MARKS[3:],
    )
    out.chat_template = TEMPLATE if template else None
    out.image_token, out.video_token = "<image>", "<video>"
    out.image_token_id, out.video_token_id = 3, 4
    out.start_image_token, out.end_image_token, out.context_image_token = "<open>", "<close>", "<image>"
    out.start_image_token_id, out.end_image_token_id, out.context_image_token_id = 5, 6, 3
    return out


def processor_for(family: str):
    """Of the family's first tiny model."""
    words = tokenizer()
    place = {"llava-next": "<image>", "internvl": "<image>"}.get(family, "<open> <image> <close>")
    template = TEMPLATE.replace("IMAGE", place)
    if family.startswith("qwen2"):
        sizes = {"patch_size": 4, "min_pixels": 8 * 8 * 4, "max_pixels": 48 * 48}
        images, videos = hf.Qwen2VLImageProcessor(**sizes), hf.Qwen2VLVideoProcessor(**sizes)
        kind = hf.Qwen2VLProcessor if family == "qwen2-vl" else hf.Qwen2_5_VLProcessor
        return kind(images, words, videos, chat_template=template)
    if family == "llava-next":
        images = hf.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=SIDE, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]
        )
        more = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return hf.LlavaNextProcessor(images, words, chat_template=template, image_token="<image>", **more)
    assert family == "internvl"
    images = hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=2)
    videos = hf.InternVLVideoProcessor(size=SIDE)
    return hf.InternVLProcessor(images, words, videos, image_seq_length=16, chat_template=template)
