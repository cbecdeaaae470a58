"""MuE's exit of the image (arXiv 2211.11152) against a slow transcription: one prompt, layer and head at a time."""

from __future__ import annotations

import math
from typing import Any

import builders as B
import pytest
import torch
from slow_layers import attended, behind, double, entered
from torch import Tensor
from vtprune.models.engine.host import cache_of, cached, held

import vtprune
from prompts import llama
from vtprune.check.case import Case
from vtprune.core.types import Cut, TokenView, VtpruneError
from vtprune.methods.base import make
from watch import spent

FAMILIES = [("causal-lm", v) for v in ("llama", "qwen3")] + [
    ("llava", "clip-llama"),
    ("qwen2-vl", "images"),
    ("llava-next", "clip-llama"),
]


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two states ``[m, C]``, all numbers of each in a row."""
    x, y = a.flatten().tolist(), b.flatten().tolist()
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    return dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))


@torch.no_grad()
def slow(
    model: Any, lm: Any, x: Tensor, tables: list[Any], images: list[list[int]], theta: float
) -> tuple[Tensor, list[int | None], list[list[float]], list[Tensor]]:
    """Logits ``[n, V]`` of one prompt whose rows ``x`` enter layer 0 and whose ``images`` stand in these rows; the
    layer in front of which each exits, the cosines that were met, and what each layer's keys are, ``[H, n, d]``."""
    exits: list[int | None] = [None] * len(images)
    met: list[list[float]] = [[] for _ in images]
    keys, before = [], x
    for j, layer in enumerate(lm.layers):
        for i, rows in enumerate(images):
            if j and exits[i] is None:
                met[i].append(cosine(x[rows], before[rows]))
                exits[i] = j if met[i][-1] > theta else None
        h, kept = layer.input_layernorm(x), dict[str, Tensor]()
        made = behind(layer, x, attended(layer, h, h, tables[j], kept))
        for rows, at in zip(images, exits, strict=True):
            if at is not None:  # frozen
                made[rows] = x[rows]
        keys.append(kept["keys"])
        before, x = x, made
    return model.lm_head(lm.norm(x)), exits, met, keys


def of_prompt(case: Case, one: dict[str, Tensor]) -> list[list[int]]:
    """The rows of all its visual tokens, as one image."""
    return [case.adapter.prunable(one)[0].nonzero()[:, 0].tolist()]


def thresholds(met: list[float]) -> list[float]:
    """Between any two cosines that were met, and beyond them."""
    values = sorted(met)
    inner = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
    return [-1.0, *inner[:: max(1, len(inner) // 3)], 1.0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "variant"), FAMILIES, ids=lambda x: x)
def test_equals_the_transcription(tiny, family, variant):
    """Logits of the text, the layers that images exit in front of, and every layer's keys, at thresholds that tell the
    layers apart."""
    model, lm, case = double(tiny, "mue", family, variant)
    limit, found = 1e-5 if variant == "qwen3" else 1e-9, set()
    for one in case.samples():
        rows, tables = entered(model, lm, one)
        images = of_prompt(case, one)
        text = torch.tensor([r not in images[0] for r in range(len(rows))])
        met = slow(model, lm, rows, tables, images, 1.0)[2][0]
        for theta in thresholds(met):
            want, exits, _, keys = slow(model, lm, rows, tables, images, theta)
            with vtprune.attach(model, "mue", threshold=theta, per="sample") as handle, torch.no_grad():
                out = model(**one, use_cache=True)
                report = handle.report()
            B.close(out.logits[0, text], want[text], limit)
            out_of = [s.tokens_out[0] for s in report.stages]
            assert out_of == [len(images[0]) if exits[0] is None or j < exits[0] else 0 for j in range(1, len(keys))]
            assert report.layer_tokens == [[len(images[0])] * len(keys)]
            assert report.kv_bytes == report.dense_kv_bytes
            assert (report.flops < report.dense_flops) is (exits[0] is not None)
            order = torch.cat([(~text).nonzero()[:, 0], text.nonzero()[:, 0]])
            for j, (layer, told) in enumerate(zip(cache_of(out).layers, keys, strict=True)):
                gone = exits[0] is not None and j >= exits[0]
                B.close(layer.keys[0], told[:, order if gone else torch.arange(len(order))], limit)
            found.add(exits[0])
    assert len(found) >= 3, "every threshold does the same"


def test_no_exit_is_the_dense_model_and_higher_thresholds_exit_later(tiny):
    model, lm, case = double(tiny, "mue", "llava", "clip-llama")
    with torch.no_grad():
        want = model(**case.inputs).logits
        with vtprune.attach(model, "mue", threshold=1.0):
            assert torch.equal(model(**case.inputs).logits, want)
        depths = []
        for step in range(-10, 11):
            with vtprune.attach(model, "mue", threshold=step / 10) as handle:
                model(**case.inputs)
                counts = zip(*(s.tokens_out for s in handle.report().stages), strict=True)
                depths.append([sum(n > 0 for n in sample) for sample in counts])
    assert depths == sorted(depths) and depths[0] == [0] * len(depths[0]) and depths[-1] == [5] * len(depths[0])


@pytest.mark.parametrize(
    ("theta", "kept"),
    [(1.0, [3, 2, 1]), (0.99, [0, 2, 1]), (0.5, [0, 2, 1]), (0.4, [0, 0, 1]), (-0.9, [0, 0, 1]), (-1.0, [0, 0, 1])],
)
def test_the_cosine_is_of_all_tokens_and_of_no_padding(theta, kept):
    """States that did not change, that changed by a cosine of 0.48, and that turned round, which none is below."""
    turned = torch.tensor(
        [[3.0, 4.0], [0.0, 5.0], [7.0, 7.0]]
    )  # the last row of the second is padding, as of the third
    now = torch.stack([turned, turned, turned])
    before = torch.stack([turned, torch.tensor([[4.0, 3.0], [5.0, 0.0], [-9.0, 1.0]]), -turned])
    valid = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    view = TokenView(
        features=now,
        valid=valid,
        index=torch.arange(3).expand(3, -1),
        size=valid.float(),
        protected=torch.zeros_like(valid),
        grid=(3, 1),
        sources={"states": lambda layer: before},
    )
    method = make("mue", {"threshold": theta})
    assert method.select(view, Cut(site="llm.1", keep=0)).counts.tolist() == kept


def layouts() -> tuple[Any, dict[str, Tensor], list[list[list[int]]]]:
    """Unequal prompts of one and of two images, and of text alone; where their images stand without padding."""
    shapes = [[4, 9], [7, 2, 5], [3, 12], [11]]
    model, inputs = B.llava(text="mistral"), B.prompts(shapes)
    return (
        model,
        inputs,
        [
            [B.visual_positions(inputs, b)[36 * i : 36 * i + 36].tolist() for i in range(len(s) - 1)]
            for b, s in enumerate(shapes)
        ],
    )


def alone(inputs: dict[str, Tensor], b: int, first: int, count: int) -> dict[str, Tensor]:
    real = inputs["attention_mask"][b].bool()
    one = {k: inputs[k][b : b + 1, real] for k in ("input_ids", "attention_mask", "position_ids")}
    return {**one, "pixel_values": inputs["pixel_values"][first : first + count]} if count else one


@pytest.mark.parametrize("per", ["image", "sample"])
def test_images_of_a_padded_batch_exit_each_by_itself(per):
    """At a threshold that tells them apart: each as alone, and each prompt's answer token by token."""
    model, inputs, images = layouts()
    lm, first, told = model.model.language_model, 0, []
    for b, rows in enumerate(images):
        one = alone(inputs, b, first, len(rows))
        first += len(rows)
        units = rows if per == "image" else [sum(rows, [])] if rows else []
        told.append((one, units, *entered(model, lm, one)))
    met = [c for one, units, *given in told for cs in slow(model, lm, *given, units, 1.0)[2] for c in cs]
    met.sort()
    more, apart = torch.randint(8, 60, (4, 3), generator=torch.Generator().manual_seed(1)), []
    for theta in [(met[i] + met[i + 1]) / 2 for i in range(1, len(met) - 1, 4)]:
        exits = []
        with vtprune.attach(model, "mue", threshold=theta, per=per), torch.no_grad():
            hidden = B.final(model, inputs)
            cache = cache_of(model(**inputs, use_cache=True))
            mask, steps = inputs["attention_mask"], []
            for i in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                at = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
                steps.append(model(input_ids=more[:, i : i + 1], **at, **cached(model, cache)).logits)
        for b, (one, units, *given) in enumerate(told):
            want, out, *_ = slow(model, lm, *given, units, theta)
            text = torch.tensor([all(r not in u for u in units) for r in range(len(want))])
            with torch.no_grad():
                B.close(model.lm_head(hidden[b][text]), want[text])
            grown = {"input_ids": torch.cat([one["input_ids"], more[b : b + 1]], 1)}
            grown |= {k: v for k, v in one.items() if k == "pixel_values"}
            B.close(torch.cat(steps, 1)[b], slow(model, lm, *entered(model, lm, grown), units, theta)[0][-3:])
            exits.append(out)
        apart.append(len({at for out in exits for at in out}) > 1)
    assert any(apart), "no threshold tells them apart"


def test_flops_are_those_that_torch_counts():
    model, ids = llama(length=30)
    model = model.float()
    model.set_attn_implementation("eager")  # whose products the counter sees

    prompt = {"input_ids": ids}
    dense, saved = spent(model, prompt), []
    for theta in (-1.0, 0.7, 0.9, 1.0):
        with vtprune.attach(model, "mue", threshold=theta) as handle:
            saved.append(dense - spent(model, prompt))
            assert handle.report().dense_flops - handle.report().flops == saved[-1]
    assert saved == sorted(saved, reverse=True) and saved[0] > 0 == saved[-1]


def test_a_visual_token_that_is_asked_goes_on():
    """A prompt that ends with its image: all but the last visual token stop."""
    model, inputs = B.llava(), B.prompts([[4, 9]])
    inputs = {k: v[:, :40] if v.ndim == 2 else v for k, v in inputs.items()}
    with vtprune.attach(model, "mue", threshold=-1.0) as handle:
        (hidden,), report = B.final(model, inputs), handle.report()
    assert [s.kept[0].tolist() for s in report.stages] == [[35]] * 5 and report.layer_tokens == [[36] * 6]
    lm, x = model.model.language_model, B.embeddings(model, inputs)[0]
    tables = [lm.rotary_emb(x[None], torch.arange(40)[None])] * 6
    want = slow(model, lm, x, tables, [list(range(4, 39))], -1.0)[0]
    with torch.no_grad():
        B.close(model.lm_head(hidden[[3, 39]]), want[[3, 39]])


def test_caches_of_fixed_size():
    """Layers behind which more has stopped need other columns; where they do not fit, that is said."""
    from transformers import StaticCache

    model, inputs, _ = layouts()
    how = {"max_new_tokens": 4, "do_sample": False}
    config = model.config.text_config
    with vtprune.attach(model, "mue", threshold=0.9):
        want = model.generate(**inputs, **how)
        big = StaticCache(config=config, max_cache_len=inputs["input_ids"].shape[1] + 60)
        assert torch.equal(model.generate(**inputs, **how, **cached(model, big)), want)


def test_a_cache_holds_every_token():
    model, inputs, _ = layouts()
    one = alone(inputs, 0, 0, 1)
    with vtprune.attach(model, "mue", threshold=-1.0), torch.no_grad():
        cache = cache_of(model(**one, use_cache=True))
    assert [held(cache, j) for j in range(6)] == [49] * 6


def test_what_cannot_be_is_refused(tiny):
    model = B.llava()
    for options, why in (
        ({"threshold": 1.5}, "at most 1"),
        ({"threshold": -2.0}, "at least -1"),
        ({"keep": 0.5}, "takes no keep="),
        ({"effective_tokens": 0.5}, "cannot reach"),
        ({"flops": 0.5}, "cannot reach"),
        ({"shelve": True}, "every stage has to drop or merge"),
    ):
        with pytest.raises(VtpruneError, match=why):
            vtprune.attach(model, "mue", **options)
    with pytest.raises(VtpruneError, match="sliding window"):
        vtprune.attach(tiny("causal-lm", "gemma3")[0], "mue")
    stages = (vtprune.Stage(method="mue"), vtprune.Stage(method="random", keep=0.5, options={"site": "llm.3"}))
    with pytest.raises(VtpruneError, match="put the visual tokens aside"):
        vtprune.attach(model, vtprune.Recipe(name="both", stages=stages))
