"""Training what methods need trained: only the part moves, the file gives back what was trained, and the command works
from end to end on a tiny model."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from vtprune.models.base import ADAPTERS

import vtprune
from vtprune.cli import train as command
from vtprune.core import backbone
from vtprune.core.ledger import snapshot
from vtprune.core.planning import bind
from vtprune.core.types import VtpruneError
from vtprune.inputs import models
from vtprune.train import card, compare, dpvr_lf, questions
from vtprune.train.base import TRAININGS
from vtprune.train.fit import fit

QUIET = {"say": lambda line: None}
CASES = {name: training.case for name, training in TRAININGS.items()}
PARTS = {name: case["options"] for name, case in CASES.items()}


@pytest.fixture(scope="module")
def case():
    return made()


def made():
    """A tiny LLaVA and eight images with the same question and different answers: only the image tells which."""
    model, _ = ADAPTERS.get("llava").tiny["dinov2-llama"]()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    projected = questions.takes_projected(model)
    if projected:
        with torch.no_grad():
            images = torch.stack(list(model.get_image_features(pixel_values=images).pooler_output))
    rows = [
        questions.Row(i, "existence", [1, 5, *[3] * 16, 6 + 5 * i, *[7] * (i % 3)], [20 + i, *[9] * (i % 2), 2])
        for i in range(8)
    ]
    return model, questions.Questions(images, projected, rows)


def trained(case, folder, method="dpvr-lf", **how):
    model, data = case
    how = {"steps": 40, "batch": 8, "lr": CASES[method]["lr"], "folder": folder, **PARTS[method], **QUIET, **how}
    return fit(model, data, method, **how)


@pytest.fixture(scope="module")
def branch(case, tmp_path_factory):
    return trained(case, tmp_path_factory.mktemp("branch"))


@pytest.mark.parametrize("method", PARTS)
def test_only_the_part_moves_and_the_loss_falls(case, tmp_path, method):
    model, _ = case
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.lm_head.requires_grad_(False)  # a flag that the user set himself
    flags, before = [p.requires_grad for p in model.parameters()], snapshot(model)
    part, facts = trained(case, tmp_path / "none", method, settings=CASES[method].get("settings", {}))
    assert snapshot(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert facts["steps"] == len(facts["loss"]) == 40 and facts["processes"] == 1
    assert min(facts["loss"][-5:]) < 0.95 * facts["loss"][0]
    assert facts["parameters"] == sum(p.numel() for p in part.parameters())
    assert not list(tmp_path.iterdir()), "a checkpoint that nobody asked for"
    with vtprune.attach(model, method, **PARTS[method]) as handle:
        fresh = handle.modules[method].state_dict()
    assert all(not torch.equal(v, fresh[k]) for k, v in part.state_dict().items())


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
    card.save(part, path, facts, bind(model).decoder_layers())
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
        card.save(huge, path, facts, bind(model).decoder_layers())
    path.with_suffix(".json").write_text('{"method": "dpvr-lf", "options": {}}')
    with pytest.raises(VtpruneError, match="tells of 'dpvr-lf', not of mindskip"):
        card.read_facts(path, "mindskip")


@pytest.mark.parametrize("method", PARTS)
def test_weights_of_another_model_are_refused(case, tmp_path, method, caplog):
    """Also one of the same shape; its casts to short types are the same model, and a file that does not tell is named
    in the log."""
    model, _ = case
    part, facts = trained(case, tmp_path, method, steps=1)
    path = tmp_path / "part.safetensors"
    card.save(part, path, facts, bind(model).decoder_layers())
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
    assert len(backbone.signature([big])["0.weight"]) == 8
    strange = torch.nn.Linear(4, 4).to(torch.float8_e4m3fn)
    assert backbone.signature([strange]) == {}
    from safetensors.torch import load_file, save_file

    caplog.clear()
    save_file(load_file(path), path, metadata={"layers": "1,3,4", "split": "3", "backbone": '{"0.other": [1.0]}'})
    vtprune.attach(other, method, **options).remove()
    assert "cannot be compared with this one" in caplog.text
    save_file(load_file(path), path, metadata={"layers": "1,3,4", "split": "3", "backbone": "{"})
    with pytest.raises(VtpruneError, match="that is none"):
        vtprune.attach(other, method, **options)
    save_file(load_file(path), path, metadata={"layers": "1,3,4", "split": "3"})
    vtprune.attach(other, method, **options).remove()
    assert "does not tell which model it was trained beside" in caplog.text


def test_training_goes_on_from_weights(case, branch, tmp_path):
    model, data = case
    path = tmp_path / "branch.safetensors"
    card.save(*branch[:1], path, branch[1], bind(model).decoder_layers())
    _, facts = trained(case, tmp_path, steps=1, weights=str(path))
    assert facts["loss"][0] < branch[1]["loss"][0]


@pytest.mark.parametrize("method", PARTS)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_trains_too(case, tmp_path, method, weights):
    model, data = case
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


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", PARTS)
def test_a_run_that_was_broken_off_goes_on(case, tmp_path, method):
    """To the same weights, bit by bit; not with other options, and not over what another run has left."""
    how = {"steps": 6, "batch": 3, "save_every": 2, "seed": 5}
    want, told = trained(case, tmp_path / "whole", method, **how)

    def kill(line: str) -> None:
        if line.startswith("step 5 "):
            raise Killed

    flags = [p.requires_grad for p in case[0].parameters()]
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    with pytest.raises(Killed):
        trained(case, tmp_path / "broken", method, **how, say=kill)
    assert numbers == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    assert [p.requires_grad for p in case[0].parameters()] == flags
    got, facts = trained(case, tmp_path / "broken", method, **how, resume=True)
    assert all(torch.equal(v, want.state_dict()[k]) for k, v in got.state_dict().items())
    assert facts["loss"] == told["loss"] and len(facts["loss"]) == 6
    with pytest.raises(VtpruneError, match="of another run: lr was another"):
        trained(case, tmp_path / "broken", method, **how, resume=True, lr=1e-3)
    model, data = case
    others = [dataclasses.replace(r, answer=[19, 2]) for r in data.rows]
    with pytest.raises(VtpruneError, match="of another run: data was another"):
        trained(
            (model, questions.Questions(data.images, data.projected, others)),
            tmp_path / "broken",
            method,
            **how,
            resume=True,
        )
    with pytest.raises(VtpruneError, match="of another run: dtype was another"):
        trained(case, tmp_path / "broken", method, **how, resume=True, dtype=torch.bfloat16)
    (tmp_path / "broken" / "checkpoint-8").mkdir()  # torn while it was written
    again, _ = trained(case, tmp_path / "broken", method, **how, resume=True)
    assert all(torch.equal(v, want.state_dict()[k]) for k, v in again.state_dict().items())
    with pytest.raises(VtpruneError, match="holds checkpoints already"):
        trained(case, tmp_path / "broken", method, **how)
    with pytest.raises(VtpruneError, match="no checkpoint to go on from"):
        trained(case, tmp_path / "none", method, **how, resume=True)


SCRIPT = """
import sys
from pathlib import Path

import torch
from test_training import SHARED, made, trained

torch.set_num_threads(1)
part, facts = trained(made(), Path(sys.argv[1]), sys.argv[2], **SHARED[sys.argv[2]])
if torch.distributed.get_rank() == 0:
    torch.save((part.state_dict(), facts), sys.argv[1] + "/out.pt")
torch.distributed.destroy_process_group()
"""


SHARED = {name: {"steps": 4, "batch": 4, "lr": 1e-2, **case.get("shared", {})} for name, case in CASES.items()}


def test_gates_of_the_shared_batches_decide_otherwise(case):
    """Else a price on each process's own share would be as good as one on all."""
    model, data = case
    with vtprune.attach(model, "mindskip", **PARTS["mindskip"], init="random") as handle:
        handle.modules["mindskip"].requires_grad_()
        model(**data.batch(data.rows, torch.device("cpu")), use_cache=False)
        ran = torch.stack(list(handle.gates().values())).detach()
    assert len(set(ran.mean(0).tolist())) > 1 and float(ran.mean()) > 0.2


@pytest.mark.parametrize("method", PARTS)
def test_two_processes_are_as_one(tmp_path, method):
    """Each reads half of every batch, with answers of other lengths, and gates that decide otherwise."""
    case = made()
    want, told = trained(case, tmp_path / "one", method, **SHARED[method])
    (tmp_path / "script.py").write_text(SCRIPT)
    here = Path(__file__).parent
    paths = [str(here.parent.parent), str(here.parent), str(here)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command = [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(tmp_path / "script.py"), str(tmp_path), method]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    got, facts = torch.load(tmp_path / "out.pt")
    assert facts["processes"] == 2 and told["processes"] == 1
    assert facts["loss"] == pytest.approx(told["loss"], rel=1e-4)
    start = fresh(case, method)
    for name, p in want.state_dict().items():  # where a gradient is next to nothing, AdamW makes a step of its rounding
        assert float((got[name] - p).abs().mean()) <= 1e-3 * float((p - start[name]).abs().mean()), name


def fresh(case, method):
    options = {k: v for k, v in CASES[method].get("shared", {}).items() if k != "settings"}
    with vtprune.attach(case[0], method, **PARTS[method], **options) as handle:
        return handle.modules[method].state_dict()


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random LLaVA of the bundled model's geometry and tokenizer, on disk."""
    pytest.importorskip("easy_vqa")
    from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vtprune.train.demo_model import TOKENS, processor_and_tokenizer

    processor = processor_and_tokenizer()
    tokenizer = processor.tokenizer
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=Dinov2Config(**sizes, image_size=168, patch_size=14),
        text_config=LlamaConfig(
            **{**sizes, "num_hidden_layers": 4}, vocab_size=len(tokenizer), intermediate_size=32, initializer_range=0.2
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
    )
    path = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def arguments(*words: str, method: str = "dpvr-lf") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.method_arguments(parser, TRAININGS.get(method))
    return parser.parse_args(list(words), argparse.Namespace(what=method, argv=["train", method, *words]))


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


def test_the_gates_that_are_shipped():
    """They belong to the bundled model, leave out what its card says, and answers stay."""
    from vtprune.inputs import demo_model
    from vtprune.measure.run import evaluate
    from vtprune.measure.samples import scenes_samples

    model, processor = vtprune.load_demo_model()
    weights, samples = demo_model.FOLDER / "mindskip.safetensors", scenes_samples(1)
    assert card.read_facts(weights, "mindskip")["settings"]["target"] == 0.5
    found = evaluate(model, processor, samples, "mindskip", weights=str(weights))
    assert all(found["correct"]) and found["flops"] < found["dense_flops"]
