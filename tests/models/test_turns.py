"""Later turns that choose again are what a new prompt of the whole conversation is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.host import cache_of, cached

import vtprune
from dense import Dense, Done
from talks import TYPES, Talk
from vtprune.core.handle import Handle
from vtprune.core.planning import plan
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.methods.base import METHODS

FAMILIES = [
    (name, next(iter(ADAPTERS.get(name).tiny))) for name in ADAPTERS if name not in ("hf-vit", "timm-vit", "open-clip")
]
ANSWER, QUESTION = ([9, 23, 11], [12, 13, 9, 14, 10])


def talked(model: Any, inputs: dict[str, Any], recipe: Any, **options: Any) -> tuple[Talk, Handle]:
    """A prompt and an answer, token by token."""
    handle = vtprune.attach(model, recipe, shelve=True, **options)
    talk = Talk(model, inputs)
    talk.read()
    for token in ANSWER:
        talk.say([token])
    return talk, handle


def the_same(talk: Talk, handle: Handle, logits: Tensor, recipe: Any, **options: Any) -> Talk:
    """What the turn said, chose, counted and cached is what a new prompt's is; answers with that."""
    told, step = handle.report(), torch.tensor([20])
    own = talk.mask, talk.say(step)
    handle.remove()
    new = talk.anew()
    new.ids, new.mask = new.ids[:, :-1], own[0]
    new.inputs.update({"input_ids": new.ids, "attention_mask": new.mask})
    new.inputs.update({name: new.inputs[name][:, :-1] for name in TYPES if name in new.inputs})
    with vtprune.attach(new.model, recipe, **options) as again:
        want = new.read()
        real = new.mask[:, -logits.shape[1] :].bool()
        torch.testing.assert_close(logits[real], want[:, -logits.shape[1] :][real], atol=2e-5, rtol=1e-4)
        other = again.report()
        assert [s.site for s in told.stages] == [s.site for s in other.stages]
        for mine, its in zip(told.stages, other.stages, strict=True):
            assert [k.tolist() for k in mine.kept] == [k.tolist() for k in its.kept]
        for name in ("visual_tokens", "layer_tokens", "kv_bytes", "dense_kv_bytes", "grids"):
            assert getattr(told, name) == getattr(other, name), name
        levels = again.adapter.decoder.requests[new.cache].at
        for mine, its, level in zip(talk.cache.layers, new.cache.layers, levels, strict=True):
            assert mine.keys.shape[2] == its.keys.shape[2] + 1
            real = level.valid[:, -its.keys.shape[2] :]  # (a sliding layer has the last ones)
            for name in ("keys", "values"):
                a, b = getattr(mine, name)[:, :, :-1].transpose(1, 2)[real], getattr(its, name).transpose(1, 2)[real]
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(own[1], new.say(step), atol=2e-5, rtol=1e-4)
    return new


def chosen(handle: Handle) -> list[list[int]]:
    return [k.tolist() for s in handle.report().stages for k in s.kept]


def refused(family: str, variant: str, recipe: str, model: Any, **options: Any) -> bool:
    try:
        vtprune.attach(model, recipe, shelve=True, **options).remove()
    except UnsupportedError as e:
        assert "shelve" in str(e) or family in str(e), e
        return True
    return False


@pytest.mark.parametrize("method", ["fastv", pytest.param("v2drop", marks=pytest.mark.ci)])
@pytest.mark.parametrize(("family", "variant"), FAMILIES, ids=lambda x: x)
def test_a_turn_is_a_new_prompt_in_every_family(tiny, family, variant, method):
    model, inputs = tiny(family, variant)
    options = {"keep": 3} if method == "v2drop" else {"keep": 3, "layer": 2}
    if refused(family, variant, method, model, **options):
        return
    talk, handle = talked(model, inputs, method, **options)
    first = chosen(handle)
    try:
        logits = talk.say(QUESTION)
    except UnsupportedError as e:
        assert any(words in str(e) for words in ("DeepStack", "see others that stand behind")), e
        return
    assert family == "paligemma" or len(chosen(handle)) == len(first)
    the_same(talk, handle, logits, method, **options)


METHODS_THAT_MAY = [name for name in METHODS if METHODS.get(name).kinds[0] == "llm" and not METHODS.get(name).skips]


@pytest.mark.parametrize("method", METHODS_THAT_MAY)
@pytest.mark.parametrize(
    ("family", "variant"), [("qwen2-vl", "images"), pytest.param("causal-lm", "llama", marks=pytest.mark.ci)]
)
def test_a_turn_is_a_new_prompt_with_every_method(tiny, family, variant, method):
    model, inputs = tiny(family, variant)
    options = dict(METHODS.get(method).cases[0])
    try:
        vtprune.attach(model, method, **options).remove()
    except UnsupportedError:
        return
    if refused(family, variant, method, model, **options):
        return
    talk, handle = talked(model, inputs, method, **options)
    the_same(talk, handle, talk.say(QUESTION), method, **options)


def test_most_methods_inside_the_language_model_can(tiny):
    """So that the test above is not one of refusals."""
    model, _ = tiny("qwen2-vl", "images")
    able = []
    for name in METHODS_THAT_MAY:
        try:
            vtprune.attach(model, name, shelve=True, **METHODS.get(name).cases[0]).remove()
            able.append(name)
        except UnsupportedError:
            continue
    assert {"fastv", "pyramiddrop", "fitprune", "v2drop", "dart", "feather", "vtw", "promptdistill"} <= set(able), able


@pytest.mark.parametrize(("family", "variant"), [("llava", "clip-llama"), ("causal-lm", "qwen3")])
def test_a_turn_is_the_dense_model_with_what_it_dropped_hidden(tiny, family, variant):
    """By masks of the stock model over the whole conversation, and no cache."""
    model, inputs = tiny(family, variant)
    talk, handle = talked(model, inputs, "pyramiddrop", keep=0.25)
    first, logits = chosen(handle), talk.say(QUESTION)
    assert chosen(handle) != first
    planned = plan(handle.geometry, handle.recipe)
    cuts = [(n, c) for n, (*_, cs) in enumerate(planned) for c in cs]
    done = Done(
        talk.ids, handle.report().stages, [], cuts, [m for _, m, _ in planned], [*range(len(talk.ids))], mask=talk.mask
    )
    adapter = handle.adapter
    handle.remove()
    new = talk.anew()
    with Dense(model, adapter, done), torch.no_grad():
        want = model(**new.inputs, use_cache=False).logits[:, -len(QUESTION) :]
    torch.testing.assert_close(logits[:, -1], want[:, -1], atol=2e-5, rtol=1e-4)
    where = logits.abs().sum(-1) > 0 if family == "causal-lm" else torch.ones(logits.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(logits[where], want[where], atol=2e-5, rtol=1e-4)


def test_turn_behind_turn_and_answers_between(tiny):
    model, inputs = tiny("llava", "clip-llama")
    talk, handle = talked(model, inputs, "fastv", keep=3, layer=2)
    for question in ([9, 10, 11, 12], [14, 22], [13, 13, 9, 21, 20, 11]):
        talk.say(question)
        for token in ANSWER:
            talk.say([token])
    the_same(talk, handle, talk.say(QUESTION), "fastv", keep=3, layer=2)


def test_generate_goes_on_and_chooses_again(tiny):
    """The whole conversation and the cache, as ``generate`` takes them, without the pictures."""
    model, inputs = tiny("qwen2-vl", "images")
    how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    how["suppress_tokens"] = [*range(8), *range(40, 64)]
    with vtprune.attach(model, "fastv", keep=3, layer=2, shelve=True) as handle:
        out = model.generate(**inputs, **how)
        talk = Talk(model, inputs)
        talk.ids = torch.cat([out.sequences, torch.tensor(QUESTION).expand(len(out.sequences), -1)], 1)
        talk.mask = torch.nn.functional.pad(talk.mask, (0, talk.ids.shape[1] - talk.mask.shape[1]), value=1)
        given = {"input_ids": talk.ids, "attention_mask": talk.mask, **cached(model, cache_of(out))}
        got, kept = model.generate(**given, **how), chosen(handle)
    with vtprune.attach(model, "fastv", keep=3, layer=2) as handle:
        want = model.generate(**talk.anew().inputs, **how)
        assert kept == chosen(handle)
    assert torch.equal(got.sequences, want.sequences)
    for mine, its in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(mine, its, atol=2e-5, rtol=1e-4)


def test_a_second_picture_in_a_later_turn(tiny):
    model, inputs = tiny("llava", "clip-llama")
    one = {k: v[:1] for k, v in inputs.items()}
    row = one["input_ids"][0]
    marks = row == model.config.image_token_id
    count = int(marks.sum()) // len(one["pixel_values"])
    placeholder = int(row[marks][0])
    pixels = torch.randn(1, *one["pixel_values"].shape[1:], generator=torch.Generator().manual_seed(7))
    talk, handle = talked(model, one, "pyramiddrop", keep=0.25)
    logits = talk.say([9, *[placeholder] * count, 12, 13], pixel_values=pixels)
    told = handle.report()
    assert len(told.grids[0]) == 2 and told.visual_tokens == [2 * count]
    talk.inputs = {**talk.inputs, "pixel_values": torch.cat([one["pixel_values"], pixels])}
    the_same(talk, handle, logits, "pyramiddrop", keep=0.25)
    # one that has three axes of positions is told
    model, inputs = tiny("qwen2-vl", "images")
    talk, handle = talked(model, inputs, "fastv", keep=3, layer=2)
    with pytest.raises((UnsupportedError, VtpruneError), match="neither new images|whole images|placeholders"):
        talk.say([9, model.config.image_token_id, 12])


@pytest.mark.parametrize(("family", "variant"), [("llava", "clip-llama"), ("causal-lm", "llama")])
def test_questions_of_several_lengths_and_answers_that_end_early(tiny, family, variant):
    """Padding in front of a later question, and tokens of an answer that are hidden from then on."""
    model, inputs = tiny(family, variant)
    inputs = {k: v[:1].repeat(2, *[1] * (v.ndim - 1)) for k, v in inputs.items()}
    talk, handle = talked(model, inputs, "fastv", keep=3, layer=2)
    talk.mask[0, -1] = 0  # the last of its answer
    question = torch.tensor([QUESTION, [0, 0, *QUESTION[:3]]])
    logits = talk.say(question, (question != 0).long())
    the_same(talk, handle, logits, "fastv", keep=3, layer=2)


def test_a_cache_that_was_cut_back_goes_on_from_there(tiny):
    """Another answer to the same prompt, then a question."""
    model, inputs = tiny("causal-lm", "llama")
    talk, handle = talked(model, inputs, "fastv", keep=3, layer=2)
    talk.cache.crop(-2)
    talk.ids, talk.mask = talk.ids[:, :-2], talk.mask[:, :-2]
    talk.say([30])
    the_same(talk, handle, talk.say(QUESTION), "fastv", keep=3, layer=2)


def test_two_conversations_do_not_meet(tiny):
    model, inputs = tiny("llava", "clip-llama")
    other = {k: v.flip(0) for k, v in inputs.items()}
    handle = vtprune.attach(model, "fastv", keep=3, layer=2, shelve=True)
    a, b = Talk(model, inputs), Talk(model, other)
    a.read(), b.read()
    for token in ANSWER:
        a.say([token]), b.say([token + 1])
    got = a.say(QUESTION)
    b.say([11, 10, 9])
    told = handle.report(of=a.cache)
    handle.remove()
    with vtprune.attach(model, "fastv", keep=3, layer=2) as handle:
        want = a.anew().read()[:, -len(QUESTION) :]
        assert [k.tolist() for k in told.stages[0].kept] == chosen(handle)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_all_that_is_kept_is_the_dense_model(tiny):
    model, inputs = tiny("llava", "clip-llama")
    talk, handle = talked(model, inputs, "fastv", keep=1.0, layer=2)
    logits = talk.say(QUESTION)
    handle.remove()
    torch.testing.assert_close(logits, talk.anew().read()[:, -len(QUESTION) :], atol=2e-5, rtol=1e-4)


def test_what_it_costs_is_counted(tiny):
    """FLOPs of the turn as torch counts them, and the bytes on the shelf."""
    model, inputs = tiny("causal-lm", "llama")
    model.set_attn_implementation("eager")  # whose products torch counts
    inputs = {k: v[:1] for k, v in inputs.items()}
    talk, handle = talked(model, inputs, "drop-all", layer=3)
    t, c = talk.ids.shape[1], model.config.hidden_size
    told = handle.report()
    table = 2 * model.config.hidden_size // model.config.num_attention_heads
    assert told.shelved_bytes == (t * c + t * table) * 4 + t * 8
    prompt = told.flops
    with FlopCounterMode(display=False) as counter:
        talk.say(QUESTION, logits_to_keep=1)
    told = handle.report()
    # (the rotary table of the new tokens is counted by torch alone)
    assert told.flops == pytest.approx(counter.get_total_flops(), rel=2e-3)
    assert told.flops != prompt
    handle.remove()
    plain = talk.anew()
    plain.inputs = {k: v[:, : -len(QUESTION)] for k, v in plain.inputs.items()}
    plain.read()
    plain.ids, plain.mask = plain.inputs["input_ids"], plain.inputs["attention_mask"]
    with FlopCounterMode(display=False) as counter:
        plain.say(QUESTION, logits_to_keep=1)
    assert told.dense_flops == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_off_by_default(tiny):
    model, inputs = tiny("llava", "clip-llama")
    with vtprune.attach(model, "fastv", keep=3, layer=2) as handle:
        talk = Talk(model, inputs)
        talk.read()
        kept = chosen(handle)
        talk.say(QUESTION)
        assert chosen(handle) == kept and handle.report().shelved_bytes == 0


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("recipe", "options", "says"),
    [
        ("flowcut", {"keep": 4}, "every stage has to drop or merge tokens inside the language model"),
        ("uniform", {"keep": 4}, "inside the language model"),
        ("dpvr-lf", {"split": 3}, "inside the language model"),
        ("mindskip", {}, "inside the language model"),
        ("gemfilter", {"keep": 4, "positions": "original"}, "above layer 0"),
        ("promptdistill", {"keep": 0.5, "truncate": 1}, "evict nothing"),
        ("fastv", {"keep": 4, "positions": "compact"}, "compact"),
    ],
)
def test_what_cannot_choose_again_is_refused_when_attached(tiny, recipe, options, says):
    model, _ = tiny("llava", "clip-llama")
    with pytest.raises(UnsupportedError, match=says):
        vtprune.attach(model, recipe, shelve=True, **options)
    vtprune.attach(model, "fastv", keep=3).remove()  # nothing is left behind


@pytest.mark.parametrize("given", [1, "yes", None])
def test_it_is_on_or_off(tiny, given):
    model, _ = tiny("llava", "clip-llama")
    with pytest.raises(VtpruneError, match="is not True or False"):
        vtprune.attach(model, "fastv", shelve=given)


def test_a_vision_tower_has_no_turns(tiny):
    model, _ = tiny("hf-vit", "dinov2")
    with pytest.raises(VtpruneError, match="models with a language model"):
        vtprune.attach(model, "tome", shelve=True)


def test_rotary_positions_that_stretch_are_refused(tiny):
    model, _ = tiny("causal-lm", "llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(UnsupportedError, match="change with the length"):
        vtprune.attach(model, "fastv", keep=3, shelve=True)


def _static(talk: Talk) -> None:
    from transformers import StaticCache

    talk = Talk(talk.model, talk.inputs, StaticCache(config=talk.model.config, max_cache_len=64))
    talk.read(**cached(talk.model, talk.cache))
    talk.say(QUESTION)


def _moved(talk: Talk) -> None:
    talk.cache.reorder_cache(torch.tensor([1, 0]))
    talk.say(QUESTION)


def _embedded(talk: Talk) -> None:
    embeds = talk.model.get_input_embeddings()(torch.tensor([[9], [9]]))
    talk.say([9], input_ids=None, inputs_embeds=embeds)
    talk.say(QUESTION)


def _labelled(talk: Talk) -> None:
    talk.say(QUESTION, labels=torch.tensor(QUESTION).expand(2, -1))


def _graph(talk: Talk) -> None:
    talk = Talk(talk.model, talk.inputs, cache_of(talk.model(**talk.inputs, use_cache=True)))
    talk.say(QUESTION)


def _hidden(talk: Talk) -> None:
    talk.mask[0, -2] = 0
    talk.say(QUESTION)


def _maskless(talk: Talk) -> None:
    talk.say(QUESTION, attention_mask=None)


@pytest.mark.parametrize(
    ("way", "says"),
    [
        (_static, "StaticLayer cannot be read anew"),
        (_moved, "its samples were moved"),
        (_embedded, "went on with inputs_embeds"),
        (_labelled, "went on with labels"),
        (_graph, "read with gradients"),
        (_hidden, "shows the conversation otherwise"),
        (_maskless, "shows the conversation otherwise"),
    ],
    ids=lambda x: x.__name__.strip("_") if callable(x) else "",
)
def test_a_turn_that_is_no_new_prompt_is_refused(tiny, way, says):
    model, inputs = tiny("causal-lm", "llama")  # its second prompt is padded
    talk, handle = talked(model, inputs, "fastv", keep=3, layer=2)
    with pytest.raises(UnsupportedError, match=says):
        way(talk)
    handle.remove()


def test_a_refused_turn_leaves_the_conversation_as_it_was(tiny):
    model, inputs = tiny("causal-lm", "llama")
    talk, handle = talked(model, inputs, "fastv", keep=3, layer=2)
    ids, mask = talk.ids, talk.mask
    held = [layer.keys.clone() for layer in talk.cache.layers]
    with pytest.raises(UnsupportedError, match="2-D"):
        talk.say(QUESTION, attention_mask={"full_attention": None})
    assert all(map(torch.equal, held, (layer.keys for layer in talk.cache.layers)))
    talk.ids, talk.mask = ids, mask
    the_same(talk, handle, talk.say(QUESTION), "fastv", keep=3, layer=2)


def test_a_turn_that_breaks_off_is_not_gone_on_with(tiny):
    model, inputs = tiny("llava", "clip-llama")
    talk, handle = talked(model, inputs, "fastv", keep=3, layer=2)

    def stop(module: Any, args: tuple) -> None:
        raise KeyboardInterrupt

    hook = talk.model.model.language_model.layers[3].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        talk.say(QUESTION)
    hook.remove()
    for tokens in ([9], QUESTION):
        with pytest.raises(UnsupportedError, match="broke off"):
            talk.say(tokens)
    handle.remove()
