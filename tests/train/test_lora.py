"""LoRA adapters beside a method's part, or alone: the model is given back as it was, the folder is peft's own, and
weights that were trained beside adapters ask for them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trained import CASES, PARTS, QUIET, SHARED, Killed, arguments, made, run_two

import vtprune
from vtprune import testing
from vtprune.cli import train as command
from vtprune.core import backbone
from vtprune.core.ledger import snapshot
from vtprune.core.planning import bind
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.inputs import models
from vtprune.train import card, questions
from vtprune.train.base import TRAININGS
from vtprune.train.compare import compare, evaluate
from vtprune.train.fit import fit
from vtprune.train.lora import Lora, inserted, loaded

LAYERS = {"layers": (1, 3, 4)}


@pytest.fixture(scope="module")
def case():
    return made()


def trained(case, folder, lora, method="mindskip", **how):
    model, data = case
    how = {"steps": 12, "batch": 8, "lr": CASES[method]["lr"], "folder": folder, **PARTS[method], **QUIET, **how}
    return fit(model, data, method, lora=lora, **how)


@pytest.fixture(scope="module")
def gates(case, tmp_path_factory):
    """``(path, lora, part)``: gates trained beside adapters, on disk."""
    path, lora = tmp_path_factory.mktemp("gates") / "gates.safetensors", Lora(2, alpha=3.0, lr=1e-2)
    part, facts = trained(case, path.parent / "none", lora, init="random", settings={"target": 0.2})
    card.save(part, path, facts, backbone.layers(bind(case[0])))
    lora.save(path.with_suffix(".lora"))
    return path, lora, part


def logits(model, data, recipe=None, **options):
    inputs = data.batch(data.rows, torch.device("cpu"))
    inputs.pop("labels")
    with torch.no_grad():
        if recipe is None:
            return model(**inputs).logits
        with vtprune.attach(model, recipe, **options):
            return model(**inputs).logits


def test_the_model_is_given_back_and_both_move(case, tmp_path):
    model, _ = case
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, snapshot(model)
    flags = [p.requires_grad for p in model.parameters()]
    lora = Lora(2, lr=1e-2)
    part, facts = trained(case, tmp_path, lora, steps=30)
    assert snapshot(model) == before and [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert min(facts["loss"][-5:]) < 0.9 * facts["loss"][0]
    assert len(lora.state) == 2 * 7 * 6 and all(t.any() for name, t in lora.state.items() if "lora_B" in name)
    own, beside = sum(p.numel() for p in part.parameters()), sum(t.numel() for t in lora.state.values())
    assert facts["parameters"] == own + beside and facts["lora"] == lora.plan()
    with vtprune.attach(model, "mindskip", **LAYERS) as handle:
        fresh = handle.modules["mindskip"].state_dict()
    assert all(not torch.equal(v, fresh[k]) for k, v in part.state_dict().items())


def test_the_first_step_is_the_one_of_the_definition(case, tmp_path):
    """By hand: h = W x + alpha / r B A x in every q_proj, written into the weights; AdamW's first step on B."""
    model, data = copy.deepcopy(case[0]), case[1]
    lora = Lora(2, targets=("q_proj",), alpha=6.0)
    trained(case, tmp_path, lora, method="pyramiddrop", steps=1, lr=1e-2, keep=0.5)
    a = {n: t for n, t in lora.state.items() if "lora_A" in n}
    leaves = {n: torch.zeros(model.config.text_config.hidden_size, 2, requires_grad=True) for n in a}
    originals = {}
    for name, t in a.items():
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        linear = model.get_submodule(path)
        originals[name] = linear.weight.detach()
        del linear.weight
        linear.weight = originals[name] + 6.0 / 2 * leaves[name] @ t  # A does not move in the first step: B is 0
    with vtprune.attach(model, "pyramiddrop", keep=0.5):
        model(**data.batch(data.rows, torch.device("cpu")), use_cache=False).loss.backward()
    norm = torch.stack([p.grad.norm() for p in leaves.values()]).norm()
    for name, leaf in leaves.items():
        g = leaf.grad * min(1.0, float(1 / (norm + 1e-6)))
        clear = g.abs() > 1e-5
        want = -1e-2 * g / (g.abs() + 1e-8)
        got = lora.state[name.replace("lora_A", "lora_B")]
        assert clear.any() and torch.allclose(got[clear], want[clear], atol=2e-4), name


def test_the_folder_is_pefts(case, gates):
    """peft reads it, and with it the weights give what was trained."""
    model, data = copy.deepcopy(case[0]), case[1]
    path, lora, part = gates
    plain = logits(model, data)
    wrapped = peft.PeftModel.from_pretrained(model, str(path.with_suffix(".lora"))).eval()
    assert (logits(wrapped, data) - plain).abs().max() > 1e-3
    found = logits(wrapped, data, "mindskip", **LAYERS, weights=str(path))
    with vtprune.attach(wrapped, "mindskip", **LAYERS) as handle, torch.no_grad():
        handle.modules["mindskip"].load_state_dict({k: v.half().float() for k, v in part.state_dict().items()})
        inputs = data.batch(data.rows, torch.device("cpu"))
        inputs.pop("labels")
        assert torch.equal(wrapped(**inputs).logits, found)
    by_hand = copy.deepcopy(case[0])
    for name, b in lora.state.items():
        if "lora_B" in name:
            target = by_hand.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_B.weight"))
            with torch.no_grad():
                target.weight += lora.alpha / lora.rank * b @ lora.state[name.replace("lora_B", "lora_A")]
    torch.testing.assert_close(logits(by_hand, data), logits(wrapped, data), atol=1e-4, rtol=1e-4)
    unwrapped = wrapped.unload()
    assert torch.equal(logits(unwrapped, data), plain)
    unwrapped.load_adapter(str(path.with_suffix(".lora")))  # transformers' own way
    assert torch.equal(logits(unwrapped, data, "mindskip", **LAYERS, weights=str(path)), found)


def test_ours_loads_it_too_and_takes_it_back(case, gates):
    model, data = case
    plain, before = logits(model, data), snapshot(model)
    flags = [p.requires_grad for p in model.parameters()]
    with loaded(model, gates[0].with_suffix(".lora")):
        inside = logits(model, data)
        vtprune.attach(model, "mindskip", **LAYERS, weights=str(gates[0])).remove()
        assert not any(p.requires_grad for p in model.parameters())
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(gates[0].with_suffix(".lora")))
    assert torch.equal(inside, logits(wrapped, data)) and not torch.equal(inside, plain)
    assert snapshot(model) == before and torch.equal(logits(model, data), plain)
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(ZeroDivisionError), loaded(model, gates[0].with_suffix(".lora")):
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_weights_ask_for_their_adapters(case, gates, tmp_path, caplog):
    path = gates[0]
    options = {**LAYERS, "weights": str(path)}
    folder = str(path.with_suffix(".lora"))
    with pytest.raises(
        VtpruneError, match=r"adapters that this model does not have: model = peft.PeftModel.*gates\.lora"
    ):
        vtprune.attach(case[0], "mindskip", **options)
    model = copy.deepcopy(case[0])
    wrapped = peft.PeftModel.from_pretrained(model, folder)
    vtprune.attach(wrapped, "mindskip", **options).remove()
    with wrapped.disable_adapter(), pytest.raises(VtpruneError, match="does not have"):
        vtprune.attach(wrapped, "mindskip", **options)
    wrapped.merge_adapter()
    with pytest.raises(VtpruneError, match="does not have.*not merged"):
        vtprune.attach(wrapped, "mindskip", **options)
    wrapped.unmerge_adapter()
    for dtype in (torch.float16, torch.bfloat16):
        vtprune.attach(copy.deepcopy(wrapped).to(dtype), "mindskip", **options).remove()
    state = load_file(Path(folder) / "adapter_model.safetensors")
    for name, change in {"B": lambda n, t: t * 1.2 if "lora_B" in n else t, "A": lambda n, t: -t}.items():
        other = tmp_path / name
        peft.LoraConfig.from_pretrained(folder).save_pretrained(str(other))
        save_file({n: change(n, t) for n, t in state.items()}, other / "adapter_model.safetensors")
        strange = peft.PeftModel.from_pretrained(copy.deepcopy(case[0]), str(other))
        with pytest.raises(VtpruneError, match="together with other adapters"):
            vtprune.attach(strange, "mindskip", **options)
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    (tmp_path / "A" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3 * config["lora_alpha"]}))
    save_file(state, tmp_path / "A" / "adapter_model.safetensors")
    scaled = peft.PeftModel.from_pretrained(copy.deepcopy(case[0]), str(tmp_path / "A"))
    with pytest.raises(VtpruneError, match="together with other adapters"):
        vtprune.attach(scaled, "mindskip", **options)
    fewer = peft.get_peft_model(copy.deepcopy(case[0]), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(VtpruneError, match="together with other adapters"):
        vtprune.attach(fewer, "mindskip", **options)
    assert not caplog.records
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for told in ("{", "[]", '{"count": 3}'):
        save_file(load_file(path), tmp_path / "odd.safetensors", metadata={**metadata, "adapters": told})
        with pytest.raises(VtpruneError, match="that is none|other adapters"):
            vtprune.attach(wrapped, "mindskip", **LAYERS, weights=str(tmp_path / "odd.safetensors"))


def test_the_signature_of_a_model_is_the_same_with_adapters(case):
    model, _ = copy.deepcopy(case)
    want = backbone.signature(backbone.layers(bind(model)))
    assert backbone.adapters(model) == {}
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert backbone.signature(backbone.layers(bind(model))) == want
    assert backbone.adapters(model)["count"] == [
        len([n for n, _ in model.named_modules() if n.endswith(("q_proj", "down_proj"))])
    ]


def test_a_run_that_was_broken_off_goes_on(case, tmp_path):
    how = {"steps": 6, "batch": 3, "save_every": 2, "seed": 5, "init": "random"}
    want, got = Lora(2), Lora(2)
    part, _ = trained(case, tmp_path / "whole", want, **how)

    def kill(line: str) -> None:
        if line.startswith("step 5 "):
            raise Killed

    before = snapshot(case[0])
    with pytest.raises(Killed):
        trained(case, tmp_path / "broken", Lora(2), **how, say=kill)
    assert snapshot(case[0]) == before
    again, _ = trained(case, tmp_path / "broken", got, **how, resume=True)
    assert all(torch.equal(v, want.state[k]) for k, v in got.state.items()) and got.state.keys() == want.state.keys()
    assert all(torch.equal(v, part.state_dict()[k]) for k, v in again.state_dict().items())
    for other in (Lora(3), Lora(2, alpha=1.0), Lora(2, ("q_proj",)), Lora(2, lr=1e-3), None):
        with pytest.raises(VtpruneError, match="of another run: lora was another"):
            trained(case, tmp_path / "broken", other, **how, resume=True)
    seeds = [Lora(2), Lora(2)]
    for seed, lora in enumerate(seeds):
        trained(case, tmp_path / "none", lora, steps=1, seed=seed)
    a = [next(t for n, t in lora.state.items() if "lora_A" in n) for lora in seeds]
    assert not torch.equal(*a)


LORA_SCRIPT = """
import sys
from pathlib import Path

import torch
from test_lora import made, trained
from trained import SHARED
from vtprune.train.lora import Lora

torch.set_num_threads(1)
lora = Lora(2)
result = trained(made(), Path(sys.argv[1]), lora, sys.argv[2], **SHARED[sys.argv[2]])
if torch.distributed.get_rank() == 0:
    torch.save(lora.state, sys.argv[1] + "/out.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("method", ["mindskip", "pyramiddrop"])
def test_two_processes_are_as_one(tmp_path, method):
    want, start = Lora(2), Lora(2)
    trained(made(), tmp_path / "one", want, method, **SHARED[method])
    with inserted(made()[0], start, 0):
        pass
    got = torch.load(run_two(tmp_path, LORA_SCRIPT, method, head=""))
    for name, t in want.state.items():
        assert float((got[name] - t).abs().mean()) <= 1e-3 * float((t - start.state[name]).abs().mean()), name


def test_the_tower_of_a_model_that_is_shown_pixels(case, tmp_path):
    model, data = case
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    lora = Lora(2, ("tower",), lr=1e-2)
    trained((model, replace(data, images=pixels, projected=False)), tmp_path, lora, steps=2)
    assert lora.state and all("vision_tower" in name for name in lora.state)
    lora.save(folder := tmp_path / "tower.lora")
    training = TRAININGS.get("mindskip")
    with pytest.raises(VtpruneError, match="seen these images without them"):
        compare(model, data, training, LAYERS, lora=folder, **QUIET)
    table = compare(model, replace(data, images=pixels, projected=False), training, LAYERS, lora=folder, **QUIET)
    assert [row["name"] for row in table["rows"]][2:] == ["unpruned, with the adapters", "mindskip, trained"]
    with pytest.raises(VtpruneError, match="the adapters get no gradient.*images themselves"):
        trained(case, tmp_path, Lora(2, ("tower",)), steps=1)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Lora(0), "rank=0"),
        (lambda: Lora(True), "rank=True"),
        (lambda: Lora(2, alpha=0.0), "alpha=0"),
        (lambda: Lora(2, lr=float("nan")), "lr=nan"),
        (lambda: Lora(2, ("tower", "q_proj")), "not both"),
        (lambda: Lora(2).save(Path("none")), "nothing to save"),
        (lambda: Lora(2, ("query",)), "no linear layer is called 'query'; there are down_proj"),
    ],
)
def test_bad_adapters(case, tmp_path, make, word):
    before = snapshot(case[0])
    with pytest.raises(VtpruneError, match=word):
        trained(case, tmp_path, make(), steps=1)
    assert snapshot(case[0]) == before


def test_models_that_have_adapters_already(case, tmp_path):
    """No second ones; but a part is trained beside them, and asks for them."""
    model, data = copy.deepcopy(case[0]), case[1]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    before = snapshot(wrapped)
    with pytest.raises(VtpruneError, match="has adapters already"):
        trained((wrapped, data), tmp_path, Lora(2), steps=1)
    part, facts = trained((wrapped, data), tmp_path, None, steps=1)
    assert snapshot(wrapped) == before
    path = tmp_path / "gates.safetensors"
    card.save(part, path, facts, backbone.layers(bind(wrapped)))
    vtprune.attach(wrapped, "mindskip", **LAYERS, weights=str(path)).remove()
    with pytest.raises(VtpruneError, match="does not have"):
        vtprune.attach(case[0], "mindskip", **LAYERS, weights=str(path))
    with pytest.raises(VtpruneError, match="has adapters already"), loaded(wrapped, path.with_suffix(".lora")):
        pass


def test_folders_that_hold_no_adapters_of_this_model(case, gates, tmp_path):
    with pytest.raises(VtpruneError, match="holds no LoRA adapters"), loaded(case[0], tmp_path):
        pass
    other, _ = testing.tiny("qwen2-vl")
    before = snapshot(other)
    with pytest.raises(VtpruneError, match="beside another model"), loaded(other, gates[0].with_suffix(".lora")):
        pass
    assert snapshot(other) == before
    other, _ = testing.tiny("timm-vit")
    with pytest.raises(VtpruneError, match="are another model's"), loaded(other, gates[0].with_suffix(".lora")):
        pass
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(VtpruneError, match="no adapters of vtprune's"), loaded(case[0], tmp_path):
        pass
    tower, _ = testing.tiny("causal-lm")
    with pytest.raises(VtpruneError, match="no vision tower"), inserted(tower, Lora(2, ("tower",)), 0):
        pass
    clip, _ = testing.tiny("open-clip")
    with inserted(clip, lora := Lora(2), 0):
        pass
    assert lora.state and all("attn" not in name for name in lora.state), (
        "MultiheadAttention reads past a layer's forward"
    )


def test_short_weights_train_too(case, tmp_path):
    model, data = copy.deepcopy(case[0]).to(torch.bfloat16), case[1]
    lora = Lora(2, lr=1e-2)
    trained((model, data), tmp_path, lora, steps=3, dtype=torch.bfloat16)
    assert all(t.dtype == torch.float32 for t in lora.state.values())


def test_a_method_without_a_part_needs_adapters(case, tmp_path):
    with pytest.raises(VtpruneError, match="pyramiddrop has no part of its own.*--lora RANK"):
        trained(case, tmp_path, None, "pyramiddrop", steps=1)


def test_a_copied_layer_holds_what_adapters_add(case, tmp_path):
    """The branch of dpvr-lf begins as the merged model's, and is trained beside adapters."""
    model, data = copy.deepcopy(case[0]), case[1]
    targets = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**targets)).eval()
    with vtprune.attach(wrapped, "dpvr-lf", split=3) as handle:
        found = {k: v.clone() for k, v in handle.modules["dpvr-lf"].state_dict().items()}
    with wrapped.disable_adapter(), vtprune.attach(wrapped, "dpvr-lf", split=3) as handle:
        plain = {k: v.clone() for k, v in handle.modules["dpvr-lf"].state_dict().items()}
    with vtprune.attach(case[0], "dpvr-lf", split=3) as handle:
        assert all(torch.equal(v, plain[k]) for k, v in handle.modules["dpvr-lf"].state_dict().items())
    logged = logits(wrapped, data, "dpvr-lf", split=3)
    merged = wrapped.merge_and_unload()
    with vtprune.attach(merged, "dpvr-lf", split=3) as handle:
        want = handle.modules["dpvr-lf"].state_dict()
    assert found.keys() == want.keys()
    assert all(torch.allclose(v, found[k], atol=1e-6) for k, v in want.items())
    torch.testing.assert_close(logits(merged, data, "dpvr-lf", split=3), logged, atol=1e-4, rtol=1e-4)
    assert sum(not torch.equal(v, found[k]) for k, v in plain.items()) == 2
    lora, path = Lora(2, lr=1e-2), tmp_path / "branch.safetensors"
    part, facts = trained(case, tmp_path / "none", lora, "dpvr-lf", steps=4)
    card.save(part, path, facts, backbone.layers(bind(case[0])))
    lora.save(path.with_suffix(".lora"))
    with pytest.raises(VtpruneError, match="does not have"):
        vtprune.attach(case[0], "dpvr-lf", split=3, weights=str(path))
    with loaded(case[0], path.with_suffix(".lora")):
        with vtprune.attach(case[0], "dpvr-lf", split=3, weights=str(path)) as handle:
            state = handle.modules["dpvr-lf"].state_dict()
    assert all(torch.equal(state[k], v.half().float()) for k, v in part.state_dict().items())
    dora = peft.get_peft_model(copy.deepcopy(case[0]), peft.LoraConfig(**targets, use_dora=True))
    with pytest.raises(UnsupportedError, match="cannot be copied: it holds"):
        vtprune.attach(dora, "dpvr-lf", split=3)


def test_the_command_trains_adapters_of_the_tower_alone(request, tmp_path):
    """Also where they are only compared, the tower runs with them."""
    folder = request.getfixturevalue("model_folder")
    out = tmp_path / "alone.lora"
    words = [f"--model={folder}", f"--out={out}", "--scenes=1", "--easy=0", "--eval-scenes=1", "--eval-easy=0"]
    words += ["--batch=2", "--dtype=float32", "--keep=0.5"]
    more = ["--lora=2", "--lora-targets=tower", "--lr=1e-1"]
    assert command.run(arguments(*words, *more, "--steps=4", method="pyramiddrop")) == 0
    table = json.loads((tmp_path / "alone.compare.json").read_text())
    model, processor = models.load(str(folder), "cpu", "float32")
    rows = questions.scene_items("test", 0, 1, 2)
    with loaded(model, out):
        found = evaluate(model, questions.encode(model, processor, rows))["hits"]
    assert table["rows"][2]["mean"] == pytest.approx(mean_of(table, found))
    assert command.run(arguments(*words, "--compare-only", method="pyramiddrop")) == 0
    assert json.loads((tmp_path / "alone.compare.json").read_text()) == table
    for bad, says in (
        ([], "pyramiddrop has no part of its own.*--lora RANK"),
        (["--lora-alpha=2"], "--lora-alpha is of adapters: give --lora RANK"),
        ([*more, f"--out={tmp_path / 'alone.safetensors'}"], "must end in .lora"),
        (["--lora=2", "--lora-targets=query"], "no linear layer is called 'query'"),
        (["--lora=2", "--keep=2.5"], "keep=2.5: a fraction"),
        (["--lora=2", "--keep=0"], "--keep 0: keep at least one token"),
        (["--lora=2", "--keep=true"], "got True"),
    ):
        with pytest.raises(VtpruneError, match=says):
            command.run(arguments(*words, *bad, method="pyramiddrop"))
    with pytest.raises(VtpruneError, match="--lora-lr is of adapters"):
        command.run(arguments(f"--model={folder}", "--out=a.safetensors", "--lora-lr=1", method="mindskip"))


def mean_of(table, hits):
    """Of the mean over kinds, as many questions of each."""
    assert len(set(table["questions"].values())) == 1
    return sum(hits) / len(hits)
