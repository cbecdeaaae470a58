"""MindSkip (arXiv 2410.13184) against a slow transcription, and the halves of layers that the engine leaves out."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from slow_layers import entered
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vtprune.models.engine.host import cache_of, cached, held

import vtprune
from prompts import llama
from vtprune.check.case import Case
from vtprune.core import cost
from vtprune.core.planning import load_recipe
from vtprune.core.types import Geometry, VtpruneError
from watch import spent

FAMILIES = [("causal-lm", v) for v in ("llama", "qwen3", "phi3")] + [
    ("llava", "clip-llama"),
    ("qwen2-vl", "images"),
    ("llava-next", "clip-llama"),
]


def attend(attention, h: Tensor, tables) -> Tensor:
    """A layer's attention over ``h`` ``[n, C]``, plain causal."""
    n = len(h)
    mask = torch.full((n, n), torch.finfo(h.dtype).min, dtype=h.dtype).triu(1)[None, None]
    return attention(hidden_states=h[None], position_embeddings=tables, attention_mask=mask)[0][0]


@torch.no_grad()
def slow(model, lm, x: Tensor, tables, gates: dict[int, Tensor], tau: float) -> tuple[Tensor, list[int]]:
    """Logits of one prompt ``x`` ``[n, C]``, and the layers whose attention was left out."""
    left = []
    for i, layer in enumerate(lm.layers):
        h = layer.input_layernorm(x)
        runs = True
        if i in gates:
            mean = [sum(row[c].item() for row in h) / len(h) for c in range(h.shape[1])]
            dot = sum(a * b for a, b in zip(mean, gates[i].tolist(), strict=True))
            runs = 1 / (1 + math.exp(-dot)) >= tau
        if runs:
            x = x + attend(layer.self_attn, h, tables)
        else:
            left.append(i)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(lm.norm(x)), left


def gates_of(handle) -> dict[int, Tensor]:
    module = handle.modules["mindskip"]
    return dict(zip(module.routed, module.w.detach(), strict=True))


def drawn(handle, seed: int, scale: float = 3.0) -> None:
    """Other random gates."""
    w = handle.modules["mindskip"].w
    with torch.no_grad():
        w.copy_(torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)) * scale)


def names(layers: list[int]) -> list[str]:
    return [f"llm.{i}.attention" for i in layers]


def tell(model, inputs, seed: int | None = None, **options):
    """Logits of an attached run with the gates that ``seed`` draws, its report, and those gates."""
    with vtprune.attach(model, "mindskip", **options) as handle, torch.no_grad():
        if seed is not None:
            drawn(handle, seed)
        return model(**inputs).logits, handle.report(), gates_of(handle)


@pytest.mark.parametrize(("family", "variant"), FAMILIES, ids=lambda x: x)
def test_equals_the_transcription(tiny, family, variant):
    """Logits of single prompts and the layers left out, under some draws of the gates."""
    model, inputs = tiny(family, variant)
    case = Case(model, load_recipe("mindskip"), inputs, {})
    lm, met = case.adapter.lm, set()
    for one in case.samples():
        x, tables = entered(model, lm, one)
        for seed in range(4):
            got, report, gates = tell(model, one, seed, layers=(1, 2, 3))
            want, left = slow(model, lm, x, tables[0], gates, 0.5)
            assert report.skipped == [names(left)]
            assert torch.allclose(got[0], want, atol=1e-4 * float(want.abs().max()))
            met.add(tuple(left))
    assert len(met) > 2, "the draws all do the same"


@pytest.mark.parametrize(("family", "variant"), [("causal-lm", "llama"), ("llava", "clip-llama")])
def test_gates_of_zeros_are_the_dense_model(tiny, family, variant):
    model, inputs = tiny(family, variant)
    with torch.no_grad():
        want = model(**inputs).logits
    got, report, gates = tell(model, inputs)
    assert torch.equal(got, want) and not any(w.any() for w in gates.values())
    assert report.skipped == [[], []] and report.flops == report.dense_flops
    assert report.kv_bytes == report.dense_kv_bytes


def test_the_default_layers_are_the_papers():
    info = vtprune.describe("mindskip")
    geometry = Geometry("causal-lm", "x", 9, (9, 1), 0, 0, 0, 32, {"llm": frozenset()})
    assert [c.layer for c in info.cls().plan(geometry, None)] == list(range(15, 31))


def test_a_layer_without_attention_is_the_model_with_that_half_deleted(tiny):
    """With a gate that always closes: weights of the output projection of zero."""
    model, inputs = tiny("causal-lm", "llama")
    got, report, _ = tell(model, inputs, 3, layers=(2, 3), threshold=1.0)
    assert report.skipped == [names([2, 3])] * 2
    with torch.no_grad():
        for i in (2, 3):
            model.model.layers[i].self_attn.o_proj.weight.zero_()
        want = model(**inputs).logits
    assert torch.equal(got, want)


def test_decoding_keeps_the_prompts_decision():
    """Token by token and all at once; layers that were left out cache nothing, and FLOPs and bytes are what ran."""
    model, ids = llama(length=30)
    model = model.float()
    model.set_attn_implementation("eager")  # whose products the counter sees
    more = torch.randint(8, 64, (1, 5), generator=torch.Generator().manual_seed(1))
    dense = spent(model, {"input_ids": ids})
    with vtprune.attach(model, "mindskip", layers=(1, 2, 4), threshold=1.0) as handle, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        report, cache = handle.report(), cache_of(out)
        assert report.skipped == [names([1, 2, 4])]
        assert report.dense_flops - report.flops == dense - counter.get_total_flops() > 0
        assert [held(cache, i) for i in range(6)] == [30, 0, 0, 30, 0, 30]
        assert report.kv_bytes * 2 == report.dense_kv_bytes
        steps = [model(input_ids=more[:, i : i + 1], **cached(model, cache)).logits for i in range(5)]
        whole = model(input_ids=torch.cat([ids, more], 1), labels=_labels(ids, more)).logits
        again = model(input_ids=ids, use_cache=True)
        at_once = model(input_ids=more, **cached(model, cache_of(again))).logits
    assert torch.allclose(torch.cat(steps, 1), whole[:, 30:], atol=1e-5)
    assert torch.allclose(at_once, whole[:, 30:], atol=1e-5)


def test_answers_and_padding_decide_nothing():
    """The layers left out are those of the prompt alone, whatever follows it."""
    model, ids = llama(length=20)
    answer = torch.randint(8, 64, (1, 30), generator=torch.Generator().manual_seed(2))
    both, met = torch.cat([ids, answer], 1), set()
    for seed in range(12):
        _, alone, _ = tell(model, {"input_ids": ids}, seed, layers=(1, 2, 3))
        _, told, _ = tell(model, {"input_ids": both, "labels": _labels(ids, answer)}, seed, layers=(1, 2, 3))
        _, whole, _ = tell(model, {"input_ids": both}, seed, layers=(1, 2, 3))
        assert told.skipped == alone.skipped
        met.add(whole.skipped == alone.skipped)
    assert met == {True, False}, "the answer would never have changed a decision"


def test_what_stands_in_front_of_an_image_is_its_prompt_whatever_its_labels(tiny):
    """Labels on everything but the image: the gates read what they read with labels on the answer alone."""
    model, inputs = tiny("llava", "clip-llama")
    one = Case(model, load_recipe("mindskip"), inputs, {}).samples()[0]
    images = one["input_ids"] == model.config.image_token_id
    behind = int(images[0].nonzero()[-1]) + 1
    every = one["input_ids"].masked_fill(images, -100)
    answer = every.clone()
    answer[:, :behind] = -100
    for seed in range(6):
        logits = [tell(model, {**one, "labels": labels}, seed, layers=(1, 2, 3)) for labels in (every, answer)]
        assert logits[0][1].skipped == logits[1][1].skipped


def _labels(ids: Tensor, more: Tensor) -> Tensor:
    return torch.cat([torch.full_like(ids, -100), more], 1)


def mixed(tiny, family: str, variant: str) -> tuple:
    """A model, a padded batch, and gates by whose decisions its samples differ in some layer."""
    model, inputs = tiny(family, variant)
    for seed in range(40):
        _, report, _ = tell(model, inputs, seed, layers=(1, 2, 3))
        if report.skipped[0] != report.skipped[1]:
            return model, inputs, seed
    raise AssertionError("no draw tells the samples apart")


@pytest.mark.parametrize(("family", "variant"), [("causal-lm", "llama"), ("qwen2.5-vl", "images")])
def test_samples_decide_for_themselves(tiny, family, variant):
    """A batch equals its samples alone, through greedy answers and beams whose rows move; what only some leave out is
    counted as run."""
    model, inputs, seed = mixed(tiny, family, variant)
    case = Case(model, load_recipe("mindskip"), inputs, {})
    with vtprune.attach(model, "mindskip", layers=(1, 2, 3)) as handle, torch.no_grad():
        drawn(handle, seed)
        for how in ({"num_beams": 1}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
            how = {**how, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            both = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
            report, alone = handle.report(), []
            for b, one in enumerate(case.samples()):
                alone.append(model.generate(**one, **how)[:, one["input_ids"].shape[1] :])
                assert handle.report().skipped[0] == report.skipped[b * how["num_beams"]]
            assert torch.equal(both, torch.cat(alone))
        model(**inputs)
        report = handle.report()
    every = set(report.skipped[0]) & set(report.skipped[1])
    shapes, n = handle.adapter.cost, [int(m.sum()) for m in inputs["attention_mask"]]
    saved = sum(cost.half(shapes, int(name.split(".")[1]), "attention", k) for name in every for k in n)
    assert report.flops == report.dense_flops - saved
    cache = [cost.kv_bytes(shapes, [k] * shapes.depth) // shapes.depth for k in n]
    assert report.kv_bytes == report.dense_kv_bytes - len(every) * sum(cache)


def test_no_budget_is_promised(tiny):
    model, _ = tiny("llava", "clip-llama")
    for target in ({"effective_tokens": 0.5}, {"flops": 0.5}):
        with pytest.raises(VtpruneError, match="mindskip drops no token and leaves out halves of layers instead"):
            vtprune.attach(model, "mindskip", **target)
    with pytest.raises(VtpruneError, match="takes no keep="):
        vtprune.attach(model, "mindskip", keep=0.5)


def test_trained_gates_are_read_and_bad_files_are_refused(tmp_path):
    model, ids = llama(length=12)
    gates = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    good, path = {"w": gates}, str(tmp_path / "gates.safetensors")
    save_file(good, path, {"layers": "1,2"})
    _, report, read = tell(model, {"input_ids": ids}, layers=(1, 2), weights=path)
    assert torch.equal(torch.stack([read[1], read[2]]), gates)
    with pytest.raises(VtpruneError, match="was trained for layers=1,2, this is layers=2,3"):
        vtprune.attach(model, "mindskip", layers=(2, 3), weights=path)
    with pytest.raises(VtpruneError, match="no such file"):
        vtprune.attach(model, "mindskip", weights=str(tmp_path / "none"))
    for bad, why in (
        ({"w": gates[:, :5].contiguous()}, "does not fit 2 gates of this model"),
        ({"v": gates}, "does not fit"),
        ({"w": gates * math.nan}, "no finite numbers"),
    ):
        save_file(bad, path, {"layers": "1,2"})
        with pytest.raises(VtpruneError, match=why):
            vtprune.attach(model, "mindskip", layers=(1, 2), weights=path)
    save_file(good, path)
    with pytest.raises(VtpruneError, match="does not tell for which layers it was trained"):
        vtprune.attach(model, "mindskip", layers=(1, 2), weights=path)
    (tmp_path / "gates.safetensors").write_bytes(b"nothing")
    with pytest.raises(VtpruneError, match="not a safetensors file"):
        vtprune.attach(model, "mindskip", layers=(1, 2), weights=path)


def training(handle, seed: int):
    """Other random gates that want gradients."""
    drawn(handle, seed)
    return handle.modules["mindskip"].requires_grad_()


@pytest.mark.parametrize(
    ("family", "variant"), [("causal-lm", "llama"), ("llava", "clip-llama"), ("qwen2-vl", "images")]
)
def test_gates_that_are_trained_decide_the_same(tiny, family, variant):
    """Loss, logits and what is left out are those of an attachment in use, which are the masked dense model's."""
    model, inputs = tiny(family, variant)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    inputs = {**inputs, "labels": labels, "use_cache": False}
    met = set()
    for seed in range(3):
        with vtprune.attach(model, "mindskip", layers=(1, 2, 3)) as handle:
            drawn(handle, seed)
            with torch.no_grad():
                want, report = model(**inputs), handle.report()
            assert handle.gates() == {}
            training(handle, seed)
            got = model(**inputs)
            told = handle.gates()
        assert torch.allclose(got.logits, want.logits, atol=1e-5) and torch.allclose(got.loss, want.loss, atol=1e-6)
        assert handle.report().skipped == report.skipped
        for name, gate in told.items():
            left = [name in mine for mine in report.skipped]
            assert gate.tolist() == [0.0 if gone else 1.0 for gone in left]
            met |= set(left)
    assert met == {True, False}


def test_gradients_of_gates_go_straight_through():
    """Those of the loss with ``m + sigma(w) - sigma`` in the place of every hard ``m``, by finite differences, also
    through what later gates read; nothing else wants any."""
    model, ids = llama(length=12)
    labels = ids.clone()
    labels[:, :8] = -100
    inputs = {"input_ids": ids, "labels": labels, "use_cache": False}
    for p in model.parameters():
        p.requires_grad_(False)

    def cross_entropy(output) -> Tensor:
        """In float64; the model's own is float32."""
        return torch.nn.functional.cross_entropy(output.logits[0, 7:-1], ids[0, 8:])

    with vtprune.attach(model, "mindskip", layers=(1, 3)) as handle:
        module = training(handle, 2).double()
        with torch.no_grad():
            module.w.mul_(0.1)
        cross_entropy(model(**inputs)).backward()
        got, w = module.w.grad.clone(), module.w.detach().clone()
        hard = {int(name.split(".")[1]): float(g) for name, g in handle.gates().items()}
    assert all(p.grad is None for p in model.parameters()) and set(hard) == {1, 3}

    @torch.no_grad()
    def loss(w: Tensor, about: dict[int, float]) -> tuple[float, dict[int, float]]:
        """The loss with soft gates, and their sigmas; ``about``: those that the hard ones stand for."""
        sigma: dict[int, float] = {}

        def soft(layer: int, row: int):
            def leave(module, args, kwargs, output):
                mean = kwargs["hidden_states"][0, :8].mean(0)  # of the prompt, answers left out
                sigma[layer] = float(torch.sigmoid(mean @ w[row]))
                share = hard[layer] + sigma[layer] - about.get(layer, sigma[layer])
                return (output[0] * share, *output[1:])

            return leave

        hooks = [
            model.model.layers[layer].self_attn.register_forward_hook(soft(layer, row), with_kwargs=True)
            for row, layer in enumerate((1, 3))
        ]
        value = float(cross_entropy(model(**inputs)))
        for hook in hooks:
            hook.remove()
        return value, sigma

    _, about = loss(w, {})
    for row in (0, 1):
        for place in (0, 5, 17):
            step = torch.zeros_like(w)
            step[row, place] = 1e-4
            slope = (loss(w + step, about)[0] - loss(w - step, about)[0]) / 2e-4
            assert float(got[row, place]) == pytest.approx(slope, rel=1e-3, abs=1e-9)


def test_gates_are_trained_without_a_cache(tiny):
    model, inputs = tiny("llava", "clip-llama")
    with vtprune.attach(model, "mindskip", layers=(1, 2)) as handle:
        assert not handle.modules["mindskip"].w.requires_grad
        training(handle, 1)
        with pytest.raises(VtpruneError, match="use_cache=False"):
            model(**inputs, use_cache=True)
        with torch.no_grad():
            model(**inputs, use_cache=True)
