"""The cost model against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.count import fit
from vtprune.models.engine.host import cache_of

import vtprune
from vtprune.core import cost
from vtprune.core.planning import bind
from vtprune.core.types import UnsupportedError

METHODS = [
    ("random", {"keep": 1.0}),
    ("random", {"keep": 4}),
    ("drop-all", {"layer": 2}),
    ("pool", {"keep": 4}),
    ("downsample", {"keep": 4}),
    ("tome", {"keep": 6}),
    ("dpvr-lf", {"split": 2}),
    ("dpvr-lf", {"split": 1, "variant": "kv"}),
    ("dpvr-lf", {"split": 2, "fusion_rows": "keys"}),
]


def _count(model, inputs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("variant", ["clip-llama", "dinov2-llama", "siglip-qwen2"])
def test_llava_flops_equal_the_counter(tiny, variant, method, options):
    """Exact for methods that score nothing; eager attention, equal prompts, one position through the head (sizes are
    not whole multiples, so a wrong term shows)."""
    model, inputs = tiny("llava", variant)
    model.set_attn_implementation("eager")
    one = {k: v[:1] for k, v in inputs.items()} | {"logits_to_keep": 1}
    dense = _count(model, one)
    with vtprune.attach(model, method, **options) as handle:
        real = _count(model, one)
        report = handle.report()
    assert report.dense_flops == pytest.approx(dense, rel=1e-3)
    # ToMe's own matching is counted by torch and not by the report; fused attention in a composed block (DINOv2 on
    # transformers 5.17) the other way round.
    slack = 0.02 if method == "tome" else 3e-3
    assert report.flops == pytest.approx(real, rel=slack)


LANGUAGE = [(f, v) for f in ADAPTERS if f not in ("hf-vit", "timm-vit", "open-clip") for v in ADAPTERS.get(f).tiny]
ALONE = (
    "generic",
    "mistral3",
)  # of an unknown model the tower is not known, and Pixtral's masks in each image what all of them cost


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("family", "variant"), LANGUAGE)
def test_every_familys_flops_and_cache_equal_the_counter(tiny, family, variant):
    """The whole model, tower and experts included, and what its cache holds: the formulas know each layer of each
    family."""
    model, inputs = tiny(family, variant)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # torch does not count grouped products
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])  # padding is not reported
    with FlopCounterMode(display=False, depth=99) as counter, torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True, logits_to_keep=1))
    with vtprune.attach(model, "random", keep=0.5) as handle, torch.no_grad():
        model(**inputs, use_cache=True)
        report, adapter = handle.report(), bind(model)
    found = counter.get_flop_counts()
    if family in ALONE:
        name = next(n for n, m in model.named_modules() if m is adapter.lm)
        rows, length = inputs["input_ids"].shape
        layers = sum(cost.decoder_layer(adapter.cost, i, length) for i in range(adapter.cost.depth))
        # 5.17 makes rotary tables by a product
        assert rows * layers == pytest.approx(sum(found[f"{type(model).__name__}.{name}"].values()), rel=3e-4)
    else:
        assert report.dense_flops == pytest.approx(sum(found["Global"].values()), rel=3e-4)
    assert report.dense_kv_bytes == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    assert report.flops < report.dense_flops


def test_work_that_does_not_go_by_tokens_is_refused():
    """Counted on three prompts: so much per token and so much per pair, in whole numbers, or no report could be
    right."""
    assert fit("Toy", 0, [(n, 7 * n + 2 * n * n) for n in (3, 6, 11)]) == (7, 2)
    for work in ([(3, 9), (6, 18), (11, 34)], [(3, 10), (6, 21), (11, 40)], [(n, 7 * n + 8) for n in (3, 6, 11)]):
        with pytest.raises(UnsupportedError, match="layer 4 is not so much per token"):
            fit("Toy", 4, work)


@pytest.mark.parametrize("variant", ["class", "layerscale-registers", "avg-pool", "eva02", "dinov3"])
def test_timm_flops_equal_the_counter(tiny, variant):
    model, inputs = tiny("timm-vit", variant)
    for block in model.blocks:
        block.attn.fused_attn = False
    head = 2 * 2 * model.embed_dim * 10  # two images through the classifier
    dense = _count(model, inputs) - head
    with vtprune.attach(model, "random", keep=5) as handle:
        real = _count(model, inputs) - head
        report = handle.report()
    assert report.dense_flops == pytest.approx(dense, rel=1e-3)
    assert report.flops == pytest.approx(real, rel=1e-3)


def test_kv_bytes_are_what_the_cache_holds(tiny):
    model, inputs = tiny("llava", "clip-llama")
    one = {k: v[:1] for k, v in inputs.items()}
    with torch.no_grad(), vtprune.attach(model, "pyramiddrop", keep=2, layers=(1, 3)) as handle:
        cache = cache_of(model(**one, use_cache=True))
        report = handle.report()
    assert report.kv_bytes == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    with torch.no_grad():
        cache = cache_of(model(**one, use_cache=True))
    assert report.dense_kv_bytes == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
