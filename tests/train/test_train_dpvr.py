"""Training the DPVR-LF branch: only the branch moves, the file gives back what was trained, and the command works from
end to end on a tiny model."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from vtprune.models.base import ADAPTERS

import vtprune
from vtprune.cli import train as command
from vtprune.core.ledger import snapshot
from vtprune.core.types import VtpruneError
from vtprune.inputs import models
from vtprune.train import dpvr_compare, dpvr_fit, dpvr_lf, dpvr_questions

QUIET = {"say": lambda line: None}


@pytest.fixture(scope="module")
def case():
    """A tiny LLaVA and eight images with the same question and different answers: only the image tells which."""
    model, _ = ADAPTERS.get("llava").tiny["dinov2-llama"]()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    projected = dpvr_questions.takes_projected(model)
    if projected:
        with torch.no_grad():
            images = torch.stack(list(model.get_image_features(pixel_values=images).pooler_output))
    rows = [dpvr_questions.Row(i, "existence", [1, 5, *[3] * 16, 6, *[7] * (i % 3)], [20 + i, 2]) for i in range(8)]
    return model, dpvr_questions.Questions(images, projected, rows)


@pytest.fixture(scope="module")
def trained(case):
    model, data = case
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.lm_head.requires_grad_(False)  # a flag that the user set himself
    flags, before = [p.requires_grad for p in model.parameters()], snapshot(model)
    branch, facts = dpvr_fit.train(model, data, split=3, steps=40, batch=8, lr=1e-2, **QUIET)
    assert snapshot(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    return branch, facts


def logits(model, data, **options):
    with torch.no_grad(), vtprune.attach(model, "dpvr-lf", **options):
        inputs = data.batch(data.rows, torch.device("cpu"))
        inputs.pop("labels")
        return model(**inputs).logits


def test_loss_falls_and_only_the_branch_moves(case, trained):
    model, _ = case
    branch, facts = trained
    assert facts["steps"] == len(facts["loss"]) == 40
    assert facts["loss"][-1] < 0.9 * facts["loss"][0]
    assert (
        facts["parameters"]
        == sum(p.numel() for p in branch.parameters())
        == sum(p.numel() for p in model.model.language_model.layers[3].parameters())
    )
    source = model.model.language_model.layers[3].state_dict()
    assert all(not torch.equal(v, source[k.removeprefix("0.")]) for k, v in branch.state_dict().items())


def test_the_file_gives_back_what_was_trained(case, trained, tmp_path):
    model, data = case
    branch, facts = trained
    path = tmp_path / "folder" / "branch.safetensors"
    dpvr_lf.save(branch, path, facts)
    assert dpvr_lf.read_facts(path) == json.loads(json.dumps(facts))
    found = logits(model, data, split=3, weights=str(path))
    with vtprune.attach(model, "dpvr-lf", split=3, weights=str(path)) as handle:
        loaded = handle.modules["dpvr-lf"].state_dict()
    assert all(torch.equal(loaded[k], v.half().float()) for k, v in branch.state_dict().items())
    with torch.no_grad(), vtprune.attach(model, "dpvr-lf", split=3) as handle:
        handle.modules["dpvr-lf"].load_state_dict(branch.state_dict())
        inputs = data.batch(data.rows, torch.device("cpu"))
        wanted = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=0)  # half precision on disk
    assert (found - logits(model, data, split=3)).abs().max() > 0.1


def test_training_goes_on_from_weights(case, trained, tmp_path):
    model, data = case
    path = tmp_path / "branch.safetensors"
    dpvr_lf.save(*trained[:1], path, trained[1])
    _, facts = dpvr_fit.train(model, data, split=3, steps=1, batch=8, weights=str(path), **QUIET)
    assert facts["loss"][0] < trained[1]["loss"][0]


def test_persistent_context_and_half_precision_train_too(case):
    model, data = case
    _, facts = dpvr_fit.train(
        model, data, split=4, variant="pc", init="identity", steps=12, batch=8, lr=3e-3, dtype=torch.bfloat16, **QUIET
    )
    assert facts["loss"][-1] < facts["loss"][0]


def test_wall_clock_ends_the_training(case):
    model, data = case
    _, facts = dpvr_fit.train(model, data, split=3, steps=10**6, batch=8, minutes=1 / 600, **QUIET)
    assert 0 < facts["steps"] < 1000


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"fusion": 0}, "nothing to train"),
        ({"steps": 0}, "steps=0"),
        ({"batch": -1}, "batch=-1"),
        ({"lr": 0.0}, "lr=0"),
        ({"minutes": 0.0}, "minutes=0"),
        ({"split": 6}, "0..5"),
        ({"init": "zeros"}, "init='zeros'"),
        ({"depth": 3}, "depth"),
    ],
)
def test_bad_arguments(case, options, word):
    model, data = case
    flags, before = [p.requires_grad for p in model.parameters()], snapshot(model)
    with pytest.raises(VtpruneError, match=word):
        dpvr_fit.train(model, data, **{"split": 3, "steps": 1, "batch": 2, **QUIET, **options})
    assert [p.requires_grad for p in model.parameters()] == flags
    assert snapshot(model) == before


def test_a_fusion_layer_that_looks_at_nothing_is_told(case):
    model, data = case
    weight = model.model.language_model.layers[5].self_attn.o_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        with pytest.raises(VtpruneError, match="no gradient"):
            dpvr_fit.train(model, data, split=3, steps=1, **QUIET)
        dpvr_fit.train(model, data, split=3, fusion=2, steps=1, **QUIET)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_the_split_is_where_half_of_the_image_is_still_needed():
    curve = [{"layer": i, "mean": m} for i, m in enumerate((0.2, 0.3, 0.5, 0.7, 0.8, 0.95, 1.0))]
    assert dpvr_compare.choose_split(curve, fusion=1) == 2
    late = [{"layer": i, "mean": float(i == 6)} for i in range(7)]
    assert dpvr_compare.choose_split(late, fusion=2) == 3  # one of the six layers stays without the image
    with pytest.raises(VtpruneError, match="no difference"):
        dpvr_compare.choose_split([{"layer": i, "mean": 0.5} for i in range(7)], fusion=1)


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


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.branch_arguments(parser)
    return parser.parse_args(list(words))


def test_encoded_questions_are_what_the_processor_makes(folder):
    from PIL import Image

    model, processor = models.load(str(folder), "cpu", "float32")
    image, rows = next(dpvr_questions.scene_items("val", 3, 4, 1))
    data = dpvr_questions.encode(model, processor, [(image, rows)])
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
    facts, table = dpvr_lf.read_facts(out), json.loads(out.with_suffix(".compare.json").read_text())
    assert (facts["split"], facts["steps"], facts["images"], len(facts["loss"])) == (1, 3, 3, 3)
    assert set(facts["versions"]) == {"torch", "transformers", "vtprune"}
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


def test_the_curve_ends_with_the_unpruned_model(folder):
    model, processor = models.load(str(folder), "cpu", "float32")
    data = dpvr_questions.encode(model, processor, dpvr_questions.scene_items("val", 0, 1, 1))
    curve = dpvr_compare.withdrawal_curve(model, data, **QUIET)
    assert [p["layer"] for p in curve] == [0, 1, 2, 3, 4]
    assert curve[-1]["accuracy"] == dpvr_compare.evaluate(model, data)["accuracy"]


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (("--out=branch.bin",), "safetensors"),
        (("--out=b.safetensors", "--split=deep"), "layer number"),
        (("--out=b.safetensors", "--scenes=-1"), "negative"),
        (("--out=b.safetensors", "--scenes=0", "--easy=0"), "nothing to train on"),
        (("--out=missing.safetensors", "--compare-only"), "no such file"),
        (("--out=b.safetensors", "--model=./no-such-folder"), "no such model"),
    ],
)
def test_bad_command_lines(words, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VtpruneError, match=word):
        command.run(arguments(*words))
