"""Language models without images: which of a prompt's tokens may go, and that nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.host import cache_of, cached
from vtprune.models.engine.prompt import prompt_tokens
from vtprune.models.engine.request import Call
from vtprune.models.engine.whole import HEAD

import vtprune

VARIANTS = tuple(ADAPTERS.get("causal-lm").tiny)


def built(variant: str = "llama") -> tuple[Any, dict[str, Tensor]]:
    return ADAPTERS.get("causal-lm").tiny[variant]()


@pytest.mark.parametrize("variant", VARIANTS)
def test_head_and_tail_stay_and_the_rest_is_counted(variant):
    model, inputs = built(variant)
    lengths = inputs["attention_mask"].sum(1).tolist()
    with vtprune.attach(model, "random", keep=3) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    assert report.visual_tokens == [n - HEAD - 1 for n in lengths]
    assert [set(row) for row in report.layer_tokens] == [{3}, {3}]
    assert report.flops < report.dense_flops and report.kv_bytes < report.dense_kv_bytes


def test_prompts_of_five_tokens_stay_whole():
    model, inputs = built()
    short = {k: v[:, -5:] for k, v in inputs.items()}
    with torch.no_grad():
        want = model(**short).logits
        with vtprune.attach(model, "drop-all") as handle:
            assert torch.equal(model(**short).logits, want)
            assert handle.report().visual_tokens == [0, 0]


def marks(real: list[int], head: int = 2, tail: int = 1, **known: Any) -> list[int]:
    call = Call(**{k: None if v is None else torch.tensor([v]) for k, v in known.items() if k != "prompt"})
    if "prompt" in known:
        call.prompt = torch.tensor([known["prompt"]])
    return prompt_tokens(call, torch.tensor([real]).bool(), head, tail)[0].int().tolist()


def test_what_of_a_prompt_may_go():
    assert marks([1, 1, 1, 1, 1, 1]) == [0, 0, 1, 1, 1, 0]
    assert marks([0, 0, 1, 1, 1, 1]) == [0, 0, 0, 0, 1, 0]  # padding in front
    assert marks([1, 1, 1, 1, 0, 0]) == [0, 0, 1, 0, 0, 0]
    assert marks([1, 1, 1, 0, 1, 1]) == [0, 0, 1, 0, 1, 0]  # a hole
    assert marks([1, 1, 1]) == [0, 0, 0]
    assert marks([1, 1, 1, 1, 1, 1], head=0, tail=0) == [1] * 6
    # an answer that generate gave follows
    assert marks([1, 1, 1, 1, 1, 1, 1], prompt=5) == [0, 0, 1, 1, 0, 0, 0]
    # labels: up to the first answer; later questions belong to what follows
    labels = [-100, -100, -100, -100, -100, 7, 8, -100, -100, 9]
    assert marks([1] * 10, labels=labels) == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert marks([1] * 6, labels=[-100] * 6) == [0, 0, 1, 1, 1, 0]
    # two prompts packed into a row, each with its answer
    segments = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert marks([1] * 11, segments=segments) == [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0]
    labels = [-100, -100, -100, -100, 5, -100, -100, -100, -100, 6, 7]
    assert marks([1] * 11, segments=segments, labels=labels) == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0]


def test_labels_without_a_prompt_are_refused():
    model, inputs = built()
    with vtprune.attach(model, "random", keep=3), pytest.raises(vtprune.UnsupportedError, match="leave no prompt"):
        model(**inputs, labels=inputs["input_ids"])


@pytest.mark.parametrize("method", ["random", "fastv", "pyramiddrop", "gemfilter", "promptdistill"])
def test_a_row_of_packed_prompts_is_what_each_is_alone(method):
    """Padding-free batches: positions begin anew."""
    model, inputs = built()
    rows = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    packed = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(r)) for r in rows])[None],
    }
    with vtprune.attach(model, method, keep=5) as handle, torch.no_grad():
        alone = [model(input_ids=r[None]).logits[0] for r in rows]
        got = model(**packed, use_cache=False).logits[0].split([len(r) for r in rows])
        assert handle.report().visual_tokens == [sum(len(r) - HEAD - 1 for r in rows)]
    for a, b in zip(alone, got, strict=True):
        torch.testing.assert_close(a[-1], b[-1], rtol=1e-4, atol=1e-5)


def test_answers_are_never_pruned_and_do_not_rank():
    """A log-likelihood of prompt and answer with labels equals cached generation; uncached generation ranks once."""
    model, inputs = built()
    with vtprune.attach(model, "pyramiddrop", keep=0.25), torch.no_grad():
        kwargs: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
        kwargs["return_dict_in_generate"] = True
        cached = model.generate(**inputs, **kwargs)
        uncached = model.generate(**inputs, **kwargs, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
        for a, b in zip(cached.logits, uncached.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_stack_called_by_itself_is_refused():
    model, inputs = built()
    with vtprune.attach(model, "random", keep=3), pytest.raises(vtprune.UnsupportedError, match="called by itself"):
        model.model(**inputs)


def test_embeddings_alone_are_refused():
    model, inputs = built()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with vtprune.attach(model, "random", keep=3), pytest.raises(vtprune.UnsupportedError, match="needs input_ids"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


def test_what_images_alone_have_is_refused():
    model, _ = built()
    for method, why in (("divprune", "reads no images"), ("flowcut", "reads no images"), ("hired", "reads no images")):
        with pytest.raises(vtprune.UnsupportedError, match=why):
            vtprune.attach(model, method)


def test_other_stacks_are_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4))
    with pytest.raises(vtprune.UnsupportedError):
        vtprune.attach(model, "random")


@pytest.mark.parametrize("length", [3, 5, 15])
def test_a_cache_that_this_attachment_did_not_fill_goes_on(length):
    """Of a prompt that is too short to be pruned, or read before: decoding is the stock model's."""
    model, inputs = built()
    prompt = inputs["input_ids"][inputs["attention_mask"].bool().all(1)][:1, :length]
    steps = torch.tensor([[9, 11, 13]])

    def decode(cache):
        out = []
        for i in range(3):
            out.append(model(input_ids=steps[:, i : i + 1], use_cache=True, **cached(model, cache)).logits)
        return torch.cat(out, 1)

    with torch.no_grad():
        want = decode(cache_of(model(input_ids=prompt, use_cache=True)))
        before = cache_of(model(input_ids=prompt, use_cache=True))
        with vtprune.attach(model, "vtw", layer=2):
            torch.testing.assert_close(decode(before), want)
            if length <= 5:
                torch.testing.assert_close(decode(cache_of(model(input_ids=prompt, use_cache=True))), want)
