"""ARank (γ-MoD, arXiv 2410.13859): ranks of constructed maps, maps against the model's own, and the recipe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from vtprune.models.base import ADAPTERS

import vtprune
from fake import picture
from fake import tiny as fake_model
from vtprune.check.case import Case
from vtprune.cli import main, models
from vtprune.core.ledger import snapshot
from vtprune.core.planning import bind, load_recipe
from vtprune.inputs.chats import prepare
from vtprune.measure import arank, fit
from vtprune.measure.arank import aranks, ranks
from vtprune.measure.samples import Sample

SAMPLES = [Sample(picture(i), q, "", "") for i, q in enumerate(["what is it", "is the big one red then", "where"])]


def decoder_layers(model):
    return bind(model).decoder_layers()


def test_ranks_of_constructed_maps():
    """Everything on the first token: 1; what is even over all before it: T - 1; diagonals alone: 0."""
    t = 12
    first = torch.zeros(t, t)
    first[:, 0] = 1
    even = torch.ones(t, t).tril() / torch.arange(1, t + 1)[:, None]
    blocks = torch.zeros(t, t)
    blocks[4:, 0] = blocks[8:, 1] = 0.5
    assert ranks(torch.stack([first, even, torch.eye(t), blocks])).tolist() == [1, t - 1, 0, 2]
    assert ranks(even.triu()).item() == 0  # nothing above the diagonal counts, nor on it


def test_noise_below_float32_is_no_rank():
    even = torch.zeros(8, 8, dtype=torch.float64)
    even[:, 0] = 1
    even += 1e-12 * torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert ranks(even).item() == 1


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llava", "clip-llama"),
        ("causal-lm", "qwen3"),
        ("causal-lm", "phi3"),
        ("gemma3", "sliding"),
        ("qwen2-vl", "images"),
    ],
)
def test_maps_are_the_models_own(tiny, family, variant, monkeypatch):
    """Those of the eager attention of the unpruned model, prompt by prompt, layer by layer and head by head; what is
    told is the mean over heads and prompts of their ranks."""
    model, inputs = tiny(family, variant)
    singles = Case(model, load_recipe("gamma-mod"), inputs, {}).samples()
    with torch.no_grad():  # sharp, so that ranks differ
        for i, layer in enumerate(decoder_layers(model)):
            layer.input_layernorm.weight.mul_(2.0 * i + 1)
    before, seen = snapshot(model), []
    monkeypatch.setattr(arank, "ranks", lambda maps: seen.append(maps) or ranks(maps))
    found = aranks(model, singles)
    assert snapshot(model) == before
    model.set_attn_implementation("eager")
    want, depth = [], len(found)
    with torch.no_grad():
        for n, one in enumerate(singles):
            maps = model(**one, output_attentions=True).attentions  # per layer [1, H, T, T]
            for i, (own, mine) in enumerate(zip(maps, seen[n * depth : (n + 1) * depth], strict=True)):
                assert torch.allclose(own, mine, atol=2e-3), (n, i)  # sharp maps of float32
            mine = seen[n * depth : (n + 1) * depth]
            each = [[np.linalg.matrix_rank(np.tril(head.numpy(), -1)) for head in m[0]] for m in mine]
            want.append([float(np.mean(heads)) for heads in each])
    assert len(set(want[0])) > 1 and found == pytest.approx(np.mean(want, 0).tolist(), abs=1e-9)


def test_the_layers_of_the_lowest_rank_are_routed(monkeypatch):
    model, processor = fake_model()
    ticks: list[int] = []
    found = fit.routed(model, processor, SAMPLES, layers=2, keep=5, progress=ticks.append)
    inputs = [prepare(processor, [s.picture()], [s.question]) for s in SAMPLES]
    assert found.facts["arank"] == pytest.approx(aranks(model, inputs)) and sum(ticks) == 3
    monkeypatch.setattr(fit, "aranks", lambda model, prompts: [5.0, 2.0, 3.0, 2.0, 1.0, 2.0])
    for count, want in ((1, [4]), (2, [4, 5]), (3, [3, 4, 5]), (5, [1, 2, 3, 4, 5]), (None, [4, 5])):
        stage = fit.routed(model, processor, SAMPLES, layers=count, keep=0.25).recipe.stages[0]
        assert (stage.method, stage.keep, stage.options) == ("gamma-mod", 0.25, {"layers": want})
    for count in (0, 7):
        with pytest.raises(vtprune.VtpruneError, match="route at least one of the 6 layers"):
            fit.routed(model, processor, SAMPLES, layers=count)


def test_what_cannot_be_measured(tiny):
    model, inputs = tiny("llava", "clip-llama")
    with pytest.raises(vtprune.VtpruneError, match="prompt by prompt, without padding"):
        aranks(model, [inputs])
    with pytest.raises(vtprune.VtpruneError, match="there are no prompts"):
        aranks(model, [])
    model.train()
    with pytest.raises(vtprune.VtpruneError, match="training mode"):
        aranks(model, [inputs])
    with vtprune.attach(model.eval(), "fastv", keep=4), pytest.raises(vtprune.VtpruneError, match="attached already"):
        aranks(model, [inputs])
    tower, _ = ADAPTERS.get("timm-vit").tiny["class"]()
    with pytest.raises(vtprune.UnsupportedError, match="does not show queries and keys"):
        aranks(tower, [])


def test_the_command_writes_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda args: fake_model())
    image = tmp_path / "a.png"
    picture(1).save(image)
    out = tmp_path / "mod.json"
    words = ["fit", "gamma-mod", "--image", str(image), "--question", "what is it", "--recipe-out", str(out)]
    assert main.main([*words, "--layers", "3", "--keep", "6"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("routed") == 3 and "the 3 layers of the lowest attention rank" in shown
    recipe = vtprune.Recipe.load(out)
    assert recipe.stages[0].keep == 6 and len(recipe.stages[0].options["layers"]) == 3
    assert main.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["arank"]) == 6 and told["routed"] == told["recipe"]["stages"][0]["options"]["layers"]
    with vtprune.attach(fake_model()[0], out):
        pass
