"""SwiftKV's distilled part (arXiv 2410.03960) against a slow transcription, and what it is trained by."""

from __future__ import annotations

import copy
import math
from typing import Any

import builders as B
import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_layers import attended, behind, double, entered, limit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vtprune.models.engine.host import cache_of, cached, held

import vtprune
from prompts import llama
from vtprune.core.ledger import snapshot
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.train.base import TRAININGS, Step
from vtprune.train.swiftkv import distance, distil, divergence
from watch import spent

FAMILIES = [("causal-lm", v) for v in ("llama", "qwen3", "gemma3")] + [
    ("llava", "clip-llama"),
    ("qwen2-vl", "images"),
    ("llava-next", "clip-llama"),
]
DEPTH = 6


def draw(part: nn.Module, seed: int = 5, scale: float = 0.3) -> None:
    """Other weights than the model's own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in part.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_((noise * (scale * float(p.std()) if p.ndim > 1 else 0.2)).to(p.dtype))


def made_of(part: Any, j: int) -> tuple[nn.Module, dict[str, Any]]:
    """The norm in front of what layer ``j`` borrows, and its projections as weight and bias."""
    i = j - part.first
    norm = part.norm[0] if part.norms == "one" else part.norm[i]
    return norm, {name: (getattr(part, name)[i].weight, getattr(part, name)[i].bias) for name in "qkv"}


@torch.no_grad()
def slow(model: Any, lm: Any, x: Tensor, tables: list[Any], part: Any) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Logits ``[n, V]`` of one prompt whose rows ``x`` ``[n, C]`` enter layer 0, and what every layer caches."""
    caches, lends = [], None
    for j, layer in enumerate(lm.layers):
        lends = x if j == part.first else lends
        own, caches = layer.input_layernorm(x), [*caches, {}]
        lent, parts = own, None
        if lends is not None:
            norm, parts = made_of(part, j)
            lent = norm(lends)
        x = behind(layer, x, attended(layer, own, lent, tables[j], caches[-1], parts))
    return model.lm_head(lm.norm(x)), caches


CASES = [
    pytest.param(f, v, rows, norms, first, id=f"{v}-{rows}-{norms}-{first}")
    for f, v in FAMILIES
    for rows in ("needed", "all")
    for norms, first in (("one", 2), ("each", 1), ("one", 5))
    if v != "gemma3" or rows == "all" or first == 5  # windows
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "variant", "rows", "norms", "first"), CASES)
def test_equals_the_transcription(tiny, family, variant, rows, norms, first):
    """Logits of every row that runs, and what every layer caches of every token."""
    model, lm, case = double(tiny, "swiftkv", family, variant)
    for one in case.samples():
        with vtprune.attach(model, "swiftkv", layer=first, rows=rows, norms=norms) as handle, torch.no_grad():
            part = handle.modules["swiftkv"]
            draw(part)
            out = model(**one, use_cache=True)
            report = handle.report()
        want, caches = slow(model, lm, *entered(model, lm, one), part)
        gone = case.adapter.prunable(one)[0]
        total = int(gone.sum())
        gone = gone if rows == "needed" else torch.zeros_like(gone)
        B.close(out.logits[0, ~gone], want[~gone], limit(variant))
        assert report.layer_tokens == [[total] * len(caches)] and report.kv_bytes == report.dense_kv_bytes
        order = torch.cat([gone.nonzero()[:, 0], (~gone).nonzero()[:, 0]])  # what left stands in front
        for j, (layer, told) in enumerate(zip(cache_of(out).layers, caches, strict=True)):
            for name in ("keys", "values"):
                wanted = told[name][:, order if j >= first else torch.arange(len(order))]
                got = getattr(layer, name)[0]  # of a window its end
                B.close(got, wanted[:, wanted.shape[1] - got.shape[1] :], limit(variant))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rows", ["needed", "all"])
@pytest.mark.parametrize("norms", ["one", "each"])
@pytest.mark.parametrize(("family", "variant"), [FAMILIES[1], FAMILIES[3], FAMILIES[4]], ids=lambda x: x)
def test_new_tokens_are_made_of_it_too(tiny, family, variant, norms, rows):
    """Token by token, and several at once."""
    model, lm, case = double(tiny, "swiftkv", family, variant)
    one = case.samples()[-1]
    more = torch.randint(8, 60, (1, 5), generator=torch.Generator().manual_seed(1))
    longer = {**one, "input_ids": torch.cat([one["input_ids"], more], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in one:
        longer["mm_token_type_ids"] = torch.cat([one["mm_token_type_ids"], torch.zeros_like(more)], 1)
    with vtprune.attach(model, "swiftkv", layer=2, rows=rows, norms=norms) as handle, torch.no_grad():
        part = handle.modules["swiftkv"]
        draw(part)
        cache = cache_of(model(**one, use_cache=True))
        n, steps = held(cache, 0), []
        for i, m in ((0, 1), (1, 3), (4, 1)):
            told = {"attention_mask": torch.ones(1, n + i + m, dtype=torch.long)}
            steps.append(model(input_ids=more[:, i : i + m], **told, **cached(model, cache)).logits)
    want, _ = slow(model, lm, *entered(model, lm, longer), part)
    B.close(torch.cat(steps, 1)[0], want[-5:], limit(variant))


@pytest.mark.parametrize("rows", ["needed", "all"])
@pytest.mark.parametrize("left", [True, False])
def test_samples_of_a_padded_batch_are_as_alone(left, rows):
    """One of them text alone, which borrows nothing, and is the unchanged model's, decoding as well."""
    shapes = [[4, 9], [7, 2, 5], [3, 12], [11]]
    model, inputs = B.llava(text="qwen2"), B.prompts(shapes, left=left)
    lm = model.model.language_model
    text = inputs["input_ids"][3:][inputs["attention_mask"][3:].bool()][None]
    with torch.no_grad():
        dense = model(input_ids=text).logits[0]
    with vtprune.attach(model, "swiftkv", layer=2, rows=rows, norms="one") as handle, torch.no_grad():
        part = handle.modules["swiftkv"]
        draw(part)
        hidden = B.final(model, inputs)
        B.close(model.lm_head(hidden[3]), dense, 1e-9)
        assert torch.equal(model(input_ids=text).logits[0], dense)
        if left:
            how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            both = model.generate(**inputs, **how)[3, -4:]
    if left:
        assert torch.equal(both, model.generate(input_ids=text, **how)[0, -4:])
    for b in range(3):
        real = inputs["attention_mask"][b].bool()
        x = B.embeddings(model, inputs)[b]
        table = lm.rotary_emb(x[None], torch.arange(len(x))[None])
        want, _ = slow(model, lm, x, [table] * DEPTH, part)
        stays = inputs["input_ids"][b][real] != B.IMAGE
        with torch.no_grad():
            B.close(model.lm_head(hidden[b][stays]), want[stays], 1e-9)


@pytest.mark.parametrize("rows", ["needed", "all"])
@pytest.mark.parametrize(("family", "variant"), [FAMILIES[1], FAMILIES[3], FAMILIES[4]], ids=lambda x: x)
def test_untrained_it_is_the_mechanism_alone(tiny, family, variant, rows):
    """Bit by bit with a norm of each layer, with its answers; one norm is layer n's in front of all. There is no part
    where nobody asks for it."""
    model, inputs = tiny(family, variant)
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = {}
    for norms in (None, "each", "one"):
        given = {} if norms is None else {"norms": norms}
        with vtprune.attach(model, "swiftkv", layer=2, rows=rows, **given) as handle, torch.no_grad():
            assert ("swiftkv" in handle.modules) is (norms is not None)
            found[norms] = (
                model(**inputs).logits,
                model.generate(**inputs, **how),
                repr(handle.report()).replace(f"norms={norms!r}", ""),
            )
            if norms is not None:
                part = handle.modules["swiftkv"]
                layers = handle.adapter.decoder_layers()
                assert len(part.norm) == (4 if norms == "each" else 1) and len(part.q) == len(part.k) == 4
                assert torch.equal(part.norm[0].weight, layers[2].input_layernorm.weight)
                assert all(torch.equal(part.k[i].weight, layers[2 + i].self_attn.k_proj.weight) for i in range(4))
                assert not any(p.requires_grad for p in part.parameters())
    assert torch.equal(found[None][0], found["each"][0]) and torch.equal(found[None][1], found["each"][1])
    assert float((found["one"][0] - found[None][0]).abs().max()) > 1e-3


def test_it_stands_beside_the_model_and_leaves_it_as_it_was(tiny):
    model, inputs = tiny("llava", "clip-llama")
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        want = model(**inputs).logits
        with vtprune.attach(model, "swiftkv", layer=2, norms="one") as handle:
            draw(handle.modules["swiftkv"])
            pruned, report = model(**inputs).logits, repr(handle.report())
            with handle.unpruned():  # the teacher
                assert torch.equal(model(**inputs).logits, want)
            assert repr(handle.report()) == report
            assert torch.equal(model(**inputs).logits, pruned) and not torch.equal(pruned, want)
        assert snapshot(model) == before and torch.equal(model(**inputs).logits, want)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_flops_are_those_that_torch_counts():
    """The model's own projections do not run beside the distilled ones, and no side branch is counted."""
    model, ids = llama(length=30)
    model = model.float()
    model.set_attn_implementation("eager")  # whose products the counter sees
    prompt, dense = {"input_ids": ids}, None
    dense = spent(model, prompt)
    for rows, first in (("needed", 2), ("needed", 0), ("all", 2)):
        for given in ({}, {"norms": "one"}, {"norms": "each"}):
            with vtprune.attach(model, "swiftkv", layer=first, rows=rows, **given) as handle, torch.no_grad():
                with FlopCounterMode(display=False) as counter:
                    model(**prompt, use_cache=True, logits_to_keep=1)
                report = handle.report()
            assert report.dense_flops - report.flops == dense - counter.get_total_flops()
            assert (report.flops < report.dense_flops) is (rows == "needed")


def test_what_is_read_ahead_borrows_nothing():
    """GemFilter's filter layer, behind n, chooses as it does alone."""
    model, inputs = B.llava(), B.prompts([[4, 9]])
    gem = vtprune.Stage(method="gemfilter", keep=9, options={"layer": 4})
    mine = vtprune.Stage(method="swiftkv", options={"layer": 1, "norms": "one"})
    kept = []
    for stages in ((gem,), (gem, mine)):
        recipe = vtprune.Recipe(name="ahead", stages=stages)
        with vtprune.attach(model, recipe, positions="original") as handle:
            if "swiftkv" in handle.modules:
                draw(handle.modules["swiftkv"])
            B.final(model, inputs)
            kept.append(handle.report().stages[0].kept[0])
    assert torch.equal(*kept)


def test_it_follows_where_the_model_goes(tiny):
    """Cast since attach(), also together with what is lent; under autocast a part in float32 stays that."""
    model, inputs = tiny("llava", "clip-llama")
    with vtprune.attach(model, "swiftkv", layer=2, norms="one") as handle, torch.no_grad():
        part = handle.modules["swiftkv"]
        draw(part)
        want = model(**inputs).logits
        model.to(torch.bfloat16)
        short = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.autocast("cpu", torch.bfloat16):
            long = model(**short).logits
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        got = model(**short).logits
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16} and got.isfinite().all()
    for one in (long, got):
        assert float((one.float() - want).abs().max()) < 0.1 * float(want.abs().max())


# ------------------------------------------------------------------------------------------------------------ training


def asked(model: Any, inputs: dict[str, Any], answers: tuple[int, ...]) -> dict[str, Any]:
    """A batch whose samples' last ``answers`` tokens are asked for."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for b, n in enumerate(answers):
        at = inputs["attention_mask"][b].nonzero()[-n:, 0]
        labels[b, at] = inputs["input_ids"][b, at]
    return {**inputs, "labels": labels, "use_cache": False}


def losses(model: Any, inputs: dict[str, Any], handle: Any, **settings: float) -> dict[str, Tensor]:
    training = TRAININGS.get("swiftkv")
    output = model(**inputs, **training.asks)
    told = {**training.settings, **settings}
    given = {k: v for k, v in inputs.items() if k != "use_cache"}
    return distil(Step(handle=handle, settings=told, model=model, inputs=given, output=output, done=0.0))


def by_hand(
    teacher: Any, student: Any, labels: Tensor, mask: Tensor, tau: float, every: bool = True
) -> tuple[float, float]:
    """Both losses, number by number; not ``every`` row: of the text alone."""
    kls, squares = [], []
    for b in range(len(labels)):
        kl, square = [], []
        for t in range(labels.shape[1]):
            if t and labels[b, t] != -100:  # what stands in front of an answer's token says it
                p, q = ([float(x) / tau for x in out.logits[b, t - 1]] for out in (teacher, student))
                norms = [math.log(sum(math.exp(x) for x in row)) for row in (p, q)]
                logs = [(x - norms[0], y - norms[1]) for x, y in zip(p, q, strict=True)]
                kl.append(tau**2 * sum(math.exp(x) * (x - y) for x, y in logs))
            if mask[b, t]:
                x, y = (out.hidden_states[-2][b, t].tolist() for out in (teacher, student))
                square.append(sum((s - t) ** 2 for s, t in zip(x, y, strict=True)) / len(x))
        kls.append(sum(kl) / len(kl))
        squares.append(sum(square) / len(square))
    return sum(kls) / len(kls), sum(squares) / len(squares)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "states_weight": 0.25}])
def test_losses_are_those_of_the_definition(left, settings):
    """Answers of other lengths in a padded batch; each sample weighs as much."""
    model, inputs = B.llava(), B.prompts([[4, 9], [7, 2, 5], [3, 12]], left=left)
    inputs = asked(model, inputs, (1, 3, 2))
    with torch.no_grad():
        plain = {k: v for k, v in inputs.items() if k != "labels"}
        teacher = model(**plain, output_hidden_states=True)
        with vtprune.attach(model, "swiftkv", layer=2, rows="all", norms="one") as handle:
            draw(handle.modules["swiftkv"])
            found = losses(model, inputs, handle, **settings)
            student = model(**plain, output_hidden_states=True)
    told = {"temperature": 2.0, "states_weight": 1.0, **settings}
    kl, square = by_hand(teacher, student, inputs["labels"], inputs["attention_mask"], told["temperature"])
    assert list(found) == ["kl", "states"] and kl > 0.01 and square > 0.01
    assert float(found["kl"]) == pytest.approx(kl, rel=1e-9)
    assert float(found["states"]) == pytest.approx(told["states_weight"] * square, rel=1e-9)


def test_the_answers_mask_is_shifted():
    """Logits at a place say the next token: changing those at an answer's own last place changes nothing."""
    labels = torch.tensor([[-100, -100, 7, 8, -100]])
    teacher = torch.randn(1, 5, 9, generator=torch.Generator().manual_seed(0))
    for place in range(5):
        other = teacher.clone()
        other[0, place, 3] += 1
        assert (float(divergence(teacher, other, labels, 2.0)) > 1e-3) is (place in (1, 2))
    rows = torch.tensor([[True, False, True]])
    one = torch.zeros(1, 3, 2)
    assert float(distance(one, one + torch.tensor([[[1.0], [5.0], [3.0]]]), rows)) == pytest.approx(5.0)
    assert float(divergence(teacher, teacher + 1, torch.full_like(labels, -100), 2.0)) == 0


def test_a_full_part_of_the_models_own_weights_has_nothing_to_learn():
    """At the last layer, whose input is its own: the loss is 0, exactly."""
    model, inputs = B.llava(), asked(B.llava(), B.prompts([[4, 9]]), (2,))
    with vtprune.attach(model, "swiftkv", layer=5, rows="all", norms="each") as handle:
        found = losses(model, inputs, handle)
    assert all(float(x.detach()) == 0 for x in found.values())


@pytest.mark.parametrize("left", [True, False])
def test_training_computes_what_use_computes(left):
    """All rows run in training, and in use the prunable ones stop: the answers' divergence, and what enters the last
    layer of the rows that run, are the same; so are the gradients of the divergence."""
    model = B.llava()
    inputs = asked(model, B.prompts([[4, 9], [3, 12]], left=left), (2, 3))
    plain = {k: v for k, v in inputs.items() if k not in ("labels", "use_cache")}
    stays = (inputs["input_ids"] != B.IMAGE) & inputs["attention_mask"].bool()
    with torch.no_grad():
        teacher = model(**plain).logits
    found = {}
    for rows in ("all", "needed"):
        with vtprune.attach(model, "swiftkv", layer=2, rows=rows, norms="one") as handle:
            part = handle.modules["swiftkv"].requires_grad_(True)
            draw(part)
            entered_: list[Tensor] = []
            hook = model.model.language_model.layers[5].register_forward_pre_hook(
                lambda m, args, kwargs, to=entered_: to.append(args[0]), with_kwargs=True
            )
            student = model(**plain, use_cache=False).logits
            hook.remove()
            kl = divergence(teacher, student, inputs["labels"], 2.0)
            grads = torch.autograd.grad(kl, list(part.parameters()))
            found[rows] = kl, grads, entered_[0]
    B.close(found["all"][0], found["needed"][0], 1e-6)
    for a, b in zip(found["all"][1], found["needed"][1], strict=True):
        assert bool(a.any())
        B.close(a, b, 1e-6)
    for b in range(2):  # rows that are left stand together
        few = found["needed"][2][b]
        rows = found["all"][2][b][stays[b]]
        near = (few[None] - rows[:, None]).abs().amax(-1).amin(1)
        assert float(near.detach().max()) < 1e-9


def test_gradients_reach_the_part_and_nothing_else(tiny):
    """By finite differences of the sum of both losses, in every kind of parameter."""
    model = B.llava(text="qwen2")
    for p in model.parameters():
        p.requires_grad_(False)
    inputs = asked(model, B.prompts([[4, 9], [3, 12]], left=False), (2, 3))
    with vtprune.attach(model, "swiftkv", layer=2, rows="all", norms="one") as handle:
        part = handle.modules["swiftkv"].requires_grad_(True)
        draw(part)

        def loss() -> Tensor:
            return sum(losses(model, inputs, handle).values())

        loss().backward()
        names = [name for name, _ in part.named_parameters()]
        assert {name.rsplit(".", 1)[0] for name in names} == {
            "norm.0",
            *(f"{w}.{i}" for w in "qkv" for i in range(4)),
        }
        for name, p in part.named_parameters():
            assert p.grad is not None
            if name in ("k.0.bias", "k.1.bias", "k.2.bias", "k.3.bias"):
                continue  # turned by the rotary table, and next to nothing
            assert bool(p.grad.any()), name
            flat, place = p.data.view(-1), int(p.grad.flatten().abs().argmax())
            got, told = float(p.grad.flatten()[place]), []
            for step in (1e-3, -1e-3):
                flat[place] += step
                with torch.no_grad():
                    told.append(float(loss().detach()))
                flat[place] -= step
            assert (told[0] - told[1]) / 2e-3 == pytest.approx(got, rel=2e-2, abs=1e-5), name
    assert all(p.grad is None for p in model.parameters())


def test_training_refuses_what_cannot_be(tmp_path):
    model, inputs = B.llava(), asked(B.llava(), B.prompts([[4, 9]]), (2,))
    with vtprune.attach(model, "swiftkv", layer=2, rows="all", norms="one") as handle:
        with pytest.raises(VtpruneError, match="temperature=0"):
            losses(model, inputs, handle, temperature=0.0)
    with pytest.raises(VtpruneError, match="rows='needed': distilling compares all tokens"):
        TRAININGS.get("swiftkv").check({"rows": "needed"})


# ------------------------------------------------------------------------------------------------------------- weights


def test_weights_are_read_and_bad_files_are_refused(tmp_path):
    model, inputs, path = B.llava(), B.prompts([[4, 9]]), str(tmp_path / "part.safetensors")
    training = TRAININGS.get("swiftkv")
    with vtprune.attach(model, "swiftkv", layer=2, norms="one") as handle, torch.no_grad():
        part = handle.modules["swiftkv"]
        draw(part)
        (want,) = B.final(model, inputs)
        told = training.tells(part, {"layer": None, "norms": "one"})
        assert told == {"layer": "2", "norms": "one"}
        save_file(part.state_dict(), path, told)
    for given in ({}, {"norms": "one"}):
        with vtprune.attach(model, "swiftkv", layer=2, weights=path, **given) as handle, torch.no_grad():
            B.close(B.final(model, inputs)[0], want)
    for options, why in (
        ({"layer": 3}, "was trained for layer=2, this is layer=3"),
        ({"layer": 2, "norms": "each"}, "was trained for norms=one, this is norms=each"),
    ):
        with pytest.raises(VtpruneError, match=why):
            vtprune.attach(model, "swiftkv", weights=path, **options)
    good = load_file(path)
    for metadata, why in (
        ({"norms": "one"}, "does not tell for which layer"),
        ({"layer": "2"}, "does not tell for which norms"),
    ):
        save_file(good, path, metadata)
        with pytest.raises(VtpruneError, match=why):
            vtprune.attach(model, "swiftkv", layer=2, weights=path)
    for bad, why in (
        ({**good, "k.0.weight": good["k.0.weight"][:5].contiguous()}, "does not fit layers 2 to 5 of this model"),
        ({k: v for k, v in good.items() if k != "q.3.weight"}, "does not fit layers 2 to 5"),
        ({**good, "norm.0.weight": good["norm.0.weight"] * math.nan}, "no finite numbers"),
    ):
        save_file(bad, path, told)
        with pytest.raises(VtpruneError, match=why):
            vtprune.attach(model, "swiftkv", layer=2, weights=path)
    with pytest.raises(VtpruneError, match="no such file"):
        vtprune.attach(model, "swiftkv", layer=2, weights=str(tmp_path / "none"))


def test_layers_whose_projections_cannot_be_copied_are_refused(tiny):
    """Fused, quantised, or of adapters; and values that there are none of."""
    phi, _ = tiny("causal-lm", "phi3")
    with pytest.raises(
        UnsupportedError, match=r"layer 2 has no q_proj of the usual kind: .* cannot be distilled one by one"
    ):
        vtprune.attach(phi, "swiftkv", layer=2, norms="one")
    model, _ = tiny("llava", "clip-llama")
    Linear4bit = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn"})
    attention = model.model.language_model.layers[3].self_attn
    attention.q_proj.__class__ = Linear4bit
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="layer 3 cannot be copied: it holds Linear4bit"):
        vtprune.attach(model, "swiftkv", layer=2, norms="one")
    assert snapshot(model) == before
    attention.q_proj.__class__ = nn.Linear
    with pytest.raises(VtpruneError, match="norms='two'"):
        vtprune.attach(model, "swiftkv", layer=2, norms="two")


@pytest.mark.parametrize("what", ["q_proj", "k_proj", "v_proj"])
def test_projections_that_were_replaced_since_are_refused(tiny, what):
    model, inputs = tiny("llava", "clip-llama")
    attention = model.model.language_model.layers[3].self_attn
    with vtprune.attach(model, "swiftkv", layer=2, norms="one"), torch.no_grad():
        setattr(attention, what, copy.deepcopy(getattr(attention, what)))
        vtprune.core.ledger.strip(attention)
        with pytest.raises(UnsupportedError, match="query, key or value projection of layer 3 was replaced since"):
            model(**inputs)
