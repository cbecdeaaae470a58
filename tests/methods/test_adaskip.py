"""AdaSkip (arXiv 2501.02336) against slow transcriptions: of what is measured, what is chosen, and what then runs."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.host import cache_of, cached, held
from vtprune.models.parts.tiny import tiny_build, tiny_text

import vtprune
from fake import picture
from fake import tiny as fake_model
from prompts import llama
from vtprune.check.case import Case
from vtprune.check.verify import check
from vtprune.cli import main, models
from vtprune.core.planning import load_recipe
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.inputs.chats import prepare
from vtprune.measure import fit
from vtprune.measure.samples import Sample
from vtprune.measure.similarity import similarities
from watch import spent

FAMILIES = [("causal-lm", v) for v in ("llama", "gemma3", "phi3")] + [
    ("llava", "clip-llama"),
    ("qwen2-vl", "images"),
    ("gemma3", "sliding"),
    ("paligemma", "gemma2"),
]
EVERY = [(f, v) for f in ADAPTERS if f not in ("hf-vit", "timm-vit", "open-clip") for v in ADAPTERS.get(f).tiny]
NAMES = ("attention", "mlp")


def given(model, lm, inputs) -> tuple[Tensor, list[dict]]:
    """What the stock model's first layer reads of ``inputs``, ``[B, n, C]``, and each layer's tables and masks."""
    rows, told = [], []

    def note(module, args, kwargs):
        rows.append(args[0] if args else kwargs["hidden_states"])
        told.append({k: kwargs[k] for k in ("position_embeddings", "attention_mask", "position_ids") if k in kwargs})

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in lm.layers]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return rows[0], told


def attended(layer, x: Tensor, told: dict) -> Tensor:
    """``x + Attn(norm x)``, of Gemmas with a second norm behind the attention."""
    out = layer.self_attn(hidden_states=layer.input_layernorm(x), **told)[0]
    return x + (layer.post_attention_layernorm(out) if sandwich(layer) else out)


def fed(layer, y: Tensor) -> Tensor:
    """``y + MLP(norm y)``."""
    if sandwich(layer):
        return y + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(y)))
    return y + layer.mlp(layer.post_attention_layernorm(y))


def sandwich(layer) -> bool:
    return hasattr(layer, "post_feedforward_layernorm")


def slow(lm, x: Tensor, told: list[dict], gone: dict[int, float]) -> list[Tensor]:
    """What stands in front of each sub-layer, and behind the last; those that are ``gone`` hand on their input times
    their ratio."""
    out = [x]
    for i, layer in enumerate(lm.layers):
        for half in (0, 1):
            x, n = out[-1], 2 * i + half
            out.append(x * gone[n] if n in gone else fed(layer, x) if half else attended(layer, x, told[i]))
    return out


def most_similar(similarity, count: int) -> list[int]:
    """The ``count`` highest, one after the other, the first of equal ones."""
    left, out = dict(enumerate(similarity)), []
    for _ in range(count):
        best = next(n for n in left if left[n] == max(left.values()))
        out.append(best)
        del left[best]
    return sorted(out)


def names(numbers) -> list[str]:
    return [f"llm.{n // 2}.{NAMES[n % 2]}" for n in numbers]


def drawn(depth: int, seed: int) -> tuple[list[float], list[float]]:
    """Similarities, some of them equal, that leave each type's first attention in; and ratios."""
    draw = random.Random(seed)
    similarity = [round(draw.uniform(0, 1), 1) for _ in range(2 * depth)]
    for layer in (0, 1, 3, 5):
        similarity[2 * layer] = -1.0
    return similarity, [round(draw.uniform(0.5, 1.5), 3) for _ in range(2 * depth)]


def limit(lm) -> float:
    """Gemmas normalise in 32 bits, whatever the model's type."""
    return 1e-5 if sandwich(lm.layers[0]) or "Phi3" in type(lm).__name__ else 1e-9


def doubled(inputs) -> dict:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize(("family", "variant"), FAMILIES, ids=lambda x: x)
def test_equals_the_transcription(tiny, family, variant):
    """Logits and hidden states of single prompts, and which sub-layers are left out."""
    model, inputs = tiny(family, variant)
    model, inputs = model.double(), doubled(inputs)
    case = Case(model, load_recipe("mindskip"), inputs, {})
    lm = case.adapter.lm
    for seed, one in enumerate(case.samples()):
        x, told = given(model, lm, one)
        similarity, ratio = drawn(len(lm.layers), seed)
        for count in (3, 5):
            chosen = most_similar(similarity, count)
            options = {"similarity": similarity, "ratio": ratio, "sublayers": count}
            with vtprune.attach(model, "adaskip", **options) as handle, torch.no_grad():
                got = model(**one, output_hidden_states=True)
                assert handle.report().skipped == [sorted(names(chosen))]
            with torch.no_grad():
                want = slow(lm, x, told, {n: ratio[n] for n in chosen})
            for at, state in enumerate(got.hidden_states[:-1]):
                assert torch.allclose(state, want[2 * at], atol=limit(lm) * float(want[2 * at].abs().max())), at
            with torch.no_grad():
                logits = model.lm_head(lm.norm(want[-1]))
                plain = model(**one, output_hidden_states=True)
            cap = getattr(lm.config, "final_logit_softcapping", None)
            if cap and not torch.equal(plain.logits, model.lm_head(plain.hidden_states[-1])):  # not in all releases
                logits = torch.tanh(logits / cap) * cap
            assert torch.allclose(got.logits, logits, atol=limit(lm) * float(logits.abs().max()))


def test_residuals_that_are_scaled_themselves():
    """Granite adds a share of what its halves make."""
    config = hf.GraniteConfig(**tiny_text(residual_multiplier=0.22, logits_scaling=1.0))
    model = tiny_build(hf.GraniteForCausalLM, config).double()
    ids = torch.randint(8, 64, (1, 20), generator=torch.Generator().manual_seed(4))
    x, told = given(model, model.model, {"input_ids": ids})
    states = [x[0]]
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            x = x * 1.3 if i == 2 else x + 0.22 * layer.self_attn(layer.input_layernorm(x), **told[i])[0]
            x = x * 1.3 if i == 3 else x + 0.22 * layer.mlp(layer.post_attention_layernorm(x))
            states.append(x[0])
        with vtprune.attach(model, "adaskip", attention=(2,), mlp=(3,), ratio=1.3):
            got = model(input_ids=ids, output_hidden_states=True).hidden_states
    for mine, want in zip(got[:-1], states, strict=False):
        assert torch.allclose(mine[0], want, atol=1e-6 * float(want.abs().max()))


def measured(model, lm, samples, mean: str) -> tuple[list[float], list[float]]:
    """Similarity and ratio of every sub-layer, number by number."""
    of: list[list[list[tuple[float, float, float]]]] = []  # prompt, sub-layer, token: cosine and both norms
    for one in samples:
        x, told = given(model, lm, one)
        with torch.no_grad():
            states = [s[0].double().tolist() for s in slow(lm, x, told, {})]
        of.append(
            [
                [
                    (
                        sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b),
                        math.hypot(*a),
                        math.hypot(*b),
                    )
                    for a, b in zip(before, after, strict=True)
                ]
                for before, after in zip(states, states[1:], strict=False)
            ]
        )
    similarity, ratio = [], []
    for n in range(2 * len(lm.layers)):
        if mean == "tokens":
            tokens = [t for prompt in of for t in prompt[n]]
            similarity.append(sum(c for c, _, _ in tokens) / len(tokens))
            ratio.append(sum(b / a for _, a, b in tokens) / len(tokens))
        else:
            similarity.append(sum(sum(c for c, _, _ in p[n]) / len(p[n]) for p in of) / len(of))
            frobenius = [math.hypot(*(b for *_, b in p[n])) / math.hypot(*(a for _, a, _ in p[n])) for p in of]
            ratio.append(sum(frobenius) / len(of))
    return similarity, ratio


@pytest.mark.parametrize("mean", ["tokens", "requests"])
@pytest.mark.parametrize(
    ("family", "variant"),
    [("causal-lm", "llama"), ("causal-lm", "gemma3"), ("llava", "clip-llama"), ("qwen2-vl", "images")],
    ids=lambda x: x,
)
def test_what_is_measured(tiny, family, variant, mean):
    """Of a padded batch with unequal prompts, and of its prompts one by one."""
    model, inputs = tiny(family, variant)
    model, inputs = model.double(), doubled(inputs)
    case = Case(model, load_recipe("mindskip"), inputs, {})
    want = measured(model, case.adapter.lm, case.samples(), mean)
    lengths = {one["input_ids"].shape[1] for one in case.samples()}
    assert len(lengths) > 1, "the means would be the same"
    for batches in ([inputs], case.samples()):
        got = similarities(model, batches, mean=mean)
        for mine, theirs in zip(got, want, strict=True):
            assert mine == pytest.approx(theirs, rel=10 * limit(case.adapter.lm))
    assert check("restored", model, "random", inputs, keep=0.5).passed


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("family", "variant"), EVERY, ids=lambda x: x)
def test_every_family_that_can_scale_can_be_measured(tiny, family, variant):
    """And the other way round; what no sub-layer's place was told of leaves the logits as they are."""
    model, inputs = tiny(family, variant)
    with torch.no_grad():
        want = model(**inputs).logits
    try:
        vtprune.attach(model, "adaskip", mlp=(1,), ratio=1.1).remove()
    except UnsupportedError as e:
        with pytest.raises(UnsupportedError, match=re.escape(str(e))):
            similarities(model, [inputs])
        pytest.skip(str(e))
    similarity, ratio = similarities(model, [inputs])
    assert len(similarity) == len(ratio) == 2 * len(Case(model, load_recipe("mindskip"), inputs, {}).adapter.lm.layers)
    assert all(0 < abs(s) <= 1 and 0 < r < 100 for s, r in zip(similarity, ratio, strict=True))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)


def test_means_differ(tiny):
    model, inputs = tiny("causal-lm", "llama")
    one, other = (similarities(model, [inputs], mean=mean) for mean in ("tokens", "requests"))
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=0.3) and a != pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize(("family", "variant"), [("causal-lm", "llama"), ("llava", "clip-llama")])
def test_nothing_left_out_is_the_dense_model(tiny, family, variant):
    model, inputs = tiny(family, variant)
    with torch.no_grad():
        want = model(**inputs).logits
        with vtprune.attach(model, "adaskip", similarity=(0.5,) * 12, ratio=2.0, sublayers=0) as handle:
            assert torch.equal(model(**inputs).logits, want)
            report = handle.report()
    assert report.skipped == [[], []] and report.flops == report.dense_flops
    assert report.kv_bytes == report.dense_kv_bytes


def test_an_answer_goes_without_them_too():
    """Token by token, all at once and without a cache; FLOPs and bytes are those of what ran."""
    model, ids = llama(length=30)
    model.set_attn_implementation("eager")  # whose products the counter sees
    more = torch.randint(8, 64, (1, 5), generator=torch.Generator().manual_seed(1))
    gone = {2 * 1: 1.25, 2 * 2 + 1: 0.75, 2 * 4: 0.5, 2 * 4 + 1: 1.5}
    ratio = [gone.get(n, 9.0) for n in range(12)]
    whole = torch.cat([ids, more], 1)
    with torch.no_grad():
        x, told = given(model, model.model, {"input_ids": whole})
        want = model.lm_head(model.model.norm(slow(model.model, x, told, gone)[-1]))[:, 30:]
    dense = spent(model, {"input_ids": ids})
    with vtprune.attach(model, "adaskip", attention=(1, 4), mlp=(2, 4), ratio=ratio) as handle, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        report, cache = handle.report(), cache_of(out)
        assert report.skipped == [["llm.1.attention", "llm.2.mlp", "llm.4.attention", "llm.4.mlp"]]
        assert report.dense_flops - report.flops == dense - counter.get_total_flops() > 0
        assert [held(cache, i) for i in range(6)] == [30, 0, 30, 30, 0, 30]
        assert report.kv_bytes * 3 == report.dense_kv_bytes * 2
        steps = [model(input_ids=more[:, i : i + 1], **cached(model, cache)).logits for i in range(5)]
        again = cache_of(model(input_ids=ids, use_cache=True))
        at_once = model(input_ids=more, **cached(model, again)).logits
        labels = torch.cat([torch.full_like(ids, -100), more], 1)
        uncached = model(input_ids=whole, labels=labels, use_cache=False).logits[:, 30:]
    for got in (torch.cat(steps, 1), at_once, uncached):
        assert torch.allclose(got, want, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("family", "variant"), [("causal-lm", "gemma3"), ("qwen2.5-vl", "images"), ("llava", "clip-llama")]
)
def test_batches_beams_and_requests_between_each_other(tiny, family, variant):
    model, inputs = tiny(family, variant)
    options = {"attention": (2, 4), "mlp": (0, 2), "ratio": 1.2}
    for name in ("batch_is_singles", "interleaved_is_solo", "cached_is_uncached", "decode_is_masked_dense", "restored"):
        assert (found := check(name, model, "adaskip", inputs, **options)).passed, f"{name}: {found.detail}"
    case = Case(model, load_recipe("mindskip"), inputs, {})
    with vtprune.attach(model, "adaskip", **options), torch.no_grad():
        how = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0}
        both = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
        alone = [model.generate(**one, **how)[:, one["input_ids"].shape[1] :] for one in case.samples()]
    assert torch.equal(both, torch.cat(alone))


def beside_text(inputs) -> dict:
    """The batch with a third sample, of text alone."""
    length = inputs["input_ids"].shape[1]
    text = torch.randint(8, 60, (1, length), generator=torch.Generator().manual_seed(3))
    return {
        "input_ids": torch.cat([inputs["input_ids"], text]),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(text)]),
        "pixel_values": inputs["pixel_values"],
    }


def test_samples_without_images_stay_whole_beside_others(tiny):
    model, inputs = tiny("llava", "clip-llama")
    batch = beside_text(inputs)
    step = torch.tensor([[9], [9], [9]])
    grown = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        dense = model(**batch, use_cache=True)
        next_ = model(input_ids=step, attention_mask=grown, **cached(model, cache_of(dense))).logits
        with vtprune.attach(model, "adaskip", attention=(1, 3), mlp=(3,), ratio=1.5) as handle:
            got = model(**batch, use_cache=True)
            assert handle.report().skipped[2] == [] != handle.report().skipped[0]
            steps = model(input_ids=step, attention_mask=grown, **cached(model, cache_of(got))).logits
            alone = model(**inputs).logits
    assert torch.allclose(got.logits[2], dense.logits[2], atol=1e-5) and torch.allclose(steps[2], next_[2], atol=1e-5)
    real = inputs["attention_mask"].bool()
    assert torch.allclose(got.logits[:2][real], alone[real], atol=1e-5)
    assert not torch.allclose(steps[0], next_[0], atol=1e-2)


def test_gradients_are_the_transcriptions():
    model, ids = llama(length=20)
    weight = model.model.layers[0].mlp.down_proj.weight
    gone = {2 * 1: 1.25, 2 * 3 + 1: 0.75}
    x, told = given(model, model.model, {"input_ids": ids})
    out = model.lm_head(model.model.norm(slow(model.model, x, told, gone)[-1]))
    want = torch.autograd.grad(out.square().sum(), weight)[0]
    labels = ids.clone()
    labels[:, :15] = -100
    ratio = [gone.get(n, 1.0) for n in range(12)]
    with vtprune.attach(model, "adaskip", attention=(1,), mlp=(3,), ratio=ratio):
        got = torch.autograd.grad(model(input_ids=ids, labels=labels).logits.square().sum(), weight)[0]
    assert torch.allclose(got, want, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_layers_whose_halves_read_side_by_side_are_refused(tiny, monkeypatch, share):
    """A sub-layer's input would be no other's output; with a ratio of 1 nothing is scaled, and it is the same. Also
    where the MLP reads a ``share`` of what the attention adds."""
    model, inputs = tiny("generic", "aya-vision")
    with pytest.raises(UnsupportedError, match="does not read what its attention leaves"):
        vtprune.attach(model, "adaskip", attention=(2,), ratio=1.1)
    with pytest.raises(UnsupportedError, match="does not read what its attention leaves"):
        similarities(model, [inputs])
    vtprune.attach(model, "adaskip", attention=(2,)).remove()
    model, _ = tiny("causal-lm", "llama")
    layer = model.model.layers[3]

    def beside(x, **kwargs):
        attended = layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]
        return x + attended + layer.mlp(layer.post_attention_layernorm(x + share * attended))

    monkeypatch.setattr(layer, "forward", beside)
    with pytest.raises(UnsupportedError, match="the MLP of layer 3 does not read"):
        vtprune.attach(model, "adaskip", mlp=(2,), ratio=1.1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "'vtprune fit adaskip' writes that as a recipe"),
        ({"ratio": 1.1}, "'vtprune fit adaskip' writes that as a recipe"),
        ({"similarity": (0.5,) * 8}, "fitted to a model of 4 layers, and this one has 6"),
        ({"similarity": (0.5,) * 12, "ratio": (1.0,) * 13}, "ratio= was fitted to a model of 6.5 layers"),
        ({"similarity": (0.5,) * 12, "sublayers": 13}, "there are 12 sub-layers"),
        ({"similarity": (0.5,) * 11 + (math.nan,)}, "at least -1"),
        ({"similarity": (0.5,) * 11 + (1.1,)}, "at most 1"),
        ({"attention": (1,), "ratio": (1.0,) * 11 + (math.inf,)}, "above 0"),
        ({"attention": (1,), "ratio": 0.0}, "above 0"),
        ({"attention": (1,), "ratio": -1.0}, "above 0"),
        ({"attention": (3, 1)}, "must ascend"),
        ({"mlp": (6,)}, "must ascend and lie in 0..5"),
        ({"mlp": ()}, "empty"),
        ({"sublayers": -1}, "at least 0"),
        ({"similarity": (1.0, *(0.5,) * 11), "sublayers": 1}, "first of type full_attention"),
        ({"attention": (1,), "keep": 0.5}, "takes no keep="),
        ({"attention": (1,), "effective_tokens": 0.5}, "meets no budget"),
    ],
)
def test_what_cannot_be(tiny, options, says):
    model, _ = tiny("llava", "clip-llama")
    with pytest.raises(VtpruneError, match=says):
        vtprune.attach(model, "adaskip", **options)


def test_what_cannot_be_measured(tiny):
    model, inputs = tiny("causal-lm", "llama")
    with pytest.raises(VtpruneError, match="there are no prompts"):
        similarities(model, [])
    with pytest.raises(VtpruneError, match="not one of 'tokens', 'requests'"):
        similarities(model, [inputs], mean="x")
    with vtprune.attach(model, "random", keep=0.5), pytest.raises(VtpruneError, match="attached already"):
        similarities(model, [inputs])
    for wrong in (None, "text", ["text"], [{"input_ids": [[1, 2]]}], [{"inputs_embeds": torch.zeros(1, 4, 48)}]):
        with pytest.raises(VtpruneError, match="a batch is what the model is called with"):
            similarities(model, wrong)
    ids = inputs["input_ids"]
    want = similarities(model, [inputs])
    assert similarities(model, {**inputs, "labels": ids, "use_cache": True, "logits_to_keep": 3}) == want
    model.model.layers[1].train()
    with pytest.raises(VtpruneError, match="in training mode"):
        similarities(model, [inputs])
    model.eval()
    seeing, shown = tiny("llava", "clip-llama")
    with pytest.raises(VtpruneError, match="not finite"):
        similarities(seeing, [{**shown, "pixel_values": shown["pixel_values"] * torch.nan}])
    tower, pixels = tiny("timm-vit", "class")
    with pytest.raises(UnsupportedError, match="no language model"):
        similarities(tower, [pixels])


SAMPLES = [Sample(picture(i), q, "", "") for i, q in enumerate(["what is it", "is the big one red then", "where"])]


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("mean", ["tokens", "requests"])
def test_the_recipe_holds_what_was_measured(batch, mean):
    model, processor = fake_model()
    shown = [prepare(processor, [s.picture()], [s.question]) for s in SAMPLES]
    want = measured(model, Case(model, load_recipe("random"), {}, {}).adapter.lm, shown, mean)
    ticks: list[int] = []
    found = fit.left_out(model, processor, SAMPLES, sublayers=5, mean=mean, batch=batch, progress=ticks.append)
    options = found.recipe.stages[0].options
    assert options["similarity"] == pytest.approx(want[0], rel=1e-4)
    assert options["ratio"] == pytest.approx(want[1], rel=1e-4)
    assert options["sublayers"] == 5 and sum(ticks) == found.facts["prompts"] == 3
    assert found.facts["left_out"] == names(most_similar(options["similarity"], 5))
    assert f"means over {mean}" in found.recipe.source and "3 prompts" in found.recipe.source
    with vtprune.attach(model, found.recipe) as handle, torch.no_grad():
        model(**shown[0])
        assert handle.report().skipped == [sorted(found.facts["left_out"])]


def test_fits_that_cannot_be():
    model, processor = fake_model()
    ticks: list[int] = []
    with pytest.raises(VtpruneError, match="sublayers=13, and there are 12"):
        fit.left_out(model, processor, SAMPLES, sublayers=13, progress=ticks.append)
    assert not ticks, "it was measured first"
    with pytest.raises(VtpruneError, match="nothing to fit on"):
        fit.left_out(model, processor, [])
    with pytest.raises(UnsupportedError, match="first of type full_attention"):  # not written, to be refused later
        fit.left_out(model, processor, SAMPLES, sublayers=12)


def test_the_command_writes_a_recipe(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load", lambda args: fake_model())
    picture().save(tmp_path / "a.png")
    asked = ["--image", str(tmp_path / "a.png"), "--question", "what is it"] * 2
    out = tmp_path / "fitted.json"
    words = ["fit", "adaskip", "--recipe-out", str(out), "--sublayers", "4", *asked]
    assert main.main(words) == 0
    told = capsys.readouterr().out
    assert told.count("left out") == 5 and "llm.5.mlp" in told and f"wrote {out}" in told  # four rows and the source
    assert main.main([*words, "--mean", "requests", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    recipe = vtprune.Recipe.load(out)
    assert vtprune.Recipe.from_dict(told["recipe"]) == recipe and told["mean"] == "requests"
    assert len(told["left_out"]) == 4 and recipe.stages[0].options["ratio"] == told["ratio"]
    with vtprune.attach(fake_model()[0], recipe, sublayers=2) as handle:
        assert len({planned for planned in handle.adapter.decoder.skipping.watched}) == 2
    run = ["run", "--image", str(tmp_path / "a.png"), "--question", "what", "--recipe"]
    broken = {
        "short": {"similarity": [0.5] * 8},
        "nan": {"similarity": [0.5] * 11 + [math.nan]},
        "huge": {"similarity": [0.5] * 12, "ratio": [1e9] * 12},
        "word": {"similarity": "high"},
        "strange": {"similarity": [0.5] * 12, "requests": 20},
    }
    for name, options in broken.items():
        data = {**recipe.to_dict(), "stages": [{"method": "adaskip", "options": options}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    for name in (*broken, "missing"):
        assert main.main([*run, str(tmp_path / f"{name}.json")]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("vtprune: error: ") and "unexpected" not in lines[0], lines
