"""Tokens retained softly while what decides is being trained: every layer behind the decision attends to them by the
share that is retained."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from vtprune.models.engine.layout import units
from vtprune.models.engine.level import dense_level, prefill_mask
from vtprune.models.engine.masked import hide_in_decoder

import vtprune
from vtprune import testing
from vtprune.core.ledger import UndoLedger
from vtprune.core.planning import bind
from vtprune.core.select import from_mask
from vtprune.core.types import Cut, UnsupportedError, VtpruneError
from vtprune.methods.base import METHODS, Method, MethodInfo, option, register

PLACES = [
    ("llava", "projector"),
    ("llava", "llm.2"),
    ("llava-next", "projector"),
    ("qwen2.5-vl", "llm.1"),
    ("qwen3-vl", "projector"),
    ("gemma3", "llm.1"),
    ("paligemma", "projector"),
    ("internvl", "llm.3"),
]


class Shares(nn.Module):
    """Of every original token of an image the share that is retained, the same for all images."""

    def __init__(self):
        super().__init__()
        draw = torch.rand(512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.w = nn.Parameter(draw * 0.9 + 0.05)


@pytest.fixture
def softly():
    @register(
        MethodInfo(
            name="softly",
            paper="baseline",
            idea="retains by a table",
            kinds=("llm", "projector", "vision"),
            cases=({}, {}),
            learns=True,
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class Softly(Method):
        sites: tuple[str, ...] = option(("projector",), "where")
        drops: bool = option(False, "whether it drops a token all the same")

        def plan(self, geometry, keep):
            return tuple(Cut(site=site, keep=keep) for site in self.sites)

        def build(self, branch, geometry):
            return Shares().requires_grad_(False)

        def select(self, view, cut):
            mask = view.valid & (view.index != 0) if self.drops else view.valid
            share = view.module.w[view.index.clamp_min(0)]
            return replace(from_mask(mask), retention=share)

    yield Softly
    METHODS._forget("softly")


def double(family: str):
    model, inputs = testing.tiny(family)
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    model = model.double()
    for p in model.parameters():
        p.requires_grad_(False)
    return model, {**inputs, "use_cache": False}


def trained(handle) -> Shares:
    return handle.modules["softly"].requires_grad_()


def shares_of(model, inputs, w: Tensor) -> Tensor:
    """``[B, T]``: the share of every column of the prompts, by hand: 1 but for visual tokens, which are counted image
    by image."""
    adapter = bind(model)
    out = torch.ones(inputs["input_ids"].shape, dtype=torch.float64)
    for unit in units(adapter.parts(inputs["input_ids"], inputs), "image"):
        out[unit.sample, unit.columns] = w[: len(unit.columns)]
    return out


def biased(model, inputs, share: Tensor, first: int) -> Tensor:
    """Logits of the dense model whose layers from ``first`` on add the log of ``share`` ``[B, T]`` to their logits."""
    ledger = UndoLedger()
    layers = bind(model).decoder_layers()
    nothing = torch.zeros(share.shape, dtype=torch.bool)
    hide_in_decoder(ledger, list(layers), [nothing] * len(layers))  # additive masks, whichever the attention

    def add(module, args, kwargs):
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": torch.where(mask == 0, share.log()[:, None, None], mask)}

    for layer in layers[first:]:
        ledger.before(layer, add)
    try:
        with torch.no_grad():
            return model(**inputs).logits
    finally:
        ledger.undo()


def real_rows(inputs) -> Tensor:
    return inputs["attention_mask"].bool()


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize(("family", "site"), PLACES)
def test_layers_attend_by_what_is_retained(softly, family, site, attention):
    """Logits are those of the dense model with the log added to its own masks; with all of it they are the dense
    model's, with nothing those of the model that drops the token; gradients by finite differences."""
    model, inputs = double(family)
    if attention == "eager":  # whose masks are NaN on padding in float64
        model = model.float()
        inputs = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    model.set_attn_implementation(attention)
    near = {"rtol": 1e-4, "atol": 1e-4} if attention == "eager" else {"rtol": 1e-7, "atol": 1e-7}
    real, first = real_rows(inputs), int(site.partition(".")[2] or 0)
    with torch.no_grad():
        dense = model(**inputs).logits
    with vtprune.attach(model, "softly", sites=(site,), keep=3) as handle:
        module = trained(handle)
        got = model(**inputs).logits
        table = module.w.detach().clone()
        want = shares_of(model, inputs, table)

        def loss(logits: Tensor) -> Tensor:
            rows = logits[real].double()
            return (rows * torch.linspace(-1, 1, rows.numel(), dtype=torch.float64).view_as(rows)).sum() / len(rows)

        (slope,) = torch.autograd.grad(loss(got), [module.w])
        assert float(slope.norm()) > 1e-6
        if attention == "sdpa":
            for place in (int(slope.abs().argmax()), 1):
                found = []
                for step in (1e-3, -1e-3):
                    with torch.no_grad():
                        module.w[place] += step
                    found.append(float(loss(model(**inputs).logits).detach()))
                    with torch.no_grad():
                        module.w[place] -= step
                assert (found[0] - found[1]) / 2e-3 == pytest.approx(
                    float(slope[place]), rel=2e-2, abs=1e-4
                )  # norms in float32
        with torch.no_grad():
            module.w.fill_(1)
        whole = model(**inputs).logits
        report = handle.report()
        with torch.no_grad():
            module.w[::3] = 0
        gone = model(**inputs).logits
        left = shares_of(model, inputs, module.w.detach())
    torch.testing.assert_close(whole[real], dense[real], **near)
    assert report.flops == report.dense_flops and report.stages[0].tokens_out == report.visual_tokens
    torch.testing.assert_close(got[real], biased(model, inputs, want, first)[real], **near)
    assert float((got - dense)[real].abs().max()) > 1e-3
    ledger = UndoLedger()
    layers = bind(model).decoder_layers()
    hide_in_decoder(ledger, list(layers), [(left == 0) & (torch.tensor(i >= first)) for i in range(len(layers))])
    try:
        with torch.no_grad():
            dropped = model(**inputs).logits
    finally:
        ledger.undo()
    stays = real & (left > 0)
    torch.testing.assert_close(gone[stays], dropped[stays], **near)
    assert bool(gone.isfinite().all())


def test_two_decisions_multiply(softly):
    model, inputs = double("llava")
    real = real_rows(inputs)
    with vtprune.attach(model, "softly", sites=("projector", "llm.2"), keep=3) as handle:
        module = trained(handle)
        got = model(**inputs).logits
        share = shares_of(model, inputs, module.w.detach())
    ledger = UndoLedger()
    layers = bind(model).decoder_layers()

    def add(power):
        def enter(module, args, kwargs):
            mask = kwargs["attention_mask"]
            return args, {**kwargs, "attention_mask": torch.where(mask == 0, power * share.log()[:, None, None], mask)}

        return enter

    hide_in_decoder(ledger, list(layers), [torch.zeros_like(real)] * len(layers))
    for i, layer in enumerate(layers):
        ledger.before(layer, add(1 if i < 2 else 2))
    try:
        with torch.no_grad():
            want = model(**inputs).logits
    finally:
        ledger.undo()
    torch.testing.assert_close(got[real], want[real], rtol=1e-7, atol=1e-7)


def test_tokens_that_were_dropped_before(softly):
    """A hard stage in front: what is left of its tokens is retained by share, at its own columns."""
    model, inputs = double("llava")
    stages = (
        vtprune.Stage(method="uniform", keep=7),
        vtprune.Stage(method="softly", keep=3, options={"sites": ("llm.2",)}),
    )
    recipe, real = vtprune.Recipe(name="both", stages=stages), real_rows(inputs)
    with vtprune.attach(model, recipe) as handle:
        module = trained(handle)
        got = model(**inputs).logits
        report = handle.report()
        share = shares_of(model, inputs, module.w.detach())
    visual = bind(model).prunable(inputs)
    gone = visual.clone()
    for b, kept in enumerate(report.stages[0].kept):
        gone[b, visual[b].nonzero()[kept, 0]] = False
    ledger = UndoLedger()
    hide_in_decoder(ledger, list(bind(model).decoder_layers()), [gone] * 6)
    layers = bind(model).decoder_layers()

    def add(module, args, kwargs):
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": torch.where(mask == 0, share.log()[:, None, None], mask)}

    for layer in layers[2:]:
        ledger.before(layer, add)
    try:
        with torch.no_grad():
            want = model(**inputs).logits
    finally:
        ledger.undo()
    stays = real & ~gone
    torch.testing.assert_close(got[stays], want[stays], rtol=1e-7, atol=1e-7)


def test_in_training_alone(softly):
    model, inputs = testing.tiny("llava")
    alone = {**inputs, "use_cache": False}
    for sites in (("projector",), ("llm.2",)):
        with vtprune.attach(model, "softly", sites=sites, keep=3) as handle:
            with pytest.raises(VtpruneError, match="in training alone"), torch.no_grad():
                model(**alone)
            with pytest.raises(VtpruneError, match="in training alone"):
                model(**alone)
            trained(handle)
            with pytest.raises(VtpruneError, match="in training alone"), torch.no_grad():
                model(**alone)
            with pytest.raises(UnsupportedError, match="use_cache=False"):
                model(**inputs, use_cache=True)
            model(**alone).logits.sum().backward()
        with vtprune.attach(model, "softly", sites=sites, keep=3, drops=True) as handle:
            trained(handle)
            with pytest.raises(VtpruneError, match="all stay"):
                model(**alone)
    with vtprune.attach(model, "softly", sites=("vision.1",), keep=3) as handle:
        trained(handle)
        with pytest.raises(UnsupportedError, match="behind the projector"):
            model(**alone)
    stages = (
        vtprune.Stage(method="softly", keep=8, options={"sites": ("projector",)}),
        vtprune.Stage(method="fastv", keep=3),
    )
    with vtprune.attach(model, vtprune.Recipe(name="both", stages=stages)) as handle:
        trained(handle)
        with pytest.raises(UnsupportedError, match="train it alone"):
            model(**alone)
    learning = copy.deepcopy(model).train()
    learning.gradient_checkpointing_enable()
    for sites in (("projector",), ("llm.2",)):
        with vtprune.attach(learning, "softly", sites=sites, keep=3) as handle:
            trained(handle)
            with pytest.raises(UnsupportedError, match="gradient_checkpointing_disable"):
                learning(**alone).logits.sum().backward()


def test_flash_attention_takes_no_such_mask():
    level = dense_level(torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="train with sdpa or eager"):
        prefill_mask(None, level, level, torch.zeros(1, 4, 2), 4, "flash", False, torch.zeros(1, 4))
