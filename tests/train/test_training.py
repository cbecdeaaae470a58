"""Training what methods need trained: only the part moves, the file gives back what was trained, and the command works
from end to end on a tiny model."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from trained import (
    PARTS,
    QUIET,
    Killed,
    arguments,
    made,
    trained,
)

import vtprune
from vtprune.cli import train as command
from vtprune.core import backbone
from vtprune.core.ledger import snapshot
from vtprune.core.planning import bind
from vtprune.core.types import VtpruneError
from vtprune.inputs import models
from vtprune.train import card, compare, dpvr_lf, questions
from vtprune.train.base import EQUAL, TRAININGS
from vtprune.train.fit import fit


@pytest.fixture(scope="module")
def case():
    return made()


@pytest.fixture(scope="module")
def branch(case, tmp_path_factory):
    return trained(case, tmp_path_factory.mktemp("branch"))


def test_the_first_step_is_the_one_of_the_definition(case, tmp_path):
    """AdamW's first step by hand, on the gradient that the model's own loss gives."""
    model, data = case
    with vtprune.attach(model, "dpvr-lf", split=3) as handle:
        own = handle.modules["dpvr-lf"].requires_grad_(True)
        loss = model(**data.batch(data.rows, torch.device("cpu")), use_cache=False).loss
        names = [name for name, _ in own.named_parameters()]
        grads = torch.autograd.grad(loss, list(own.parameters()))
        before = {k: v.detach().clone() for k, v in own.named_parameters()}
    norm = torch.stack([g.norm() for g in grads]).norm()
    part, facts = trained(case, tmp_path, steps=1, lr=1e-2)
    assert facts["loss"][0] == pytest.approx(float(loss.detach()), abs=1e-4)
    for name, g in zip(names, grads, strict=True):
        g = g * min(1.0, float(1 / (norm + 1e-6)))
        want = before[name] - 1e-2 * g / (g.abs() + 1e-8)
        clear = g.abs() > 1e-5
        assert torch.allclose(part.state_dict()[name][clear], want[clear], atol=2e-4), name


def logits(model, data, method, **options):
    with torch.no_grad(), vtprune.attach(model, method, **options):
        inputs = data.batch(data.rows, torch.device("cpu"))
        inputs.pop("labels")
        return model(**inputs).logits


def test_the_file_gives_back_what_was_trained(case, branch, tmp_path):
    model, data = case
    part, facts = branch
    path = tmp_path / "folder" / "branch.safetensors"
    card.save(part, path, facts, backbone.layers(bind(model)))
    assert card.read_facts(path, "dpvr-lf") == json.loads(json.dumps(facts))
    found = logits(model, data, "dpvr-lf", split=3, weights=str(path))
    with vtprune.attach(model, "dpvr-lf", split=3, weights=str(path)) as handle:
        loaded = handle.modules["dpvr-lf"].state_dict()
    assert all(torch.equal(loaded[k], v.half().float()) for k, v in part.state_dict().items())
    with torch.no_grad(), vtprune.attach(model, "dpvr-lf", split=3) as handle:
        handle.modules["dpvr-lf"].load_state_dict(part.state_dict())
        inputs = data.batch(data.rows, torch.device("cpu"))
        wanted = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=0)  # half precision on disk
    assert (found - logits(model, data, "dpvr-lf", split=3)).abs().max() > 0.1
    path.with_suffix(".json").write_text('{"method": "dpvr-lf", "split": 3}')
    with pytest.raises(VtpruneError, match="does not tell the options"):
        card.read_facts(path, "dpvr-lf")
    huge = copy.deepcopy(part)
    with torch.no_grad():
        next(huge.parameters())[0] *= 1e9
    with pytest.raises(VtpruneError, match="nothing was saved"):
        card.save(huge, path, facts, backbone.layers(bind(model)))
    path.with_suffix(".json").write_text('{"method": "dpvr-lf", "options": {}}')
    with pytest.raises(VtpruneError, match="tells of 'dpvr-lf', not of mindskip"):
        card.read_facts(path, "mindskip")


def test_rivals_take_as_many_effective_tokens(case, tmp_path):
    model, data = case
    training, path = TRAININGS.get("focusllava"), tmp_path / "part.safetensors"
    options = {**PARTS["focusllava"], "ratio": 0.5}
    part, facts = trained(case, tmp_path / "none", "focusllava", steps=1, **options)
    card.save(part, path, facts, backbone.layers(bind(model)))
    rows = compare.compare(model, data, training, options, path, batch=8, **QUIET)["rows"]
    names = [c[0] for c in training.controls(options) if EQUAL in c[2].values()]
    assert [r["name"] for r in rows[-len(names) :]] == names and rows[0]["name"] == "unpruned"
    mine = next(r for r in rows if r["name"] == "focusllava, trained")["tokens"]
    for row in rows[-len(names) :]:
        assert mine - 1.5 / 16 < row["tokens"] <= mine
    bare = compare.compare(model, data, training, options, batch=8, **QUIET)["rows"]
    assert [r["name"] for r in bare] == [r["name"] for r in rows[:3]]


def test_training_goes_on_from_weights(case, branch, tmp_path):
    model, data = case
    path = tmp_path / "branch.safetensors"
    card.save(*branch[:1], path, branch[1], backbone.layers(bind(model)))
    _, facts = trained(case, tmp_path, steps=1, weights=str(path))
    assert facts["loss"][0] < branch[1]["loss"][0]


def test_batches_that_processes_cannot_share(case, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 3))
    with pytest.raises(VtpruneError, match="batch=8 is not divisible among 3 processes"):
        trained(case, tmp_path)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"fusion": 0}, "nothing to train"),
        ({"steps": 0}, "steps=0"),
        ({"batch": -1}, "batch=-1"),
        ({"batch": 9}, "there are 8"),
        ({"lr": 0.0}, "lr=0"),
        ({"split": 6}, "0..5"),
        ({"init": "zeros"}, "init='zeros'"),
        ({"depth": 3}, "depth"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": 1e30, "steps": 4}, "no finite number"),
        ({"steps": 1.5}, "whole number"),
        ({"split": "auto"}, "give a number"),
        ({"split": True}, "neither 'auto' nor a layer"),
        ({"settings": {"target": 1.0}}, "takes no target="),
    ],
)
def test_bad_arguments(case, tmp_path, options, word):
    model, _ = case
    flags, before = [p.requires_grad for p in model.parameters()], snapshot(model)
    with pytest.raises(VtpruneError, match=word):
        trained(case, tmp_path, **{"steps": 1, "batch": 2, **options})
    assert [p.requires_grad for p in model.parameters()] == flags
    assert snapshot(model) == before


def test_what_cannot_be_trained(case, tmp_path):
    model, data = case
    with pytest.raises(VtpruneError, match="unknown method that can be trained 'fastv'"):
        fit(model, data, "fastv", steps=1, folder=tmp_path)
    with pytest.raises(VtpruneError, match="target=-1"):
        trained(case, tmp_path, "mindskip", settings={"target": -1})


def test_a_fusion_layer_that_looks_at_nothing_is_told(case, tmp_path):
    model, _ = case
    weight = model.model.language_model.layers[5].self_attn.o_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        with pytest.raises(VtpruneError, match="no gradient"):
            trained(case, tmp_path, steps=1)
        trained(case, tmp_path, steps=1, fusion=2)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_the_split_is_where_half_of_the_image_is_still_needed():
    curve = [{"layer": i, "mean": m} for i, m in enumerate((0.2, 0.3, 0.5, 0.7, 0.8, 0.95, 1.0))]
    assert dpvr_lf.choose_split(curve, fusion=1) == 2
    late = [{"layer": i, "mean": float(i == 6)} for i in range(7)]
    assert dpvr_lf.choose_split(late, fusion=2) == 3  # one of the six layers stays without the image
    with pytest.raises(VtpruneError, match="no difference"):
        dpvr_lf.choose_split([{"layer": i, "mean": 0.5} for i in range(7)], fusion=1)


# ------------------------------------------------------------------------------------------------------- the whole
# command


def test_encoded_questions_are_what_the_processor_makes(folder):
    from PIL import Image

    model, processor = models.load(str(folder), "cpu", "float32")
    image, rows = next(questions.scene_items("val", 3, 4, 1))
    data = questions.encode(model, processor, [(image, rows)])
    assert isinstance(image, Image.Image) and [r.kind for r in data.rows] == [kind for kind, *_ in rows]
    inputs = data.batch(data.rows, torch.device("cpu"))
    labels = inputs.pop("labels")
    with torch.no_grad():
        found = model(**inputs).logits
        for b, (_, question, answer) in enumerate(rows):
            message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            reply = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            plain = processor(
                text=processor.apply_chat_template(message + reply).replace("</s>assistant", "assistant"),
                images=image,
                return_tensors="pt",
            )
            n = plain["input_ids"].shape[1]
            assert plain["input_ids"][0].tolist() == inputs["input_ids"][b][:n].tolist()
            torch.testing.assert_close(model(**plain).logits[0], found[b, :n], atol=1e-4, rtol=1e-4)
            assert processor.tokenizer.decode(labels[b][labels[b] != -100], skip_special_tokens=True) == answer


def test_the_command_trains_saves_and_compares(folder, tmp_path, capsys):
    out = tmp_path / "branch.safetensors"
    sizes = (
        "--scenes=2",
        "--easy=1",
        "--eval-scenes=1",
        "--eval-easy=1",
        "--batch=8",
        "--steps=3",
        "--split=1",
        f"--model={folder}",
        f"--out={out}",
    )
    assert command.run(arguments(*sizes)) == 0
    facts, table = card.read_facts(out, "dpvr-lf"), json.loads(out.with_suffix(".compare.json").read_text())
    assert (facts["options"]["split"], facts["steps"], facts["images"], len(facts["loss"])) == (1, 3, 3, 3)
    assert set(facts["versions"]) == {"torch", "transformers", "accelerate", "vtprune"}
    assert [r["trained_share"] > 0 for r in table["rows"]] == [False, False, False, False, False, True]
    assert (
        table["rows"][0]["flops"]
        == 1.0
        > table["rows"][5]["flops"]
        > table["rows"][2]["flops"]
        > table["rows"][1]["flops"]
    )
    assert table["rows"][1]["tokens"] == pytest.approx(1 / 4) and table["rows"][5]["tokens"] == table["rows"][2][
        "tokens"
    ] == pytest.approx(2 / 4)
    printed = capsys.readouterr().out
    assert "dpvr-lf, trained" in printed and "easy-vqa" in printed
    assert command.run(arguments(*sizes, "--compare-only")) == 0
    assert json.loads(out.with_suffix(".compare.json").read_text()) == table


def test_controls_spend_as_many_flops(folder, tmp_path, capsys, monkeypatch):
    """What is distilled saves what the mechanism saves; others are given as much, or left out with a word."""
    out = tmp_path / "part.safetensors"
    words = [f"--model={folder}", f"--out={out}", "--scenes=1", "--easy=0", "--batch=4", "--steps=2", "--layer=1"]
    assert command.run(arguments(*words, "--eval-scenes=1", "--eval-easy=0", method="swiftkv")) == 0
    rows = {row["name"]: row for row in json.loads(out.with_suffix(".compare.json").read_text())["rows"]}
    own = rows["swiftkv, trained"]
    alone = rows["swiftkv, the model's own projections"]
    assert own["flops"] == alone["flops"] < 1 and own["trained_share"] > 0 == alone["trained_share"]
    equal = [row["flops"] for name, row in rows.items() if "as many FLOPs" in name]
    assert len(equal) == 3 and all(own["flops"] - 0.02 < flops <= own["flops"] + 0.005 for flops in equal)
    assert rows["withdrawn at layer 1"]["flops"] < own["flops"]
    monkeypatch.setattr(compare, "solve", lambda *args, **kwargs: (_ for _ in ()).throw(VtpruneError("too few")))
    assert command.run(arguments(*words, "--eval-scenes=1", "--eval-easy=0", "--compare-only", method="swiftkv")) == 0
    assert "pyramiddrop, as many FLOPs: left out, too few" in capsys.readouterr().err
    rows = json.loads(out.with_suffix(".compare.json").read_text())["rows"]
    assert [row["name"] for row in rows if "as many" in row["name"]] == [] and len(rows) == 5


def test_gates_are_trained_on_questions_of_ones_own(folder, tmp_path, capsys):
    from fake import picture

    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    told = [{"image": f"{i}.png", "question": q, "answer": "red"} for i in range(4) for q in ("what", "where is it")]
    data = tmp_path / "own.jsonl"
    data.write_text("\n".join(map(json.dumps, told)) + "\n\n")
    out = tmp_path / "gates.safetensors"
    words = [f"--model={folder}", f"--out={out}", f"--data={data}", "--batch=8", "--steps=20", "--target=0"]
    sizes = ["--eval-scenes=1", "--eval-easy=0"]
    assert command.run(arguments(*words, *sizes, "--layers=[1,2]", method="mindskip")) == 0
    facts = card.read_facts(out, "mindskip")
    assert facts["options"] == {"layers": [1, 2], "threshold": 0.5} and facts["questions"] == 8 and facts["images"] == 4
    assert facts["settings"] == {"target": 0.0, "budget_weight": 1.0}
    table = json.loads(out.with_suffix(".compare.json").read_text())
    assert [row["name"] for row in table["rows"]] == [
        "unpruned",
        "mindskip, random gates, untrained",
        "mindskip, trained",
    ]
    assert table["rows"][2]["flops"] < 1, "a price on every attention, and all of them run"
    model, processor = models.load(str(folder), "cpu", "float32")
    vtprune.attach(model, "mindskip", layers=(1, 2), weights=str(out)).remove()
    with pytest.raises(VtpruneError, match="was trained for layers=1,2"):
        vtprune.attach(model, "mindskip", layers=(1,), weights=str(out))
    for line, says in (
        ("{", "line 9 is not JSON"),
        ("[]", "line 9 does not have the texts"),
        ("[" * 100_000, "line 9 is not JSON"),
        ('{"image": "0.png", "question": "what <image>", "answer": "x"}', "stands for 2 images"),
        ('{"image": "0.png", "question": 3, "answer": "x"}', "line 9 does not have the texts"),
        ('{"image": "none.png", "question": "a", "answer": "x"}', "none.png"),
    ):
        data.write_text("\n".join([*map(json.dumps, told), line]))
        with pytest.raises(VtpruneError, match=says):
            questions.encode(model, processor, questions.own_items(data))
    data.write_text(json.dumps({**told[0], "question": "what\u2028is it"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(questions.encode(model, processor, questions.own_items(data))) == 1
    for content, says in ((b"\n", "holds no questions"), (b"\xff\xfe{}", "cannot be read as text")):
        data.write_bytes(content)
        with pytest.raises(VtpruneError, match=says):
            questions.encode(model, processor, questions.own_items(data))
    with pytest.raises(VtpruneError, match="cannot be read"):
        questions.encode(model, processor, questions.own_items(tmp_path / "no.jsonl"))


def test_the_command_goes_on_where_it_was_broken_off(folder, tmp_path, monkeypatch):
    words = [
        f"--model={folder}",
        "--scenes=2",
        "--easy=0",
        "--eval-scenes=0",
        "--eval-easy=0",
        "--batch=4",
        "--steps=4",
    ]
    words += ["--split=1", "--save-every=2"]
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    assert command.run(arguments(f"--out={whole}", *words)) == 0

    def kill(line: str) -> None:
        if line.startswith("step 3 "):
            raise Killed

    monkeypatch.setattr(command, "fit", partial(fit, say=kill))
    with pytest.raises(Killed):
        command.run(arguments(f"--out={broken}", *words))
    monkeypatch.undo()
    assert not broken.exists() and (tmp_path / "broken.checkpoints" / "checkpoint-2").is_dir()
    assert command.run(arguments(f"--out={broken}", *words, "--resume")) == 0
    from safetensors.torch import load_file

    want, got = load_file(whole), load_file(broken)
    assert all(torch.equal(got[name], t) for name, t in want.items()) and got.keys() == want.keys()


def test_the_curve_ends_with_the_unpruned_model(folder):
    model, processor = models.load(str(folder), "cpu", "float32")
    data = questions.encode(model, processor, questions.scene_items("val", 0, 1, 1))
    curve = dpvr_lf.withdrawal_curve(model, data, **QUIET)
    assert [p["layer"] for p in curve] == [0, 1, 2, 3, 4]
    assert curve[-1]["accuracy"] == compare.evaluate(model, data)["accuracy"]


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (("--out=branch.bin",), "safetensors"),
        (("--out=b.safetensors", "--split=deep"), "layer number"),
        (("--out=b.safetensors", "--scenes=-1"), "negative"),
        (("--out=b.safetensors", "--scenes=0", "--easy=0"), "nothing to train on"),
        (("--out=missing.safetensors", "--compare-only"), "no such file"),
        (("--out=b.safetensors", "--resume"), "give both"),
        (("--out=b.safetensors", "--split=true"), "layer number"),
        (("--out=b.safetensors", "--split=1.5"), "layer number"),
        (("--out=b.safetensors", "--branch-layers=two"), "branch_layers"),
        (("--out=b.safetensors", "--data=none.jsonl"), "no such file none.jsonl"),
        (("--out=b.safetensors", "--split=1", "--fusion=0"), "nothing to train"),
        (("--out=b.safetensors", "--model=./no-such-folder"), "no such model"),
    ],
)
def test_bad_command_lines(words, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VtpruneError, match=word):
        command.run(arguments(*words))


def test_a_model_on_another_device_than_the_trainers(case, tmp_path, monkeypatch):
    monkeypatch.setattr(type(case[0]), "device", property(lambda self: torch.device("cuda", 1)))
    with pytest.raises(VtpruneError, match="the model lies on cuda:1, and this process trains on cpu"):
        trained(case, tmp_path)


def test_a_tower_is_trained_on_pixels_and_compared_at_as_many_tokens(folder, tmp_path, capsys):
    out = tmp_path / "interpreters.safetensors"
    words = [f"--model={folder}", f"--out={out}", "--scenes=2", "--easy=0", "--eval-scenes=1", "--eval-easy=0"]
    model, processor = models.load(str(folder), "cpu", "float32")
    data = questions.encode(model, processor, questions.scene_items("val", 0, 1, 1), pixels=True)
    assert not data.projected and data.images.shape[1:] == (3, 168, 168)
    with vtprune.attach(model, "ia-red2", init="random", layers=0) as handle:
        facts = {"method": "ia-red2", "options": {"layers": 0}}
        card.save(handle.modules["ia-red2"], out, facts, backbone.layers(bind(model)))
    assert command.run(arguments(*words, "--compare-only", method="ia-red2")) == 0
    rows = json.loads(out.with_suffix(".compare.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    at = names.index("ia-red2, trained")
    assert names[:2] == ["unpruned", "ia-red2, untrained"] and at == 2 and len(rows) == 8
    assert rows[1]["flops"] > 1 > rows[at]["flops"] and 0 < rows[at]["tokens"] < 1
    for row in rows[at + 1 :]:
        assert row["name"].endswith(", as many effective tokens")
        assert row["tokens"] == pytest.approx(rows[at]["tokens"], abs=1 / 144)
    with pytest.raises(VtpruneError, match="no answer of the first batch earns a reward"):  # a random model's are wrong
        command.run(arguments(*words, "--batch=4", "--steps=2", "--layers=[0]", method="ia-red2"))


def test_every_step_draws_anew(case, tmp_path, monkeypatch):
    """By its number and the seed alone."""
    from vtprune.core.handle import Handle

    told, reseed = [], Handle.reseed
    monkeypatch.setattr(Handle, "reseed", lambda self, seed: (told.append(seed), reseed(self, seed))[1])
    for seed in (0, 1):
        trained(case, tmp_path, "mindskip", steps=3, seed=seed)
    assert len(set(told)) == 6 and told == [0, 1, 2, 3, 4, 5]
