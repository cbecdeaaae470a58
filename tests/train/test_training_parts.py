"""What every training is tested for: only the part moves, the loss falls, its file belongs to one model."""

from __future__ import annotations

import copy

import pytest
import torch
from trained import (
    CASES,
    OWN,
    PARTS,
    made,
    suited,
    trained,
)
from vtprune.models.base import ADAPTERS

import vtprune
from vtprune.core import backbone
from vtprune.core.ledger import snapshot
from vtprune.core.planning import bind
from vtprune.core.types import VtpruneError
from vtprune.train import card, questions
from vtprune.train.base import TRAININGS


@pytest.fixture(scope="module")
def case():
    return made()


@pytest.mark.parametrize("method", OWN)
def test_only_the_part_moves_and_the_loss_falls(case, tmp_path, method):
    model, _ = case = suited(case, method)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.lm_head.requires_grad_(False)  # a flag that the user set himself
    flags, before = [p.requires_grad for p in model.parameters()], snapshot(model)
    part, facts = trained(case, tmp_path / "none", method, settings=CASES[method].get("settings", {}))
    assert snapshot(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert facts["steps"] == len(facts["loss"]) == 40 and facts["processes"] == 1
    assert min(facts["loss"][-5:]) < CASES[method].get("falls", 0.95) * facts["loss"][0]
    assert facts["parameters"] == sum(p.numel() for p in part.parameters())
    assert not list(tmp_path.iterdir()), "a checkpoint that nobody asked for"
    with vtprune.attach(model, method, **PARTS[method]) as handle:
        fresh = handle.modules[method].state_dict()
    assert all(not torch.equal(v, fresh[k]) for k, v in part.state_dict().items())


@pytest.mark.parametrize("method", OWN)
def test_weights_of_another_model_are_refused(case, tmp_path, method, caplog):
    """Also one of the same shape; its casts to short types are the same model, and a file that does not tell is named
    in the log."""
    model, _ = case = suited(case, method)
    part, facts = trained(case, tmp_path, method, steps=1)
    path = tmp_path / "part.safetensors"
    card.save(part, path, facts, backbone.layers(bind(model)))
    options = {**PARTS[method], "weights": str(path)}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        other, _ = ADAPTERS.get("llava").tiny["dinov2-llama"]()
        vtprune.attach(other.to(dtype), method, **options).remove()
    with torch.no_grad():
        for p in other.model.language_model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    with pytest.raises(VtpruneError, match="trained beside another model"):
        vtprune.attach(other, method, **options)
    assert not caplog.records
    big = torch.nn.Linear(
        1, 45_088_768, bias=False, dtype=torch.float16
    )  # of a 7B model; as a float its last place is none
    assert len(backbone.signature({"": [big]})["0.weight"]) == 8
    strange = torch.nn.Linear(4, 4).to(torch.float8_e4m3fn)
    assert backbone.signature({"": [strange]}) == {}
    from safetensors.torch import load_file, save_file

    caplog.clear()
    told = TRAININGS.get(method).tells(part, facts["options"])
    save_file(load_file(path), path, metadata={**told, "backbone": '{"0.other": [1.0]}'})
    vtprune.attach(other, method, **options).remove()
    assert "cannot be compared with this one" in caplog.text
    save_file(load_file(path), path, metadata={**told, "backbone": "{"})
    with pytest.raises(VtpruneError, match="that is none"):
        vtprune.attach(other, method, **options)
    save_file(load_file(path), path, metadata=told)
    vtprune.attach(other, method, **options).remove()
    assert "does not tell which model it was trained beside" in caplog.text


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_trains_too(case, tmp_path, method, weights):
    model, data = suited(case, method)
    how = {"settings": CASES[method].get("settings", {})}
    if method == "dpvr-lf":
        how = {"variant": "pc", "init": "identity", "split": 4}
    short = questions.Questions(data.images.to(weights), data.projected, data.rows)
    case = copy.deepcopy(model).to(weights), short
    part, facts = trained(case, tmp_path, method, steps=12, dtype=torch.bfloat16, **how)
    if weights == torch.bfloat16:
        with pytest.raises(VtpruneError, match="float32 is not kept"):
            trained(case, tmp_path, method, steps=12, **how)
    assert min(facts["loss"][-4:]) < facts["loss"][0]
    assert all(p.dtype == torch.float32 for p in part.parameters())
