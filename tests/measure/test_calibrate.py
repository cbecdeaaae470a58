"""A dial is turned until the budget is met."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import vtprune
from vtprune.core.select import from_mask
from vtprune.methods.base import METHODS, Cut, Method, MethodInfo, option, register


@pytest.fixture(autouse=True)
def threshold():
    """Keeps what is longer than the dial says, in shares of the longest token."""

    @register(
        MethodInfo(
            name="spy-dial",
            paper="baseline",
            idea="keeps tokens whose norm is above a share of the largest",
            kinds=("projector",),
            keep=None,
            budgeted=False,
            exact=False,
            dial=("share", 1.0, 0.0),
            cases=({"share": 0.9}, {"share": 0.5}),
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class Dial(Method):
        share: float = option(0.9, "of the largest norm", least=0, most=1)

        def plan(self, geometry, keep):
            return (Cut(site="projector", keep=1, adaptive=True),)

        def select(self, view, cut):
            size = view.features.norm(dim=-1).masked_fill(~view.valid, 0)
            return from_mask((size >= self.share * size.amax(1, keepdim=True)) & view.valid)

    yield
    METHODS._forget("spy-dial")


def tokens(model, recipe, inputs) -> float:
    with vtprune.attach(model, recipe) as handle, torch.no_grad():
        model(**inputs)
        return handle.report().effective_tokens


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "internvl"])
@pytest.mark.parametrize("target", [0.3, 0.75])
def test_the_dial_meets_the_budget(family, target, tiny):
    from vtprune.models.base import ADAPTERS

    model, inputs = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    with vtprune.attach(model, "random", keep=1.0) as handle, torch.no_grad():
        model(**inputs)
        dense = handle.report().visual_tokens
    recipe = vtprune.calibrate(model, "spy-dial", [inputs, inputs], effective_tokens=target)
    got, most = tokens(model, recipe, inputs), target * sum(dense) / len(dense)
    assert got <= most + 1e-6
    share = recipe.stages[-1].options["share"]
    more = vtprune.Recipe.from_dict(recipe.to_dict()).override(share=max(share - 0.02, 0.0))
    assert share == 0 or tokens(model, more, inputs) >= got
    assert got >= most - 0.2 * max(dense)  # tokens are few here: a step of the dial takes several
    assert tokens(model, recipe, inputs) == got


def test_what_has_no_dial_or_cannot_be_met_is_refused(tiny):
    model, inputs = tiny("llava", "clip-llama")
    with pytest.raises(vtprune.VtpruneError, match="random has no dial"):
        vtprune.calibrate(model, "random", inputs, effective_tokens=0.5)
    with pytest.raises(vtprune.VtpruneError, match="its smallest setting"):
        vtprune.calibrate(model, "spy-dial", inputs, effective_tokens=0.01)
    with pytest.raises(vtprune.VtpruneError, match="needs inputs"):
        vtprune.calibrate(model, "spy-dial", [], effective_tokens=0.5)
