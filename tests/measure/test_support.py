"""The support table in the docs is what the registries give, and the probe of the generic adapter finds what it
must."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from vtprune.models.base import ADAPTERS
from vtprune.models.engine import cuts
from vtprune.models.parts import hindrance

import moulds
import vtprune
from vtprune.core.planning import bind
from vtprune.core.types import UnsupportedError
from vtprune.measure import support

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ci
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=() if f in ("llava", "timm-vit", "gemma3", "smolvlm") else pytest.mark.slow)
        for f in ADAPTERS
    ],
)
def test_a_familys_part_of_the_docs_is_true(family):
    told = (ROOT / "docs" / "support.md").read_text().split(f"\n## {family}\n")[1].split("\n## ")[0]
    assert f"## {family}\n{told}".strip() == "\n".join(support.section(family)), "run python -m vtprune.measure.support"
    assert support.counts(family) in (ROOT / "docs" / "support.md").read_text(), "run python -m vtprune.measure.support"


@pytest.mark.slow
def test_the_table_in_the_docs_is_true():
    assert (ROOT / "docs" / "support.md").read_text() == support.document(), "run python -m vtprune.measure.support"


@pytest.mark.ci
def test_every_family_has_a_method_of_every_kind_it_offers():
    for family in ADAPTERS:
        offered = {
            kind
            for variant in ADAPTERS.get(family).tiny
            for kind in bind(moulds.tiny(family, variant)[0]).geometry.provides
        }
        for kind in offered:
            able = (m for m in vtprune.methods() if kind in vtprune.describe(m).kinds)
            assert any(support.entry(family, m).status != "refused" for m in able), (family, kind)


def _unknown():
    """A model that only the generic adapter takes."""
    return moulds.tiny("generic", "vipllava")


def test_an_unknown_family_is_probed_and_pruned():
    model, inputs = _unknown()
    with vtprune.attach(model, "fastv", keep=3) as handle, torch.no_grad():
        model(**inputs)
    report = handle.report()
    assert report.stages[0].tokens_out == [6, 3] and bind(model).geometry.family == "generic"


class Counting(nn.Module):
    """A layer that knows the index of every row: dropping rows moves the others."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.self_attn, self.input_layernorm = layer.self_attn, layer.input_layernorm

    def forward(self, hidden_states, **kwargs):
        place = torch.arange(hidden_states.shape[1], dtype=hidden_states.dtype)
        return self.layer(hidden_states + 0.1 * place[None, :, None], **kwargs)


def test_a_decoder_that_cannot_be_pruned_is_refused():
    model, _ = _unknown()
    layers = model.model.language_model.layers
    layers[4] = Counting(layers[4])
    with pytest.raises(UnsupportedError, match="off the dense model"):
        vtprune.attach(model, "random", keep=3)


def test_attention_in_another_layout_is_not_ranked_by():
    """Cohere rotates neighbouring pairs of channels: random tokens can be dropped, but no method may rank by the usual
    attention."""
    model, inputs = moulds.tiny("generic", "aya-vision")
    with pytest.raises(UnsupportedError, match="usual layout"):
        vtprune.attach(model, "fastv", keep=3)
    with torch.no_grad(), vtprune.attach(model, "random", keep=3) as handle:
        model(**inputs)
    assert handle.report().stages[0].tokens_out == [6, 3]


@pytest.mark.parametrize("kind", ["Fuyu", "GptNeoX"])
def test_models_that_are_built_otherwise_are_refused_in_words(kind):
    import transformers as hf

    if kind == "Fuyu":
        config = hf.FuyuConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_token_id=3,
        )
        config.text_config.update(
            {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 64,
            }
        )
        model = hf.FuyuForCausalLM(config)
    else:
        known, _ = moulds.tiny("llava", "clip-llama")
        words = hf.GPTNeoXConfig(
            vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
        )
        model = hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(**{**known.config.to_dict(), "text_config": words.to_dict()})
        )
    with pytest.raises(UnsupportedError):
        vtprune.attach(model, "fastv", keep=2)


def test_an_unknown_model_without_placeholders_is_refused():
    with pytest.raises(UnsupportedError, match="no adapter takes"):
        vtprune.attach(nn.Linear(2, 2), "random")


def test_the_probe_sees_a_wrong_engine(monkeypatch):
    model, _ = _unknown()
    right = cuts.take
    monkeypatch.setattr(cuts, "take", lambda table, rows: right(table, (rows + 1).clamp_max(table.shape[1] - 1)))
    with pytest.raises(UnsupportedError, match="off the dense model"):
        vtprune.attach(model, "random", keep=3)


def test_cross_attention_is_refused_with_the_reason_whatever_the_class_is_called():
    import transformers as hf
    from vtprune.models.parts.tiny import tiny_build, tiny_text

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 32,
    }
    vision = {
        **sizes,
        "patch_size": 8,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
    }
    config = hf.MllamaConfig(
        text_config={**tiny_text(), "cross_attention_layers": [2]}, vision_config=vision, image_token_index=3
    )
    model = tiny_build(hf.MllamaForConditionalGeneration, config)
    for options in ({"keep": 0.25}, {"keep": 3}):
        with pytest.raises(UnsupportedError, match="cross-attention"):
            vtprune.attach(model, "random", **options)
    hindrance.REFUSED, known = {}, hindrance.REFUSED  # found by how it is built, not by its name
    try:
        with pytest.raises(UnsupportedError, match="cross-attention"):
            vtprune.attach(model, "random", keep=3)
    finally:
        hindrance.REFUSED = known


@pytest.mark.parametrize(
    ("family", "variant"),
    [("llava", "clip-llama"), ("qwen3-vl", "images"), ("smolvlm", "smolvlm"), ("mistral3", "pixtral")],
)
def test_a_subclass_is_taken_like_its_base(family, variant):
    model, _ = moulds.tiny(family, variant)
    model.__class__ = type("Mine", (type(model),), {})
    assert bind(model).geometry.family == family


def test_the_bundled_processor_pads_on_the_left_and_stays_so(tmp_path):
    import transformers as hf

    _, processor = vtprune.load_demo_model()
    processor.save_pretrained(tmp_path)
    for one in (processor, hf.AutoProcessor.from_pretrained(tmp_path, local_files_only=True)):
        mask = one.tokenizer(["what color is the square ?", "red ?"], padding=True, return_tensors="pt")[
            "attention_mask"
        ]
        assert mask[:, -1].tolist() == [1, 1] and mask[1, 0] == 0
