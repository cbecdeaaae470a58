"""What single model families add to the contract: sliding windows, image boundaries, image sizes, tiles."""

from __future__ import annotations

import pytest
import torch
from vtprune.models import _decoder
from vtprune.models._level import shaped

import vtprune
from vtprune.types import UnsupportedError, VtpruneError
from vtprune.verify import check

WINDOW = 12  # of every tiny model with sliding layers
SLIDING = [("gemma3", "sliding"), ("paligemma", "gemma2"), ("mistral3", "sliding")]
EVERY = [*SLIDING, ("paligemma", "gemma"), ("mistral3", "pixtral"), ("smolvlm", "smolvlm")]


def _results(model, inputs, names, method="random", **options):
    return {name: check(name, model, method, inputs, **options).passed for name in names}


@pytest.mark.parametrize(("family", "variant"), SLIDING)
def test_sliding_windows_span_the_prompts_positions(tiny, family, variant, monkeypatch):
    """A window that counted the rows left by pruning, at prefill or at decoding, would not pass."""
    model, inputs = tiny(family, variant)
    names = ("prefill_is_masked_dense", "decode_is_masked_dense")
    assert model.config.text_config.sliding_window == WINDOW < int(inputs["attention_mask"].sum(1).min())
    assert _results(model, inputs, names, keep=2) == dict.fromkeys(names, True)
    right_prefill, right_decode = _decoder.prefill_mask, _decoder.decode_mask

    def prefill(own, level, keys, x, cached, how, sliding):
        mask = right_prefill(own, level, keys, x, cached, how, sliding)
        if not sliding:
            return mask
        column = torch.arange(level.width)
        near = (column <= column[:, None]) & (column > column[:, None] - WINDOW)
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
        return shaped(seen | near & level.valid[:, None] & level.valid[..., None], how, x.dtype)

    def decode(level, tail, length, q, columns, window, x, how):
        if window is not None:
            window += length - level.width  # as far as the tokens dropped reach
        return right_decode(level, tail, length, q, columns, window, x, how)

    monkeypatch.setattr(_decoder, "prefill_mask", prefill)
    assert not any(_results(model, inputs, names, keep=2).values())
    monkeypatch.setattr(_decoder, "prefill_mask", right_prefill)
    monkeypatch.setattr(_decoder, "decode_mask", decode)
    assert _results(model, inputs, names, keep=2) == {names[0]: True, names[1]: False}


@pytest.mark.parametrize(("family", "variant"), EVERY)
def test_both_attentions_and_every_budget_unit(tiny, family, variant):
    """Eager attention and sdpa; a budget per sample; compact positions."""
    model, inputs = tiny(family, variant)
    masked, same = ("prefill_is_masked_dense", "decode_is_masked_dense"), ("cached_is_uncached", "batch_is_singles")
    assert all(_results(model, inputs, (*masked, *same), per="sample", keep=5).values())
    assert all(_results(model, inputs, same, "fastv", positions="compact", keep=3, layer=2).values())
    model.set_attn_implementation("eager")
    assert all(_results(model, inputs, (*masked, *same), "fastv", keep=3, layer=2).values())
    assert all(_results(model, inputs, masked, keep=3).values())


def test_paligemma_needs_token_type_ids(tiny):
    model, inputs = tiny("paligemma", "gemma")
    del inputs["token_type_ids"]
    with vtprune.attach(model, "random", keep=4), pytest.raises(UnsupportedError, match="token_type_ids"):
        model(**inputs)


def test_tiles_of_unknown_images_have_no_budget_per_image(tiny):
    model, inputs = tiny("smolvlm", "smolvlm")
    with pytest.raises(VtpruneError, match="'tile', 'sample'"):
        vtprune.attach(model, "random", keep=4, per="image")
    with vtprune.attach(model, "random", keep=4) as handle, torch.no_grad():
        model(**inputs)
        assert handle.report().stages[-1].tokens_out == [12, 4]


@pytest.mark.parametrize("variant", ["sliding", "pixtral"])
def test_rows_of_images_are_known_while_generating(tiny, variant):
    """generate() keeps image_sizes to itself in newer releases; methods of the image plane see the same rows and columns as in a plain forward."""
    model, inputs = tiny("mistral3", variant)
    with vtprune.attach(model, "uniform", keep=3) as handle, torch.no_grad():
        assert [[p.grid for p in sample] for sample in handle.adapter.parts(inputs["input_ids"], inputs)] == [[(4, 3), (2, 4)], [(3, 3)]]
        model(**inputs)
        want = handle.report().stages[-1].kept
        model.generate(**inputs, max_new_tokens=2, num_beams=1, suppress_tokens=[3])
        got = handle.report().stages[-1].kept
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        sizes = handle.adapter.sizes(inputs["input_ids"], [12, 8, 9])
        assert torch.equal(torch.tensor(sizes), inputs["image_sizes"])
        with pytest.raises(VtpruneError, match="rows of images"):
            handle.adapter.sizes(inputs["input_ids"], [12, 9, 8])
        del inputs["image_sizes"]
        with pytest.raises(VtpruneError, match="image_sizes"):
            model(**inputs)
