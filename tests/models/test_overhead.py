"""What the engine adds besides a method's own work: it must not grow with the number of layers, and a decoding step
that needs nothing must get nothing."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vtprune.models.engine import serving
from vtprune.models.engine.host import cache_of, cached

import moulds
import vtprune
from vtprune.core.planning import bind

READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
}  # each makes the host wait for a GPU


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        return sum(self.seen[name] for name in READS)


def llava(layers: int) -> tuple[Any, dict[str, Any]]:
    model, inputs = moulds.tiny("llava", "clip-llama")
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = None
    torch.manual_seed(0)
    return type(model)(config).eval(), {k: v[:1] for k, v in inputs.items()}


def prompt(inputs: dict[str, Any]) -> dict[str, Any]:
    """Without padding."""
    real = inputs["attention_mask"][0].bool()
    return {k: v[:, real] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}


@torch.no_grad()
def added(method: str, depth: int, **options: Any) -> tuple[Counter, int, Counter, int]:
    """Operators that an attachment adds to a prefill and to one decoding step, and how often the host then has to
    wait."""
    model, inputs = llava(depth)
    inputs = prompt(inputs)
    found = []
    for attached in (False, True):
        handle = vtprune.attach(model, method, **options) if attached else None
        with Operators() as ops:
            out = model(**inputs, use_cache=True)
        found.append((ops.seen, ops.reads))
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], dim=1)
        cache = cache_of(out)
        model(input_ids=torch.tensor([[7]]), attention_mask=mask, **cached(model, cache))
        mask = torch.cat([mask, mask[:, :1]], dim=1)
        with Operators() as ops:
            model(input_ids=torch.tensor([[7]]), attention_mask=mask, **cached(model, cache))
        found.append((ops.seen, ops.reads))
        if handle is not None:
            handle.remove()
    (dense, dense_reads), (step, step_reads), (pruned, pruned_reads), (pruned_step, pruned_step_reads) = found
    pruned.subtract(dense)
    pruned_step.subtract(step)
    return pruned, pruned_reads - dense_reads, pruned_step, pruned_step_reads - step_reads


CUTS = [
    ("random", {"site": "projector"}),
    ("fastv", {"layer": 2}),
    ("pyramiddrop", {"layers": (1, 2, 3)}),
    ("drop-all", {"layer": 2}),
]


@pytest.mark.parametrize("method, options", CUTS)
def test_nothing_is_done_once_per_layer(method, options):
    keep = {} if method == "drop-all" else {"keep": 3}
    few, many = (added(method, depth, **keep, **options) for depth in (6, 12))
    assert few[1] == many[1], "the host waits more often in a deeper model"
    assert sum(few[0].values()) == sum(many[0].values()), "a deeper model runs more operators of ours"
    assert sum(many[2].values()) == sum(few[2].values()) <= 12 and many[3] <= 1, many[2]


def test_masks_and_tables_are_made_once_per_stage(monkeypatch):
    model, inputs = llava(12)
    made = []
    stock = serving.prefill_mask
    monkeypatch.setattr(
        serving, "prefill_mask", lambda own, level, *rest: made.append(level.width) or stock(own, level, *rest)
    )
    with torch.no_grad(), vtprune.attach(model, "pyramiddrop", keep=3, layers=(2, 5, 8)):
        model(**prompt(inputs))
    assert len(made) == 3 == len(set(made))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_serves_only_layers_that_need_it(attention, monkeypatch):
    """Under sdpa one new token that sees everything needs no mask; under eager attention, and with samples of unequal
    length, pruned layers do."""
    model, inputs = moulds.tiny("llava", "clip-llama")
    model.set_attn_implementation(attention)
    served: list[int] = []
    stock = serving.Serving.decode

    def serve(self, call, level, number, kwargs, x):
        served.append(number)
        return stock(self, call, level, number, kwargs, x)

    monkeypatch.setattr(serving.Serving, "decode", serve)
    layers = model.config.text_config.num_hidden_layers
    for one in (True, False):
        given = prompt({k: v[:1] for k, v in inputs.items()}) if one else inputs
        served.clear()
        with torch.no_grad(), vtprune.attach(model, "fastv", keep=3, layer=2):
            model.generate(**given, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert served == ([] if one and attention == "sdpa" else list(range(2, layers)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method, options", [("random", {"site": "projector"}), ("fastv", {"layer": 2})])
@pytest.mark.parametrize("family, variant", [("llava", "clip-llama"), ("gemma3", "sliding"), ("paligemma", "gemma")])
def test_samples_that_pruning_makes_equally_long_decode_as_alone(family, variant, method, options, attention):
    """Two images with little text and one image with more: padded in the dense model, but not behind the cut, where no
    mask is needed any more."""
    model, stock = moulds.tiny(family, variant)
    model.set_attn_implementation(attention)
    n, keep = bind(model).geometry.tokens, 3
    placeholder = int(stock["input_ids"][bind(model).visual(stock["input_ids"])][0])
    words = [i for i in stock["input_ids"].unique().tolist() if i != placeholder and i > 3]
    image, text = [placeholder] * n, (words * 9)[:9]
    rows = [[*text[:2], *image, *text[2:4], *image, *text[4:6]], [*text[:2], *image, *text[2:6], *text[6 : 6 + keep]]]
    pixels = torch.cat([stock["pixel_values"]] * 3)[:3]

    def inputs(chosen: list[list[int]], images: torch.Tensor) -> dict[str, torch.Tensor]:
        width = max(map(len, chosen))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in chosen])
        real = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in chosen])
        types = {"token_type_ids": (ids == placeholder).long()} if "token_type_ids" in stock else {}
        return {"input_ids": ids, "attention_mask": real, "pixel_values": images, **types}

    def answers(given: dict[str, torch.Tensor]) -> torch.Tensor:
        out = model.generate(
            **given,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits, 1)

    with torch.no_grad(), vtprune.attach(model, method, keep=keep, **options) as handle:
        both = answers(inputs(rows, pixels))
        assert handle.report().layer_tokens[0][-1] == 2 * keep and handle.report().layer_tokens[1][-1] == keep
        handle.reseed(0)
        alone = answers(inputs(rows[:1], pixels[:2]))
        assert torch.allclose(both[:1], alone, atol=1e-4 * float(alone.abs().max()))
