"""Folders as the hub would give them: the tiny random model of a family and a processor for it, as transformers saves
and loads them. Every word of the prompts is one token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import moulds

SIDE = {"height": 32, "width": 32}
NAMED = {  # of the tokenizers: what processors look up -> the word
    "image_token": "<image>",
    "video_token": "<video>",
    "context_image_token": "<image>",
    "start_image_token": "<open>",
    "end_image_token": "<close>",
    "boi_token": "<begin>",
    "eoi_token": "<end>",
    "vision_start_token": "<open>",
    "vision_end_token": "<close>",
}
# The places of the marks follow the tiny models' configurations: 3 an image, 4 a video, 5 and 6 around them.
QWEN = ["<image>", "<video>", "<open>", "<close>"]
MARKS = {
    "gemma3": ["<image>", "<begin>", "<end>"],
    "smolvlm": ["<image>", "<video>", "<fake_token_around_image>", "<global-img>"],
    "mistral3": ["<image>", "<break>", "<end>"],
    "glm4v": [*QWEN, "<|begin_of_video|>", "<|end_of_video|>"],
}
WORDS = "user assistant what is it in this picture there ? . : how many".split()
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }} {% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} {% else %}PLACE {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
PLACED = "{% if c['type'] == 'video' %}OPEN<video>CLOSE{% else %}OPEN<image>CLOSE{% endif %}"


def tokenizer(family: str) -> Any:
    """Of 64 words; what is none of them is ``<unk>``."""
    marks = MARKS.get(family, QWEN)
    known = ["<pad>", "<s>", "</s>", *marks, "<unk>", *WORDS]
    known += [f"w{i}" for i in range(len(known), 64)]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = hf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=marks,
        extra_special_tokens={name: word for name, word in NAMED.items() if word in marks},
    )
    if family != "paligemma":
        wrapped = family.startswith("qwen") or family == "glm4v"
        place = PLACED.replace("OPEN", "<open>" * wrapped).replace("CLOSE", "<close>" * wrapped)
        out.chat_template = TEMPLATE.replace("PLACE", "<begin>" if family == "gemma3" else place)
    return out


def processor(family: str) -> Any:
    """Of the family's first tiny model."""
    words = tokenizer(family)
    more = {"chat_template": words.chat_template}
    sizes = {"patch_size": 4, "min_pixels": 16 * 16, "max_pixels": 48 * 48}
    patches = {"patch_size": 8, "num_additional_image_tokens": 1, "image_token": "<image>"}
    tiles = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
    match family:
        case "llava" | "generic":
            images: Any = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIDE)
            return hf.LlavaProcessor(images, words, vision_feature_select_strategy="default", **patches, **more)
        case "llava-next":
            images = hf.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=SIDE, **tiles)
            return hf.LlavaNextProcessor(images, words, vision_feature_select_strategy="default", **patches, **more)
        case "llava-onevision":
            images = hf.LlavaOnevisionImageProcessor(size=SIDE, **tiles)
            films: Any = hf.LlavaOnevisionVideoProcessor(size=SIDE)
            kept = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
            return hf.LlavaOnevisionProcessor(images, words, films, image_token="<image>", **kept, **more)
        case "qwen2-vl" | "qwen2.5-vl":
            images, films = hf.Qwen2VLImageProcessor(**sizes), hf.Qwen2VLVideoProcessor(**sizes)
            kind = hf.Qwen2VLProcessor if family == "qwen2-vl" else hf.Qwen2_5_VLProcessor
            return kind(images, words, films, **more)
        case "qwen3-vl" | "qwen3-vl-moe":
            images, films = hf.Qwen2VLImageProcessor(**sizes), hf.Qwen3VLVideoProcessor(**sizes)
            return hf.Qwen3VLProcessor(images, words, films, **more)
        case "glm4v":
            edges = {"size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48 * 2}, "patch_size": 4}
            images, films = hf.Glm4vImageProcessor(**edges), hf.Glm4vVideoProcessor(**edges)
            return hf.Glm4vProcessor(images, words, films, **more)
        case "internvl":
            images = hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=4)
            films = hf.InternVLVideoProcessor(size=SIDE)
            return hf.InternVLProcessor(images, words, films, image_seq_length=16, **more)
        case "smolvlm":
            edges = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
            images = hf.SmolVLMImageProcessor(do_image_splitting=True, **edges)
            films = hf.SmolVLMVideoProcessor(**edges)
            return hf.SmolVLMProcessor(images, words, films, image_seq_len=16, **more)
        case "gemma3":
            images = hf.Gemma3ImageProcessor(size=SIDE)
            return hf.Gemma3Processor(images, words, image_seq_length=16, **more)
        case "paligemma":
            images = hf.SiglipImageProcessor(size=SIDE)
            images.image_seq_length = 16
            return hf.PaliGemmaProcessor(images, words)
        case "mistral3":
            images = hf.PixtralImageProcessor(size={"longest_edge": 48}, patch_size=4)
            named = {"image_token": "<image>", "image_break_token": "<break>", "image_end_token": "<end>"}
            return hf.PixtralProcessor(images, words, patch_size=4, spatial_merge_size=2, **named, **more)
        case "causal-lm":
            return words
        case "hf-vit":
            return hf.ViTImageProcessor(size=SIDE)
    raise ValueError(f"{family} is not saved by transformers")


VARIANTS = {
    "llava": "clip-llama",
    "llava-next": "clip-llama",
    "llava-onevision": "images",
    "glm4v": "dense",
    "internvl": "qwen2",
    "smolvlm": "smolvlm",
    "gemma3": "sliding",
    "paligemma": "gemma",
    "mistral3": "sliding",
    "generic": "vipllava",
    "causal-lm": "llama",
    "hf-vit": "vit-classifier",
}


def save(family: str, folder: Path) -> Path:
    """The model and its processor, in ``folder``."""
    model, _ = moulds.tiny(family, VARIANTS.get(family, "images"))
    model.save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder
