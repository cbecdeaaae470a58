"""AdaSkip (arXiv 2501.02336), its online part: MLPs that go from an answer by what its first tokens showed, against a
slow transcription that reads the whole answer again for every token."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as hf
from test_adaskip import EVERY, FAMILIES, attended, beside_text, doubled, drawn, fed, given, limit, names
from torch import Tensor
from vtprune.models.engine.host import cache_of, cached
from vtprune.models.engine.online import reads_between
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

WATCH = 3


def slow(lm, x: Tensor, told: list[dict], gone: dict[int, float], prompt: int, beta: float) -> tuple[Tensor, list[int]]:
    """The states ``[1, n, C]`` behind the last layer of a prompt of so many tokens and its answer, and which MLPs went
    online. Those that are ``gone`` beforehand hand on their input times their ratio."""
    later = []
    for i, layer in enumerate(lm.layers):
        y = x * gone[2 * i] if 2 * i in gone else attended(layer, x, told[i])
        if 2 * i + 1 in gone:
            x = y * gone[2 * i + 1]
            continue
        z = fed(layer, y)
        similar, longer = 0.0, 0.0
        for row in range(prompt, min(prompt + WATCH, x.shape[1])):
            a, b = y[0, row], z[0, row]
            similar += float((a * b).sum() / (a.norm() * b.norm())) / WATCH
            longer += float(b.norm() / a.norm()) / WATCH
        if x.shape[1] > prompt + WATCH and similar >= beta:
            later.append(2 * i + 1)
            z = torch.cat([z[:, : prompt + WATCH], y[:, prompt + WATCH :] * longer], 1)
        x = z
    return x, later


@torch.no_grad()
def similar_mlps(model, lm, inputs, gone: dict[int, float], more: Tensor, follows: dict | None = None) -> list[float]:
    """What the transcription's threshold is compared with, by layer; NaN where nothing is left to watch."""
    whole = answered(inputs, more, follows or {})
    x, told = given(model, lm, whole)
    values, n = [], inputs["input_ids"].shape[1]
    for i, layer in enumerate(lm.layers):
        y = x * gone[2 * i] if 2 * i in gone else attended(layer, x, told[i])
        z = fed(layer, y)
        if 2 * i + 1 in gone:
            values.append(float("nan"))
            x = y * gone[2 * i + 1]
            continue
        rows = slice(n, n + WATCH)
        values.append(float(torch.nn.functional.cosine_similarity(y[0, rows], z[0, rows], dim=-1).mean()))
        x = z
    return values


def answered(inputs: dict, more: Tensor, follows: dict) -> dict:
    """Prompt and answer as one sequence; ``follows``: what other inputs say of an answer's tokens."""
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    out["attention_mask"] = torch.ones_like(out["input_ids"])
    for name, value in follows.items():
        if name in inputs:
            out[name] = torch.cat([inputs[name], torch.full_like(more, value)], 1)
    return out


def threshold(values: list[float]) -> float:
    """In the middle of the widest gap between them: no rounding moves one across."""
    known = sorted(v for v in values if v == v)
    gaps = [b - a for a, b in zip(known, known[1:], strict=False)]
    at = gaps.index(max(gaps))
    return (known[at] + known[at + 1]) / 2


@pytest.mark.parametrize(("family", "variant"), FAMILIES, ids=lambda x: x)
def test_equals_the_transcription(tiny, family, variant):
    """Token by token, several at once, and with labels without a cache."""
    model, inputs = tiny(family, variant)
    model, inputs = model.double(), doubled(inputs)
    case = Case(model, load_recipe("mindskip"), inputs, {})
    lm, seen = case.adapter.lm, list[Tensor]()
    gone = {2 * 2: 1.1, 2 * 3 + 1: 0.9}
    ratio = [gone.get(n, 7.0) for n in range(2 * len(lm.layers))]
    for one in case.samples():
        ids = one["input_ids"]
        more = torch.randint(8, 60, (1, 7), generator=torch.Generator().manual_seed(2))
        n, follows = ids.shape[1], case.adapter.follows
        whole = answered(one, more, follows)
        beta = threshold(similar_mlps(model, lm, one, gone, more, follows))
        x, told = given(model, lm, whole)
        with torch.no_grad():
            states, later = slow(lm, x, told, gone, n, beta)
            want = lm.norm(states)[:, n:]
        assert 0 < len(later) < len(lm.layers) - 1
        options = {"attention": (2,), "mlp": (3,), "ratio": ratio, "online": WATCH, "beta": beta}
        with vtprune.attach(model, "adaskip", **options) as handle, torch.no_grad():
            hook = lm.norm.register_forward_hook(lambda module, args, output: seen.append(output))
            ways = {"one by one": [1] * 7, "at once": [7], "across": [2, 3, 2], "from the middle": [3, 1, 3]}
            for how, sizes in ways.items():
                cache = cache_of(model(**one, use_cache=True))
                assert handle.report().skipped == [names([4, 7])] and handle.report().skipped_online == [[]]
                seen.clear()
                at = 0
                for q in sizes:
                    mask = torch.ones(1, n + at + q, dtype=torch.long)
                    model(input_ids=more[:, at : at + q], attention_mask=mask, **cached(model, cache))
                    at += q
                got = torch.cat(seen, 1)
                assert torch.allclose(got, want, atol=limit(lm) * float(want.abs().max())), how
                assert handle.report().skipped_online == [names(later)], how
                seen.clear()
            labels = torch.cat([torch.full_like(ids, -100), more], 1)
            model(**{**whole, "labels": labels, "use_cache": False})
            assert torch.allclose(seen[0][:, n:], want, atol=limit(lm) * float(want.abs().max()))
            for begun in (2, 5):  # an answer whose beginning came along with its prompt
                seen.clear()
                part = {**answered(one, more[:, :begun], follows), "labels": labels[:, : n + begun]}
                cache = cache_of(model(**part, use_cache=True))
                mask = torch.ones_like(whole["input_ids"])
                model(input_ids=more[:, begun:], attention_mask=mask, **cached(model, cache))
                got = torch.cat([seen[0][:, n:], seen[1]], 1)
                assert torch.allclose(got, want, atol=limit(lm) * float(want.abs().max())), begun
            hook.remove()


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("family", "variant"), EVERY, ids=lambda x: x)
def test_every_family_that_can_scale_can_watch(tiny, family, variant):
    """The part of a layer that is named reads what stands in front of the MLP: adding to it what the MLP makes, behind
    a second norm where there is one, gives the layer's output."""
    model, inputs = tiny(family, variant)
    try:
        handle = vtprune.attach(model, "adaskip", mlp=(2,), ratio=1.1, online=2, beta=0.5)
    except UnsupportedError as refusal:
        with pytest.raises(UnsupportedError):  # nor can it scale
            vtprune.attach(model, "adaskip", mlp=(2,), ratio=1.1)
        pytest.skip(str(refusal))
    layers, reads = handle.adapter.decoder_layers(), reads_between(handle.adapter.describe())
    handle.remove()
    number, rows = 1, {}
    layer = layers[number]
    hooks = [
        getattr(layer, reads[number]).register_forward_pre_hook(lambda m, a: rows.__setitem__("between", a[0])),
        layer.mlp.register_forward_hook(lambda m, a, out: rows.__setitem__("added", out)),
        layer.register_forward_hook(
            lambda m, a, out: rows.__setitem__("out", out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        added = rows["added"]
        behind = [n for n in ("post_feedforward_layernorm", "post_mlp_layernorm") if hasattr(layer, n)]
        added = getattr(layer, behind[0])(added) if behind else added
        added = added * getattr(layer, "residual_multiplier", 1.0)
    assert torch.allclose(rows["between"] + added, rows["out"], atol=1e-5)


@pytest.mark.parametrize(
    ("family", "variant"), [("causal-lm", "gemma3"), ("qwen2.5-vl", "images"), ("llava", "clip-llama")]
)
def test_batches_requests_and_references(tiny, family, variant):
    model, inputs = tiny(family, variant)
    options = {"attention": (2, 4), "mlp": (0, 2), "ratio": 1.2, "online": 3, "beta": -1.0}
    for name in ("batch_is_singles", "interleaved_is_solo", "cached_is_uncached", "decode_is_masked_dense", "restored"):
        assert (found := check(name, model, "adaskip", inputs, **options)).passed, f"{name}: {found.detail}"


def test_each_answer_decides_for_itself():
    """In a batch, with a threshold that some answers pass and others do not; and with beams, which bring along what
    they were watched for when they change places."""
    model, ids = llama(length=12, samples=4)
    more = torch.randint(8, 64, (4, 6), generator=torch.Generator().manual_seed(1))
    values = [similar_mlps(model, model.model, {"input_ids": ids[b : b + 1]}, {}, more[b : b + 1])[2] for b in range(4)]
    beta = threshold(values)
    options = {"sublayers": 0, "similarity": (0.0,) * 12, "online": WATCH, "beta": beta}
    with vtprune.attach(model, "adaskip", **options) as handle, torch.no_grad():

        def read(rows: Tensor, then: Tensor) -> tuple[Tensor, list[list[str]]]:
            cache, steps = cache_of(model(input_ids=rows, use_cache=True)), []
            for q in range(then.shape[1]):
                steps.append(model(input_ids=then[:, q : q + 1], **cached(model, cache)).logits)
            return torch.cat(steps, 1), handle.report(of=cache).skipped_online

        together, left = read(ids, more)
        for b in range(4):
            alone, mine = read(ids[b : b + 1], more[b : b + 1])
            assert torch.allclose(together[b : b + 1], alone, atol=1e-9) and mine == [left[b]]
        assert 0 < sum("llm.2.mlp" in some for some in left) < 4
        how = {"max_new_tokens": 8, "do_sample": False, "num_beams": 4, "eos_token_id": None, "pad_token_id": 0}
        found = model.generate(input_ids=ids[:2], return_dict_in_generate=True, output_scores=True, **how)
        sequences, scores = found.sequences, found.sequences_scores
        again = []
        for row in sequences:
            steps, _ = read(row[None, :12], row[None, 12:])
            first = model(input_ids=row[None, :12]).logits[:, -1:]
            every = torch.cat([first, steps[:, :-1]], 1).log_softmax(-1)
            again.append(every.gather(2, row[None, 12:, None]).sum() / 8)
    assert torch.allclose(scores.double(), torch.stack(again).double(), atol=1e-5)


def test_samples_that_change_places_bring_their_books_along():
    """Of prompts that brought answers of several lengths along, one without any; rows of the cache are chosen."""
    model, ids = llama(length=16, samples=3)
    more = torch.randint(8, 64, (3, 6), generator=torch.Generator().manual_seed(2))
    labels = torch.full_like(ids, -100)
    labels[0, 12:], labels[1, 15:] = ids[0, 12:], ids[1, 15:]  # four tokens of an answer, one, and none
    values = [threshold_of(model, ids[b : b + 1], labels[b : b + 1], more[b : b + 1]) for b in range(3)]
    options = {"sublayers": 0, "similarity": (0.0,) * 12, "online": WATCH, "beta": threshold(values)}
    order = [2, 0]
    with vtprune.attach(model, "adaskip", **options) as handle, torch.no_grad():

        def read(rows: Tensor, told: Tensor) -> object:
            return cache_of(model(input_ids=rows, labels=told, use_cache=True))

        def go_on(cache, tokens: Tensor) -> Tensor:
            steps = [
                model(input_ids=tokens[:, q : q + 1], **cached(model, cache)).logits for q in range(tokens.shape[1])
            ]
            return torch.cat(steps, 1)

        cache = read(ids, labels)
        cache.batch_select_indices(torch.tensor(order))
        first = go_on(cache, more[order, :4])
        cache.batch_select_indices(torch.tensor([1, 0]))
        second = go_on(cache, more[[0, 2], 4:])
        told = handle.report(of=cache).skipped_online
        for row, b in enumerate(order):
            cache = read(ids[b : b + 1], labels[b : b + 1])
            alone = go_on(cache, more[b : b + 1])
            assert torch.allclose(first[row : row + 1], alone[:, :4], atol=1e-9), b
            assert torch.allclose(second[1 - row : 2 - row], alone[:, 4:], atol=1e-9), b
            assert handle.report(of=cache).skipped_online == [told[b]], b
    assert told[1] == [] and told[0] and told[2]


def threshold_of(model, ids: Tensor, labels: Tensor, more: Tensor) -> float:
    """How similar layer 2's MLP leaves the first tokens of this answer."""
    start = int((labels[0] != -100).nonzero()[0]) if bool((labels != -100).any()) else ids.shape[1]
    answer = torch.cat([ids[:, start:], more], 1)
    return similar_mlps(model, model.model, {"input_ids": ids[:, :start]}, {}, answer)[2]


def test_padding_in_a_later_turn_is_not_watched():
    """A turn of one token beside one of four; each sample as alone."""
    model, ids = llama(length=12, samples=2)
    draw = torch.Generator().manual_seed(9)
    turn, rest = (torch.randint(8, 64, (2, 4), generator=draw) for _ in range(2))
    options = {"sublayers": 0, "similarity": (0.0,) * 12, "online": WATCH, "beta": -1.0}
    real = torch.ones(2, 20, dtype=torch.long)
    real[1, 13:16] = 0  # of the second sample's turn one token is real
    place = (real.cumsum(1) - 1).clamp_min(0)
    with vtprune.attach(model, "adaskip", **options) as handle, torch.no_grad():

        def go_on(cache, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
            how = {"attention_mask": mask, "position_ids": positions[:, -tokens.shape[1] :]}
            return model(input_ids=tokens, **how, **cached(model, cache)).logits

        cache = cache_of(model(input_ids=ids, use_cache=True))
        go_on(cache, turn, real[:, :16], place[:, :16])
        together = go_on(cache, rest, real, place)
        mask = torch.cat([real, torch.tensor([[1], [0]])], 1)
        go_on(cache, rest[:, :1], mask, torch.cat([place, place[:, -1:] + 1], 1))
        assert all(handle.report().skipped_online), "what was left out stays told"
        for b, count in ((0, 4), (1, 1)):
            cache = cache_of(model(input_ids=ids[b : b + 1], use_cache=True))
            n = 12 + count
            plain = torch.arange(n + 4)[None]
            go_on(cache, turn[b : b + 1, :count], torch.ones(1, n, dtype=torch.long), plain[:, :n])
            alone = go_on(cache, rest[b : b + 1], torch.ones(1, n + 4, dtype=torch.long), plain)
            assert torch.allclose(together[b : b + 1], alone, atol=1e-9), b


def test_masks_that_are_ready_made_tell_the_same_padding():
    """Four dimensions, as ``generate`` makes them for caches of fixed size: bool, what is added, and by kinds."""
    model, ids = llama(length=12, samples=2)
    more = torch.randint(8, 64, (2, 6), generator=torch.Generator().manual_seed(3))
    real = torch.ones(2, 18, dtype=torch.long)
    real[1, 12:15] = 0
    place = (real.cumsum(1) - 1).clamp_min(0)[:, 12:]
    seen = torch.ones(6, 18, dtype=torch.bool).tril(12) & real[:, None, None].bool()
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)
    options = {"sublayers": 0, "similarity": (0.0,) * 12, "online": WATCH, "beta": -1.0}
    with vtprune.attach(model, "adaskip", **options), torch.no_grad():

        def read(mask) -> Tensor:
            cache = cache_of(model(input_ids=ids, use_cache=True))
            return model(input_ids=more, attention_mask=mask, position_ids=place, **cached(model, cache)).logits

        want = read(real)
        for mask in (seen, added):
            assert torch.allclose(read(mask)[0], want[0], atol=1e-9)
            assert torch.allclose(read(mask)[1, 3:], want[1, 3:], atol=1e-9)

        near = (
            torch.ones(6, 18, dtype=torch.bool).tril(12).triu(12 - 3)
        )  # a window of four: it hides the answer's first
        with pytest.raises(UnsupportedError, match="pass a 2-D attention_mask"):
            read((seen & near).contiguous())

        def turns(cache) -> Tensor:
            how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
            first = model.generate(input_ids=ids, max_new_tokens=3, **how, **cached(model, cache))
            talk = torch.cat([first.sequences, more[:, :4]], 1)
            mask = torch.ones_like(talk)
            mask[1, 15:17] = 0
            second = {"attention_mask": mask, "output_logits": True, "max_new_tokens": 6, **how}
            return torch.stack(model.generate(input_ids=talk, **second, **cached(model, cache)).logits)

        static = hf.StaticCache(config=model.config, max_cache_len=64)
        assert torch.allclose(turns(static), turns(hf.DynamicCache(config=model.config)), atol=1e-9)


def test_a_cache_that_is_cut_back_is_watched_again():
    model, ids = llama(length=12)
    draw = torch.Generator().manual_seed(4)
    wrong, right = (torch.randint(8, 64, (1, 6), generator=draw) for _ in range(2))
    options = {"mlp": (2,), "ratio": 1.1, "online": WATCH, "beta": -1.0}
    with vtprune.attach(model, "adaskip", **options), torch.no_grad():

        def go_on(cache, tokens: Tensor) -> Tensor:
            return torch.cat(
                [model(input_ids=tokens[:, q : q + 1], **cached(model, cache)).logits for q in range(tokens.shape[1])],
                1,
            )

        want = go_on(cache_of(model(input_ids=ids, use_cache=True)), right)
        cache = cache_of(model(input_ids=ids, use_cache=True))
        go_on(cache, wrong)
        cache.crop(-6)
        got = go_on(cache, right)
    assert torch.allclose(got, want, atol=1e-9)


def test_what_nobody_needs_does_not_run():
    """In an answer, behind what is watched; with no similarity at all every MLP goes."""
    model, ids = llama(length=12)
    ran = [0] * 6
    more = torch.randint(8, 64, (1, 5), generator=torch.Generator().manual_seed(1))
    with vtprune.attach(model, "adaskip", mlp=(3,), online=2, beta=-1.0) as handle, torch.no_grad():
        cache = cache_of(model(input_ids=ids, use_cache=True))
        hooks = [
            layer.mlp.act_fn.register_forward_hook(lambda m, a, out, i=i: ran.__setitem__(i, ran[i] + 1))
            for i, layer in enumerate(model.model.layers)
        ]
        for q in range(5):
            model(input_ids=more[:, q : q + 1], **cached(model, cache))
        assert ran == [2, 2, 2, 0, 2, 2]
        assert handle.report().skipped == [["llm.3.mlp"]]
        assert handle.report().skipped_online == [[f"llm.{i}.mlp" for i in (0, 1, 2, 4, 5)]]
        for hook in hooks:
            hook.remove()


def test_a_threshold_of_one_is_the_offline_part(tiny):
    model, inputs = tiny("llava", "clip-llama")
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with vtprune.attach(model, "adaskip", mlp=(3,), ratio=1.1):
        want = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **how)
    with vtprune.attach(model, "adaskip", mlp=(3,), ratio=1.1, online=3, beta=1.0) as handle:
        got = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **how)
        assert handle.report().skipped_online == [[], []]
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


def test_the_threshold_is_the_least_of_what_is_fitted_to_go(tiny):
    """Whatever was measured for the others; and it does not end with a request."""
    similarity, ratio = drawn(6, 1)
    chosen = sorted(range(12), key=lambda n: -similarity[n])[:3]
    model, ids = llama(length=12)
    method = vtprune.core.planning.make(
        "adaskip", {"similarity": similarity, "ratio": ratio, "sublayers": 3, "online": 2}
    )
    cuts = method.plan(vtprune.core.planning.bind(model).geometry, None)
    beta = next(cut for cut in cuts if cut.watch)
    exact = torch.full((1, 2), beta.data["beta"], dtype=torch.float64)
    left, factor = method.learn(torch.cat([exact, exact - 1e-9]), torch.tensor([[1.0, 3.0], [2.0, 2.0]]), beta)
    assert left.tolist() == [True, False] and factor.tolist() == [2, 2]
    assert {cut.data["beta"] for cut in cuts if cut.watch} == {min(similarity[n] for n in chosen)}
    assert {cut.layer for cut in cuts if cut.watch} == {i for i in range(6) if 2 * i + 1 not in chosen}
    low = [min(s, -0.5) if n in chosen else -1.0 for n, s in enumerate(similarity)]
    options = {"similarity": low, "ratio": ratio, "sublayers": 3, "online": 2}
    with vtprune.attach(model, "adaskip", **options) as handle, torch.no_grad():
        reports = []
        for _ in range(25):
            model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
            reports.append(handle.report().skipped_online)
    assert reports == [reports[0]] * 25 and reports[0][0]


def test_a_fitted_recipe_may_watch(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load", lambda args: fake_model())
    picture().save(tmp_path / "a.png")
    out = tmp_path / "fitted.json"
    words = ["fit", "adaskip", "--recipe-out", str(out), "--sublayers", "4", "--image", str(tmp_path / "a.png")]
    assert main.main([*words, "--question", "what is it", "--online", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["left_out"]) == 4
    options = vtprune.Recipe.load(out).stages[0].options
    assert options["online"] == 3 and options["sublayers"] == 4
    with vtprune.attach(fake_model()[0], vtprune.Recipe.load(out)) as handle:
        engine = handle.adapter.decoder
        assert len(engine.skipping.watched) == 4
        assert {i for i, _ in engine.online.watched} == set(range(6)) - {
            i for i, half in engine.skipping.watched if half == "mlp"
        }
    assert main.main([*words, "--question", "what is it"]) == 0
    assert "online" not in vtprune.Recipe.load(out).stages[0].options


def test_gradients_of_an_answer_are_the_transcriptions():
    model, ids = llama(length=20)
    weight = model.model.layers[0].mlp.down_proj.weight
    beta, n = -1.0, 12
    x, told = given(model, model.model, {"input_ids": ids})
    states = slow_with_gradients(model.model, x, told, n)
    want = torch.autograd.grad(model.lm_head(model.model.norm(states)).square().sum(), weight)[0]
    labels = ids.clone()
    labels[:, :n] = -100
    options = {"sublayers": 0, "similarity": (0.0,) * 12, "online": WATCH, "beta": beta}
    with vtprune.attach(model, "adaskip", **options):
        got = torch.autograd.grad(model(input_ids=ids, labels=labels).logits.square().sum(), weight)[0]
    assert torch.allclose(got, want, atol=1e-9 * float(want.abs().max()))


def slow_with_gradients(lm, x: Tensor, told: list[dict], n: int) -> Tensor:
    """Every MLP goes; the factors are measured, and no gradient passes through them."""
    for layer, given_ in zip(lm.layers, told, strict=True):
        y = attended(layer, x, given_)
        z = fed(layer, y)
        rows = slice(n, n + WATCH)
        factor = (z[:, rows].norm(dim=-1) / y[:, rows].norm(dim=-1)).mean().detach()
        x = torch.cat([z[:, : n + WATCH], y[:, n + WATCH :] * factor], 1)
    return x


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mlp": (2,), "online": 5}, "online= needs beta="),
        ({"similarity": (0.5,) * 12, "sublayers": 0, "online": 5}, "online= needs beta="),
        ({"mlp": (2,), "online": -1}, "at least 0"),
        ({"mlp": (2,), "online": 2, "beta": 1.5}, "at most 1"),
        ({"mlp": (2,), "online": 2, "beta": float("nan")}, "at least -1"),
        ({"mlp": (2,), "beta": 0.9}, "beta= is the threshold of online="),
    ],
)
def test_what_cannot_be(tiny, options, says):
    model, _ = tiny("llava", "clip-llama")
    with pytest.raises(VtpruneError, match=says):
        vtprune.attach(model, "adaskip", **options)


def test_what_is_refused_on_the_way():
    model, ids = llama(length=12)
    more = ids[:, :1]
    options = {"mlp": (3,), "ratio": 1.1, "online": 2, "beta": 0.5}
    layer = model.model.layers[4]
    for name in ("post_attention_layernorm", "mlp"):
        with vtprune.attach(model, "adaskip", **options), torch.no_grad():
            cache, own = cache_of(model(input_ids=ids, use_cache=True)), getattr(layer, name)
            setattr(layer, name, copy.deepcopy(own).requires_grad_(False))
            getattr(layer, name).__dict__.pop("forward", None)
            getattr(layer, name)._forward_pre_hooks.clear()
            with pytest.raises(UnsupportedError, match="replaced since attach"):
                model(input_ids=more, **cached(model, cache))
            setattr(layer, name, own)
    packed = {"position_ids": torch.arange(6).repeat(2)[None], "input_ids": ids}
    alone = {"similarity": (0.0,) * 12, "sublayers": 0, "online": 2, "beta": 0.5}
    with vtprune.attach(model, "adaskip", **alone), torch.no_grad():
        with pytest.raises(UnsupportedError, match="packed into one row"):
            model(**packed, use_cache=False)
    with vtprune.attach(model, "adaskip", **options) as handle, torch.no_grad():
        cache = cache_of(model(input_ids=ids, use_cache=True))
        handle.remove()
        with pytest.raises(UnsupportedError, match="start a new prompt"):
            model(input_ids=more, **cached(model, cache))


def test_layers_no_part_of_which_reads_what_stands_in_between(tiny, monkeypatch):
    model, _ = tiny("causal-lm", "llama")
    layer = model.model.layers[3]

    def inline(x, **kwargs):
        y = x + layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]
        return y + layer.mlp(torch.nn.functional.rms_norm(y, y.shape[-1:]))

    monkeypatch.setattr(layer, "forward", inline)
    vtprune.attach(model, "adaskip", mlp=(2,), ratio=1.1).remove()
    with pytest.raises(UnsupportedError, match="no part of layer 3 reads what stands between"):
        vtprune.attach(model, "adaskip", mlp=(2,), online=2, beta=0.5)


def test_samples_without_images_stay_whole_beside_others(tiny):
    model, inputs = tiny("llava", "clip-llama")
    batch = beside_text(inputs)
    more = torch.randint(8, 60, (3, 5), generator=torch.Generator().manual_seed(5))

    def read() -> Tensor:
        cache, steps, mask = cache_of(model(**batch, use_cache=True)), [], batch["attention_mask"]
        for q in range(5):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            steps.append(model(input_ids=more[:, q : q + 1], attention_mask=mask, **cached(model, cache)).logits)
        return torch.cat(steps, 1)

    with torch.no_grad():
        dense = read()
        options = {"similarity": (0.0,) * 12, "sublayers": 0, "online": 2, "beta": -1.0}
        with vtprune.attach(model, "adaskip", **options) as handle:
            got = read()
            assert handle.report().skipped_online[2] == [] != handle.report().skipped_online[0]
    assert torch.allclose(got[:, :2], dense[:, :2], atol=1e-5) and torch.allclose(got[2], dense[2], atol=1e-5)
    assert not torch.allclose(got[:2, 2:], dense[:2, 2:], atol=1e-3)


def test_scaled_residuals():
    """Granite's layers scale what they add."""
    config = hf.GraniteConfig(**tiny_text(residual_multiplier=0.4, logits_scaling=1.0))
    model = tiny_build(hf.GraniteForCausalLM, config)
    ids = torch.randint(8, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    options = {"mlp": (2,), "ratio": 1.1, "online": 3, "beta": -1.0}
    for name in ("cached_is_uncached", "decode_is_masked_dense"):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert (found := check(name, model, "adaskip", inputs, **options)).passed, f"{name}: {found.detail}"
