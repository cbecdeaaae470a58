"""IA-RED² (arXiv 2106.12620): interpreters against a slow transcription of their formula, and REINFORCE against the
expected reward by enumeration."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import builders as B
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import oracles as O
import vtprune
from vtprune import testing
from vtprune.core.ledger import snapshot
from vtprune.core.select import marked
from vtprune.core.types import Cut, Geometry, TokenView, UnsupportedError, VtpruneError
from vtprune.methods import ia_red2 as method
from vtprune.methods.base import make
from vtprune.train import ia_red2 as training
from vtprune.train.base import TRAININGS, Step

NAME = "ia-red2"


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


@torch.no_grad()
def informative(x: Tensor, part: Any, group: int) -> list[float]:
    """I of the patches ``x`` ``[n, C]``: heads, channels and patches one at a time."""
    c = x.shape[1]
    own = part[group]
    query, key, policy = own.query, own.key, own.policy.tolist()
    size = query.weight.shape[0] // part.heads
    k = [
        sum(w * p for w, p in zip(row, policy, strict=True)) + bias
        for row, bias in zip(key.weight.tolist(), key.bias.tolist(), strict=True)
    ]
    out = []
    for patch in x.tolist():
        mean = sum(patch) / c
        spread = math.sqrt(sum((v - mean) ** 2 for v in patch) / c + 1e-5)
        z = [(v - mean) / spread for v in patch]
        q = [
            sum(w * v for w, v in zip(row, z, strict=True)) + bias
            for row, bias in zip(query.weight.tolist(), query.bias.tolist(), strict=True)
        ]
        heads = [
            sigmoid(sum(q[h * size + d] * k[h * size + d] for d in range(size)) / math.sqrt(size))
            for h in range(part.heads)
        ]
        out.append(sum(heads) / part.heads)
    return out


def parts(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, list[nn.Module]]:
    """Embedded tokens, and the blocks."""
    inner = getattr(tower, "vision_model", tower)
    if hasattr(inner, "pre_layrnorm") or not hasattr(inner, "post_layernorm"):
        x, found = O._vision_parts(tower, pixels)
        return x, [block for block, *_ in found]
    return inner.embeddings(pixels), list(inner.encoder.layers)  # SigLIP


@torch.no_grad()
def slow(tower: nn.Module, pixels: Tensor, part: Any, threshold: float, keep: list[int] | None = None) -> Any:
    """Image by image: the hidden states ``[P + n, C]`` behind the last block, and per group the patches left and I of
    those in front of it."""
    embedded, blocks = parts(tower, pixels)
    prefix = embedded.shape[1] - B.N
    hidden, alive, scores = [], [], []
    for x in embedded:
        left, mine, told = list(range(B.N)), [], []
        for number, block in enumerate(blocks):
            x = O.run_block(block, x[None])[0]
            if number in part.blocks:
                group = part.blocks.index(number)
                value = informative(x[prefix:], part, group)
                told.append(dict(zip(left, value, strict=True)))
                order = sorted(range(len(left)), key=lambda j: -value[j])
                if keep is not None:
                    stay = sorted(order[: keep[group]])
                else:
                    stay = [j for j in range(len(left)) if value[j] >= threshold] or order[:1]
                x = torch.cat([x[:prefix], x[[prefix + j for j in stay]]])
                left = [left[j] for j in stay]
                mine.append(left)
        hidden.append(x)
        alive.append(mine)
        scores.append(told)
    return hidden, alive, scores


def double(handle: Any, seed: int | None = None, scale: float = 0.5) -> Any:
    """The handle's interpreters in double precision, with other numbers if there is a seed."""
    part = handle.modules[NAME].double()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in part.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
    return part


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("clip", {}),
        ("clip", {"groups": 2, "heads": 2, "channels": 3, "threshold": 0.45}),
        ("dinov2", {"layers": (1, 2), "heads": 1}),
        ("siglip", {"threshold": 0.55}),
        ("siglip", {"layers": 3, "threshold": 1.0}),
        ("clip", {"keep": 5}),
        ("dinov2", {"keep": 0.25, "groups": 1}),
    ],
)
def test_equals_the_transcription(kind: str, options: dict[str, Any], seed: int) -> None:
    model, pixels = B.tower(kind, 6), B.images(3)
    with vtprune.attach(model, NAME, **options) as handle, torch.no_grad():
        part = double(handle, seed)
        got, report = model(pixels).last_hidden_state, handle.report()
    keep = None
    if "keep" in options:
        end = options["keep"] if isinstance(options["keep"], int) else round(options["keep"] * B.N)
        d = len(part.blocks)
        keep = [math.floor(B.N * (end / B.N) ** ((i + 1) / d) + 1e-9) for i in range(d)]
    want, alive, scores = slow(model, pixels, part, options.get("threshold", 0.5), keep)
    norm = {"clip": nn.Identity(), "dinov2": getattr(model, "layernorm", None)}.get(kind) or model.post_layernorm
    assert [s.site for s in report.stages] == [f"vision.{i}" for i in part.blocks]
    prefix = len(want[0]) - len(alive[0][-1])
    for b, mine in enumerate(alive):
        assert [s.kept[b].tolist() for s in report.stages] == mine
        for s, told in zip(report.stages, scores[b], strict=True):
            if s.scores is not None:
                assert {j: pytest.approx(v, abs=1e-12) for j, v in told.items()} == {j: s.scores[b][j] for j in told}
        with torch.no_grad():
            B.close(got[b, : prefix + len(mine[-1])], norm(want[b]))
    counts = [len(mine[-1]) for mine in alive]
    assert report.stages[-1].tokens_out == counts
    if keep is not None:
        assert counts == [end] * 3
    elif options.get("threshold") == 1.0:
        assert counts == [1] * 3  # at least one stays
    else:
        assert any(0 < n < B.N for n in counts), "the draw decides nothing"


FAMILIES = ("timm-vit", "hf-vit", "open-clip", "llava", "llava-next", "paligemma", "internvl", "qwen2-vl", "smolvlm")


def called(model: Any, inputs: Any) -> Tensor:
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if isinstance(out, dict) and "image_features" in out:
        return out["image_features"]
    out = out[0] if isinstance(out, tuple) else out
    return next(
        t for t in (getattr(out, "logits", None), getattr(out, "last_hidden_state", None), out) if t is not None
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_dropped_before_training(family: str) -> None:
    model, inputs = testing.tiny(family)
    before = snapshot(model)
    with torch.no_grad():
        want = called(model, inputs)
        with vtprune.attach(model, NAME) as handle:
            got, report = called(model, inputs), handle.report()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert report.stages and all(s.tokens_in == s.tokens_out for s in report.stages)
        padding = (20,) if family == "llava-next" else ()  # patches of its tiles that no token stands for
        asked = sum(sum(s.tokens_in) for s in report.stages)
        own = report.flops - report.dense_flops
        assert own % (2 * 32 * 64) == 0 and own // (2 * handle.adapter.cost.vd * 64) - asked in (0, *padding)
        assert snapshot(model) == before and torch.equal(called(model, inputs), want)


@pytest.mark.parametrize("channels", [1, 2, 16])
def test_open_interpreters_say_the_same_of_every_patch(channels: int) -> None:
    part = method.Interpreters((0, 2), 24, 3, channels, "open")
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)) * 30
    for group in range(2):
        torch.testing.assert_close(part[group](x), torch.full((2, 5), sigmoid(2.0)))
    assert not torch.equal(part[0].key.weight, part[1].key.weight)


def test_attaching_draws_nothing_from_the_callers_generator() -> None:
    model = B.tower("clip", 4)
    state = torch.random.get_rng_state()
    with vtprune.attach(model, NAME, init="random"):
        assert torch.equal(torch.random.get_rng_state(), state)


def test_flops_are_what_ran() -> None:
    """The report's, the interpreters' own among them but for the policies' keys."""
    model, pixels = B.tower("clip", 6), B.images(1)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels)
    dense = counter.get_total_flops()
    with vtprune.attach(model, NAME, init="random", heads=2, channels=3) as handle, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(pixels)
        report = handle.report()
    assert report.dense_flops - report.flops == dense - counter.get_total_flops() + 3 * 2 * 32 * 6 > 0


def test_half_precision_models_are_asked_in_float32() -> None:
    model, inputs = testing.tiny("llava")
    model = model.to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    with vtprune.attach(model, NAME, init="random") as handle, torch.no_grad():
        part, seen = handle.modules[NAME], []
        hook = part[0].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
        model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
        hook.remove()
    assert set(seen) == {torch.float32} and {p.dtype for p in part.parameters()} == {torch.float32}


def test_cached_decoding_is_uncached() -> None:
    model, inputs = B.llava(blocks=6, layers=3), B.prompts([[4, 9], [7, 2, 5]])
    inputs.pop("position_ids")
    with vtprune.attach(model, NAME) as handle, torch.no_grad():
        double(handle, 0)
        plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False), plain)
        assert 0 < handle.report().stages[-1].tokens_out[0] < B.N


# ---------------------------------------------------------------------------------------------------------------- draws


def drawing(model: Any, inputs: Any, seed: int | tuple[int, ...] = 0, turn: int = 0, **options: Any) -> Any:
    """One forward with gradients: the output, the report, what was told, the part."""
    with vtprune.attach(model, NAME, **options) as handle:
        part = double(handle, 0).requires_grad_(True)
        part.turn = turn
        handle.reseed(seed)
        output = called(model, inputs)
        return output, handle.report(), handle.told(), part


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_what_is_drawn_is_told(turn: int) -> None:
    """By one group; the logarithm of its probability, against I of the transcription; the others decide greedily."""
    model, pixels = B.tower("clip", 6), B.images(3)
    _, report, told, part = drawing(model, pixels, 5, turn)
    site = f"vision.{part.blocks[turn]}"
    assert list(told) == [site] and set(told[site]) == {"log_prob", "kept", "greedy", "grid"}
    told = told[site]
    _, alive, _ = slow(model, pixels, part, 0.5)
    differ = 0
    for b in range(3):
        stages = report.stages
        for g in range(turn):  # in front of the draw
            assert stages[g].kept[b].tolist() == alive[b][g]
        front = alive[b][turn - 1] if turn else list(range(B.N))
        x = hidden_behind(model, pixels[b], part, turn, front)
        value = informative(x, part, turn)
        kept = stages[turn].kept[b].tolist()
        best = front[value.index(max(value))]
        actions = [set(kept), *([set()] if kept == [best] else [])]  # where nothing is drawn the best one stays
        want = [sum(math.log(v if j in a else 1 - v) for j, v in zip(front, value, strict=True)) for a in actions]
        assert any(float(told["log_prob"][b].detach()) == pytest.approx(w, abs=1e-9) for w in want)
        greedy = [j for j, v in zip(front, value, strict=True) if v >= 0.5]
        assert float(told["greedy"][b]) == pytest.approx(max(len(greedy), 1) / B.N)
        assert float(told["kept"][b]) == pytest.approx(len(kept) / B.N)
        assert told["grid"][b].tolist() == [B.SIDE, B.SIDE]
        differ += kept != greedy
        if turn < 2:  # behind the draw
            x = hidden_behind(model, pixels[b], part, turn + 1, kept, at=turn)
            value = informative(x, part, turn + 1)
            want = [j for j, v in zip(kept, value, strict=True) if v >= 0.5] or [kept[value.index(max(value))]]
            assert stages[turn + 1].kept[b].tolist() == want
    assert differ


@torch.no_grad()
def hidden_behind(model: Any, image: Tensor, part: Any, group: int, left: list[int], at: int | None = None) -> Tensor:
    """The patches ``left`` ``[n, C]`` in front of ``group``; of those in front of the earlier groups the greedy ones,
    behind the group ``at`` those that are left."""
    embedded, blocks = parts(model, image[None])
    x, alive = embedded[0], list(range(B.N))
    for number, block in enumerate(blocks[: part.blocks[group] + 1]):
        x = O.run_block(block, x[None])[0]
        if number in part.blocks[:group]:
            g = part.blocks.index(number)
            value = informative(x[1:], part, g)
            stay = [j for j in range(len(alive)) if (alive[j] in left if g == at else value[j] >= 0.5)]
            stay = stay or [value.index(max(value))]
            x, alive = torch.cat([x[:1], x[[1 + j for j in stay]]]), [alive[j] for j in stay]
    assert alive == left
    return x[1:]


def test_draws_follow_the_seed_alone() -> None:
    model, pixels = B.tower("clip", 5), B.images(3)

    def kept(seed: Any, images: Tensor = pixels) -> list[list[int]]:
        return [k.tolist() for k in drawing(model, images, seed)[1].stages[0].kept]

    torch.manual_seed(1)
    first = kept(4)
    torch.manual_seed(2)
    assert kept(4) == first != kept(5)
    assert len({tuple(k) for k in kept(4, pixels[:1].repeat(3, 1, 1, 1))}) == 3, "images share their draws"
    alone = [kept((s,), pixels[b : b + 1])[0] for b, s in enumerate((7, 8, 9))]
    assert kept((7, 8, 9)) == alone
    with pytest.raises(VtpruneError, match="2 seeds were given for 3 images"):
        kept((7, 8))


def test_every_patch_is_kept_as_often_as_its_interpreter_says() -> None:
    model, pixels = B.tower("clip", 4), B.images(1)
    _, _, scores = slow(model, pixels, drawing(model, pixels)[3], 0.5)
    want = torch.tensor([scores[0][0][j] for j in range(B.N)])
    many = pixels.repeat(200, 1, 1, 1)
    found = torch.zeros(B.N)
    for seed in range(4):
        for kept in drawing(model, many, seed)[1].stages[0].kept:
            found[kept] += 1 / 800
    assert (found - want).abs().max() < 4.5 * 0.5 / 800**0.5


def test_groups_draw_apart() -> None:
    part_of = [method._generator(3, block).initial_seed() for block in (0, 1, 4)]
    assert len({*part_of, method._generator(4, 0).initial_seed()}) == 4


def test_without_gradients_nothing_is_drawn_or_told() -> None:
    model, pixels = B.tower("clip", 5), B.images(2)
    with vtprune.attach(model, NAME) as handle:
        part = double(handle, 0)
        model(pixels)
        greedy = [k.tolist() for k in handle.report().stages[-1].kept]
        part.requires_grad_(True)
        with torch.no_grad():
            model(pixels)
        assert [k.tolist() for k in handle.report().stages[-1].kept] == greedy and not handle.told()
        model(pixels)
        assert handle.told() and handle.told() == {}


def test_training_with_keep_is_refused() -> None:
    model, pixels = B.tower("clip", 5), B.images(2)
    with pytest.raises(VtpruneError, match="attach without keep="):
        drawing(model, pixels, keep=5)


# ------------------------------------------------------------------------------------------------------------- rewards


N = 4
TAU = 0.3


def small_view(x: Tensor, part: Any, told: dict[str, Tensor]) -> TokenView:
    b = len(x)
    return TokenView(
        features=x,
        valid=torch.ones(b, N, dtype=torch.bool),
        index=torch.arange(N).expand(b, N),
        size=torch.ones(b, N),
        protected=torch.zeros(b, N, dtype=torch.bool),
        grid=(2, 2),
        seed=0,
        module=part,
        tell=lambda name, values: told.__setitem__(name, values),
    )


class Quiet:
    """What of a handle the losses look at."""

    def __init__(self, told: dict[str, Tensor], images: list[int]):
        self.saying, self.images = told, images

    def told(self) -> dict[str, dict[str, Tensor]]:
        return {"vision.0": self.saying}

    def unreported(self) -> Any:
        return contextlib.nullcontext()


def answer(kept: set[int]) -> bool:
    """Whether a model would be right that sees these patches."""
    return 1 in kept or kept == {0, 3}


def logits_of(right: list[bool]) -> Any:
    return SimpleNamespace(logits=torch.tensor([[0.0, 1.0] if r else [1.0, 0.0] for r in right], dtype=torch.float64))


def loss_of(told: dict[str, Tensor], images: list[int], right: list[bool], calm: list[bool]) -> dict[str, Tensor]:
    step = Step(
        handle=Quiet(told, images),  # type: ignore[arg-type]
        settings={"tau": TAU},
        model=None,
        inputs={"labels": torch.ones(len(right), dtype=torch.long)},
        output=logits_of(right),
        again=lambda: logits_of(calm),
        done=0.0,
    )
    return training.reinforce(step)


def test_the_gradient_is_that_of_the_expected_reward(monkeypatch) -> None:
    """Averaged over all that can be drawn, each as often as it is, against the expected reward as a formula."""
    part = method.Interpreters((0,), 6, 2, 3, "random").double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, N, 6, dtype=torch.float64, generator=generator)
    module, cut = make(NAME, {}), Cut(site="vision.0", keep=1, adaptive=True, data={"group": 0})
    names = [n for n, p in part.named_parameters()]
    value = part[0](x)[0]
    best = int(value.argmax())
    assert 0 < int((value >= 0.5).sum()) < N
    greedy = {j for j in range(N) if value[j] >= 0.5}
    expected: Any = 0
    mean = {name: torch.zeros_like(p) for name, p in part.named_parameters()}
    total = 0.0
    for action in itertools.product([False, True], repeat=N):
        draw = torch.tensor([[0.0 if a else 1.0 for a in action]], dtype=torch.float64)
        monkeypatch.setattr(method, "_uniform", lambda view, block, process, draw=draw: draw)
        told: dict[str, Tensor] = {}
        chosen = module.select(small_view(x, part, told), cut)
        left = {j for j, a in enumerate(action) if a} or {best}
        assert set(chosen.kept[0].tolist()) == left
        odds = torch.stack([v if a else 1 - v for v, a in zip(value, action, strict=True)]).prod()
        worth = 1 - (len(left) / N) ** 2 if answer(left) else -TAU
        expected = expected + odds * worth
        found = loss_of(told, [1], [answer(left)], [answer(greedy)])
        assert list(found) == ["reward"] and float(found["reward"].detach()) == pytest.approx(-worth)
        base = 1 - (len(greedy) / N) ** 2 if answer(greedy) else -TAU
        grads = torch.autograd.grad(found["reward"], list(part.parameters()), retain_graph=True)
        log = torch.autograd.grad(odds.log(), list(part.parameters()), retain_graph=True)
        for name, g, one in zip(names, grads, log, strict=True):
            torch.testing.assert_close(g, -(worth - base) * one)
            mean[name] += float(odds.detach()) * g
        total += float(odds.detach())
    assert total == pytest.approx(1)
    want = torch.autograd.grad(-expected, list(part.parameters()))
    for name, g in zip(names, want, strict=True):
        assert float(g.abs().max()) > 1e-4
        torch.testing.assert_close(mean[name], g)


def test_rewards_find_the_patches_that_matter() -> None:
    """Answers are right while every patch of one sort is there: the threshold keeps these and no other."""
    generator = torch.Generator().manual_seed(0)
    module, cut = make(NAME, {}), Cut(site="vision.0", keep=1, adaptive=True, data={"group": 0})
    part = method.Interpreters((0,), 6, 2, 3, "open").double()
    sorts = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    optimiser = torch.optim.Adam(part.parameters(), lr=1e-2)

    def batch() -> tuple[Tensor, Tensor]:
        matters = torch.rand(32, N, generator=generator) < 0.4
        matters[torch.arange(32), torch.randint(N, (32,), generator=generator)] = True
        noise = torch.randn(32, N, 6, dtype=torch.float64, generator=generator)
        return sorts[matters.long()] + 0.2 * noise, matters

    def seen(kept: Tensor, matters: Tensor) -> list[bool]:
        return (marked(kept, N) | ~matters).all(1).tolist()

    for step in range(120):
        x, matters = batch()
        told: dict[str, Tensor] = {}
        view = dataclasses.replace(small_view(x, part, told), seed=step)
        drawn = module.select(view, cut).kept
        with torch.no_grad():
            calm = module.select(view, cut).kept
        loss = loss_of(told, [1] * 32, seen(drawn, matters), seen(calm, matters))["reward"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, matters = batch()
    with torch.no_grad():
        kept = module.select(small_view(x, part, {}), cut).kept
    assert (marked(kept, N) == matters).double().mean() > 0.95
    assert not matters.all()


def test_images_are_counted_for_their_samples() -> None:
    """A sample's share is the mean over its images, its surprise their sum; samples without images do not count."""
    log = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    kept, greedy = torch.tensor([0.5, 1.0, 0.25, 0.5]), torch.tensor([1.0, 0.5, 0.75, 1.0])
    told = {"log_prob": log, "kept": kept, "greedy": greedy, "grid": torch.tensor([[2, 2]] * 4)}
    found = loss_of(told, [1, 0, 2, 1], [True, True, True, False], [True, True, False, True])["reward"]
    worth = [1 - 0.25, 1 - 0.625**2, -TAU]
    base = [1 - 1.0, -TAU, 1 - 1.0]
    assert float(found.detach()) == pytest.approx(-sum(worth) / 3)
    (g,) = torch.autograd.grad(found, log)
    gains = [w - b for w, b in zip(worth, base, strict=True)]
    assert g.tolist() == pytest.approx([-gains[0] / 3, -gains[1] / 3, -gains[1] / 3, -gains[2] / 3])
    told["grid"] = torch.tensor([[2, 2], [2, 2], [2, 3], [2, 2]])
    with pytest.raises(VtpruneError, match="single samples"):
        loss_of(told, [1, 0, 2, 1], [True] * 4, [True] * 4)
    with pytest.raises(VtpruneError, match="single samples"):
        loss_of({**told, "grid": told["grid"][:1].expand(4, 2)}, [1, 1, 1, 2], [True] * 4, [True] * 4)
    assert loss_of(told, [4], [True], [True])  # whose are they else?


def test_right_answers() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    assert training.right(logits, torch.tensor([1, 1])).tolist() == [True, False]
    assert training.answered(torch.tensor([1, -100])).tolist() == [True, False]
    labels = torch.tensor([[-100, -100, 1, 2], [-100, 0, 1, -100], [-100] * 4, [-100, -100, -100, 1]])
    words = torch.tensor([[9, 1, 2, 9], [0, 2, 9, 9], [9, 9, 9, 9], [1, 1, 0, 1]])
    logits = nn.functional.one_hot(words, 10).float()
    assert training.right(logits, labels).tolist() == [True, False, True, False]
    assert training.answered(labels).tolist() == [True, True, False, True]


def test_samples_without_an_answer_do_not_count() -> None:
    log = torch.tensor([-1.0, -2.0], requires_grad=True)
    told = {"log_prob": log, "kept": torch.tensor([0.5, 0.5]), "greedy": torch.ones(2), "grid": torch.ones(2, 2)}
    step = Step(
        handle=Quiet(told, [1, 1]),  # type: ignore[arg-type]
        settings={"tau": TAU},
        model=None,
        inputs={"labels": torch.tensor([-100, 1])},
        output=logits_of([True, True]),
        again=lambda: logits_of([True, True]),
        done=0.0,
    )
    loss = training.reinforce(step)["reward"]
    assert float(loss.detach()) == pytest.approx(-0.75)
    assert torch.autograd.grad(loss, log)[0].tolist() == pytest.approx([0, -0.75])


@pytest.mark.parametrize("turn", [0, 1])
def test_a_step_beside_a_language_model(turn: int) -> None:
    """Rewards by hand: the report's tokens, the answers of the drawn and of the greedy forward; only the group in turn
    gets gradients, and the report stays that of the drawn one."""
    model, inputs = B.llava(blocks=6, layers=3), B.prompts([[4, 9], [7, 2, 5], [6]], left=False)
    for p in model.parameters():
        p.requires_grad_(False)
    with vtprune.attach(model, NAME, groups=2) as handle:
        part = double(handle, 2)
        labels = torch.full_like(inputs["input_ids"], -100)
        ends = inputs["attention_mask"].sum(1) - 1
        with torch.no_grad():
            calm = model(**inputs).logits
            greedy = handle.report().stages[turn]
        rows = torch.arange(3)
        labels[rows, ends] = calm[rows, ends - 1].argmax(-1)  # what the greedy one answers
        labels[1, ends[1]] += 1  # or not
        part.requires_grad_(True)
        part.turn = turn
        handle.reseed(3)
        call = lambda: model(**inputs, labels=labels, use_cache=False)  # noqa: E731
        output = call()
        report = handle.report()
        log = next(iter(handle.told().values()))["log_prob"]
        output = call()  # once more, for the losses to ask
        step = Step(
            handle=handle,
            settings={"tau": TAU},
            model=model,
            inputs={**inputs, "labels": labels},
            output=output,
            again=call,
            done=0.0,
        )
        loss = training.reinforce(step)["reward"]
        assert repr(handle.report()) == repr(report) and handle.told() == {} and handle.images == [1, 2, 0]
        asked = [bool(output.logits[b, ends[b] - 1].argmax() == labels[b, ends[b]]) for b in range(2)]
        worth, base = [], []
        for b in range(2):
            share = [s.tokens_out[b] / (B.N * (b + 1)) for s in (report.stages[turn], greedy)]
            worth.append(1 - share[0] ** 2 if asked[b] else -TAU)
            base.append(1 - share[1] ** 2 if b == 0 else -TAU)
        assert float(loss.detach()) == pytest.approx(-sum(worth) / 2)
        surprise = (worth[0] - base[0]) * log[0] + (worth[1] - base[1]) * (log[1] + log[2])
        names, ps = zip(*part.named_parameters(), strict=True)
        got = torch.autograd.grad(loss, ps, allow_unused=True, retain_graph=True)
        want = torch.autograd.grad(-surprise / 2, ps, allow_unused=True)
        for name, g, w in zip(names, got, want, strict=True):
            mine = name.split(".")[0] == str(turn)
            assert (g is not None) == (w is not None) == mine, name
            if mine:
                torch.testing.assert_close(g, w)
                assert float(g.abs().max()) > 1e-9, name
        assert all(p.grad is None for p in model.parameters())


def test_a_batch_without_images_has_no_reward() -> None:
    model, inputs = B.llava(blocks=6, layers=3), B.prompts([[6], [4]])
    inputs.pop("pixel_values")
    with vtprune.attach(model, NAME) as handle:
        double(handle).requires_grad_(True)
        output = model(**inputs)
        step = Step(
            handle=handle,
            settings={"tau": TAU},
            model=model,
            inputs={**inputs, "labels": inputs["input_ids"]},
            output=output,
            again=lambda: model(**inputs),
            done=0.0,
        )
        assert training.reinforce(step) == {}


def test_turns_share_the_learning_rate() -> None:
    assert [training.turn(d, 1) for d in (0.0, 0.5, 1.0)] == [0, 0, 0]
    steps = 3000
    area = [0.0] * 3
    turns = [training.turn(i / steps, 3) for i in range(steps)]
    for i, t in enumerate(turns):
        area[t] += (1 + math.cos(math.pi * i / steps)) / 2
    assert turns == sorted(turns) and area == pytest.approx([sum(area) / 3] * 3, rel=0.01)
    handle = SimpleNamespace(modules={NAME: method.Interpreters((0, 1, 2), 4, 1, 1, "open")})
    for done, want in ((0.0, 0), (0.25, 1), (0.99, 2)):
        training.take_turns(handle, {}, done)  # type: ignore[arg-type]
        assert handle.modules[NAME].turn == want


def test_the_training_is_registered() -> None:
    told = TRAININGS.get(NAME)
    assert (told.answers, told.rests) == (False, True)
    own, *others = told.controls({"groups": 2})
    assert own == ("ia-red2, untrained", NAME, {"groups": 2})
    assert {recipe for _, recipe, _ in others} == {"random", "flowcut", "divprune", "tome", "pitome"}


# ------------------------------------------------------------------------------------------------------ plans and files


def blocks(depth: int, **options: Any) -> list[int]:
    geometry = Geometry("hf-vit", "vit", 16, (4, 4), 1, depth, depth, 0, {"vision": frozenset()}, vision_width=8)
    return [c.layer for c in make(NAME, options).plan(geometry, None)]


def test_groups_of_equal_size_behind_the_first_block() -> None:
    assert blocks(12) == [0, 3, 7] and blocks(24) == [0, 7, 15] and blocks(4) == [0, 1, 2]
    assert blocks(3) == [0, 1] and blocks(2) == [0] and blocks(12, groups=4) == [0, 2, 5, 8]
    assert blocks(12, layers=(2, 11)) == [2, 11] and blocks(1, layers=0) == [0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"groups": 4}, "groups=4, and there are 3 blocks behind the first"),
        ({"groups": 0}, "at least 1"),
        ({"layers": (2, 1)}, "must ascend and lie in 0..3"),
        ({"layers": (1, 1)}, "must ascend"),
        ({"layers": 4}, "0..3"),
        ({"layers": -1}, "0..3"),
        ({"layers": (1,), "groups": 1}, "not both"),
        ({"threshold": 1.5}, "at most 1"),
        ({"heads": 0}, "at least 1"),
        ({"channels": 0}, "at least 1"),
        ({"init": "closed"}, "'open', 'random'"),
        ({"weights": "none.safetensors"}, "no such file"),
    ],
)
def test_bad_options(options: dict[str, Any], word: str) -> None:
    model = B.tower("clip", 4)
    before = snapshot(model)
    with pytest.raises(VtpruneError, match=word):
        vtprune.attach(model, NAME, **options)
    assert snapshot(model) == before


def test_a_tower_of_one_block_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="of this one 1 is used"):
        blocks(1)


def test_weights_are_read_and_belong_somewhere(tmp_path) -> None:
    model, pixels = B.tower("clip", 6), B.images(2)
    path = tmp_path / "interpreters.safetensors"
    with vtprune.attach(model, NAME, init="random") as handle, torch.no_grad():
        part = handle.modules[NAME]
        want = model(pixels).last_hidden_state
        told = TRAININGS.get(NAME).tells(part, {})
        assert told == {"blocks": "0,1,3", "heads": "4"}
        save_file(part.state_dict(), path, metadata=told)
    with vtprune.attach(model, NAME, weights=str(path)), torch.no_grad():
        assert torch.equal(model(pixels).last_hidden_state, want)
    for options, word in (
        ({"layers": (0, 2, 3)}, "was trained for blocks=0,1,3, this is blocks=0,2,3"),
        ({"heads": 8, "channels": 8}, "was trained for heads=4, this is heads=8"),
        ({"channels": 8}, "does not fit 3 interpreters of 4 heads with 8 channels"),
    ):
        with pytest.raises(VtpruneError, match=word):
            vtprune.attach(model, NAME, weights=str(path), **options)
