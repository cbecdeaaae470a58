"""Halves of decoder layers that a method leaves out: what the engine does, whatever the method."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.host import HALVES, cache_of, cached, held

import vtprune
from vtprune.check.case import Case
from vtprune.check.verify import check
from vtprune.core.recipe import Recipe, Stage
from vtprune.core.types import Action, Cut, UnsupportedError, VtpruneError
from vtprune.methods.base import METHODS, Method, MethodInfo, option, register
from watch import spent

# every family with a language model, and what is known of those whose layers are otherwise
PAIRS = [
    (name, next(iter(ADAPTERS.get(name).tiny))) for name in ADAPTERS if name not in ("hf-vit", "timm-vit", "open-clip")
]

MET = (
    "prefill_is_masked_dense",
    "decode_is_masked_dense",
    "cached_is_uncached",
    "batch_is_singles",
    "interleaved_is_solo",
    "restored",
    "counts_are_true",
)


@pytest.fixture(autouse=True)
def some_half():
    """A method that leaves out the halves it is told, of the samples whose prompts are odd in length, or of all."""

    @register(
        MethodInfo(
            name="some-half",
            paper="baseline",
            idea="leaves out halves of layers",
            kinds=("llm",),
            keep=None,
            budgeted=False,
            skips=True,
            cases=({"half": "mlp"}, {}),
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class SomeHalf(Method):
        half: str = option("attention", "which", choices=("attention", "mlp"))
        layers: tuple[int, ...] = option((1, 3), "where")
        odd: bool = option(False, "only of prompts of an odd number of tokens")

        def plan(self, geometry, keep):
            return tuple(Cut(site=f"llm.{i}", action=Action.SKIP, half=self.half) for i in self.layers)

        def skip(self, rows, prompt, cut, module):
            count = prompt.sum(1)
            return count % 2 == 1 if self.odd else count > 0

    yield
    METHODS._forget("some-half")


@pytest.mark.sampled(9)
@pytest.mark.parametrize("odd", [pytest.param(False, id="all", marks=pytest.mark.slow), pytest.param(True, id="odd")])
@pytest.mark.parametrize("half", list(HALVES))
@pytest.mark.parametrize(("family", "variant"), PAIRS, ids=lambda x: x)
def test_every_family_gives_what_the_dense_model_gives_with_zeros_there(tiny, family, variant, half, odd):
    """Prefill, cached generation, batches, interleaved requests, what is left behind, what is cached."""
    model, inputs = tiny(family, variant)
    try:
        vtprune.attach(model, "some-half", half=half, odd=odd).remove()
    except UnsupportedError as e:
        assert any(words in str(e) for words in ("is the first of type", "leaving out", "no half of it", "known here"))
        pytest.skip(str(e))
    results = {name: check(name, model, "some-half", inputs, half=half, odd=odd) for name in MET}
    assert not {name: r.detail for name, r in results.items() if r.passed is False}
    assert results["decode_is_masked_dense"].passed and results["prefill_is_masked_dense"].passed


def test_most_families_can():
    able = []
    for family, variant in PAIRS:
        model, _ = ADAPTERS.get(family).tiny[variant]()
        try:
            vtprune.attach(model, "some-half", half="mlp").remove()
        except UnsupportedError:
            continue
        able.append(family)
    assert len(able) >= len(PAIRS) - 3, able


def test_what_did_not_run_was_not_called(tiny):
    model, inputs = tiny("llava", "clip-llama")
    called = []
    with vtprune.attach(model, "some-half", layers=(1,)), torch.no_grad():
        for i in (1, 2):
            for name in HALVES.values():
                part = getattr(model.model.language_model.layers[i], name)
                last = part.o_proj if name == "self_attn" else part.down_proj
                last.register_forward_hook(lambda m, a, o, i=i, name=name: called.append((i, name)))
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    assert set(called) == {(1, "mlp"), (2, "self_attn"), (2, "mlp")}


def test_the_first_attention_of_each_type_stays(tiny):
    model, _ = tiny("llava", "clip-llama")
    with pytest.raises(UnsupportedError, match=r"layer 0 is the first of type full_attention"):
        vtprune.attach(model, "some-half", layers=(0, 1))
    vtprune.attach(model, "some-half", layers=(0, 1), half="mlp").remove()  # which caches nothing


def test_alone_in_a_recipe(tiny):
    model, _ = tiny("llava", "clip-llama")
    for stages in (("pyramiddrop", "some-half"), ("some-half", "fastv"), ("some-half", "mindskip")):
        recipe = Recipe(name="both", stages=tuple(Stage(method=m) for m in stages))
        with pytest.raises(VtpruneError, match="use it alone"):
            vtprune.attach(model, recipe)


def test_a_cache_goes_on_with_its_attachment_alone(tiny):
    """Neither after it was removed, nor a copy of it, nor with more rows than the prompt had."""
    model, inputs = tiny("causal-lm", "llama")
    token = torch.tensor([[9], [9]])
    with torch.no_grad():
        with vtprune.attach(model, "some-half"):
            cache, other = (cache_of(model(**inputs, use_cache=True)) for _ in range(2))
            twin = copy.deepcopy(other)
            with pytest.raises(UnsupportedError, match="copy of a pruned one"):
                model(input_ids=token, **cached(model, twin))
            with pytest.raises(UnsupportedError, match="one row belongs to each"):
                model(input_ids=token.repeat(2, 1), **cached(model, cache))
            model(input_ids=token, **cached(model, cache))
            with pytest.raises(UnsupportedError, match="cannot be cut back"):  # transformers' own would stumble over it
                other.crop(-20)
        with pytest.raises(UnsupportedError, match="has been removed"):
            model(input_ids=token, **cached(model, cache))


def test_samples_of_a_cache_that_move_take_their_decisions_along(tiny):
    model, inputs = tiny("causal-lm", "llama")
    assert len({int(m.sum()) % 2 for m in inputs["attention_mask"]}) == 2  # one sample is odd
    steps = torch.tensor([[9], [10]])
    with torch.no_grad(), vtprune.attach(model, "some-half", odd=True):

        def go_on(order):
            cache = cache_of(model(**inputs, use_cache=True))
            order = torch.tensor(order)
            cache.reorder_cache(order) if len(order) == 2 else cache.batch_select_indices(order)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)[order]
            return model(input_ids=steps[order], attention_mask=mask, **cached(model, cache)).logits

        straight = go_on([0, 1])
        assert torch.allclose(go_on([1, 0]), straight[[1, 0]], atol=1e-6)
        assert torch.allclose(go_on([1]), straight[[1]], atol=1e-6)
        for mask in ([True, True], [False, True], [True, False]):
            cache, keep = cache_of(model(**inputs, use_cache=True)), torch.tensor(mask)
            cache.batch_select_indices(keep)
            seen = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)[keep]
            got = model(input_ids=steps[keep], attention_mask=seen, **cached(model, cache)).logits
            assert torch.allclose(got, straight[keep], atol=1e-6)


def test_second_turns_go_on(tiny):
    """Several tokens behind an answer, then more: as one forward."""
    model, inputs = tiny("causal-lm", "qwen3")
    ids = inputs["input_ids"][:1]
    turn = torch.randint(8, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), vtprune.attach(model, "some-half", layers=(1, 2)):
        cache = cache_of(model(input_ids=ids, use_cache=True))
        first = model(input_ids=turn[:, :4], **cached(model, cache)).logits
        second = model(input_ids=turn[:, 4:], **cached(model, cache)).logits
        labels = torch.cat([torch.full_like(ids, -100), turn], 1)
        whole = model(input_ids=torch.cat([ids, turn], 1), labels=labels).logits[:, ids.shape[1] :]
        assert held(cache, 1) == 0 and held(cache, 3) == ids.shape[1] + 9
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-5)


def test_prompts_without_anything_to_prune_stay_whole(tiny):
    model, inputs = tiny("llava", "clip-llama")
    ids = torch.randint(8, 60, (1, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        with vtprune.attach(model, "some-half") as handle:
            assert torch.equal(model(input_ids=ids).logits, want)
            assert handle.report().skipped == [[]]
        row, more = inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] - 12
        batch = {
            "input_ids": torch.cat([inputs["input_ids"], torch.nn.functional.pad(ids, (more, 0))]),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.tensor([[0] * more + [1] * 12])]),
            "pixel_values": inputs["pixel_values"],
        }
        with vtprune.attach(model, "some-half") as handle:
            mixed = model(**batch).logits
            assert handle.report().skipped == [["llm.1.attention", "llm.3.attention"]] * 2 + [[]]
    assert torch.allclose(mixed[2, row - 12 :], want[0], atol=1e-5)


def test_packed_prompts_and_checkpoints_are_refused(tiny):
    model, inputs = tiny("causal-lm", "llama")
    ids = inputs["input_ids"][:1]
    labels = ids.clone()
    labels[:, :30] = -100
    places = torch.cat([torch.arange(20), torch.arange(16)])[None]
    with vtprune.attach(model, "some-half"):
        with pytest.raises(UnsupportedError, match="packed into one row"):
            model(input_ids=ids, position_ids=places, use_cache=False)
        model.gradient_checkpointing_enable()
        model.train()
        with pytest.raises(UnsupportedError, match="gradient_checkpointing_disable"):
            model(input_ids=ids, labels=labels)
        model.gradient_checkpointing_disable()
        model(input_ids=ids, labels=labels).loss.backward()


def test_layers_that_change_their_rows_themselves_are_refused(tiny, monkeypatch):
    """What is not a sum of its halves: scaled, or with an attention of another form."""
    model, _ = tiny("causal-lm", "llama")
    layer = model.model.layers[2]
    whole = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: whole(*args, **kwargs) * 1.5)
    with pytest.raises(UnsupportedError, match="changes what it is given also without"):
        vtprune.attach(model, "some-half")
    model, _ = tiny("causal-lm", "llama")
    attention = model.model.layers[1].self_attn
    both = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: (both(*args, **kwargs)[0][..., :4], None))
    with pytest.raises(UnsupportedError, match="gives something else than is known here"):
        vtprune.attach(model, "some-half")


def test_what_a_layer_that_was_left_out_would_mislead_is_refused(tiny):
    """Attention maps, which move up, and caches that bring back the layer behind the one that runs."""
    from transformers import DynamicCache

    model, inputs = tiny("causal-lm", "llama")
    model.set_attn_implementation("eager")
    with vtprune.attach(model, "some-half"), torch.no_grad():
        with pytest.raises(UnsupportedError, match="leave out output_attentions"):
            model(**inputs, output_attentions=True)
        model.config.output_attentions = True
        with pytest.raises(UnsupportedError, match="leave out output_attentions"):
            model(**inputs)
        model.config.output_attentions = False
        cache = DynamicCache(config=model.config)
        # only behind layer 0: moving its keys needs a GPU
        model.model.layers[0].register_forward_hook(lambda *_: setattr(cache, "offloading", True))
        with pytest.raises(UnsupportedError, match="use another cache"):
            model(**inputs, **cached(model, cache))
        model(**inputs)
    with vtprune.attach(model, "some-half", half="mlp"), torch.no_grad():
        assert len(model(**inputs, output_attentions=True).attentions) == 6


def test_a_cache_of_layers_without_mlp_can_be_cut_back(tiny):
    """Behind the prompt; a cache that was read anew, of gates that leave nothing out, as well."""
    model, inputs = tiny("causal-lm", "llama")
    ids = inputs["input_ids"][:1]
    with vtprune.attach(model, "some-half", half="mlp"), torch.no_grad():
        cache = cache_of(model(input_ids=ids, use_cache=True))
        want = model(input_ids=ids[:, :1], **cached(model, cache)).logits
        cache.crop(-1)
        assert torch.allclose(model(input_ids=ids[:, :1], **cached(model, cache)).logits, want, atol=1e-6)
        cache.crop(-10)
        with pytest.raises(UnsupportedError, match="cut back into its prompt"):
            model(input_ids=ids[:, :1], **cached(model, cache))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_others_are_refused(tiny, checkpointed, reentrant):
    """``torch.utils.checkpoint`` around a layer, which transformers does not know of."""
    model, inputs = tiny("causal-lm", "llama")
    ids, labels = inputs["input_ids"][:1], inputs["input_ids"][:1].clone()
    labels[:, :30] = -100
    with vtprune.attach(model, "some-half"):
        checkpointed(model.model.layers[1], reentrant)
        with pytest.raises(UnsupportedError, match="gradient checkpointing runs layers again"):
            model(input_ids=ids, labels=labels).loss.backward()


def test_halves_that_were_replaced_since_are_refused(tiny):
    """Another module in the place, or another forward around ours."""
    for how in ("module", "forward"):
        model, inputs = tiny("llava", "clip-llama")
        layer = model.model.language_model.layers[1]
        twin = copy.deepcopy(layer.self_attn)
        with vtprune.attach(model, "some-half"), torch.no_grad():
            cache = cache_of(model(**inputs, use_cache=True))
            if how == "module":
                layer.self_attn = twin
            else:
                layer.self_attn.forward = twin.forward
            with pytest.raises(UnsupportedError, match="attention of layer 1 was replaced since"):
                model(**inputs)
            with pytest.raises(UnsupportedError, match="attention of layer 1 was replaced since"):
                model(input_ids=torch.tensor([[9], [9]]), **cached(model, cache))


def test_what_an_mlp_takes_is_counted(tiny):
    """Of experts too: FLOPs of a layer are those of its halves."""
    for family, variant in (("causal-lm", "llama"), ("qwen2-vl", "images"), ("llava", "clip-llama")):
        model, inputs = tiny(family, variant)
        model.set_attn_implementation("eager")  # whose products the counter sees
        one = Case(model, Recipe(name="x", stages=(Stage(method="some-half"),)), inputs, {}).samples()[0]
        dense = spent(model, one)
        for half in HALVES:
            with vtprune.attach(model, "some-half", half=half) as handle:
                saved, report = dense - spent(model, one), handle.report()
            assert report.dense_flops - report.flops == saved > 0, (family, half)
