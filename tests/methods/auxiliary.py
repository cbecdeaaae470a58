"""Tiny random CLIP models and tokenizers in folders, for methods that read something beside the model."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerFast

LENGTH = 12  # of a segment, with the tokens that begin and end it


def clip_folder(path: Path, width: int = 32, seed: int = 0) -> Path:
    """A whole CLIP model whose tower is ``width`` wide, and a tokenizer that spells."""
    letters = [*string.ascii_lowercase, *string.digits, "<", ">", "_"]
    vocabulary = {token: i for i, token in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(path)
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40}
    config = CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": len(vocabulary),
            "hidden_size": 24,
            "max_position_embeddings": LENGTH,
            "bos_token_id": len(vocabulary) - 2,
            "eos_token_id": len(vocabulary) - 1,
        },
        vision_config={**sizes, "hidden_size": width, "image_size": 48, "patch_size": 8},
        projection_dim=20,
    )
    model = CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    model.save_pretrained(path)
    return path


def words_folder(path: Path, size: int = 64) -> Path:
    """A tokenizer of ``size`` words, the first three of which are special."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *(f"w{i}" for i in range(3, size))])}
    spelled = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    spelled.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=spelled, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    fast.save_pretrained(path)
    return path
