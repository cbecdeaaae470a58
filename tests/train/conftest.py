"""A model on disk for the command."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random LLaVA of the bundled model's geometry and tokenizer, on disk."""
    pytest.importorskip("easy_vqa")
    from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vtprune.train.demo_model import TOKENS, processor_and_tokenizer

    processor = processor_and_tokenizer()
    tokenizer = processor.tokenizer
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=Dinov2Config(**sizes, image_size=168, patch_size=14),
        text_config=LlamaConfig(
            **{**sizes, "num_hidden_layers": 4}, vocab_size=len(tokenizer), intermediate_size=32, initializer_range=0.2
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
    )
    path = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model_folder(folder):
    return folder
