"""FALCON (arXiv 2501.16297) against a slow transcription, and tokens that join those of a tower."""

from __future__ import annotations

import copy

import pytest
import torch
from slow_towers import double, run, watched
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune import Stage, testing
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.methods.falcon import Registers
from watch import spent

CASES = [
    ("llava", "clip-llama"),
    ("llava-next", "clip-llama"),
    ("llava-next", "siglip-mistral-window"),
    ("paligemma", None),
    ("hf-vit", "clip"),
    ("hf-vit", "vit-classifier"),
    ("timm-vit", "class"),
    ("timm-vit", "avg-pool"),
]


def mended(module: Registers) -> None:
    """ReAtten that does something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for exchange in module.exchanges:
            out = exchange.attention.out_proj.weight
            out.copy_(torch.randn(out.shape, generator=generator) * 0.3)


def tower_of(handle):
    return handle.adapter.engine.tower if hasattr(handle.adapter, "engine") else handle.adapter.engines[0].tower


def attended(exchange, rows: Tensor) -> Tensor:
    """IA over the registers ``[n, C]`` of one picture, head by head."""
    attention, c = exchange.attention, rows.shape[1]
    q, k, v = (rows @ w.T for w in attention.in_proj_weight.chunk(3))
    out = torch.zeros_like(rows)
    d = c // attention.num_heads
    for h in range(attention.num_heads):
        at = slice(h * d, (h + 1) * d)
        for i in range(len(rows)):
            logits = torch.stack([(q[i, at] * k[j, at]).sum() / d**0.5 for j in range(len(rows))])
            out[i, at] = (logits.softmax(0)[:, None] * v[:, at]).sum(0)
    return out @ attention.out_proj.weight.T


@torch.no_grad()
def slow(tower, x: Tensor, pictures: list[list[int]], module: Registers) -> Tensor:
    """The registers ``[G, M, C]`` behind the tower's blocks; ``x`` ``[G, P + N, C]`` enters the first of them."""
    m = len(module.registers)
    x = torch.stack([torch.cat([row, module.registers.to(row)]) for row in x])
    for number, block in enumerate(tower.blocks):
        attention, seen = tower.attention(block), []
        hook = attention.register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
        tower.attend(block, x, None, {})
        hook.remove()
        out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        out = out.clone()
        if len(module.exchanges):
            for tiles in pictures:
                rows = torch.cat([out[g, -m:] for g in tiles])
                rows = rows + attended(module.exchanges[number], rows)
                for i, g in enumerate(tiles):
                    out[g, -m:] = rows[i * m : (i + 1) * m]
        given = lambda *a, out=out: (out, *a[2][1:]) if isinstance(a[2], tuple) else out  # noqa: E731
        hook = attention.register_forward_hook(given)
        x = tower.feed(block, tower.attend(block, x, None, {}))
        hook.remove()
    return x[:, -m:]


def pictures_of(family, handle, inputs) -> list[list[int]]:
    if family != "llava-next":
        return []
    out, start = [], 0
    for image in handle.adapter.images(inputs):
        n = sum(len(r.passes) for r in image)
        out.append(list(range(start, start + n)))
        start += n
    return out


@pytest.mark.parametrize("reatten", [True, False])
@pytest.mark.parametrize("family,variant", CASES)
def test_registers_are_those_of_the_transcription(family, variant, reatten):
    model, inputs = testing.tiny(family, variant)
    model, inputs = model.double(), double(inputs)
    with torch.no_grad(), vtprune.attach(model, "falcon", registers=5, reatten=reatten) as handle:
        tower = tower_of(handle)
        module = handle.modules["falcon"].double()
        if reatten:
            mended(module)
        with watched(tower) as (entered, left):
            run(model, inputs)
        report = handle.report()
        pictures = pictures_of(family, handle, inputs) or [[g] for g in range(len(entered[0]))]
    want = slow(tower, entered[0], pictures, module)
    p = tower.prefix
    assert left[0].shape[1] == p + 5
    torch.testing.assert_close(left[0][:, p:], want, rtol=1e-6, atol=1e-6)
    assert all(len(k) == len(set(k.tolist())) and k.tolist() == sorted(k.tolist()) for k in report.stages[-1].kept)
    assert any(len(tiles) > 1 for tiles in pictures) == (family == "llava-next")


def test_a_tile_reads_the_others_through_reatten_alone():
    """And pictures never read each other."""
    model, inputs = testing.tiny("llava-next", "clip-llama")

    def features(change: int | None, reatten: bool) -> list[Tensor]:
        pixels = inputs["pixel_values"].clone()
        if change is not None:
            flat = pixels.view(-1, *pixels.shape[-3:])
            flat[change] += 1.0
        with torch.no_grad(), vtprune.attach(model, "falcon", registers=4, reatten=reatten) as handle:
            if reatten:
                mended(handle.modules["falcon"])
            seen: list[Tensor] = []
            tower = tower_of(handle)
            hook = tower.blocks[-1].register_forward_hook(
                lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
            )
            model(**{**inputs, "pixel_values": pixels})
            hook.remove()
            pictures = pictures_of("llava-next", handle, inputs)
        return [seen[0][g] for g in range(len(seen[0]))], pictures

    for reatten in (False, True):
        before, pictures = features(None, reatten)
        after, _ = features(0, reatten)
        mine = pictures[0]
        moved = [not torch.allclose(a, b, atol=1e-6) for a, b in zip(before, after, strict=True)]
        assert moved[0]
        assert all(moved[g] == reatten for g in mine[1:]) and len(mine) > 1
        assert not any(moved[g] for g in range(len(moved)) if g not in mine)


def test_gradients_reach_registers_and_exchanges_alone():
    model, inputs = testing.tiny("llava", "clip-llama")
    model, inputs = model.double(), double(inputs)
    for p in model.parameters():
        p.requires_grad_(False)
    with vtprune.attach(model, "falcon", registers=4) as handle:
        module = handle.modules["falcon"].double()
        mended(module)
        assert not any(p.requires_grad for p in module.parameters())
        module.requires_grad_(True)

        def loss() -> Tensor:
            logits = model(**inputs).logits
            return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()

        names, parameters = zip(*module.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss(), parameters)
        for name, p, g in zip(names, parameters, grads, strict=True):
            at = int(g.abs().flatten().argmax())
            assert float(g.flatten()[at].abs()) > 1e-8, name
            found = []
            for step in (1e-4, -1e-4):
                with torch.no_grad():
                    p.view(-1)[at] += step
                    found.append(float(loss()))
                    p.view(-1)[at] -= step
            assert (found[0] - found[1]) / 2e-4 == pytest.approx(float(g.flatten()[at]), rel=2e-2, abs=1e-5), name


@pytest.mark.parametrize("family,variant", [("llava", "clip-llama"), ("llava-next", "clip-llama"), ("hf-vit", "clip")])
@pytest.mark.parametrize("reatten", [True, False])
def test_flops_are_those_that_are_counted(family, variant, reatten):
    model, inputs = testing.tiny(family, variant)
    model.set_attn_implementation("eager")
    with vtprune.attach(model, "falcon", registers=5, reatten=reatten) as handle:
        if family != "hf-vit":
            inputs = single(inputs, 2 if family == "llava-next" else 1)
        counted = spent(model, inputs) if family != "hf-vit" else counted_by_torch(model, inputs)
        report, seen = (
            handle.report(),
            pictures_of(family, handle, inputs) or [[g] for g in range(len(inputs["pixel_values"]))],
        )
        width, blocks = handle.adapter.cost.vd, len(handle.modules["falcon"].exchanges)
    # torch does not count what scaled_dot_product_attention does here: the exchange's logits and means
    counted += sum(2 * 2 * (5 * len(tiles)) ** 2 * width for tiles in seen) * blocks
    # but it counts the padding of pictures of fewer tiles, in four projections
    padding = sum(max(map(len, seen)) - len(tiles) for tiles in seen)
    counted -= 2 * 4 * 5 * padding * width**2 * blocks
    assert report.flops == pytest.approx(counted, rel=1e-4)


def counted_by_torch(model, inputs) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def test_what_is_refused():
    model, inputs = testing.tiny("llava", "clip-llama")
    with pytest.raises(VtpruneError, match="registers=16 do not compress the 16 tokens"):
        vtprune.attach(model, "falcon", registers=16)
    with pytest.raises(VtpruneError, match="registers=0 must be at least 1"):
        vtprune.attach(model, "falcon", registers=0)
    with pytest.raises(VtpruneError, match="adds tokens of its own in the vision tower"):
        vtprune.attach(
            model,
            vtprune.Recipe(name="two", stages=(Stage(method="falcon", options={"registers": 4}), Stage(method="tome"))),
        )
    model, inputs = testing.tiny("qwen2-vl")
    with pytest.raises(UnsupportedError, match="needs insert"):
        vtprune.attach(model, "falcon", registers=4)
    model, inputs = testing.tiny("hf-vit", "dinov2")  # of any size
    with (
        vtprune.attach(model, "falcon", registers=5),
        pytest.raises(UnsupportedError, match="do not compress an image"),
    ):
        model(pixel_values=torch.randn(1, 3, 16, 16))


def test_a_budget_turns_the_number_of_registers(tmp_path):
    model, inputs = testing.tiny("llava", "clip-llama")
    for budget in (1, 6, 15):
        recipe = vtprune.solve(model, "falcon", effective_tokens=budget)
        assert recipe.stages[0].options["registers"] == budget
        with torch.no_grad(), vtprune.attach(model, recipe) as handle:
            model(**inputs)
            assert handle.report().effective_tokens == pytest.approx(budget)
    flops = [vtprune.solve(model, "falcon", flops=share).stages[0].options["registers"] for share in (0.8, 0.9, 1.0)]
    assert flops == sorted(set(flops))
    assert vtprune.solve(model, "falcon", effective_tokens=6, registers=4).stages[0].options["registers"] == 4
    with pytest.raises(VtpruneError, match="cannot reach 3 effective tokens here; its smallest schedule has 4"):
        vtprune.solve(model, "falcon", effective_tokens=3, registers=4)
    with pytest.raises(VtpruneError, match="its smallest schedule has 1"):  # trained for the default's number
        vtprune.solve(model, "falcon", effective_tokens=0.01, weights=str(tmp_path / "registers.safetensors"))


def test_stages_behind_the_tower_may_follow():
    model, inputs = testing.tiny("llava", "clip-llama")
    recipe = vtprune.Recipe(
        name="both", stages=(Stage(method="falcon", options={"registers": 6}), Stage(method="fastv", keep=2))
    )
    with torch.no_grad(), vtprune.attach(model, recipe) as handle:
        model(**inputs)
        report = handle.report()
    assert [s.tokens_out for s in report.stages] == [[6, 6], [2, 2]]


def test_gradient_checkpointing_is_refused():
    model, inputs = testing.tiny("hf-vit", "clip")
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with vtprune.attach(model, "falcon", registers=4), pytest.raises(UnsupportedError, match="joined"):
        model(**inputs).last_hidden_state.sum().backward()


def single(inputs, images: int):
    """The first prompt, which has so many images, alone, without padding."""
    real = inputs["attention_mask"][0].bool()
    one = {k: inputs[k][:1, real] for k in ("input_ids", "attention_mask")}
    return {**one, **{k: v[:images] for k, v in inputs.items() if k not in one}}
