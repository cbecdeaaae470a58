"""The same questions to an attached model and to a vLLM engine with the plug-in: do they answer the same?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...check.attach import attach
from ...core.recipe import Recipe
from ...core.types import VtpruneError
from ...inputs.chats import PROCESSING, about, prepare_chats, prompt_ids
from ..encode import Encoder
from .launch import environment
from .settings import KEEP

TIE = 1e-3  # of the reference's two best log-probabilities, closer than this rounding may exchange them


@dataclass(frozen=True)
class Answer:
    """One question, asked twice.

    Attributes:
        wanted, got: the tokens of the attached model and of the engine.
        prompt: tokens that the engine read.
        margin: how far apart the reference's two best log-probabilities are where the answers part; ``None``: they do
            not.
        difference: the largest one of a chosen token's log-probability, up to there.
    """

    wanted: tuple[int, ...]
    got: tuple[int, ...]
    prompt: int
    margin: float | None
    difference: float

    @property
    def same(self) -> bool:
        return self.margin is None

    @property
    def tie(self) -> bool:
        return self.margin is not None and self.margin < TIE


def compare(
    model: Any,
    processor: Any,
    folder: str | Path,
    recipe: Recipe,
    images: Sequence[Sequence[Any]],
    questions: Sequence[str],
    *,
    new_tokens: int = 8,
    encoded: bool = False,
    positions: str = "original",
    **engine: Any,
) -> list[Answer]:
    """Asks ``questions`` about their ``images``, greedily.

    Args:
        model, processor: of ``folder``, for the attached model's answers.
        folder: where the engine loads it from.
        recipe: one that ends before the language model.
        encoded: the engine is given images that :func:`vtprune.encode` has encoded.
        positions: of both, as for :func:`attach`; compact ones have to be encoded.
        **engine: keywords of ``vllm.LLM``.

    Raises:
        VtpruneError: no vLLM here, or it refuses the recipe.
    """
    asked = about(images, questions)
    if positions != "original" and not encoded:
        raise VtpruneError("the engine keeps original positions; compact ones have to be encoded (encoded=True)")
    with attach(model, recipe, positions=positions):
        wanted = [_reference(model, processor, chat, new_tokens) for chat in asked]
    given: list[Any] = [list(shown) for shown in images]
    if encoded:
        with Encoder(model, recipe, positions=positions) as encoder:
            given = [list(encoder(_inputs(model, processor, chat)).placed) for chat in asked]
        engine = {**engine, "enable_mm_embeds": True}
    ids = prompt_ids(processor, asked)
    prompts = [{"prompt_token_ids": i, "multi_modal_data": {"image": g}} for i, g in zip(ids, given, strict=True)]
    got = _asked(folder, None if encoded else recipe, prompts, new_tokens, max(map(len, images)), engine)
    return [_compared(w, g) for w, g in zip(wanted, got, strict=True)]


def _inputs(model: Any, processor: Any, chat: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(prepare_chats(processor, [chat]).to(model.device, model.dtype))


def _reference(
    model: Any, processor: Any, chat: list[dict[str, Any]], new_tokens: int
) -> tuple[list[int], list[torch.Tensor]]:
    """The attached model's tokens, and of each the two best log-probabilities."""
    inputs = _inputs(model, processor, chat)
    out = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, [scores[0].float().log_softmax(-1).topk(2).values for scores in out.scores]


def _asked(
    folder: str | Path,
    recipe: Recipe | None,
    prompts: list[dict[str, Any]],
    new_tokens: int,
    images: int,
    engine: dict[str, Any],
) -> list[Any]:
    """What the engine answers."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as e:
        raise VtpruneError("there is no vLLM in this environment (pip install vllm; docs/serving.md)") from e
    with tempfile.TemporaryDirectory() as place:
        os.environ.pop(KEEP, None)
        os.environ.update(environment(recipe, place))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        told = {"max_num_seqs": 8, "limit_mm_per_prompt": {"image": images}, "enforce_eager": True, **engine}
        try:
            served = LLM(model=str(folder), **told)
        except PROCESSING as e:
            raise VtpruneError(f"vLLM does not serve this: {str(e).strip().splitlines()[-1]}") from e
        greedy = SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=2)
        return served.generate(prompts, greedy, use_tqdm=False)


def _compared(wanted: tuple[list[int], list[torch.Tensor]], got: Any) -> Answer:
    tokens, best = wanted
    out = list(got.outputs[0].token_ids)
    apart = next((n for n, (a, b) in enumerate(zip(tokens, out, strict=False)) if a != b), None)
    if apart is None and len(tokens) != len(out):
        apart = min(len(tokens), len(out)) - 1
    chosen = got.outputs[0].logprobs[:apart]
    differences = [abs(step[t].logprob - float(b[0])) for step, t, b in zip(chosen, out, best, strict=False)]
    return Answer(
        tuple(tokens),
        tuple(out),
        len(got.prompt_token_ids),
        None if apart is None else float(best[apart][0] - best[apart][1]),
        max(differences, default=0.0),
    )
