"""What methods read beside the model: from folders alone, once, and refused in one sentence where it does not fit."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "methods"))  # auxiliary.py
import auxiliary as A

from vtprune.core import resources
from vtprune.core.types import VtpruneError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return A.clip_folder(folder / "clip"), A.words_folder(folder / "words")


@pytest.fixture
def offline(monkeypatch):
    """Whoever looks for a network fails, in a way that nobody takes for an answer."""

    def no(*args):
        raise SystemExit("a network was looked for")

    monkeypatch.setattr(socket, "getaddrinfo", no)
    monkeypatch.setattr(socket.socket, "connect", no)


def test_texts_and_states_are_put_where_the_whole_model_puts_them(made):
    folder, _ = made
    clip = resources.clip("clip", str(folder))
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    with torch.no_grad():
        want = model.get_text_features(**tokenizer("hello <7>", return_tensors="pt")).pooler_output
        torch.testing.assert_close(clip.text("hello <7>", CPU), want)
        pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        out = model.vision_model(pixels, output_hidden_states=True)
        torch.testing.assert_close(
            clip.image(out.hidden_states[-1])[:, 0], model.get_image_features(pixels).pooler_output
        )
    assert clip.image(out.hidden_states[-1].double()).dtype == torch.float64
    assert clip.image(out.hidden_states[-1].half()).dtype == torch.float32


def test_long_texts_are_cut(made):
    """Ten letters fit into a segment; what is short in a batch of segments is what it is alone."""
    clip = resources.clip("clip", str(made[0]))
    got = clip.text("abcdefghijklmnopqrstuvwxy z", CPU)
    assert len(got) == 3
    parts = clip.tokenizer("abcdefghijklmnopqrstuvwxy z", add_special_tokens=False).input_ids
    model = CLIPModel.from_pretrained(made[0])
    for at, row in zip((0, 10, 20), got, strict=True):
        ids = torch.tensor([[clip.tokenizer.bos_token_id, *parts[at : at + 10], clip.tokenizer.eos_token_id]])
        with torch.no_grad():
            torch.testing.assert_close(row, model.get_text_features(input_ids=ids).pooler_output[0])
    assert len(clip.text("abcdefghij", CPU)) == len(clip.text("", CPU)) == 1


def test_words_are_read_back(made):
    words = resources.words("tokenizer", str(made[1]))
    assert words([1, 5, 0, 63, 2]) == "w5 w63" and words([]) == ""
    with pytest.raises(VtpruneError, match="knows 64 tokens, and the prompt holds token 64"):
        words([5, 64])


def test_one_folder_is_read_once(made, tmp_path, monkeypatch):
    """By however many threads and under whatever name; two folders are two."""
    folder = shutil.copytree(made[0], tmp_path / "copy")
    read, original = [], CLIPModel.from_pretrained.__func__

    def counted(kind, path, **options):
        read.append(path)
        return original(kind, path, **options)

    monkeypatch.setattr(CLIPModel, "from_pretrained", classmethod(counted))
    got = []
    threads = [threading.Thread(target=lambda: got.append(resources.clip("clip", str(folder)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.chdir(tmp_path)
    got.append(resources.clip("clip", "copy"))
    assert len(got) == 7 and len({id(c) for c in got}) == 1 and len(read) == 1
    other = resources.clip("clip", str(shutil.copytree(made[0], tmp_path / "other")))
    assert other is not got[0] and len(read) == 2


def test_a_hub_id_is_refused(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VtpruneError, match="clip='openai/clip-vit-large-patch14' is no folder: nothing is downloaded"):
        resources.clip("clip", "openai/clip-vit-large-patch14")
    with pytest.raises(VtpruneError, match="tokenizer='nowhere' is no folder"):
        resources.words("tokenizer", "nowhere")


def without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def another_end(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["eos_token_id"] = 7
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot load"),
        (lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"), "cannot load"),
        (without_tokenizer, "cannot load a tokenizer from .*: there is no tokenizer.json in it"),
        (without_a_weight, "its files lack 1 of the model's weights, visual_projection.weight among them"),
        (cut, "cannot load"),
        (another_end, "does not end texts with the token that the model looks for, 7"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_sentence(made, tmp_path, offline, spoil, says):
    folder = shutil.copytree(made[0], tmp_path / "clip")
    spoil(folder)
    with pytest.raises(VtpruneError, match=says) as e:
        resources.clip("clip", str(folder))
    assert "\n" not in str(e.value) and str(e.value).startswith("clip: ")


def test_a_model_of_another_kind_is_refused(made, tmp_path, offline):
    tower = CLIPModel.from_pretrained(made[0]).config.vision_config
    CLIPVisionModel(tower).save_pretrained(tmp_path / "tower")
    with pytest.raises(VtpruneError, match="holds a clip_vision_model model, and a whole CLIP model"):
        resources.clip("clip", str(tmp_path / "tower"))
    with pytest.raises(VtpruneError, match="tokenizer: cannot load a tokenizer from"):
        resources.words("tokenizer", str(tmp_path / "tower"))


def test_states_of_another_width_are_refused(made):
    clip = resources.clip("clip", str(made[0]))
    with pytest.raises(VtpruneError, match="whose tower is 32 wide, and this one is 48"):
        clip.image(torch.randn(1, 4, 48))


def test_nothing_is_printed(made, tmp_path, capfd):
    folder = shutil.copytree(made[0], tmp_path / "clip")
    resources.clip("clip", str(folder)).text("a" * 40, CPU)
    assert capfd.readouterr() == ("", "")
