"""``generate()`` in all its ways under pruning: against the dense model under the masks that hide what was dropped."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer
from vtprune.models.engine.host import cache_of, cached

import vtprune
from vtprune.check.case import Case
from vtprune.check.dense import masks
from vtprune.core.planning import load_recipe
from vtprune.core.types import UnsupportedError

PAIRS = [
    ("llava", "clip-llama", "fastv"),
    ("llava", "clip-llama", "random"),
    ("llava", "clip-llama", "flowcut"),
    ("qwen2-vl", "images", "pyramiddrop"),
    ("qwen3-vl", "images", "random"),
    ("llava-next", "siglip-mistral-window", "pyramiddrop"),
]


def both(model, inputs, method, **ways):
    """What ``generate`` gives pruned, and dense under the same masks."""
    case = Case(model, load_recipe(method).override(keep=3), dict(inputs), {})
    rules = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "suppress_tokens": [3, 4],
    }
    with torch.no_grad():
        with case.attach() as handle:
            torch.manual_seed(0)
            got = model.generate(**inputs, **{**rules, **ways})
            report = handle.report()
            # beams share their image's pass
            passes = list({(id(run), g): (run, g) for run, g in handle.passes}.values())
        ledger = masks(Case(model, case.recipe, _repeated(inputs, len(report.visual_tokens)), {}), report, passes)[2]
        torch.manual_seed(0)
        want = model.generate(**inputs, **{**rules, **ways})
        ledger.undo()
    return got, want


def _repeated(inputs, rows):
    """Beam search repeats every prompt."""
    times = rows // len(inputs["input_ids"])
    return {k: inputs[k].repeat_interleave(times, 0) for k in ("input_ids", "attention_mask")}


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "several-answers": {"do_sample": True, "num_return_sequences": 2},
    "static-cache": {"cache_implementation": "static"},
    "offloaded-cache": {"cache_implementation": "offloaded"},
    "static-cache-beams": {"cache_implementation": "static", "num_beams": 2},
}


class NoStream(contextlib.nullcontext):
    """A stream that runs everything at once."""

    def synchronize(self) -> None: ...

    def wait_stream(self, other) -> None: ...


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "variant", "method"), PAIRS, ids=["-".join(p) for p in PAIRS])
def test_every_way_of_generating_equals_the_masked_dense_model(tiny, monkeypatch, family, variant, method, way):
    if way == "offloaded-cache" and not torch.accelerator.is_available():
        for where, name in (
            (torch, "Stream"),
            (torch.cuda, "default_stream"),
        ):  # transformers copies on the accelerator's streams; without one, in line
            monkeypatch.setattr(where, name, NoStream)
    model, inputs = tiny(family, variant)
    if (
        any(n.startswith("num_") for n in WAYS[way])
        and "mm_encoder_outputs" not in inspect.signature(model.forward).parameters
    ):
        # Before it encoded images ahead, generate() repeated them one by one: beams then fit prompts of one image only.
        inputs = Case(model, load_recipe(method), inputs, {}).samples()[-1]
    got, want = both(model, inputs, method, **WAYS[way])
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.scores, want.scores, strict=True):
        real = torch.isfinite(b)
        assert torch.equal(real, torch.isfinite(a))
        assert float((a[real] - b[real]).abs().max()) <= 1e-5 * float(b[real].abs().max().clamp_min(1))


@pytest.mark.parametrize("method", ["fastv", "random"])
def test_a_quantised_cache_loses_no_more_than_it_does_unpruned(tiny, method):
    from transformers import QuantizedCache

    model, inputs = tiny("llava", "clip-llama")
    rules = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": [3],
    }

    def logits(**ways):
        with torch.no_grad():
            return torch.stack(model.generate(**inputs, **rules, **ways).logits)

    def error():
        want = logits()
        try:
            cache = QuantizedCache(backend="fp8", config=model.config.get_text_config())
        except ValueError as e:  # releases before the fp8 backend
            pytest.skip(str(e))
        got = logits(**cached(model, cache))
        assert not torch.equal(got[1:], want[1:]), "the cache was quantised"
        return float((got[1] - want[1]).abs().max() / want[1].abs().max())

    dense = error()
    with vtprune.attach(model, method, keep=3):
        assert error() <= 3 * dense


def test_rows_that_give_keys_alone_need_a_cache_that_keeps_them(tiny):
    """A quantised cache rounds them before the layer has read them, gradient checkpointing takes the cache away."""
    from transformers import QuantizedCache

    model, inputs = tiny("llava", "clip-llama")
    with vtprune.attach(model, "dpvr-lf", split=2, variant="kv"):
        try:
            cache = QuantizedCache(backend="fp8", config=model.config.get_text_config())
        except ValueError:  # releases before the fp8 backend
            pass
        else:
            with pytest.raises(UnsupportedError, match="quantised cache rounds"):
                model.generate(**inputs, max_new_tokens=2, **cached(model, cache))
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        model.train()
        model.gradient_checkpointing_enable()
        with pytest.raises(UnsupportedError, match="checkpointing"):
            model(**inputs, labels=labels, use_cache=False)
        model.gradient_checkpointing_disable()
        model(**inputs, labels=labels, use_cache=False).loss.backward()


def test_assisted_decoding_is_refused(tiny):
    """The prompt would be read together with guessed tokens, and the last of them would choose the visual tokens."""
    model, inputs = tiny("llava", "clip-llama")
    one = {k: v[:1] for k, v in inputs.items()}
    with vtprune.attach(model, "fastv", keep=3), pytest.raises(UnsupportedError, match="assisted decoding"):
        model.generate(**one, prompt_lookup_num_tokens=2, max_new_tokens=4, do_sample=False)
    model.generate(**one, prompt_lookup_num_tokens=2, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize(("family", "variant"), [("llava", "clip-llama"), ("qwen2-vl", "images")])
def test_prompts_in_chunks_are_refused(tiny, family, variant):
    model, inputs = tiny(family, variant)
    with vtprune.attach(model, "fastv", keep=3), pytest.raises(UnsupportedError, match="prefill_chunk_size"):
        model.generate(**inputs, prefill_chunk_size=20, max_new_tokens=2)


def empty_cache(model, kind, length=64):
    from transformers import DynamicCache, StaticCache

    config = model.config.get_text_config()
    return StaticCache(config=config, max_cache_len=length) if kind == "static" else DynamicCache(config=config)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("method", ["drop-all", "uniform"])
def test_copies_and_emptied_caches(tiny, kind, method):
    """A copy of a pruned cache is refused, also one of fixed size; a cache that was emptied serves a text as if it were
    new."""
    model, inputs = tiny("llava", "clip-llama")
    one = {k: v[:1] for k, v in inputs.items()}
    new = torch.tensor([[9]])
    text = {"input_ids": torch.randint(8, 60, (1, 20), generator=torch.Generator().manual_seed(0))}
    cache = empty_cache(model, kind)
    with torch.no_grad(), vtprune.attach(model, method, **({"layer": 2} if method == "drop-all" else {"keep": 4})):
        model(**one, **cached(model, cache))
        with pytest.raises(UnsupportedError, match="copy of a pruned"):
            model(input_ids=new, **cached(model, copy.deepcopy(cache)))
        cache.reset()
        if kind == "static":  # a dynamic one keeps its length
            model(**text, **cached(model, cache))
            got = model(input_ids=new, **cached(model, cache)).logits
            want = model(input_ids=torch.cat([text["input_ids"], new], 1)).logits[:, -1:]
            assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


def shorten(layers, kind):
    """Takes the last token out of ``layers`` of a cache."""
    for layer in layers:
        if kind == "static":  # crop() of these came with 5.24
            layer.cumulative_length.sub_(1)
        else:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_cache_that_was_cut_back_is_refused(tiny, kind):
    model, inputs = tiny("llava", "clip-llama")
    one = {k: v[:1] for k, v in inputs.items()}
    last, mask = one["input_ids"][:, -1:], torch.nn.functional.pad(one["attention_mask"], (0, 1), value=1)
    with torch.no_grad(), vtprune.attach(model, "fastv", keep=3):

        def read():
            return cache_of(model(**one, use_cache=True, **cached(model, empty_cache(model, kind))))

        cache = read()
        shorten(cache.layers, kind)
        with pytest.raises(UnsupportedError, match="whole mask"):
            model(input_ids=last, attention_mask=mask, **cached(model, cache))
        with pytest.raises(UnsupportedError, match="cut back"):
            model(input_ids=last, **cached(model, cache))
        cache = read()
        shorten(cache.layers[2:], kind)
        with pytest.raises(UnsupportedError, match="cut back"):
            model(input_ids=last, attention_mask=mask, **cached(model, cache))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize(("family", "variant"), [("llava", "clip-llama"), ("qwen2-vl", "images")])
def test_generate_does_not_go_on_from_a_first_layer_that_was_pruned(tiny, family, variant, kind):
    """It would cut a conversation by the tokens which that layer holds."""
    model, inputs = tiny(family, variant)
    cache, rules = empty_cache(model, kind), {"max_new_tokens": 2, "do_sample": False, "disable_compile": True}
    with torch.no_grad(), vtprune.attach(model, "random", keep=3):
        ids = model.generate(**inputs, **rules, **cached(model, cache))
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
        with pytest.raises(UnsupportedError, match="at the wrong place"):
            model.generate(input_ids=ids, attention_mask=mask, **rules, **cached(model, cache))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize(("family", "variant"), [("llava", "clip-llama"), ("gemma3", "sliding")])
def test_a_cache_that_was_filled_elsewhere_goes_on_if_it_is_whole(tiny, family, variant, kind):
    """With a mask that is as long as its tokens, or as a cache of fixed size; it is refused where its layers differ, or
    the mask shows more than they hold."""
    model, inputs = tiny(family, variant)
    t = inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.full((len(mask), 1), 9), "position_ids": (mask.cumsum(1) - 1)[:, -1:]}
    wide = torch.nn.functional.pad(mask, (0, 64 - t - 1)) if kind == "static" else mask
    with torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True, **cached(model, empty_cache(model, kind))))
        ragged, short, *whole = (copy.deepcopy(cache) for _ in range(4))
        want = model(**step, attention_mask=mask, **cached(model, cache)).logits
        shorten([layer for layer in ragged.layers if not layer.is_sliding][1:], kind)
        shorten([layer for layer in short.layers if not layer.is_sliding], kind)
        with vtprune.attach(model, "fastv", keep=3):
            for own, given in zip(whole, (mask, wide), strict=True):
                assert torch.equal(model(**step, attention_mask=given, **cached(model, own)).logits, want)
            with pytest.raises(UnsupportedError, match="looks like a copy"):
                model(**step, attention_mask=mask, **cached(model, ragged))
            with pytest.raises(UnsupportedError, match="looks like a copy"):
                model(input_ids=step["input_ids"], attention_mask=mask, **cached(model, short))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["pyramiddrop", "random", "flowcut", "dpvr-lf"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny, method, reentrant):
    model, inputs = tiny("llava", "clip-llama")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)
    labels[:, :-4] = -100
    model.train()
    for p in model.parameters():
        p.requires_grad_(True)

    def gradients():
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with vtprune.attach(model, method, **({} if method == "dpvr-lf" else {"keep": 3})) as handle:
        loss, want = gradients()
        assert min(handle.report().layer_tokens[0]) < 16, "something was dropped"
        # the name until 5.22
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if method == "dpvr-lf" and GradientCheckpointingLayer.__call__ is not torch.nn.Module.__call__:
            with pytest.raises(UnsupportedError, match="gradient_checkpointing_disable"):
                gradients()
            return
        again, got = gradients()
    assert torch.equal(loss, again) and got.keys() == want.keys()
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-5 * float(want[name].abs().max().clamp_min(1e-3))), name


@pytest.mark.parametrize(
    ("method", "cache"),
    [
        pytest.param("fastv", "static", marks=pytest.mark.ci),
        pytest.param("fastv", "dynamic", marks=pytest.mark.slow),
        pytest.param("random", "static", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_compiled_decode_step_gives_the_same_answer(tiny, method, cache, padded):
    """``torch.compile`` of the decoding steps, as ``generate`` does it with a static cache; the second answer compiles
    nothing."""
    model, inputs = tiny("llava", "clip-llama")
    if not padded:  # then layers need no mask, but transformers makes one while it is compiled
        real = inputs["attention_mask"][0].bool()
        inputs = {k: v[:1, real] if k in ("input_ids", "attention_mask") else v[:1] for k, v in inputs.items()}
    rules = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "suppress_tokens": [3]} | (
        {"cache_implementation": "static"} if cache == "static" else {}
    )
    plain = model.forward
    compiled = torch.compile(plain, dynamic=True, backend="aot_eager")

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        return (compiled if kwargs["input_ids"].shape[1] == 1 else plain)(*args, **kwargs)

    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad(), vtprune.attach(model, method, keep=3):
        want = model.generate(**inputs, **rules)
        model.forward = forward
        try:
            got = model.generate(**inputs, **rules)
            assert counters["stats"]["calls_captured"] > 0, "something was compiled"
            counters.clear()
            again = model.generate(**inputs, **rules)
            assert not counters["stats"]
        finally:
            del model.forward
            torch._dynamo.reset()
    assert torch.equal(got, want) and torch.equal(again, want)


@pytest.mark.parametrize("method", ["fastv", "random", "flowcut"])
def test_weights_that_are_offloaded_to_disk(tiny, tmp_path, method):
    """``device_map``: accelerate's hooks bring weights in for one module's call; scores must go through those
    modules."""
    from transformers import LlavaForConditionalGeneration

    model, inputs = tiny("llava", "clip-llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    with torch.no_grad(), vtprune.attach(model, method, keep=3):
        want = model(**inputs).logits
    where = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "lm_head": "cpu",
    }
    where |= {"model.language_model.norm": "cpu", "model.language_model.rotary_emb": "cpu"}
    where |= {f"model.language_model.layers.{i}": "disk" for i in range(6)}
    spread = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=where, offload_folder=tmp_path / "disk"
    ).eval()
    with torch.no_grad(), vtprune.attach(spread, method, keep=3):
        got = spread(**inputs).logits
    with pytest.raises(UnsupportedError, match="offloaded"):
        vtprune.attach(spread, "dpvr-lf")
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("layer", [1, 3])
def test_padding_does_not_push_a_prompt_out_of_a_sliding_window(tiny, layer, kind):
    """A prompt of images leaves few rows, one of text all of its own. What follows the first must see its text, though
    the layer caches its last eleven columns only."""
    model, inputs = tiny("gemma3", "sliding")
    t = inputs["input_ids"].shape[1]
    alone = {k: v[:1] for k, v in inputs.items() if k != "pixel_values"} | {"pixel_values": inputs["pixel_values"][:2]}
    words = torch.randint(8, 64, (1, t - 4), generator=torch.Generator().manual_seed(0))
    beside = dict(alone)
    for name, more in (("input_ids", words), ("attention_mask", torch.ones_like(words))):
        beside[name] = torch.cat([alone[name], torch.nn.functional.pad(more, (0, 4))])
    beside["token_type_ids"] = torch.nn.functional.pad(alone["token_type_ids"], (0, 0, 0, 1))

    def follow(batch):
        rows, got = len(batch["input_ids"]), []
        cache = empty_cache(model, kind, t + 8)
        out = model(**batch, use_cache=True, **cached(model, cache))
        for step, ids in enumerate((9, 20, 31)):
            mask = torch.nn.functional.pad(batch["attention_mask"], (0, step + 1), value=1)
            out = model(
                input_ids=torch.full((rows, 1), ids),
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1)[:, -1:],
                token_type_ids=torch.zeros(rows, 1, dtype=torch.long),
                use_cache=True,
                **cached(model, cache_of(out)),
            )
            got.append(out.logits[:1])
        return torch.cat(got, 1)

    with vtprune.attach(model, "drop-all", layer=layer), torch.no_grad():
        torch.testing.assert_close(follow(beside), follow(alone), atol=1e-5, rtol=1e-5)
