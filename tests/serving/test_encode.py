"""Encoded prompts: the unpatched model answers them as the attached one answers the whole prompts, from memory and from
a file; what cannot be encoded is refused."""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from vtprune.models.base import ADAPTERS
from vtprune.models.engine import host

import vtprune
from cases import case_options, mixes_pictures
from choice import kinds, taken
from vtprune.core.ledger import snapshot
from vtprune.core.planning import load_recipe, plan
from vtprune.serving.encoded import Encoded

ROOT = Path(__file__).resolve().parents[2]
AHEAD = [m for m in vtprune.methods() if vtprune.describe(m).kinds[0] != "llm"]
SOME = {group[0] for group in kinds()}
FAMILIES = [f for f in ADAPTERS if ADAPTERS.get(f).package is None and f not in ("hf-vit", "timm-vit", "open-clip")]
PAIRS = [
    (family, variant, method, case)
    for family in FAMILIES
    for variant in ADAPTERS.get(family).tiny
    for method in AHEAD
    for case in range(len(vtprune.describe(method).cases))
    if taken((family, variant, method, case))
]
# One method of each kind for every family's first variant.
FIRST = {f: next(iter(ADAPTERS.get(f).tiny)) for f in FAMILIES}
CHOSEN = {p for p in PAIRS if p[1] == FIRST[p[0]] and p[2] in SOME and p[3] == 1}
ASKED = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


OLD = mixes_pictures()  # transformers 5.17, whose forwards take no encoded images


@pytest.fixture(autouse=True)
def _a_release_that_takes_encoded_images(request):
    if OLD and request.function is not test_encoded_is_attached:
        pytest.skip("this transformers takes no encoded images")


def answers(model, inputs):
    """Greedy: the new tokens ``[B, n]`` and their logits ``[B, n, V]``."""
    with torch.no_grad():
        out = model.generate(**inputs, **ASKED)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def attached(model, recipe, inputs, **options):
    with vtprune.attach(model, recipe, **options) as handle:
        return *answers(model, inputs), handle.report()


def agree(model, encoded, tokens, logits, report):
    got, values = answers(model, encoded.inputs)
    assert torch.equal(got, tokens) and float((values - logits).abs().max()) <= 1e-6 * max(1, float(logits.abs().max()))
    assert encoded.report().to_dict() == report.to_dict()
    if report.stages:
        assert [k.tolist() for k in encoded.kept] == [k.tolist() for k in report.stages[-1].kept]
    left = [row[-1] for row in report.layer_tokens]
    mine = [sum(len(i.rows) for i in encoded.items if i.sample == b) for b in range(len(left))]
    assert mine == left


def why_not(model, method, **options) -> str | None:
    """What has to be said where these prompts cannot be encoded: the method's stages, the release, windows."""
    with vtprune.attach(model, method, **options) as handle:
        decoder = handle.adapter.decoder
        options.pop("per", None)
        stages = plan(handle.geometry, load_recipe(method).override(**options))
        if any(cut.kind == "llm" for *_, cuts in stages for cut in cuts):
            return "cuts inside the language model"
        if not host.takes_encoded(model):
            return "takes no encoded images"
        if vtprune.describe(method).nests:  # drops nothing that a window would miss
            return None
        return "windows of" if any(decoder.decoder.window_of(i) for i in range(decoder.depth)) else None


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "chosen",
    [pytest.param(p, id="-".join(map(str, p)), marks=() if p in CHOSEN else pytest.mark.slow) for p in PAIRS],
)
def test_encoded_is_attached(chosen, tiny):
    family, variant, method, case = chosen
    model, inputs = tiny(family, variant)
    options = case_options(model, method, case)
    if (reason := why_not(model, method, **options)) is not None:
        with pytest.raises(vtprune.UnsupportedError, match=reason):
            vtprune.encode(model, method, inputs, **options)
        return
    before = snapshot(model)
    encoded = vtprune.encode(model, method, inputs, **options)
    assert snapshot(model) == before
    agree(model, encoded, *attached(model, method, inputs, **options))


@pytest.mark.parametrize("family", ["llava", "internvl", "paligemma", "smolvlm"])
def test_compact_positions(family, tiny):
    model, inputs = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    encoded = vtprune.encode(model, "uniform", inputs, keep=0.5, positions="compact")
    agree(model, encoded, *attached(model, "uniform", inputs, keep=0.5, positions="compact"))
    assert not torch.equal(encoded.positions, vtprune.encode(model, "uniform", inputs, keep=0.5).positions)


def several(inputs):
    """Three samples: the first with its image twice, the second, and one without an image, padded on the left."""
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    first = ids[0][inputs["attention_mask"][0].bool()]
    rows = [torch.cat([first[:-3], first]), ids[1][inputs["attention_mask"][1].bool()], torch.arange(8, 14)]
    length = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(r, (length - len(r), 0)) for r in rows])
    mask = torch.stack([torch.arange(length) >= length - len(r) for r in rows]).long()
    return {"input_ids": padded, "attention_mask": mask, "pixel_values": torch.cat([pixels[:1], pixels])}


@pytest.mark.parametrize("per", ["image", "sample"])
def test_several_images_and_none(per, tiny):
    model, inputs = tiny("llava", "clip-llama")
    inputs = several(inputs)
    encoded = vtprune.encode(model, "divprune", inputs, keep=5, per=per)
    agree(model, encoded, *attached(model, "divprune", inputs, keep=5, per=per))
    assert [(i.sample, i.kind) for i in encoded.items] == [(0, "image"), (0, "image"), (1, "image")]
    if per == "image":
        assert [tuple(e.shape) for e in encoded.embeds] == [(5, 48)] * 3
    assert encoded.inputs["attention_mask"].sum(1).tolist()[2] == 6


def test_whole_prompts_where_nothing_is_dropped(tiny):
    model, inputs = tiny("llava", "clip-llama")
    encoded = vtprune.encode(model, "uniform", inputs, keep=1.0)
    tokens, logits = answers(model, inputs)
    got, values = answers(model, encoded.inputs)
    assert torch.equal(got, tokens) and torch.allclose(values, logits, atol=1e-6)


def test_inputs_are_fresh_for_every_call(tiny):
    model, inputs = tiny("llava", "clip-llama")
    encoded = vtprune.encode(model, "uniform", inputs, keep=4)
    first = answers(model, encoded.inputs)
    again = answers(model, encoded.inputs)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_forwards_of_other_threads_run_to_their_end(tiny, monkeypatch):
    """While one thread encodes, another one's prompt is read as the attached model reads it."""
    model, inputs = tiny("llava", "clip-llama")
    want = attached(model, "uniform", inputs, keep=4)[1][:, 0]
    inside: list[torch.Tensor] = []
    project = model.model.multi_modal_projector
    original = project.forward

    def forward(*args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: inside.append(model(**inputs).logits[:, -1].detach()))
            other.start()
            other.join()
        return original(*args, **kwargs)

    monkeypatch.setitem(project.__dict__, "forward", forward)
    encoded = vtprune.encode(model, "uniform", inputs, keep=4)
    monkeypatch.undo()
    assert torch.allclose(inside[0], want, atol=1e-5)
    assert torch.equal(answers(model, encoded.inputs)[1][:, 0], want)


def test_another_dtype_is_for_the_rows_alone(tiny):
    model, inputs = tiny("qwen3-vl", "images")
    half = vtprune.encode(model, "uniform", inputs, keep=0.5).to(torch.bfloat16)
    assert {t.dtype for i in half.items for t in (i.rows, *i.planes)} == {torch.bfloat16} and half.items[0].planes
    given = (half.input_ids, half.attention_mask, half.position_ids, *half.along.values())
    assert {t.is_floating_point() for t in given} == {False}
    answers(model.to(torch.bfloat16), half.inputs)


# --------------------------------------------------------------------------------------------------------------- files

FRESH = """
import sys, torch, vtprune
from vtprune.testing import tiny
model, _ = tiny(sys.argv[1], sys.argv[2])
encoded = vtprune.Encoded.load(sys.argv[3], model)
with torch.no_grad():
    print(model.generate(**encoded.inputs, max_new_tokens=4, do_sample=False)[:, encoded.input_ids.shape[1] :].tolist())
"""


def test_a_file_holds_the_whole_report(tiny, tmp_path):
    model, inputs = tiny("qwen3-vl", "video")
    encoded = vtprune.encode(model, "uniform", inputs, keep=0.5)
    encoded.save(tmp_path / "a.safetensors")
    assert Encoded.load(tmp_path / "a.safetensors", model).report().to_dict() == encoded.report().to_dict()


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param("qwen3-vl", "video", marks=pytest.mark.ci),
        pytest.param("llava-next", "clip-llama", marks=pytest.mark.slow),
    ],
)
def test_a_saved_file_is_read_in_another_process(family, variant, tiny, tmp_path):
    model, inputs = tiny(family, variant)
    encoded = vtprune.encode(model, "uniform", inputs, keep=0.5)
    encoded.save(tmp_path / "a.safetensors")
    read = Encoded.load(tmp_path / "a.safetensors", model)
    assert torch.equal(read.positions, encoded.positions) and all(map(torch.equal, read.embeds, encoded.embeds))
    command = [sys.executable, "-c", FRESH, family, variant, str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == answers(model, encoded.inputs)[0].tolist()


def header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewritten(path: Path, head: dict, body: bytes) -> None:
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def edited(**changes):
    """A change to the JSON in the header that keeps its digest true."""
    import hashlib

    def edit(path: Path) -> None:
        head, body = header(path)
        told = json.loads(head["__metadata__"]["encoded"])
        for name, value in changes.items():
            told.pop(name) if value is None else told.update({name: value})
        text = json.dumps(told, sort_keys=True)
        head["__metadata__"] = {"encoded": text, "digest": hashlib.sha256(text.encode()).hexdigest()}
        rewritten(path, head, body)

    return edit


def flipped(path: Path) -> None:
    head, body = header(path)
    rewritten(path, head, body[:40] + bytes([body[40] ^ 1]) + body[41:])


def headed(path: Path) -> None:
    head, body = header(path)
    head["__metadata__"]["encoded"] = head["__metadata__"]["encoded"].replace('"sample": 0', '"sample": 1', 1)
    rewritten(path, head, body)


def foreign(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flipped, "tensors do not match their digest"),
        (headed, "header does not match its digest"),
        (foreign, "holds no encoded prompts"),
        (edited(type="other"), "holds no encoded prompts"),
        (edited(version=99), "has version 99; this vtprune reads version 2"),
        (edited(report=None), "lacks a part of encoded prompts"),
        (edited(items=[{"sample": 0}]), "lacks a part of encoded prompts"),
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "is no safetensors file, or not a whole one"),
        (lambda p: p.write_bytes(b"{}"), "is no safetensors file, or not a whole one"),
        (lambda p: p.unlink(), "there is no file"),
    ],
)
def test_files_that_were_changed_are_refused(change, said, tiny, tmp_path):
    model, inputs = tiny("llava", "clip-llama")
    path = tmp_path / "a.safetensors"
    vtprune.encode(model, "uniform", inputs, keep=4).save(path)
    change(path)
    with pytest.raises(vtprune.VtpruneError, match=said) as e:
        Encoded.load(path, model)
    assert "\n" not in str(e.value)


def test_files_of_another_model_are_refused(tiny, tmp_path):
    model, inputs = tiny("llava", "clip-llama")
    vtprune.encode(model, "uniform", inputs, keep=4).save(tmp_path / "a.safetensors")
    with pytest.raises(vtprune.VtpruneError, match="encoded for a model whose class is LlavaForConditionalGeneration"):
        Encoded.load(tmp_path / "a.safetensors", tiny("internvl", "qwen2")[0])
    with pytest.raises(vtprune.VtpruneError, match="cannot write"):
        vtprune.encode(model, "uniform", inputs, keep=4).save(tmp_path / "nowhere" / "a.safetensors")


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_an_encoder_cannot_run(tiny):
    model, inputs = tiny("llava", "clip-llama")
    before = snapshot(model)
    two = vtprune.Recipe(
        name="two",
        stages=(vtprune.Stage(method="flowcut", keep=0.5), vtprune.Stage(method="pyramiddrop", keep=0.25)),
    )
    with pytest.raises(
        vtprune.UnsupportedError, match=r"inside the language model \(llm\..*in front of it \(flowcut\)"
    ):
        vtprune.encode(model, two, inputs)
    with pytest.raises(vtprune.UnsupportedError, match="fastv cuts inside the language model.*attach the recipe"):
        vtprune.encode(model, "fastv", inputs, keep=4)
    with pytest.raises(vtprune.VtpruneError, match="no image in these inputs"):
        vtprune.encode(model, "uniform", {"input_ids": torch.full((1, 5), 9)}, keep=4)
    with pytest.raises(vtprune.VtpruneError, match="labels"):
        vtprune.encode(model, "uniform", {**inputs, "labels": inputs["input_ids"]}, keep=4)
    with pytest.raises(vtprune.UnsupportedError, match="not known what strange is"):
        vtprune.encode(model, "uniform", {**inputs, "strange": inputs["input_ids"]}, keep=4)
    with pytest.raises(vtprune.UnsupportedError, match="has no language model"):
        vtprune.encode(*[tiny("hf-vit", "clip")[0], "tome", tiny("hf-vit", "clip")[1]], keep=4)
    assert snapshot(model) == before
    with vtprune.attach(model, "uniform", keep=4), pytest.raises(vtprune.VtpruneError, match="attached already"):
        vtprune.encode(model, "uniform", inputs, keep=4)


def test_long_prompts_of_models_with_windows_are_refused(tiny):
    model, inputs = tiny("gemma3", "sliding")
    with pytest.raises(vtprune.UnsupportedError, match="windows of 12 tokens and the prompt has 47"):
        vtprune.encode(model, "uniform", inputs, keep=4)
    config = copy.deepcopy(model.config)
    config.text_config.sliding_window = 52
    torch.manual_seed(0)
    wider = type(model)(config).eval()
    with pytest.warns(UserWarning, match="windows of 52 tokens: answers of up to 5 tokens are") as said:
        encoded = vtprune.encode(wider, "uniform", inputs, keep=4)
    assert said[0].filename == __file__
    agree(wider, encoded, *attached(wider, "uniform", inputs, keep=4))
