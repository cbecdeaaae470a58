"""A module of a method's own that decides at cuts: what it is shown, and the gradients that reach it while it is being
trained."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from torch import nn

import vtprune
from vtprune import testing
from vtprune.core.select import from_mask, merged, top
from vtprune.core.types import Cut, Mix, UnsupportedError
from vtprune.methods.base import METHODS, Method, MethodInfo, option, register

PLACES = [
    ("llava", "projector"),
    ("llava", "llm.2"),
    ("llava", "vision.1"),
    ("llava-next", "projector"),
    ("llava-next", "llm.1"),
    ("qwen2-vl", "llm.1"),
    ("timm-vit", "vision.2"),
    ("hf-vit", "vision.1"),
]


class Scorer(nn.Module):
    """A linear score; ``gate`` is what kept tokens are multiplied by instead of 1, for finite differences."""

    def __init__(self, width: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(1)) / width**0.5)
        self.factors: list[torch.Tensor] = []  # of each call, if not 1
        self.seen: list[torch.Tensor] = []


@pytest.fixture
def scorer():
    """A method that keeps the best half of the tokens by a linear score, registered for one test."""

    @register(
        MethodInfo(
            name="scorer",
            paper="baseline",
            idea="a linear score",
            kinds=("llm", "projector", "vision"),
            cases=({}, {}),
            learns=True,
            merges=True,
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class Linear(Method):
        site: str = option("projector", "where")
        how: str = option("keep", "what with the others", choices=("keep", "merge", "mix"))

        def plan(self, geometry, keep):
            return (Cut(site=self.site, keep=keep),)

        def build(self, branch, geometry):
            width = geometry.vision_width if self.site.startswith("vision") else geometry.width
            return Scorer(width).requires_grad_(False).to(torch.float64)

        def select(self, view, cut):
            module: Scorer = view.module
            s = torch.sigmoid(view.features.double() @ module.w)
            gate = None
            if s.requires_grad:
                number = len(module.seen)
                gate = 1 + s - s.detach()
                if module.factors:
                    gate = module.factors[number]
            module.seen.append(s)
            view.tell("mean", s.mean(1))
            chosen = top(s, cut.keep, view.valid, view.protected)
            if self.how == "keep":
                return replace(chosen, gate=gate)
            mask = torch.zeros_like(view.valid).scatter(1, chosen.kept.clamp_min(0), True) & view.valid
            first = chosen.kept[:, :1].expand_as(view.index)
            place = torch.arange(view.index.shape[1]).expand_as(first)
            whole = merged(mask, torch.where(mask, place, torch.where(view.valid, first, -1)))
            if self.how == "merge":
                return replace(whole, gate=gate)
            weight = s * gate if module.factors else s
            return replace(from_mask(mask), target=whole.target, mix=Mix(place, whole.target, weight))

    yield Linear
    METHODS._forget("scorer")


def loss_of(output) -> torch.Tensor:
    last = next(
        t
        for t in (getattr(output, "logits", None), getattr(output, "last_hidden_state", None), output)
        if t is not None
    )
    last = last.double()
    return (last * torch.linspace(-1, 1, last.numel(), dtype=torch.float64).view_as(last)).sum()


def call(model, inputs):
    return model(inputs) if isinstance(inputs, torch.Tensor) else model(**inputs)


@pytest.mark.parametrize("how", ["keep", "merge", "mix"])
@pytest.mark.parametrize("family,site", PLACES)
def test_gradients_reach_what_decides(scorer, family, site, how):
    """Of the score of every token, by finite differences of the loss in what it multiplies; to nothing else."""
    model, inputs = testing.tiny(family)
    model = model.double()
    inputs = (
        {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        if isinstance(inputs, dict)
        else inputs.double()
    )
    for p in model.parameters():
        p.requires_grad_(False)
    with vtprune.attach(model, "scorer", site=site, how=how, keep=0.5) as handle:
        module = handle.modules["scorer"]
        with torch.no_grad():
            plain = loss_of(call(model, inputs))
        assert not handle.told() and not module.seen[0].requires_grad
        loss_of_untrained = loss_of(call(model, inputs))
        assert not loss_of_untrained.requires_grad and not handle.told()
        module.requires_grad_(True)
        module.seen.clear()
        loss = loss_of(call(model, inputs))
        torch.testing.assert_close(loss.detach(), plain, rtol=1e-9, atol=1e-9)
        told = handle.told()
        assert list(told) == [site] and not handle.told()
        scores = list(module.seen)
        torch.testing.assert_close(told[site]["mean"], torch.cat([s.mean(1) for s in scores]))
        grads = torch.autograd.grad(loss, scores, retain_graph=True)
        (whole,) = torch.autograd.grad(loss, [module.w])
        assert float(whole.norm()) > 1e-9
        module.factors = [torch.ones_like(s) for s in scores]
        for n, (s, g) in enumerate(zip(scores, grads, strict=True)):
            for place in (int(g[0].abs().argmax()), s.shape[1] - 1):
                found = []
                for step in (1e-3, -1e-3):
                    module.factors[n][0, place] += step
                    module.seen.clear()
                    found.append(float(loss_of(call(model, inputs)).detach()))
                    module.factors[n][0, place] -= step
                difference = (found[0] - found[1]) / 2e-3
                if how == "mix":  # the gate multiplies the weight there
                    difference = difference / float(s[0, place].detach())
                assert difference == pytest.approx(float(g[0, place]), rel=2e-2, abs=1e-3), (
                    n,
                    place,
                )  # norms in float32
    assert all(p.grad is None for p in model.parameters())


def test_whole_prompts_beside_an_attachment(scorer):
    """What a teacher reads: the unpruned model's own logits, and no report of it."""
    model, inputs = testing.tiny("llava")
    with torch.no_grad():
        dense = model(**inputs).logits
        with vtprune.attach(model, "scorer", site="llm.1", keep=0.25) as handle:
            pruned, report = model(**inputs).logits, handle.report()
            with handle.unpruned():
                assert torch.equal(model(**inputs).logits, dense)
            assert repr(handle.report()) == repr(report)
            assert torch.equal(model(**inputs).logits, pruned) and not torch.equal(pruned, dense)
    with vtprune.attach(model, "scorer", site="vision.1") as handle, pytest.raises(UnsupportedError, match="tower"):
        with handle.unpruned():
            pass


def test_forwards_that_leave_no_report(scorer):
    model, inputs = testing.tiny("llava")
    with vtprune.attach(model, "scorer", site="vision.1", keep=0.25) as handle, torch.no_grad():
        assert handle.images == []
        with handle.unreported():
            model(**inputs)
            assert handle.images == [1, 1]
        with pytest.raises(vtprune.VtpruneError, match="no prefill"):
            handle.report()
        model(**inputs)
        told = repr(asdict(handle.report()))
        with pytest.raises(KeyError), handle.unreported():
            model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
            assert repr(asdict(handle.report())) != told
            raise KeyError
        assert repr(asdict(handle.report())) == told
    with vtprune.attach(model, "scorer", site="llm.1", keep=0.25) as handle, torch.no_grad():
        model(**inputs)
        assert handle.images == [0, 0]  # no stage in the tower: nothing is known of its passes
    model, inputs = testing.tiny("timm-vit")
    with vtprune.attach(model, "scorer", site="vision.1") as handle, torch.no_grad():
        call(model, inputs)
        assert handle.images == [1] * len(handle.passes) != []


@pytest.mark.parametrize("site", ["llm.1", "vision.1"])
def test_gradient_checkpointing_is_refused_in_training(scorer, site):
    model, inputs = testing.tiny("llava")
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable()
    inputs = {**inputs, "use_cache": False}
    with vtprune.attach(model, "scorer", site=site) as handle:
        model(**inputs).logits.sum().backward()
        handle.modules["scorer"].requires_grad_(True)
        with pytest.raises(UnsupportedError, match="being trained"):
            model(**inputs).logits.sum().backward()


@pytest.mark.parametrize("method", [n for n in vtprune.methods() if vtprune.describe(n).learns])
def test_what_decides_is_made_alike_and_leaves_the_callers_numbers(method):
    """Layers draw as they are made; whose module it is, the caller's generator does not tell."""
    family = "timm-vit" if method == "clca" else "llava"
    model, _ = testing.tiny(family)
    options = dict(vtprune.describe(method).cases[0])
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        with vtprune.attach(model, method, **options) as handle:
            made.append({k: v.clone() for k, v in handle.modules[method].state_dict().items()})
        assert torch.equal(torch.random.get_rng_state(), before)
    assert made[0].keys() == made[1].keys() and all(torch.equal(v, made[1][k]) for k, v in made[0].items())


def test_told_is_of_the_last_forward(scorer):
    """What a forward told that failed is no other's."""
    model, inputs = testing.tiny("llava")
    with vtprune.attach(model, "scorer", site="llm.1") as handle:
        handle.modules["scorer"].requires_grad_(True)

        def fail(module, args):
            raise MemoryError

        hook = model.model.language_model.layers[3].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(**inputs)
        hook.remove()
        model(**inputs)
        model(**inputs)
        assert handle.told()["llm.1"]["mean"].shape == (2,) and not handle.told()


@pytest.mark.parametrize("method", [m for m in vtprune.methods() if vtprune.describe(m).cases])
def test_recipes_from_files_give_what_options_give(method, tmp_path):
    """Files have lists where options are tuples."""
    family = "timm-vit" if method == "clca" else "llava"
    model, inputs = testing.tiny(family)
    info = vtprune.describe(method)
    for case in info.cases:
        options = {k: v for k, v in case.items() if k not in ("keep", "per", "positions")}
        recipe = vtprune.Recipe(
            name="x", stages=(vtprune.Stage(method=method, options=options, keep=case.get("keep")),)
        )
        recipe.save(tmp_path / "recipe.json")
        try:
            vtprune.attach(model, recipe).remove()
        except (UnsupportedError, vtprune.VtpruneError):
            continue
        out = []
        for chosen in (recipe, vtprune.Recipe.load(tmp_path / "recipe.json")):
            with torch.no_grad(), vtprune.attach(model, chosen):
                out.append(call(model, inputs))
        assert torch.equal(loss_of(out[0]), loss_of(out[1])), case
