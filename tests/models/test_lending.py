"""Keys and values that are made of another layer's input: what the engine does around them, whatever the method."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from vtprune.models.engine.host import cache_of, cached

import vtprune
from vtprune.core.ledger import snapshot
from vtprune.core.types import UnsupportedError

ROWS = pytest.mark.parametrize("rows", ["needed", "all"])


@ROWS
def test_a_cache_goes_on_with_its_attachment_alone(tiny, rows):
    """Neither after it was removed, nor a copy of it, nor with more rows than the prompt had, nor cut into its
    prompt; and the model is as it was."""
    model, inputs = tiny("causal-lm", "llama")
    token, before = torch.tensor([[9], [9]]), snapshot(model)
    with torch.no_grad():
        want = model(**inputs).logits
        with vtprune.attach(model, "swiftkv", layer=2, rows=rows):
            cache, other = (cache_of(model(**inputs, use_cache=True)) for _ in range(2))
            twin = copy.deepcopy(other)
            with pytest.raises(UnsupportedError, match="copy of a pruned one"):
                model(input_ids=token, **cached(model, twin))
            with pytest.raises(UnsupportedError, match="one row belongs to each"):
                model(input_ids=token.repeat(2, 1), **cached(model, cache))
            model(input_ids=token, **cached(model, cache))
            other.crop(-20)
            with pytest.raises(UnsupportedError, match="cut back into its prompt"):
                model(input_ids=token, **cached(model, other))
        with pytest.raises(UnsupportedError, match="has been removed"):
            model(input_ids=token, **cached(model, cache))
        assert snapshot(model) == before and torch.equal(model(**inputs).logits, want)


@ROWS
def test_prompts_without_anything_to_prune_are_the_models_own(tiny, rows):
    """Bit by bit, also what follows them, and what follows a prompt that was read before."""
    model, _ = tiny("llava", "clip-llama")
    ids = torch.randint(8, 60, (1, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        foreign = cache_of(model(input_ids=ids[:, :10], use_cache=True))
        with vtprune.attach(model, "swiftkv", layer=1, rows=rows) as handle:
            assert torch.equal(model(input_ids=ids).logits, want)
            assert handle.report().flops == handle.report().dense_flops
            cache = cache_of(model(input_ids=ids[:, :10], use_cache=True))
            for begun in (cache, foreign):
                behind = model(input_ids=ids[:, 10:], **cached(model, begun)).logits
                assert torch.allclose(behind, want[:, 10:], atol=1e-6)


@pytest.mark.parametrize("what", ["k_proj", "v_proj", "self_attn", "wrapped", "forward"])
def test_parts_that_were_replaced_since_are_refused(tiny, what):
    """Another module in the place, or one around the old one, as adapters put it there."""
    model, inputs = tiny("llava", "clip-llama")
    layer = model.model.language_model.layers[3]

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + x[..., : self.inner.out_features]

    with vtprune.attach(model, "swiftkv", layer=2), torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
        if what == "self_attn":
            layer.self_attn = copy.deepcopy(model).model.language_model.layers[3].self_attn
            vtprune.core.ledger.strip(layer.self_attn)
        elif what == "forward":
            layer.self_attn.forward = _keys_alone(layer.self_attn)
        elif what == "wrapped":
            layer.self_attn.v_proj = Around(layer.self_attn.v_proj)
        else:
            part = getattr(layer.self_attn, what)
            fresh = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
            setattr(layer.self_attn, what, fresh)
        with pytest.raises(UnsupportedError, match="of layer 3 was replaced since"):
            model(**inputs)
        with pytest.raises(UnsupportedError, match="of layer 3 was replaced since"):
            model(input_ids=torch.tensor([[9], [9]]), **cached(model, cache))


@ROWS
def test_packed_prompts_and_checkpoints_are_refused(tiny, rows):
    model, inputs = tiny("causal-lm", "llama")
    ids = inputs["input_ids"][:1]
    labels = ids.clone()
    labels[:, :30] = -100
    places = torch.cat([torch.arange(20), torch.arange(16)])[None]
    with vtprune.attach(model, "swiftkv", layer=2, rows=rows):
        with pytest.raises(UnsupportedError, match="packed into one row"):
            model(input_ids=ids, position_ids=places, use_cache=False)
        model.gradient_checkpointing_enable()
        model.train()
        with pytest.raises(UnsupportedError, match="gradient_checkpointing_disable"):
            model(input_ids=ids, labels=labels)  # before anything was computed for nothing
        model.gradient_checkpointing_disable()
        model(input_ids=ids, labels=labels).loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_others_are_refused(tiny, checkpointed, reentrant):
    """``torch.utils.checkpoint`` around a layer, which transformers does not know of."""
    model, inputs = tiny("causal-lm", "llama")
    ids, labels = inputs["input_ids"][:1], inputs["input_ids"][:1].clone()
    labels[:, :30] = -100
    with vtprune.attach(model, "swiftkv", layer=2, rows="all"):
        checkpointed(model.model.layers[3], reentrant)
        with pytest.raises(UnsupportedError, match="gradient checkpointing runs layers again"):
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()


def test_layers_that_are_built_otherwise_are_refused(tiny, monkeypatch):
    """One projection for all three, none called, called twice, or given something else than the norm's output."""
    phi, _ = tiny("causal-lm", "phi3")
    with pytest.raises(UnsupportedError, match="layer 2 has no k_proj: .*with its queries in one projection"):
        vtprune.attach(phi, "swiftkv", layer=2)
    gemma, _ = tiny("causal-lm", "gemma3")
    with pytest.raises(UnsupportedError, match="sliding window, whose cache does not hold"):
        vtprune.attach(gemma, "swiftkv", layer=2)
    vtprune.attach(gemma, "swiftkv", layer=2, rows="all").remove()

    model, _ = tiny("causal-lm", "llama")
    del model.model.layers[4].input_layernorm
    with pytest.raises(UnsupportedError, match="layer 4 has no input_layernorm"):
        vtprune.attach(model, "swiftkv", layer=2)
    vtprune.attach(tiny("causal-lm", "llama")[0], "swiftkv", layer=2).remove()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("shared", "layer 3 calls its v_proj 0 times"),
        ("twice", "layer 3 calls its k_proj 2 times"),
        ("scaled", "layer 3 makes its keys and values of something else"),
    ],
)
def test_attention_that_makes_keys_otherwise_is_refused(tiny, monkeypatch, how, why):
    """As in models whose last layers read what earlier ones cached."""
    model, _ = tiny("causal-lm", "llama")
    attention = model.model.layers[3].self_attn
    whole = attention.forward

    def forward(hidden_states, **kwargs):
        if how == "twice":
            attention.k_proj(hidden_states)
        elif how == "scaled":
            hidden_states = hidden_states * 1.5
        return whole(hidden_states=hidden_states, **kwargs)

    monkeypatch.setattr(attention, "forward", _keys_alone(attention) if how == "shared" else forward)
    with pytest.raises(UnsupportedError, match=why):
        vtprune.attach(model, "swiftkv", layer=2)


def _keys_alone(attention):
    def forward(hidden_states, **kwargs):
        attention.k_proj(hidden_states)
        return torch.zeros_like(hidden_states), None

    return forward
