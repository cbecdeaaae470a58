"""Attached means pruned, or refused: every way to reach a model, and the same tokens however one asks."""

import copy
import gc
import inspect
import pickle
import threading
import weakref
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.host import ENCODED, cache_of, cached
from vtprune.models.engine.run import Run

import vtprune
from moulds import tiny
from vtprune.core.ledger import snapshot

SEQUENCES = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
FAMILIES = [("llava", "clip-llama"), ("qwen2.5-vl", "images"), ("gemma3", "sliding")]
GREEDY = {
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "do_sample": False,
    "suppress_tokens": [3, 4, 5],
    "return_dict_in_generate": True,
    "output_logits": True,
}


def alone(family="llava", variant="clip-llama", sample=-1):
    """The model and one sample of its batch without padding."""
    from vtprune.check.case import Case
    from vtprune.core.planning import load_recipe

    model, inputs = tiny(family, variant)
    one = Case(model, load_recipe("fastv"), inputs, {}).samples()[sample]
    n = int(one["attention_mask"].sum())
    return model, {k: v[:, -n:] if k in SEQUENCES else v for k, v in one.items()}


def off(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-9))


# ---------------------------------------------------------------------------------------------------------------
# reached otherwise


class LoraModel(nn.Module):
    """Calls as peft's does: the forward of what it holds, past its hooks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)


class PeftModel(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.base_model = LoraModel(model)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


@pytest.mark.parametrize("recipe", ["fastv", "random", "flowcut"])
def test_wrappers_are_looked_through_and_forward_is_not_a_way_around(recipe):
    model, one = alone()
    with torch.no_grad():
        with vtprune.attach(model, recipe, keep=3):
            want = model(**one).logits
        with vtprune.attach(PeftModel(model), recipe, keep=3) as handle:
            assert torch.equal(PeftModel(model)(**one).logits, want)
            assert torch.equal(model.forward(**one).logits, want)
            # by position
            assert torch.equal(model(one["input_ids"], one["pixel_values"], one["attention_mask"]).logits, want)
            assert handle.report().layer_tokens[0][-1] == 3
            with pytest.raises(vtprune.VtpruneError, match="attached already"):
                vtprune.attach(model, recipe)
    with pytest.raises(vtprune.UnsupportedError, match="DistributedDataParallel"):
        vtprune.attach(nn.DataParallel(model), recipe)


@pytest.mark.parametrize(("family", "variant"), FAMILIES)
@pytest.mark.parametrize("recipe", ["fastv", "random", "flowcut"])
def test_the_core_is_pruned_like_the_model(family, variant, recipe):
    model, inputs = tiny(family, variant)
    if recipe not in vtprune.methods("*") or (recipe == "flowcut" and not family.startswith("llava")):
        pytest.skip("no stage in this tower")
    with torch.no_grad(), vtprune.attach(model, recipe, keep=0.3) as handle:
        want = model(**inputs, output_hidden_states=False)
        kept = [k.tolist() for k in handle.report().stages[-1].kept]
        hidden = model.model(**inputs).last_hidden_state
        assert torch.isfinite(hidden).all()
        assert [k.tolist() for k in handle.report().stages[-1].kept] == kept
        real = inputs["attention_mask"][:, -1].bool()
        assert off(model.lm_head(hidden)[real, -1], want.logits[real, -1]) < 1e-5
        assert torch.equal(model(**inputs, return_dict=False)[0], want.logits)
        with pytest.raises(vtprune.UnsupportedError, match="called by itself"):
            model.model.language_model(inputs_embeds=hidden)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("how", "warm"),
    [
        ("layer.compile", True),
        *(pytest.param(h, w, marks=SLOW) for h in ("torch.compile", "model.compile") for w in (True, False)),
    ],
)
def test_what_was_compiled_before_is_pruned_and_what_is_removed_is_dense(how, warm):
    model, one = alone()
    run = model
    torch._dynamo.reset()
    with torch.no_grad():
        dense = model(**one).logits
        with vtprune.attach(model, "random", keep=2):
            want = model(**one).logits
        if how == "torch.compile":
            run = torch.compile(model, backend="eager")
        elif how == "model.compile":
            model.compile(backend="eager")
        else:
            model.model.language_model.layers[2].compile(backend="eager")
        if warm:
            run(**one)
        with vtprune.attach(run, "random", keep=2) as handle:
            assert off(run(**one).logits, want) < 1e-5
            assert handle.report().layer_tokens[0] == [2] * 6
        assert off(run(**one).logits, dense) < 1e-5
    torch._dynamo.reset()


def test_a_copy_is_refused_until_it_is_attached_itself():
    model, one = alone()
    before = snapshot(model)
    with torch.no_grad():
        handle = vtprune.attach(model, "flowcut", keep=5)
        twin = copy.deepcopy(model)
        for p in twin.parameters():
            p.mul_(1.1)
        for call in (lambda: twin(**one), lambda: twin.model(**one), lambda: twin.generate(**one, max_new_tokens=2)):
            with pytest.raises(vtprune.UnsupportedError, match="copy of an attached model"):
                call()
        with pytest.raises(vtprune.UnsupportedError, match="pickled"):
            pickle.dumps(model)
        handle.remove()
        assert snapshot(model) == before
        fresh, _ = alone()
        fresh.load_state_dict(twin.state_dict())
        with vtprune.attach(twin, "flowcut", keep=5), vtprune.attach(fresh, "flowcut", keep=5):
            assert torch.equal(twin(**one).logits, fresh(**one).logits)
        assert torch.equal(twin(**one).logits, fresh(**one).logits)


def test_a_tower_inside_an_attached_model_is_not_attached_again():
    model, _ = tiny()
    with vtprune.attach(model, "fastv"):
        with pytest.raises(vtprune.VtpruneError, match="belong to a LlavaForConditionalGeneration that is attached"):
            vtprune.attach(model.model.vision_tower, "tome")
    with (
        vtprune.attach(model.model.vision_tower, "tome"),
        pytest.raises(vtprune.VtpruneError, match="attached already"),
    ):
        vtprune.attach(model, "fastv")


def test_two_threads_attach_and_one_succeeds():
    model, _ = tiny()
    before = snapshot(model)
    for _ in range(5):
        gate, got = threading.Barrier(2), []

        def go(recipe, gate=gate, got=got):
            gate.wait()
            try:
                got.append(vtprune.attach(model, recipe))
            except vtprune.VtpruneError:
                pass

        threads = [threading.Thread(target=go, args=(r,)) for r in ("tome", "fastv")]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert len(got) == 1
        got[0].remove()
        assert snapshot(model) == before


# --------------------------------------------------------------------------------------------------------------------
# left midway


@pytest.mark.parametrize("recipe", ["tome", "pool", "uniform", "fastv"])
def test_a_cache_outlives_its_attachment_closed(recipe):
    model, one = alone()
    token = torch.tensor([[9]])
    with torch.no_grad():
        with vtprune.attach(model, recipe):
            cache = cache_of(model(**one, use_cache=True))
            twin = copy.deepcopy(cache)
            with pytest.raises(vtprune.UnsupportedError, match="copy"):
                model(input_ids=token, **cached(model, twin))
        for kept, why in ((cache, "has been removed"), (twin, "copy")):
            with pytest.raises(vtprune.UnsupportedError, match=why):
                model(input_ids=token, **cached(model, kept))
        text = torch.tensor([[5, 6, 7]])
        with vtprune.attach(model, recipe):
            whole = cache_of(model(input_ids=text, use_cache=True))
        assert model(input_ids=token, **cached(model, whole)).logits.shape[1] == 1  # nothing was pruned in it


def test_removed_during_a_forward_gives_no_answer():
    model, one = alone()
    handle = vtprune.attach(model, "fastv", keep=3)
    hook = model.model.language_model.layers[4].register_forward_pre_hook(lambda *a: handle.remove())
    with pytest.raises(vtprune.UnsupportedError, match="removed while"), torch.no_grad():
        model(**one)
    hook.remove()
    with torch.no_grad():
        model(**one)


def test_an_interrupt_leaves_nothing_open():
    model, one = alone()
    with vtprune.attach(model, "fastv", keep=3) as handle, torch.no_grad():
        want = model(**one).logits

        def interrupt(*args):
            raise KeyboardInterrupt

        hook = model.model.language_model.layers[3].register_forward_pre_hook(interrupt)
        for call in (lambda: model(**one), lambda: model.generate(**one, max_new_tokens=2)):
            with pytest.raises(KeyboardInterrupt):
                call()
            assert not handle.adapter.decoder.local.stack and not handle.adapter.decoder.entrance.generations
        hook.remove()
        assert torch.equal(model(**one).logits, want)


# ------------------------------------------------------------------------------------------------------- the same
# tokens however one asks


@pytest.mark.parametrize(("family", "variant"), FAMILIES)
@pytest.mark.parametrize("recipe", ["fastv", "pyramiddrop"])
def test_answers_are_scored_with_the_tokens_they_were_generated_with(family, variant, recipe):
    model, inputs = tiny(family, variant)
    n = inputs["input_ids"].shape[1]
    with torch.no_grad(), vtprune.attach(model, recipe, keep=0.2) as handle:
        made = model.generate(**inputs, **GREEDY)
        kept = [[k.tolist() for k in s.kept] for s in handle.report().stages]
        logits = torch.stack(made.logits, 1)
        whole = {**inputs, "input_ids": made.sequences}
        for name in SEQUENCES[1:]:
            if name in inputs:
                whole[name] = nn.functional.pad(inputs[name], (0, 5), value=int(name == "attention_mask"))
        labels = made.sequences.clone()
        labels[:, :n] = -100
        for more in ({"labels": labels}, {}):
            got = model(**whole, **more, use_cache=False).logits[:, n - 1 : -1]
            assert off(got, logits) < 1e-4
            assert [[k.tolist() for k in s.kept] for s in handle.report().stages] == kept
        uncached = model.generate(**inputs, **GREEDY, use_cache=False)
        assert off(torch.stack(uncached.logits, 1), logits) < 1e-4
        other = {**whole, "input_ids": torch.where(whole["attention_mask"] > 0, whole["input_ids"], 0)}
        other["input_ids"][:, -1] = 63 - other["input_ids"][:, -1] % 32  # no answer of this model: a prompt of its own
        model(**other)
        assert handle.report().visual_tokens


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
@pytest.mark.parametrize("way", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2}])
def test_answers_of_beams_are_known_again(family, way):
    """Fewer answers than beams, and prompts of different lengths."""
    model, inputs = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    each, n = way.get("num_return_sequences", 1), inputs["input_ids"].shape[1]
    way = {**way, "suppress_tokens": [model.config.image_token_id]}  # what a random model may well say
    with torch.no_grad(), vtprune.attach(model, "fastv", keep=0.3) as handle:
        sequences = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **way)
        for answer in range(each):
            mine = sequences[answer::each]
            whole = {**inputs, "input_ids": mine}
            for name in SEQUENCES[1:]:
                if name in inputs:
                    whole[name] = nn.functional.pad(inputs[name], (0, 4), value=int(name == "attention_mask"))
            kept = []
            for more in ({"labels": torch.where(torch.arange(n + 4) < n, -100, mine)}, {}):
                model(**whole, **more, use_cache=False)
                kept.append([k.tolist() for k in handle.report().stages[0].kept])
            assert kept[0] == kept[1]


def test_training_without_labels_is_refused_by_methods_that_rank():
    model, one = alone()
    model.train()
    with vtprune.attach(model, "pyramiddrop", keep=3):
        with pytest.raises(vtprune.UnsupportedError, match="pass labels"):
            model(**one)
        labels = one["input_ids"].clone()
        labels[:, :-3] = -100
        model(**one, labels=labels).loss.backward()
    with vtprune.attach(model, "random", keep=3) as handle:
        model(**one)
        assert handle.report().layer_tokens[0][-1] == 3


def test_where_everything_is_supervised_the_answer_is_what_follows_the_image():
    model, one = alone()
    ids = one["input_ids"]
    last = int((ids[0] == 3).nonzero()[-1])
    with torch.no_grad(), vtprune.attach(model, "pyramiddrop", keep=3) as handle:
        kept = []
        for start in (0, last + 1):  # everything; the caption right behind the image
            labels = ids.clone()
            labels[:, :start] = -100
            model(**one, labels=labels)
            kept.append([s.kept[0].tolist() for s in handle.report().stages])
        assert kept[0] == kept[1] and len(kept[0][-1]) == 3 and kept[0][-1][-1] == 15  # the row that ranks stays
        labels = torch.full_like(ids, -100)
        labels[:, last + 2 :] = ids[:, last + 2 :]
        model(**one, labels=labels)
        assert [s.kept[0].tolist() for s in handle.report().stages] != kept[0]
        prompt = {k: v[:, : last + 1] if k in SEQUENCES else v for k, v in one.items()}
        model.generate(**prompt, max_new_tokens=1)  # a prompt that ends with its image
        assert [s.kept[0].tolist() for s in handle.report().stages] == kept[0]


def test_a_prompt_that_ends_with_a_dropped_token_is_refused():
    model, one = alone()
    last = int((one["input_ids"][0] == 3).nonzero()[-1])
    prompt = {k: v[:, : last + 1] if k in SEQUENCES else v for k, v in one.items()}
    with torch.no_grad():
        for recipe, options in (("random", {}), ("fastv", {}), ("uniform", {"site": "projector"}), ("keep-last", {})):
            with vtprune.attach(model, recipe, keep=3, **options) as handle:
                logits = model(**prompt).logits[0, -1]
                assert float(logits.abs().max()) > 0 and 15 in handle.report().stages[-1].kept[0].tolist()
        with vtprune.attach(model, "drop-all"), pytest.raises(vtprune.UnsupportedError, match="ends with an image"):
            model(**prompt)


@pytest.mark.parametrize("query", ["last", "all"])
def test_what_ranks_never_sees_the_answer(query):
    model, one = alone()
    n = one["input_ids"].shape[1]
    kept = set()
    with torch.no_grad(), vtprune.attach(model, "fastv", keep=6, query=query) as handle:
        model(**one)
        want = handle.report().stages[0].kept[0].tolist()
        for seed in range(4):
            answer = torch.randint(8, 60, (1, 20), generator=torch.Generator().manual_seed(seed))
            ids = torch.cat([one["input_ids"], answer], 1)
            labels = torch.where(torch.arange(n + 20) < n, -100, ids)
            model(**{**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=labels)
            kept.add(tuple(handle.report().stages[0].kept[0].tolist()))
    assert kept == {tuple(want)}


def test_guidance_does_not_hide_the_report():
    model, one = alone()
    with torch.no_grad(), vtprune.attach(model, "pyramiddrop", keep=3) as handle:
        model.generate(**one, max_new_tokens=3, do_sample=False, guidance_scale=1.5)
        assert handle.report().visual_tokens == [16] and handle.report().layer_tokens[0][-1] == 3


@pytest.mark.ci
def test_solver_and_contract_look_into_the_wrappers_that_attach_looks_into():
    from vtprune.measure.run import dense_report

    model, inputs = tiny()
    want = vtprune.solve(model, "fastv", effective_tokens=0.5)
    wrapped = [torch.compile(model)]
    if find_spec("peft") is not None:
        from peft import LoraConfig, get_peft_model

        wrapped.append(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval())
    for outer in wrapped:
        assert vtprune.solve(outer, "fastv", effective_tokens=0.5) == want
        assert dense_report(outer, inputs).dense_flops > 0
        assert vtprune.verify(outer, "fastv", inputs, keep=0.5).passed


@pytest.mark.parametrize("family", ["llava", "llava-next", "llava-onevision", "paligemma"])
@pytest.mark.parametrize(("recipe", "keep"), [("tome", 0.5), ("flowcut", 0.4), ("fastv", 0.5), ("dpvr-lf", None)])
def test_the_report_of_a_cache_is_that_of_its_own_request(family, recipe, keep):
    """Whatever was read since: another number of images, other counts in the tower."""
    model, both = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    _, one = alone(family, next(iter(ADAPTERS.get(family).tiny)))
    with torch.no_grad(), vtprune.attach(model, recipe, **({} if keep is None else {"keep": keep})) as handle:
        known = []
        for inputs in (both, one, both):
            cache = cache_of(model(**inputs, use_cache=True))
            known.append((cache, handle.report().to_dict()))
        for cache, report in known:
            assert handle.report(of=cache).to_dict() == report
    assert known[0][1]["flops"] != known[1][1]["flops"]


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava"])
@pytest.mark.parametrize("way", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_several_answers_without_a_cache(family, way):
    model, inputs = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    rules = {**GREEDY, **way}
    with torch.no_grad(), vtprune.attach(model, "fastv", keep=0.3):
        torch.manual_seed(0)
        want = model.generate(**inputs, **rules)
        torch.manual_seed(0)
        got = model.generate(**inputs, **rules, use_cache=False)
        assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("recipe", ["fastv", "random", "pool"])
def test_a_second_turn_is_right_or_refused(family, recipe):
    variant = next(iter(ADAPTERS.get(family).tiny))
    model, one = alone(family, variant)
    words = torch.tensor([[11, 12, 13]])
    with torch.no_grad(), vtprune.attach(model, recipe, keep=4):
        first = model.generate(**one, **GREEDY)
        whole = torch.cat([first.sequences, words], 1)
        more = {
            n: nn.functional.pad(one[n], (0, whole.shape[1] - one[n].shape[1]), value=int(n == "attention_mask"))
            for n in SEQUENCES[1:]
            if n in one
        }
        try:
            got = model.generate(input_ids=whole, **more, **cached(model, cache_of(first)), **GREEDY).logits[0]
        except vtprune.UnsupportedError as e:
            assert recipe != "fastv" and "start a new prompt" in str(e)
            return
        assert recipe == "fastv"
        again = model.generate(**one, **GREEDY)
        cache = cache_of(again)
        for token in torch.cat([again.sequences[:, -1:], words], 1)[0]:
            want = model(input_ids=token.view(1, 1), **cached(model, cache)).logits[:, -1]
        assert off(got, want) < 1e-4


# --------------------------------------------------------------------------------------------------------------------
# packed prompts


def _flash(q, k, v, causal, scale, window):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    ahead = torch.arange(k.shape[0])[None] > torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(ahead, -torch.inf).softmax(-1), v)


@pytest.fixture
def flash(monkeypatch):
    """Slow stand-ins for flash attention's two functions, in the language model alone."""
    import transformers.modeling_flash_attention_utils as host

    def plain(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **more):
        return torch.stack([_flash(*x, causal, softmax_scale, window_size) for x in zip(q, k, v, strict=True)])

    def varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        **more,
    ):
        a, b = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert (a[-1], b[-1]) == (len(q), len(k)) and max(y - x for x, y in zip(a, a[1:], strict=False)) == max_seqlen_q
        parts = [(q[a[i] : a[i + 1]], k[b[i] : b[i + 1]], v[b[i] : b[i + 1]]) for i in range(len(a) - 1)]
        return torch.cat([_flash(*x, causal, softmax_scale, window_size) for x in parts])

    monkeypatch.setattr(
        host, "_lazy_imports", lambda *a, **k: (plain, varlen, None, host._pad_input, host._unpad_input)
    )

    def use(model):
        for module in model.model.language_model.modules():
            if hasattr(module, "config"):
                monkeypatch.setattr(module.config, "_attn_implementation_internal", "flash_attention_2")

    return use


@pytest.mark.sampled(2)
@pytest.mark.parametrize("attention", ["sdpa", "flash"])
@pytest.mark.parametrize(
    ("recipe", "options"),
    [("random", {}), ("fastv", {}), ("pyramiddrop", {}), ("fastv", {"query": "all"}), ("drop-all", {})],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_prompts_packed_into_one_row_stay_apart(attention, recipe, options, labelled, request):
    model, inputs = tiny("internvl", "qwen3")
    if attention == "flash":
        request.getfixturevalue("flash")(model)
    singles = [alone("internvl", "qwen3", b)[1] for b in (0, 1)]
    lengths = [s["input_ids"].shape[1] for s in singles]
    pack = {
        "input_ids": torch.cat([s["input_ids"] for s in singles], 1),
        "pixel_values": torch.cat([s["pixel_values"] for s in singles]),
    }
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = torch.full_like(pack["input_ids"], -100)
    for end in (lengths[0], sum(lengths)):
        labels[0, end - 3 : end] = pack["input_ids"][0, end - 3 : end]
    parts = labels.split(lengths, 1)
    budget = {} if recipe == "drop-all" else {"keep": 4}
    with torch.no_grad(), vtprune.attach(model, recipe, **budget, **options) as handle:
        apart = []
        for single, own in zip(singles, parts, strict=True):
            bare = {k: v for k, v in single.items() if k != "attention_mask"}
            apart.append(model(**bare, **({"labels": own} if labelled else {}), use_cache=False).logits)
            kept = handle.report().stages[-1].kept[0].tolist()
        got = model(**pack, position_ids=positions, **({"labels": labels} if labelled else {}), use_cache=False).logits
        assert off(got, torch.cat(apart, 1)) < 1e-4
        first = handle.report().visual_tokens[0] - 16
        assert [k - first for k in handle.report().stages[-1].kept[0].tolist() if k >= first] == kept


# ------------------------------------------------------------------------------------------------------------ reports
# and what they cost


def test_reports_belong_to_their_thread_and_to_their_cache():
    model, _ = tiny()
    ones = [alone(sample=b)[1] for b in (0, 1)]
    with vtprune.attach(model, "fastv", keep=4) as handle, torch.no_grad():
        with pytest.raises(vtprune.VtpruneError, match="no prefill"):
            handle.report()
        caches = [cache_of(model(**one, use_cache=True)) for one in ones]
        kept = [handle.report(of=c).stages[0].kept[0].tolist() for c in caches]
        assert kept[0] != kept[1] and handle.report().stages[0].kept[0].tolist() == kept[1]
        wrong = []
        only = []
        threading.Thread(target=lambda: only.append(handle.report().stages[0].kept[0].tolist())).start()

        def work(b):
            for _ in range(10):
                with torch.no_grad():
                    model(**ones[b])
                wrong.extend([b] * (handle.report().stages[0].kept[0].tolist() != kept[b]))

        threads = [threading.Thread(target=work, args=(b,)) for b in (0, 1)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong and only == [kept[1]]
        with pytest.raises(vtprune.VtpruneError, match="no prompt with visual tokens"):
            handle.report(of=cache_of(model(input_ids=torch.tensor([[5, 6]]), use_cache=True)) and object())


def test_images_encoded_ahead_keep_their_books_and_foreign_ones_are_refused():
    model, one = alone()
    if ENCODED not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers encodes inside the forward")
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randn(1, 3, 32, 32, generator=generator) for _ in range(40)]
    text = {k: v for k, v in one.items() if k != "pixel_values"}
    foreign = model.get_image_features(pixel_values=pictures[0])
    with vtprune.attach(model, "flowcut", keep=5) as handle, torch.no_grad():
        want = []
        for picture in (pictures[0], pictures[39]):
            logits = model(**text, pixel_values=picture).logits
            want.append((logits, handle.report().to_dict()))
        ahead = [model.get_image_features(pixel_values=p) for p in pictures]
        assert all(torch.isfinite(torch.cat(list(a.pooler_output))).all() for a in ahead)
        for number, (logits, report) in zip((0, 39), want, strict=True):
            assert torch.equal(model(**text, **{ENCODED: {"image": ahead[number]}}).logits, logits)
            assert handle.report().to_dict() == report
        with pytest.raises(vtprune.UnsupportedError, match="encode them with this attachment"):
            model(**text, **{ENCODED: {"image": foreign}})


class Count(TorchDispatchMode):
    READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}

    def __init__(self):
        super().__init__()
        self.operators = self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        self.reads += function._schema.name in self.READS
        return function(*args, **(kwargs or {}))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("family", "variant", "recipe"),
    [
        ("llava", "clip-llama", "flowcut"),
        pytest.param("llava", "clip-llama", "pyramiddrop", marks=pytest.mark.slow),
        pytest.param("llava-next", "clip-llama", "tome", marks=pytest.mark.slow),
    ],
)
def test_the_hundredth_prefill_costs_what_the_third_did(family, variant, recipe):
    model, inputs = tiny(family, variant)
    counts = []
    gc.collect()
    before = sum(type(o) is Run for o in gc.get_objects())
    with vtprune.attach(model, recipe, keep=0.4) as handle, torch.no_grad():
        for batch in range(100):
            given = {**inputs, "pixel_values": inputs["pixel_values"] + 0.01 * batch}
            if batch not in (2, 99):
                model(**given)
                continue
            with Count() as count:
                model(**given)
            counts.append((count.operators, count.reads))
        gc.collect()
        assert counts[0] == counts[1]
        # the last one's books alone: its pass of the tower, and that of the stages behind the projector
        assert sum(type(o) is Run for o in gc.get_objects()) <= before + 2 and len(handle.adapter.notes) <= 1


def test_host_reads_do_not_grow_with_the_frames_of_a_video():
    model, _ = tiny("qwen2.5-vl", next(iter(ADAPTERS.get("qwen2.5-vl").tiny)))
    found = []
    for frames in (4, 64):
        ids = torch.cat([torch.tensor([8, 9, 5]), torch.full((frames * 4,), 4), torch.tensor([10, 11, 12])])[None]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 4).int() * 2}
        given |= {
            "pixel_values_videos": torch.randn(frames * 16, 24 * 4),
            "video_grid_thw": torch.tensor([[frames, 4, 4]]),
        }
        row = []
        for recipe in (None, "pyramiddrop", "random"):
            handle = None if recipe is None else vtprune.attach(model, recipe, keep=0.25)
            with torch.no_grad(), Count() as count:
                model(**given)
            row.append(count.reads)
            if handle is not None:
                handle.remove()
        found.append([n - row[0] for n in row[1:]])
    assert found[0] == found[1]


def test_checkpoints_keep_no_forward_alive():
    model, one = alone()
    model.train()
    model.gradient_checkpointing_enable()
    labels = one["input_ids"].clone()
    labels[:, :-2] = -100
    alive = []
    with vtprune.attach(model, "pyramiddrop", keep=4) as handle:
        entrance = handle.adapter.decoder.entrance
        hook = model.model.language_model.register_forward_pre_hook(lambda *a: alive.append(weakref.ref(entrance.call)))
        for _ in range(3):
            model(**one, labels=labels).loss.backward()
            model.zero_grad()
        hook.remove()
    gc.collect()
    assert len(alive) == 3 and sum(call() is not None for call in alive) == 0


def test_a_side_branch_follows_the_model():
    model, one = alone()
    with torch.no_grad(), vtprune.attach(model, "dpvr-lf"):
        model.to(torch.bfloat16)
        out = model(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in one.items()})
        assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.logits).all()


def test_masks_and_positions_of_another_length_are_refused():
    model, one = alone()
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad(), vtprune.attach(model, "random", keep=3):
        for given in (one, text):
            for length in (1, given["input_ids"].shape[1] + 1):
                with pytest.raises((vtprune.UnsupportedError, RuntimeError, ValueError)) as caught:
                    model(**{**given, "attention_mask": torch.ones(1, length, dtype=torch.long)})
                assert isinstance(caught.value, vtprune.VtpruneError)


# -------------------------------------------------------------------------------------------------------------- parts
# replaced since

MULTIMODAL = [name for name in ADAPTERS if name not in ("hf-vit", "timm-vit", "open-clip")]


class Wrapped(nn.Module):
    """A layer that somebody has put his own around (FSDP, activation checkpointing)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "layer" else getattr(super().__getattr__("layer"), name)

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", ["one", "fewer", "skipped", "wrapped"])
@pytest.mark.parametrize("family", MULTIMODAL)
def test_layers_that_were_replaced_since_are_noticed(family, how):
    """Hooks do not move to a layer that takes another's place: the prompt, and a step behind a prompt that was pruned,
    are refused."""
    variant = next(iter(ADAPTERS.get(family).tiny))
    (model, one), (other, _) = alone(family, variant), tiny(family, variant)
    if how == "skipped" and family.startswith(("qwen", "glm")):
        pytest.skip("the stack runs all its layers, whatever the configuration says")
    step = {
        "input_ids": torch.full((1, 1), 9),
        "attention_mask": torch.ones(1, one["input_ids"].shape[1] + 1, dtype=torch.long),
    }
    step |= {k: torch.zeros(1, 1, dtype=one[k].dtype) for k in ("token_type_ids",) if k in one}
    with torch.no_grad(), vtprune.attach(model, "keep-last", keep=2, site="llm.2") as handle:
        cache = cache_of(model(**one, use_cache=True))
        lm, fresh = handle.adapter.lm, handle.adapter.lm.layers.__class__
        spare = vtprune.attach(other, "keep-last", keep=2, site="llm.2")
        layers = spare.adapter.lm.layers
        spare.remove()
        if how == "one":
            lm.layers[3] = layers[3]
        elif how == "fewer":
            lm.layers = fresh(list(lm.layers)[:-1])
        elif how == "wrapped":
            want = model(**one).logits
            lm.layers[3] = Wrapped(lm.layers[3])
            assert torch.equal(model(**one).logits, want)
            return
        else:
            lm.config.num_hidden_layers -= 1  # stacks run as many layers as it says
        for given in (one, {**step, **cached(model, cache)}):
            with pytest.raises(vtprune.UnsupportedError, match="replaced|skipped|layers, and"):
                model(**given)


def test_a_projector_that_was_replaced_since_is_noticed():
    (model, inputs), (other, _) = tiny(), tiny()
    with torch.no_grad(), vtprune.attach(model, "flowcut", keep=3):
        model.model.multi_modal_projector = other.model.multi_modal_projector
        with pytest.raises(vtprune.UnsupportedError, match="Projector"):
            model(**inputs)


def test_replicas_are_refused():
    """``nn.DataParallel`` calls shallow copies, whose hooks are those of the original."""
    model, inputs = tiny()
    with torch.no_grad(), vtprune.attach(model, "fastv", keep=3):
        for module, given in (
            (model, inputs),
            (model.model, {k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")}),
        ):
            replica = module._replicate_for_data_parallel()
            replica._modules = dict(module._modules)  # as they are given to it, one after the other
            with pytest.raises(vtprune.UnsupportedError, match="replica"):
                replica(**given)


@pytest.fixture
def shard(tmp_path):
    """``fully_shard`` of a model layer by layer, block by block, over one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))

    def sharded(model, *lists):
        for part in [part for parts in lists for part in parts]:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)

    yield sharded
    torch.distributed.destroy_process_group()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "recipe, options",
    [
        ("fastv", {}),
        ("pyramiddrop", {"score_layer": "previous"}),
        ("pyramiddrop", {}),
        ("flowcut", {}),
        ("tome", {}),
        ("dpvr-lf", {}),
    ],
)
@pytest.mark.parametrize("first", ["attached", "sharded"])
def test_sharded_models_are_pruned_alike(shard, recipe, options, first):
    """FSDP2: layers whose weights are shared out between their forwards, also where one's attention is read later;
    copies of layers need whole ones."""
    (model, inputs), (whole, _) = tiny(), tiny()
    with torch.no_grad(), vtprune.attach(whole, recipe, **options) as handle:
        want, sites = whole(**inputs).logits, [s.site for s in handle.report().stages]
    parts = model.model.language_model.layers, model.model.vision_tower.encoder.layers
    if first == "sharded":
        shard(model, *parts)
        if recipe == "dpvr-lf":
            with pytest.raises(vtprune.UnsupportedError, match="sharded"):
                vtprune.attach(model, recipe, **options)
            return
    with torch.no_grad(), vtprune.attach(model, recipe, **options) as handle:
        if first == "attached":
            shard(model, *parts)
        assert torch.equal(model(**inputs).logits, want) and [s.site for s in handle.report().stages] == sites


@pytest.mark.parametrize(
    "recipe, options", [("fastv", {"keep": 3}), ("flowcut", {"keep": 3}), ("dpvr-lf", {"variant": "kv"})]
)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_cache_whose_samples_move_goes_on(recipe, options, positions):
    """What reorders, selects or repeats the samples of a cache moves what is known of them; rows that fit no sample are
    refused."""
    model, inputs = tiny()
    ids, mask = torch.tensor([[9], [11]]), torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    place = mask.sum(1, keepdim=True) - 1
    swap = torch.tensor([1, 0])
    with torch.no_grad(), vtprune.attach(model, recipe, positions=positions, **options):

        def read():
            given = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)}
            return cache_of(model(**given, use_cache=True))

        def step(cache, rows, placed=True):
            where = {"position_ids": place[rows]} if placed else {}
            return model(input_ids=ids[rows], attention_mask=mask[rows], **where, **cached(model, cache)).logits

        want = step(read(), torch.arange(2))
        for move, rows in (
            (lambda c: c.reorder_cache(swap), swap),
            (lambda c: c.batch_select_indices(torch.tensor([1])), torch.tensor([1])),
            (lambda c: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1])),
        ):
            for placed in (True, False)[
                : 2 if recipe == "flowcut" else 1
            ]:  # behind a short first layer positions are known
                cache = read()
                move(cache)
                assert off(step(cache, rows, placed), want[rows]) < 1e-5
        with pytest.raises(vtprune.UnsupportedError, match="2 prompts"):
            step(read(), torch.tensor([0, 1, 1]))
        cache = read()
        twin = copy.deepcopy(cache)
        with pytest.raises(vtprune.UnsupportedError, match="copy"):
            twin.reorder_cache(swap)
        assert off(step(cache, torch.arange(2)), want) < 1e-5, "what moves in a copy stays there"


def test_a_cache_in_which_nothing_was_dropped_is_as_any_other():
    """It may be copied, and its samples repeated, as without an attachment."""
    model, inputs = tiny()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1).repeat_interleave(2, 0)
    step = {"input_ids": torch.full((4, 1), 9), "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}

    def repeated():
        cache = copy.deepcopy(cache_of(model(**inputs, use_cache=True)))
        cache.batch_repeat_interleave(2)
        return model(**step, **cached(model, cache)).logits

    def in_place():
        cache = cache_of(model(**inputs, use_cache=True))
        cache.batch_repeat_interleave(2)
        return model(**step, **cached(model, cache)).logits

    with torch.no_grad():
        want = repeated()
        with vtprune.attach(model, "fastv", keep=1.0):
            assert off(in_place(), want) < 1e-6 and off(repeated(), want) < 1e-6


def test_a_static_cache_that_is_used_again_follows_its_new_prompt():
    """Emptied, read into by another attachment, reordered: what is moved is the new prompt's."""
    from transformers import StaticCache

    model, inputs = tiny()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    place, ids, swap = mask.sum(1, keepdim=True) - 1, torch.tensor([[9], [11]]), torch.tensor([1, 0])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)

    def read(into):
        given = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)}
        return cache_of(model(**given, use_cache=True, **({} if into is None else cached(model, into))))

    with torch.no_grad(), vtprune.attach(model, "fastv", keep=3) as handle:
        read(cache)
        handle.remove()
    cache.__dict__.pop("update")  # what remove() closed is opened again by hand
    cache.reset()
    with torch.no_grad(), vtprune.attach(model, "pyramiddrop", keep=2):
        want = model(input_ids=ids, attention_mask=mask, position_ids=place, **cached(model, read(None))).logits[swap]
        read(cache)
        cache.reorder_cache(swap)
        got = model(
            input_ids=ids[swap], attention_mask=mask[swap], position_ids=place[swap], **cached(model, cache)
        ).logits
    assert off(got, want) < 1e-5


def test_recordings_are_refused():
    """A trace or an export would repeat the choice made for one prompt."""
    model, inputs = tiny()
    tower, images = tiny("timm-vit", next(iter(ADAPTERS.get("timm-vit").tiny)))
    pixels = next(iter(images.values()))
    with (
        torch.no_grad(),
        vtprune.attach(model, "random", keep=3),
        vtprune.attach(tower, "random", keep=3, site="vision.1"),
    ):
        with pytest.raises(vtprune.UnsupportedError, match="traced or exported"):
            torch.export.export(model, (), inputs, strict=False)
        with pytest.raises(vtprune.UnsupportedError, match="traced or exported"):
            torch.export.export(tower, (pixels,), strict=False)
        with pytest.raises(vtprune.UnsupportedError, match="traced or exported"):
            torch.jit.trace(tower, (pixels,), check_trace=False)
        with pytest.raises(vtprune.UnsupportedError, match="traced or exported"):
            torch.jit.trace(
                lambda *given: model(**dict(zip(inputs, given, strict=True))).logits,
                tuple(inputs.values()),
                check_trace=False,
            )


@pytest.mark.parametrize(("family", "variant"), [("llava", "clip-llama"), ("causal-lm", "llama")])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_four_axes_tells_padding_or_is_refused(family, variant, dtype):
    """Padding that sees nothing is padding, as in a 2-D mask; padding that sees itself cannot be told from a token."""
    model, inputs = tiny(family, variant)
    mask = inputs["attention_mask"].bool()
    assert not mask.all()
    length, eye = mask.shape[1], torch.eye(mask.shape[1], dtype=torch.bool)
    hidden = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None]

    def given(seen):
        if dtype != torch.bool:
            seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return {**inputs, "attention_mask": seen}

    with vtprune.attach(model, "fastv", keep=0.4, layer=2) as handle, torch.no_grad():
        model(**inputs)
        want = [k.tolist() for k in handle.report().stages[0].kept]
        model(**given(hidden))
        assert [k.tolist() for k in handle.report().stages[0].kept] == want
        blocks = (torch.arange(length) < 9)[:, None] == (torch.arange(length) < 9)  # two prompts in each row
        for seen in (hidden | eye, torch.ones_like(hidden).tril() & blocks):
            with pytest.raises(vtprune.UnsupportedError, match="seen by themselves alone"):
                model(**given(seen))
        model(**given(torch.ones_like(hidden).tril()))  # all are tokens
