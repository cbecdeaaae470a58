"""Random Qwen-VL and LLaVA-OneVision models in folders, of sizes that vLLM's attention takes."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = (
    "what color is the circle square triangle red blue green a yes no left right of how "
    "many are there ? user assistant : one two"
).split()
MARKS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
]
QWEN = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|> {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant : {% endif %}"
)
ONEVISION = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %} {{ c['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %} assistant : {% endif %}"
)
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": len(WORDS) + len(MARKS) + 1,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


def ids() -> dict[str, int]:
    return {word: number for number, word in enumerate(["[UNK]", *MARKS, *WORDS])}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel(ids(), unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", eos_token=MARKS[0], pad_token=MARKS[0])
    out.add_special_tokens({"additional_special_tokens": MARKS[1:]})
    return out


def _qwen(kind: str):
    import transformers as hf

    known, rope = ids(), {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    marks = {
        "image_token_id": known["<|image_pad|>"],
        "video_token_id": known["<|video_pad|>"],
        "vision_start_token_id": known["<|vision_start|>"],
        "vision_end_token_id": known["<|vision_end|>"],
    }
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": 128,
        "intermediate_size": 96,
    }
    if kind == "qwen2.5-vl":
        config = hf.Qwen2_5_VLConfig(
            vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
            text_config={**TEXT, "rope_parameters": rope},
            **marks,
        )
        return hf.Qwen2_5_VLForConditionalGeneration(config)
    text = {**TEXT, "head_dim": 32, "rope_parameters": {**rope, "mrope_interleaved": True}}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "patch_size": 16}
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **marks)
    )


def _processor(kind: str):
    import transformers as hf

    sizes = {"min_pixels": 56 * 56, "max_pixels": 280 * 280}
    if kind == "qwen2.5-vl":
        images, videos = hf.Qwen2VLImageProcessor(patch_size=14, **sizes), hf.Qwen2VLVideoProcessor(patch_size=14)
        return hf.Qwen2_5_VLProcessor(images, tokenizer(), videos, chat_template=QWEN)
    images, videos = hf.Qwen2VLImageProcessor(patch_size=16, **sizes), hf.Qwen3VLVideoProcessor(patch_size=16)
    return hf.Qwen3VLProcessor(images, tokenizer(), videos, chat_template=QWEN)


def _onevision():
    import transformers as hf

    known = ids()
    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "model_type": "siglip_vision_model",
    }
    text = {**TEXT, "model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = hf.LlavaOnevisionConfig(
        vision_config={**vision, "vision_use_head": False},
        text_config=text,
        image_token_index=known["<image>"],
        video_token_index=known["<|video_pad|>"],
        image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112]],
        tie_word_embeddings=False,
    )
    images = hf.LlavaOnevisionImageProcessor(
        size={"height": 56, "width": 56}, image_grid_pinpoints=config.image_grid_pinpoints
    )
    processor = hf.LlavaOnevisionProcessor(
        images,
        tokenizer(),
        hf.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION,
        image_token="<image>",
        video_token="<|video_pad|>",
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def save(kind: str, folder: Path) -> None:
    """A model of one of these kinds, with its processor."""
    torch.manual_seed(0)
    model, processor = _onevision() if kind == "llava-onevision" else (_qwen(kind), _processor(kind))
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
