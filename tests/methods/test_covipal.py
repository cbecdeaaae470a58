"""CoViPAL (arXiv 2508.17243): a slow transcription of its pruning modules, what it spends, what moves while it is
trained, and what guides it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vtprune.models.engine.guidance import received

import vtprune
from vtprune import testing
from vtprune.check.case import Case
from vtprune.core.planning import bind, load_recipe
from vtprune.core.types import Geometry, UnsupportedError, VtpruneError
from vtprune.methods.covipal import HARD, LOOK, SOFT, CoViPAL, Module
from vtprune.train import covipal as training
from vtprune.train.base import EQUAL, Step

FAMILIES = ("llava", "llava-next", "qwen2.5-vl")


def double(family: str, variant: str | None = None):
    model, inputs = testing.tiny(family, variant)
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    model = model.double()
    for p in model.parameters():
        p.requires_grad_(False)
    return model, inputs


def entering(model, inputs, layer: int) -> Tensor:
    """What a decoder layer of the unpruned model is given, ``[B, T, C]``."""
    seen = []
    block = bind(model).decoder_layers()[layer]
    hook = block.register_forward_pre_hook(
        lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def real_of(inputs) -> Tensor:
    return inputs["attention_mask"].bool()


# ------------------------------------------------------------------------------------------------- a slow
# transcription


def normed(x: list[float], weight: Tensor, bias: Tensor) -> list[float]:
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(var + 1e-5) * float(w) + float(b) for v, w, b in zip(x, weight, bias, strict=True)]


def linear(x: list[float], weight: Tensor, bias: Tensor | None = None) -> list[float]:
    out = [sum(float(w) * v for w, v in zip(row, x, strict=True)) for row in weight]
    return out if bias is None else [v + float(b) for v, b in zip(out, bias, strict=True)]


def slow_scores(visual: Tensor, text: Tensor, p: dict[str, Tensor], heads: int) -> list[float]:
    """Row by row: every row is projected, reads all rows in two blocks, and each visual one gets a number."""
    rows = [linear(r.tolist(), p["enter.weight"], p["enter.bias"]) for r in (*text, *visual)]
    d = len(rows[0])
    size = d // heads
    for i in range(2):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in p.items() if k.startswith(f"blocks.{i}.")}
        x = [normed(r, b["norms.0.weight"], b["norms.0.bias"]) for r in rows]
        q, k, v = ([linear(r, b["attention.in_proj_weight"][j * d : (j + 1) * d]) for r in x] for j in range(3))
        for n in range(len(rows)):
            mixed: list[float] = []
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                dots = [sum(a * c for a, c in zip(q[n][part], key[part], strict=True)) / math.sqrt(size) for key in k]
                most = max(dots)
                share = [math.exp(s - most) for s in dots]
                total = sum(share)
                mixed += [
                    sum(s * value[h * size + c] for s, value in zip(share, v, strict=True)) / total for c in range(size)
                ]
            rows[n] = [a + c for a, c in zip(rows[n], linear(mixed, b["attention.out_proj.weight"]), strict=True)]
        for n, r in enumerate(rows):
            inner = linear(normed(r, b["norms.1.weight"], b["norms.1.bias"]), b["mlp.0.weight"], b["mlp.0.bias"])
            inner = [s * 0.5 * (1 + math.erf(s / math.sqrt(2))) for s in inner]
            rows[n] = [a + c for a, c in zip(r, linear(inner, b["mlp.2.weight"], b["mlp.2.bias"]), strict=True)]
    last = [normed(r, p["norm.weight"], p["norm.bias"]) for r in rows[len(text) :]]
    return [linear(r, p["head.weight"], p["head.bias"])[0] for r in last]


def randomised(module, seed: int = 3):
    """Every parameter random, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
            p.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return module


@pytest.mark.parametrize("where", ["projector", "llm.2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_transcription(family, where):
    """Scores and kept tokens, of every sample of a padded batch, all of its images together."""
    model, inputs = double(family)
    options = {} if where == "projector" else {"projector": False, "layers": (2,)}
    rows = entering(model, inputs, 0 if where == "projector" else 2)
    visual, real = bind(model).prunable(inputs), real_of(inputs)
    with torch.no_grad(), vtprune.attach(model, "covipal", keep=0.3, per="sample", width=6, **options) as handle:
        module = randomised(handle.modules["covipal"])
        model(**inputs)
        stage = handle.report().stages[0]
        p = module.ppm[0].state_dict()
    assert stage.site == where
    for b in range(len(rows)):
        want = slow_scores(rows[b][visual[b]], rows[b][real[b] & ~visual[b]], p, 1)
        assert torch.allclose(stage.scores[b], torch.tensor(want, dtype=torch.float64), atol=1e-9)
        best = sorted(sorted(range(len(want)), key=lambda n: (-want[n], n))[: int(len(want) * 0.3)])
        assert stage.kept[b].tolist() == best


def test_a_module_of_several_heads():
    """128 channels are two heads of 64; rows that are padding are read by none, and permuted tokens have permuted
    scores."""
    generator = torch.Generator().manual_seed(0)
    module = randomised(Module(5, 128, generator, random=True).double())
    visual, text = (torch.randn(1, n, 5, generator=generator, dtype=torch.float64) for n in (4, 3))
    every = [torch.ones(1, n, dtype=torch.bool) for n in (4, 3)]
    got = module(visual, every[0], text, every[1])
    want = slow_scores(visual[0], text[0], module.state_dict(), 2)
    assert torch.allclose(got[0], torch.tensor(want, dtype=torch.float64), atol=1e-8)
    fewer = module(visual, every[0], text, torch.tensor([[True, True, False]]))
    assert torch.allclose(fewer, module(visual, every[0], text[:, :2], every[1][:, :2])) and not torch.allclose(
        fewer, got
    )
    fewer = module(visual, torch.tensor([[True, True, True, False]]), text, every[1])
    assert torch.allclose(fewer[:, :3], module(visual[:, :3], every[0][:, :3], text, every[1]))
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(module(visual[:, order], every[0], text, every[1]), got[:, order])
    assert bool(module(visual, ~every[0], text, ~every[1]).isfinite().all())
    module.float()
    single = [visual.float(), every[0], text.float(), every[1]]
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        short = module(*single)
    assert torch.equal(short, module(*single))


# ----------------------------------------------------------------------------------------------------------- in use


def test_what_stays():
    """Every place leaves the same share of what it finds; an untrained module the first tokens."""
    model, inputs = testing.tiny("llava")
    with torch.no_grad(), vtprune.attach(model, "covipal", keep=4, layers=(2, 4)) as handle:
        model(**inputs)
        report = handle.report()
    assert [s.site for s in report.stages] == ["projector", "llm.2", "llm.4"]
    assert [s.tokens_out for s in report.stages] == [[10, 10], [6, 6], [4, 4]]
    assert report.layer_tokens[0] == [10, 10, 6, 6, 4, 4]
    assert all(k.tolist() == list(range(n)) for s, n in zip(report.stages, (10, 6, 4), strict=True) for k in s.kept)
    assert all(bool((scores == 0).all()) for scores in report.stages[0].scores)


@pytest.mark.parametrize("family", ("llava", "qwen2.5-vl", "paligemma"))
def test_at_full_budget_it_is_the_dense_model(family):
    model, inputs = testing.tiny(family)
    with torch.no_grad():
        want = model(**inputs).logits
        with vtprune.attach(model, "covipal", keep=1.0, init="random", layers=(1,)):
            assert torch.equal(model(**inputs).logits, want)
        assert torch.equal(model(**inputs).logits, want)


def test_text_alone_asks_no_module():
    model, inputs = testing.tiny("llava")
    ids = inputs["input_ids"].clone()
    ids[ids == model.config.image_token_id] = 9
    with torch.no_grad(), vtprune.attach(model, "covipal", keep=2, layers=(1,)) as handle:
        handle.modules["covipal"].register_forward_hook(lambda *a: pytest.fail("a module was called"))
        model(input_ids=ids, attention_mask=inputs["attention_mask"])
        assert handle.report().flops == handle.report().dense_flops


def test_attach_draws_no_random_numbers():
    model, _ = testing.tiny("llava")
    before = torch.random.get_rng_state()
    with vtprune.attach(model, "covipal", init="random"):
        assert torch.equal(torch.random.get_rng_state(), before)


def spent(model, inputs) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def test_modules_are_counted():
    """What is saved, and what the modules run themselves, in a report and where a budget of FLOPs is planned."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, inputs = testing.tiny("llava", "clip-llama")
    model.set_attn_implementation("eager")
    one = {k: v[:1] for k, v in inputs.items()}
    one["input_ids"] = one["input_ids"][:, inputs["attention_mask"][0].bool()]
    one["attention_mask"] = torch.ones_like(one["input_ids"])
    dense = spent(model, one)
    with vtprune.attach(model, "covipal", keep=4, layers=(3,), width=24) as handle:
        with sdpa_kernel(SDPBackend.MATH):
            pruned = spent(model, one)
        report = handle.report()
    assert report.dense_flops - report.flops == dense - pruned
    assert sum(report.layer_tokens[0]) < 6 * 16 and report.flops > 0
    text = int(one["input_ids"].shape[1]) - 16
    method, geometry = CoViPAL(width=24), bind(model).geometry
    assert method.work(16, text, None, geometry) > 24 * 24 * 24 * 16
    wide = vtprune.solve(model, "covipal", flops=0.9, width=12).stages[0]
    thin = vtprune.solve(model, "covipal", flops=0.9, width=4).stages[0]
    assert wide.keep < thin.keep


def test_a_batch_costs_what_its_samples_cost():
    """Images of several kinds, asked kind by kind."""
    model, inputs = testing.tiny("llava-next")
    case = Case(model, load_recipe("covipal"), inputs, {})
    with torch.no_grad(), vtprune.attach(model, "covipal", keep=3, layers=(2,), width=16) as handle:
        model(**inputs)
        both, alone = handle.report(), []
        for one in case.samples():
            model(**one)
            alone.append(handle.report().flops)
    assert both.flops == sum(alone) and len({tuple(map(tuple, grids)) for grids in both.grids}) > 1


def test_bad_options_are_refused():
    model, _ = testing.tiny("llava")
    for options, why in (
        ({"projector": False}, "projector=False leaves no module"),
        ({"layers": (6,)}, "must ascend and lie in 0..5"),
        ({"layers": (2, 1)}, "must ascend"),
        ({"width": 0}, "at least 1"),
        ({"init": "ones"}, "init='ones'"),
    ):
        with pytest.raises(VtpruneError, match=why):
            vtprune.attach(model, "covipal", **options)
    text = Geometry("causal-lm", "x", 9, (9, 1), 0, 0, 0, 4, {"llm": frozenset({"text"})})
    with pytest.raises(UnsupportedError, match="covipal works at projector; this model"):
        CoViPAL().plan(text, 3)


def test_trained_modules_are_read(tmp_path):
    model, inputs = testing.tiny("llava")
    path = str(tmp_path / "modules.safetensors")
    with torch.no_grad(), vtprune.attach(model, "covipal", keep=3, width=24) as handle:
        module = randomised(handle.modules["covipal"]).float()
        model(**inputs)
        want = handle.report().stages[0].kept
        state = {k: v.contiguous() for k, v in module.state_dict().items()}
    save_file(state, path, {"places": "projector"})
    with torch.no_grad(), vtprune.attach(model, "covipal", keep=3, width=24, weights=path) as handle:
        model(**inputs)
        assert all(torch.equal(a, b) for a, b in zip(handle.report().stages[0].kept, want, strict=True))
    with pytest.raises(VtpruneError, match="was trained for places=projector, this is places=projector,llm.1"):
        vtprune.attach(model, "covipal", layers=(1,), width=24, weights=path)
    with pytest.raises(VtpruneError, match="does not fit 1 modules 16 wide"):
        vtprune.attach(model, "covipal", width=16, weights=path)


# --------------------------------------------------------------------------------------------------------- training


def labelled(inputs) -> dict:
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return {**inputs, "labels": labels, "use_cache": False}


def cross_entropy(output, inputs) -> Tensor:
    """In float64; the model's own is float32."""
    return torch.nn.functional.cross_entropy(output.logits[:, -5:-1].flatten(0, 1), inputs["labels"][:, -4:].flatten())


@pytest.mark.parametrize("family", ("llava", "llava-next"))
def test_modules_that_are_trained_decide_the_same(family):
    model, inputs = testing.tiny(family)
    inputs = labelled(inputs)
    with vtprune.attach(model, "covipal", keep=3, init="random", layers=(2,)) as handle:
        with torch.no_grad():
            want, before = model(**inputs), handle.report()
        assert not handle.told()
        handle.modules["covipal"].requires_grad_()
        got, report = model(**inputs), handle.report()
        told = handle.told()
        with torch.no_grad():
            model(**inputs)
        assert not handle.told()
    assert torch.allclose(got.logits, want.logits, atol=1e-5) and torch.allclose(got.loss, want.loss, atol=1e-5)
    assert [s.tokens_out for s in report.stages] == [s.tokens_out for s in before.stages]
    assert list(told) == ["projector", "llm.2"] and set(told["llm.2"]) == {"score"}


@pytest.mark.parametrize("where", ({}, {"projector": False, "layers": (2,)}), ids=("projector", "llm.2"))
@pytest.mark.parametrize("phase", (SOFT, HARD))
def test_gradients_reach_the_module_alone(phase, where, monkeypatch):
    """By finite differences of the loss in its parameters; while tokens are dropped, of the loss with ``1 + g - g0`` in
    the place of every kept token's factor."""
    model, inputs = double("llava")
    inputs = labelled(inputs)
    with vtprune.attach(model, "covipal", keep=6, width=8, **where) as handle:
        module = randomised(handle.modules["covipal"]).requires_grad_()
        module.phase, module.temperature = phase, 0.7
        cross_entropy(model(**inputs), inputs).backward()
        assert all(p.grad is None for p in model.parameters())
        grads = {name: p.grad.clone() for name, p in module.named_parameters()}
        assert all(float(g.abs().max()) > 1e-12 for g in grads.values())
        told = {site: names["score"].detach() for site, names in handle.told().items()}
        original = CoViPAL.select

        def select(self, view, cut):
            """The same tokens, whatever the scores are now."""
            found = original(self, view, cut)
            if phase == SOFT:
                return found
            share, about = (torch.sigmoid(s / 0.7) for s in (view.module(cut.site, *given(view)), told[cut.site]))
            first = told[cut.site].argsort(dim=1, descending=True, stable=True)[:, : cut.keep].sort(1).values
            return replace(found, kept=first, gate=1 + share - about)

        def given(view):
            text = view.source("text")
            return view.features, view.valid, text.hidden, text.valid

        monkeypatch.setattr(CoViPAL, "select", select)
        for name in ("ppm.0.enter.weight", "ppm.0.head.bias", "ppm.0.blocks.1.mlp.0.weight", "ppm.0.head.weight"):
            p = module.get_parameter(name)
            at = int(grads[name].abs().argmax())
            found = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    p.view(-1)[at] += step
                found.append(float(cross_entropy(model(**inputs), inputs).detach()))
                with torch.no_grad():
                    p.view(-1)[at] -= step
            slope = (found[0] - found[1]) / 2e-5
            assert slope == pytest.approx(float(grads[name].view(-1)[at]), rel=1e-4, abs=1e-9), name


def test_phases():
    how = {"guided": 0.5, "hard": 1 / 3, "guidance": 0.5, "temperature": 2.0}
    told = [training.phase(how, n / 12) for n in range(12)]
    assert told == [LOOK] * 6 + [SOFT] * 4 + [HARD] * 2
    assert [training.phase({**how, "guided": 1.0}, n / 4) for n in range(4)] == [LOOK] * 4
    assert [training.phase({**how, "guided": 0.0, "hard": 0.0}, n / 4) for n in range(4)] == [SOFT] * 4
    part = torch.nn.Module()
    handle = SimpleNamespace(modules={"covipal": part})
    training.prepare(handle, how, 0.9)
    assert (part.phase, part.temperature) == (HARD, 2.0)
    for bad, why in (({"guided": 1.5}, "guided=1.5"), ({"temperature": 0.0}, "temperature=0")):
        with pytest.raises(VtpruneError, match=why):
            training.prepare(handle, {**how, **bad}, 0.0)


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("family", ("llava", "qwen2.5-vl", "gemma3"))
def test_what_guides_is_the_models_own_attention(family, side):
    """All heads and all rows behind the image, as eager attention tells them; whichever attention the model runs."""
    model, inputs = testing.tiny(family)  # eager attention is NaN on padding in float64
    visual, real = bind(model).prunable(inputs), real_of(inputs)
    if side == "right":  # roll the padding behind
        shift = (~real).long().cumprod(1).sum(1).tolist()
        inputs = {
            k: torch.stack([row.roll(-s) for row, s in zip(v, shift, strict=True)])
            if isinstance(v, Tensor) and v.shape == real.shape
            else v
            for k, v in inputs.items()
        }
        visual, real = bind(model).prunable(inputs), real_of(inputs)
    assert not bool(real.all())
    decoder = bind(model).describe()
    got, marks, _ = received(decoder, 3, inputs, lambda: model(**inputs))
    assert torch.equal(marks, visual)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[3]
    for b in range(len(maps)):
        behind = [n for n in range(maps.shape[2]) if real[b, n] and n > int(visual[b].nonzero()[-1])]
        for k in visual[b].nonzero()[:, 0].tolist():
            want = sum(float(maps[b, h, j, k]) for h in range(maps.shape[1]) for j in behind)
            assert float(got[b, k]) * maps.shape[1] * len(behind) == pytest.approx(want, rel=1e-4, abs=1e-7)


def step_of(model, inputs, handle, settings, done: float) -> Step:
    handle.modules["covipal"].requires_grad_()
    training.prepare(handle, settings, done)
    output = model(**inputs)
    return Step(
        handle=handle,
        settings=settings,
        model=model,
        inputs=inputs,
        output=output,
        again=lambda: model(**inputs),
        done=done,
    )


SETTINGS = {
    "guided": 0.5,
    "guidance": 0.5,
    "hard": 0.5,
    "temperature": 1.0,
    "budget_weight": 3.0,
    "distil_weight": 2.0,
}


def test_the_losses_are_those_of_the_definition():
    model, inputs = double("llava")
    inputs = labelled(inputs)
    plain = {k: v for k, v in inputs.items() if k != "labels"}
    visual = bind(model).prunable(inputs)
    with torch.no_grad():
        dense = model(**plain).logits
    attention, *_ = received(bind(model).describe(), 3, plain, lambda: model(**plain))
    with vtprune.attach(model, "covipal", keep=4, layers=(1,), width=8) as handle:
        module = randomised(handle.modules["covipal"])
        step = step_of(model, inputs, handle, SETTINGS, 0.1)
        assert torch.allclose(step.output.logits, dense), "nothing is dropped while attention guides"
        with torch.no_grad():
            model(**plain)
        scores = [module.ppm[i] for i in range(2)]
        made = {}
        hooks = [m.register_forward_hook(lambda m, a, out, i=i: made.update({i: out})) for i, m in enumerate(scores)]
        step = step_of(model, inputs, handle, SETTINGS, 0.1)
        handle.told()  # of this forward alone
        step = step_of(model, inputs, handle, SETTINGS, 0.1)
        (name, loss), *more = training.losses(step).items()
        assert name == "guidance" and not more
        want = []
        for place in (0, 1):
            for b in range(2):
                a = attention[b][visual[b]]
                target = (a - a.mean()) / (a - a.mean()).square().mean().sqrt()
                want.append(float((made[place][b].detach() - target).square().mean()))
        assert float(loss.detach()) == pytest.approx(sum(want) / 4, rel=1e-4)
        for done, names in ((0.6, {"distil", "budget"}), (0.8, {"distil"})):
            step = step_of(model, inputs, handle, SETTINGS, done)
            found = training.losses(step)
            assert set(found) == names
            each = []
            for b in range(2):
                rows = [n - 1 for n in range(1, dense.shape[1]) if inputs["labels"][b, n] != -100]
                p, q = (t[b, rows].float().softmax(-1) for t in (dense, step.output.logits.detach()))
                each.append(float((p * (p / q).log()).sum(-1).mean()))
            assert float(found["distil"].detach()) == pytest.approx(2.0 * sum(each) / 2, rel=1e-3)
            if "budget" in names:
                over = [(float(made[i][b].sigmoid().mean()) - (8, 4)[i] / 16) ** 2 for i in (0, 1) for b in (0, 1)]
                assert float(found["budget"].detach()) == pytest.approx(3.0 * sum(over) / 4, rel=1e-4)
        for hook in hooks:
            hook.remove()
        with pytest.raises(VtpruneError, match="must be deeper than every module"):
            training.losses(step_of(model, inputs, handle, {**SETTINGS, "guidance": 0.2}, 0.1))


def test_prompts_that_cannot_train_it_are_refused():
    model, inputs = testing.tiny("llava")
    inputs = labelled(copy.copy(inputs))
    ids = inputs["input_ids"]
    with pytest.raises(VtpruneError, match="one image each"):
        training.standardised(torch.rand(2, 3), torch.tensor([[True, True, False], [True, False, False]]))
    with pytest.raises(VtpruneError, match="one image each"):
        training._distance(torch.zeros(3, 4), torch.zeros(2, 4))
    ids[ids == model.config.image_token_id] = 9
    with vtprune.attach(model, "covipal", layers=(1,)) as handle:
        inputs = {k: v for k, v in inputs.items() if not k.startswith("pixel")}
        assert training.losses(step_of(model, inputs, handle, SETTINGS, 0.1)) == {}


def test_controls_cost_as_much():
    options = {"keep": 0.25, "projector": True, "layers": None, "width": None}
    by = {name: (recipe, extra) for name, recipe, extra in training.controls(options)}
    assert {recipe for recipe, _ in by.values()} == {"covipal", "random", "divprune", "fastv", "pyramiddrop"}
    assert all(extra == {"effective_tokens": EQUAL} for recipe, extra in by.values() if recipe != "covipal")
