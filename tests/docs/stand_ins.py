"""What stands in for checkpoints while the pages' programs run: random models of the same families, and processors that
take what the programs give them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn
from transformers import BatchFeature
from vtprune.models.base import ADAPTERS

import moulds
import vtprune
from vtprune.core import backbone
from vtprune.core.planning import bind, load_recipe
from vtprune.core.types import UnsupportedError
from vtprune.data import scenes
from vtprune.train import card
from vtprune.train.base import TRAININGS

REFUSED = json.loads((Path(__file__).resolve().parents[1] / "refused_pairs.json").read_text(encoding="utf-8"))
TOKENS, LAYERS = 576, 32  # of LLaVA-1.5-7B, whose numbers pages speak of


class Processor:
    """Gives a tiny model's own inputs, whatever it is asked: random weights make no difference between questions."""

    def __init__(self, inputs: dict[str, Any]):
        self.inputs = inputs

    def apply_chat_template(self, chat: list[dict[str, Any]], *, add_generation_prompt: bool, **how: Any) -> Any:
        assert add_generation_prompt and chat[0]["role"] == "user"
        kinds = [part["type"] for part in chat[0]["content"]]
        assert kinds == ["image", "text"]
        if not how:
            return "<image> what ?"
        assert how == {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        assert isinstance(chat[0]["content"][0]["image"], Image.Image)
        return BatchFeature(dict(self.inputs))

    def batch_decode(self, ids: Any, *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens and ids.ndim == 2
        return [" ".join(map(str, row)) for row in ids.tolist()]

    def __call__(self, *args: Any, **given: Any) -> BatchFeature:
        assert given.pop("return_tensors") == "pt" and set(given) <= {"images", "text"}
        return BatchFeature(dict(self.inputs))


@functools.cache
def _llava() -> Any:
    """A random LLaVA with as many visual tokens and decoder layers as LLaVA-1.5-7B, 32 numbers wide."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    side = int(TOKENS**0.5) * 8
    narrow = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**narrow, num_hidden_layers=12, image_size=side, patch_size=8),
        text_config=LlamaConfig(**narrow, num_hidden_layers=LAYERS, num_key_value_heads=2, vocab_size=96),
        image_token_index=3,
        image_seq_length=TOKENS,
    )
    torch.manual_seed(0)
    ids = torch.tensor([[1, *[3] * TOKENS, 7, 8, 9]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, side, side),
    }
    return moulds.Mould((LlavaForConditionalGeneration(config).eval(), inputs))


def takes(method: str) -> tuple[str, str]:
    """A family and variant whose tiny model takes a method with its defaults, LLaVA's if it does; of methods of videos
    one with a video."""
    every = [(family, variant) for family in ("llava", *ADAPTERS) for variant in ADAPTERS.get(family).tiny]
    every = [p for p in every if method not in REFUSED.get("/".join(p), ())]
    if vtprune.describe(method).video:
        every = [p for p in every if p[1] in ("video", "frames")]
    return every[0]


def model_of(page: str, code: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a page's ``model`` and ``inputs`` are."""
    name = Path(page).stem
    if page.startswith("families/"):
        return moulds.tiny(name, next(iter(ADAPTERS.get(name).tiny)))
    method = name if page.startswith("methods/") else None
    if method and method not in REFUSED["llava/clip-llama"] and not vtprune.describe(method).video:
        return _llava().cast()
    if method:
        family, variant = takes(method)
        if vtprune.describe(method).classifies:
            variant = "vit-classifier"
        return moulds.tiny(family, variant)
    return _llava().cast()


class Tokenizer:
    """One word, one token."""

    def __call__(self, text: str, return_tensors: str) -> BatchFeature:
        ids = torch.tensor([[4 + sum(map(ord, word)) % 40 for word in text.split()]])
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def prepared(page: str, code: str) -> dict[str, Any]:
    """The names that a block may use without making them."""
    model, inputs = model_of(page, code)
    scene = scenes.scene(0, "test")
    text = "a long prompt of many words " * 300
    return {
        "model": model,
        "inputs": inputs,
        "image": Image.fromarray(scene.image),
        "processor": Processor(inputs),
        "pixels": torch.zeros(1, 3, 224, 224)
        if page == "families/timm-vit.md"  # whose model has its real shape
        else next((v for v in inputs.values() if v.ndim == 4), None),
        "question": torch.tensor([[11, 12, 13]]),
        "text": text,
        "texts": ["some words", "some other words"],
        "folder": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tokenizer": Tokenizer(),
        "torch": torch,
        "vtprune": vtprune,
    }


def instead(monkeypatch: Any, folder: Path) -> None:
    """From now on checkpoints' names give the models above, weights that are not there are those of a part that was not
    trained, and nothing reads a network or a GPU."""
    from family_pages import EXAMPLES

    families = {name: family for family, (name, *_) in EXAMPLES.items()}

    def tiny(name: str) -> tuple[nn.Module, dict[str, Any]]:
        family = families[name]
        return moulds.tiny(family, next(iter(ADAPTERS.get(family).tiny)))

    def checkpoint(cls: type, name: str, **how: Any) -> Any:
        assert set(how) <= {"dtype", "device_map"}
        return tiny(name)[0]

    models = ("AutoModelForImageTextToText", "PaliGemmaForConditionalGeneration", "AutoModelForCausalLM")
    for kind in (*models, "CLIPVisionModel"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", classmethod(checkpoint))
    for kind in ("AutoProcessor", "AutoImageProcessor", "AutoTokenizer"):
        own = getattr(transformers, kind).from_pretrained

        def processor(cls: type, name: Any, own: Any = own, **how: Any) -> Any:
            if name not in families:  # the bundled model's
                return own(name, **how)
            return Tokenizer() if cls is transformers.AutoTokenizer else Processor(tiny(name)[1])

        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", classmethod(processor))
    _without_hub(monkeypatch)
    _without_gpu(monkeypatch)
    attach = vtprune.attach

    def attach_or_make(model: Any, recipe: Any, **options: Any) -> Any:
        path = options.get("weights")
        if path is not None and not Path(path).exists():
            _untrained(attach, model, recipe, Path(path), options)
        return attach(model, recipe, **options)

    monkeypatch.setattr(vtprune, "attach", attach_or_make)
    monkeypatch.chdir(folder)


def _untrained(attach: Any, model: nn.Module, method: str, path: Path, options: dict[str, Any]) -> None:
    """Writes the part of a method as ``vtprune train`` saves it, in front of its first step."""
    training = TRAININGS.get(method)
    given = {k: v for k, v in options.items() if k not in ("weights", "keep")}
    begun = {k: v for k, v in training.case["options"].items() if k not in given and k != "weights"}
    try:
        handle = attach(model, method, **given)
    except UnsupportedError:  # without weights there is nothing to answer with
        handle = attach(model, method, **{**begun, **given})
    if method not in handle.modules:  # nor a part that could be trained
        handle.remove()
        handle = attach(model, method, **{**begun, **given})
    with handle:
        facts = {"method": method, "options": {**vtprune.describe(method).options, **given}}
        layers = backbone.layers(bind(model))
        card.save(handle.modules[method], path, facts, layers)
    assert load_recipe(method)


def _without_hub(monkeypatch: Any) -> None:
    """timm and open_clip make models of the same shape with random weights."""
    import timm

    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: make(name, pretrained=False))
    try:
        import open_clip
    except ModuleNotFoundError:
        return
    tower = moulds.tiny("open-clip", "clip")[0]
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda name, pretrained: (tower, None, None))


def _without_gpu(monkeypatch: Any) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(nn.Module, "cuda", lambda self: self)
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)


def adapters_in(folder: Path, code: str, model: nn.Module) -> None:
    """LoRA adapters of the model in each folder ``*.lora`` that a block reads."""
    import re

    import peft

    for name in re.findall(r'"([\w-]+\.lora)"', code):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        wrapped = peft.get_peft_model(model, config)
        wrapped.save_pretrained(str(folder / name))
        wrapped.unload()
