"""Language models without images: the prompt itself is pruned. A stack of layers of transformers' usual shape (Llama,
Mistral, Qwen, Gemma, Phi and what is built alike), under any ``...ForCausalLM``.

What may go is the prompt's tokens (:mod:`.engine.whole`), answers never. Decoders that are not known here are probed
at ``attach``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.types import UnsupportedError
from .base import ADAPTERS, AdapterInfo
from .engine.description import LLM, Decoder
from .engine.layout import RasterSpan
from .engine.toy import toy_prompt
from .engine.whole import OfPrompts
from .parts.hindrance import placeholder, stack_of
from .parts.mllm import NO_TOWER, Mllm, untowered
from .parts.tiny import tiny_build, tiny_text


def matches(model: nn.Module) -> bool:
    """A transformers language model that generates and has no token that stands for an image."""
    return (
        hasattr(model, "generate")
        and hasattr(model, "base_model")
        and any(c.__name__.endswith("ForCausalLM") for c in type(model).__mro__)
        and placeholder(model, "image") is None
    )


class CausalLm(OfPrompts, Mllm):
    """One bound language model."""

    ranks = False

    def __init__(self, model: Any):
        lm, images = stack_of(model), "this model reads no images"
        geometry = untowered(
            "causal-lm",
            model,
            lm,
            provides={"llm": LLM},
            refuses=dict.fromkeys(("pixels", "vision", "projector"), images),
            traits=frozenset({"prompt"}),
            per=("sample", "prompt"),
        )
        super().__init__(model, geometry=geometry, projector=nn.Identity(), lm=lm, image_token=-1, vision=NO_TOWER)
        self.unspoken = ()

    def probe(self) -> None:
        """As of any unknown language model; and it must read tokens as it reads their embeddings."""
        super().probe()
        with toy_prompt(self.describe(), "embeddings") as toy:
            if toy is not None:
                embedded = self.lm(inputs_embeds=self.lm.embed_tokens(toy.ids)).last_hidden_state
                if not torch.equal(self.lm(input_ids=toy.ids).last_hidden_state, embedded):
                    raise UnsupportedError(f"{toy.name} reads tokens otherwise than their embeddings")

    def slice_(self, inputs: dict[str, Any], samples: list[list[RasterSpan]], b: int) -> dict[str, Any]:
        return {}

    def describe(self) -> Decoder:
        return replace(super().describe(), core=None)


def _tiny(config: str, model: str, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A random model of these classes of transformers, and two left-padded prompts."""
    import transformers

    ids = torch.randint(8, 64, (2, 36), generator=torch.Generator().manual_seed(2))
    ids[1, :11] = 0
    made = tiny_build(getattr(transformers, model), getattr(transformers, config)(**tiny_text(**more)))
    return made, {"input_ids": ids, "attention_mask": (ids != 0).long()}


ADAPTERS.register(
    "causal-lm",
    AdapterInfo(
        name="causal-lm",
        priority=-2,
        idea="language models without images: the tokens of a long prompt, in the language model",
        matches=matches,
        bind=CausalLm,
        tiny={
            "llama": lambda: _tiny("LlamaConfig", "LlamaForCausalLM"),
            "qwen3": lambda: _tiny("Qwen3Config", "Qwen3ForCausalLM", head_dim=12),
            "gemma3": lambda: _tiny("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=12, sliding_window=12),
            "phi3": lambda: _tiny("Phi3Config", "Phi3ForCausalLM"),
        },
    ),
)
