"""CLCA (arXiv 2501.00243) against a slow transcription."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from slow_towers import double, run, watched
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune import testing
from vtprune.core import backbone
from vtprune.core.planning import bind
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.train import card
from vtprune.train.fit import fit
from vtprune.train.pictures import Picture, Pictures

TOWERS = [
    ("timm-vit", "class"),
    ("timm-vit", "layerscale-registers"),
    ("hf-vit", "vit-classifier"),
    ("hf-vit", "dinov2-registers-classifier"),
    ("hf-vit", "deit"),
    ("open-clip", None),
]
OPTIONS = [
    {"ratio": 0.5},
    {"ratio": 0.25, "fused": True, "carriers": 2},
    {"ratio": 0.3, "carriers": 0, "layers": (1,)},
    {"ratio": 0.4, "cache": False},
    {"ratio": 0.5, "layers": (1, 2), "carriers": 3},
]


@torch.no_grad()
def slow(tower, x: Tensor, carriers: Tensor, blocks, ratio, fuse, cache) -> tuple[Tensor, list[Tensor]]:
    """One image ``x`` ``[P + N, C]`` in front of the blocks: what is behind them, and the class tokens on the way."""
    p, clr, depth = tower.prefix, len(carriers), len(tower.blocks)
    pool, cached, classes = len(x) - p, [], []
    x = torch.cat([x, x[:1] + carriers]) if clr else x
    back = sorted({i for i in blocks if i < depth - 1} | {depth - 2}) if cache else []
    for i, block in enumerate(tower.blocks):
        caught: dict[str, Tensor] = {}
        hooks = [
            m.register_forward_hook(lambda *a, name=name, caught=caught: caught.update({name: a[2]}))
            for name, m in tower.capture(block).items()
        ]
        y = tower.attend(block, x[None], None, caught)
        for hook in hooks:
            hook.remove()
        if i in blocks:
            q, k, _, scale = tower.project(block, {"x": x[None], **caught})
            score = torch.stack([(q[0, h, 0] @ k[0, h].T * scale).softmax(0) for h in range(q.shape[1])]).mean(0)[p:]
            tokens = y[0, p:]
            left = math.ceil(ratio * len(tokens))
            order = sorted(range(len(tokens)), key=lambda j: (-float(score[j]), j))
            kept = [tokens[j] for j in order[:left]]
            if fuse and left < len(tokens) - 1:
                kept.append(sum(score[j] * tokens[j] for j in order[left:]))
            y = torch.cat([y[:, :p], torch.stack(kept)[None]], 1)
        x = tower.feed(block, y)[0]
        if i in blocks:
            classes.append(x[0])
        if i in back:
            pool = len(x) - p
            x = torch.cat([x, *cached])
            cached = []
        if back and i < back[-1]:
            cached.append(torch.cat([x[p : p + pool].mean(0, keepdim=True), x[len(x) - clr :]]))
    return x, [*classes, x[0]]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family,variant", TOWERS)
def test_tokens_are_those_of_the_transcription(family, variant, options):
    model, inputs = testing.tiny(family, variant)
    model, inputs = model.double(), double(inputs)
    with torch.no_grad(), vtprune.attach(model, "clca", **options) as handle:
        tower = handle.adapter.engine.tower
        module = handle.modules["clca"].double()
        with watched(tower) as (entered, left):
            run(model, inputs)
        report = handle.report()
    carriers, blocks = module.carriers, module.blocks
    if carriers is None:
        carriers = torch.zeros(0, entered[0].shape[-1], dtype=torch.float64)
    for g, row in enumerate(entered[0]):
        want, _ = slow(
            tower, row, carriers, blocks, options["ratio"], options.get("fused", False), options.get("cache", True)
        )
        p = tower.prefix
        assert left[0].shape[1] == len(want)
        # tokens stand in another order than the transcription's, which nothing in a block depends on
        torch.testing.assert_close(left[0][g, :p], want[:p], rtol=1e-7, atol=1e-7)
        far = torch.cdist(left[0][g, p:], want[p:])
        assert float(far.min(1).values.max()) < 1e-6 and float(far.min(0).values.max()) < 1e-6
    assert [s.site for s in report.stages] == [f"vision.{i}" for i in blocks]
    n = 16
    for stage in report.stages:
        assert all(
            0 <= int(k.max(initial=0) if hasattr(k, "initial") else (k.max() if len(k) else 0)) < n for k in stage.kept
        )


@pytest.mark.parametrize("family,variant", TOWERS[:4])
def test_the_head_is_that_of_the_transcription(family, variant):
    model, inputs = testing.tiny(family, variant)
    model, inputs = model.double(), double(inputs)
    with torch.no_grad():
        dense = run(model, inputs)
        with vtprune.attach(model, "clca", ratio=0.4, head="cla", layers=(1, 3)) as handle:
            tower, entered = handle.adapter.engine.tower, []
            module = handle.modules["clca"].double()
            head = module.head
            for i, norm in enumerate((head.before, head.after)):
                for j, t in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
                    t.copy_(torch.rand(t.shape, generator=torch.Generator().manual_seed(10 * i + j)) + 0.5)
            hook = tower.blocks[0].register_forward_pre_hook(
                lambda m, a, k: entered.append(a[0] if a else k["hidden_states"]), with_kwargs=True, prepend=True
            )
            output = run(model, inputs)
            hook.remove()
            got = output if isinstance(output, Tensor) else output.logits
            alone = model.get_classifier() if family == "timm-vit" else model.classifier
            with pytest.raises(UnsupportedError, match="call the model"):
                alone(torch.zeros(2, alone.in_features).double())
        for g, row in enumerate(entered[0]):
            _, classes = slow(tower, row, module.carriers, (1, 3), 0.4, False, True)
            z = torch.stack([*classes[:2], classes[-1]], 1)
            norm = lambda t, m: (t - m.running_mean[:, None]) / (m.running_var[:, None] + m.eps) ** 0.5  # noqa: E731
            y = norm(z, head.before) * head.before.weight[:, None] + head.before.bias[:, None]
            out = []
            for c in range(2 * len(y)):
                kernel = head.across.weight[c, 0]
                out.append((kernel * y[c // 2]).sum() + head.across.bias[c])
            y = torch.stack(out)[:, None]
            y = F.gelu(norm(y, head.after) * head.after.weight[:, None] + head.after.bias[:, None])[:, 0]
            torch.testing.assert_close(got[g], head.out.weight @ y + head.out.bias, rtol=1e-7, atol=1e-7)
        assert torch.equal(*(o if isinstance(o, Tensor) else o.logits for o in (dense, run(model, inputs))))


def test_nothing_is_dropped_without_anything_to_drop():
    """All tokens, no carriers and no cache: the model itself."""
    for family, variant in TOWERS:
        model, inputs = testing.tiny(family, variant)
        with torch.no_grad():
            dense = run(model, inputs)
            with vtprune.attach(model, "clca", ratio=1.0, carriers=0, cache=False):
                got = run(model, inputs)
        pair = [o if isinstance(o, Tensor) else o[0] for o in (dense, got)]
        torch.testing.assert_close(pair[1], pair[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["own", "cla"])
def test_gradients_reach_carriers_and_head_alone(head):
    model, inputs = testing.tiny("timm-vit", "class")
    model, inputs = model.double(), double(inputs)
    for p in model.parameters():
        p.requires_grad_(False)
    with vtprune.attach(model, "clca", ratio=0.5, head=head) as handle:
        module = handle.modules["clca"].double()
        assert not run(model, inputs).requires_grad
        module.requires_grad_(True)

        def loss() -> Tensor:
            logits = run(model, inputs)
            return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()

        names, parameters = zip(*module.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
        for name, p, g in zip(names, parameters, grads, strict=True):
            if name.endswith(("across.bias", "before.bias")):  # the statistics behind it take it away again
                assert float(g.abs().max()) < 1e-9
                continue
            at = int(g.abs().flatten().argmax())
            assert float(g.flatten()[at].abs()) > 1e-8, name
            found = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    p.view(-1)[at] += step
                found.append(float(loss().detach()))
                with torch.no_grad():
                    p.view(-1)[at] -= step
            assert (found[0] - found[1]) / 2e-5 == pytest.approx(float(g.flatten()[at]), rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.5},
        {"ratio": 0.3, "carriers": 2},
        {"ratio": 0.5, "cache": False},
        {"ratio": 0.5, "carriers": 0, "cache": False},
    ],
    ids=str,
)
def test_flops_are_those_that_are_counted(options):
    """The last block reduces as well, in front of its MLP."""
    model, inputs = testing.tiny("hf-vit", "vit-classifier")
    model.set_attn_implementation("eager")
    with torch.no_grad(), vtprune.attach(model, "clca", **options) as handle:
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        report = handle.report()
    blocks, width, images = handle.modules["clca"].blocks, model.config.hidden_size, 2
    scores = sum(2 * images * (report.layer_tokens[0][i] + 1) * width for i in blocks)  # of one query
    head = 2 * images * model.classifier.weight.numel()
    assert report.flops + scores + head == counter.get_total_flops()


def test_what_is_refused():
    model, inputs = testing.tiny("timm-vit", "class")
    for options, says in (
        ({"layers": (3, 1)}, "must ascend and lie in 0..3"),
        ({"layers": (4,)}, "must ascend and lie in 0..3"),
        ({"ratio": 0.0}, "must be above 0"),
        ({"carriers": -1}, "must be at least 0"),
        ({"head": "mine"}, "not one of"),
        ({"layers": (0, 2)}, "remembers nothing yet in front of layer 0"),
    ):
        with pytest.raises(VtpruneError, match=says):
            vtprune.attach(model, "clca", **options)
    for family, variant, says in (
        ("llava", "clip-llama", "needs classifier"),
        ("timm-vit", "avg-pool", "needs class_token"),
        ("timm-vit", "eva02", "needs insert"),
    ):
        with pytest.raises(UnsupportedError, match=says):
            vtprune.attach(testing.tiny(family, variant)[0], "clca")
    with pytest.raises(UnsupportedError, match="needs a linear classifier"):
        vtprune.attach(testing.tiny("hf-vit", "clip")[0], "clca", head="cla")


def labelled(count: int = 12) -> Pictures:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    rows = [Picture(i, "accuracy", i % 5) for i in range(count)]
    return Pictures(images, rows, tuple("abcde"))


def trained(folder, **how):
    model, _ = testing.tiny("hf-vit", "vit-classifier")
    options = {"layers": (1, 2), "ratio": 0.5, "head": "cla"}
    how = {"steps": 30, "batch": 12, "lr": 1e-2, "folder": folder, "say": lambda line: None, **options, **how}
    return model, *fit(model, labelled(), "clca", **how)


def test_training_moves_carriers_and_head_alone(tmp_path):
    model, part, facts = trained(tmp_path / "run")
    fresh, _ = testing.tiny("hf-vit", "vit-classifier")
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())
    assert min(facts["loss"][-3:]) < 0.5 * facts["loss"][0]
    with vtprune.attach(fresh, "clca", layers=(1, 2), ratio=0.5, head="cla") as handle:
        begun = handle.modules["clca"].state_dict()
    moved = {k for k, v in part.state_dict().items() if not torch.equal(v, begun[k])}
    assert moved == set(begun)  # what the batches were like among them
    path = tmp_path / "part.safetensors"
    card.save(part, path, facts, backbone.layers(bind(model)))
    pixels = labelled().images
    with torch.no_grad(), vtprune.attach(model, "clca", layers=(1, 2), ratio=0.5, head="cla") as handle:
        handle.modules["clca"].load_state_dict(part.state_dict())
        want = model(pixel_values=pixels).logits
    options = {"layers": (1, 2), "ratio": 0.5, "head": "cla", "weights": str(path)}
    with torch.no_grad(), vtprune.attach(model, "clca", **options):
        got = model(pixel_values=pixels).logits
        one = model(pixel_values=pixels[:1]).logits
    torch.testing.assert_close(got, want, rtol=0, atol=0.05)  # half precision on disk
    torch.testing.assert_close(one, got[:1], rtol=1e-4, atol=1e-4)  # no statistics of the batch in use
    assert float((got.argmax(-1) == torch.tensor([r.label for r in labelled().rows])).float().mean()) > 0.6
    for wrong, says in (
        ({"layers": (1, 3)}, "layers=1,2"),
        ({"carriers": 2}, "carriers=1"),
        ({"ratio": 0.25}, "ratio=0.5"),
        ({"head": "own"}, "head=cla"),
    ):
        with pytest.raises(VtpruneError, match=says):
            vtprune.attach(model, "clca", **{**options, **wrong})


def test_training_goes_on_where_it_was_broken_off(tmp_path):
    class Killed(Exception):
        pass

    def kill(line: str) -> None:
        if line.startswith("step 5 "):
            raise Killed

    how = {"steps": 6, "batch": 6, "save_every": 2, "seed": 3}
    _, want, told = trained(tmp_path / "whole", **how)
    with pytest.raises(Killed):
        trained(tmp_path / "broken", **how, say=kill)
    _, got, facts = trained(tmp_path / "broken", **how, resume=True)
    assert all(torch.equal(v, want.state_dict()[k]) for k, v in got.state_dict().items())
    assert facts["loss"] == told["loss"]


def test_a_head_that_averages_counts_patches_alone():
    """DINOv2's classifier takes the mean of the patches: what joined them is none."""
    model, inputs = testing.tiny("hf-vit", "dinov2-registers-classifier")
    model, inputs, seen = model.double(), double(inputs), []
    with torch.no_grad(), vtprune.attach(model, "clca", ratio=0.8, carriers=2) as handle:
        hook = model.dinov2_with_registers.encoder.layer[-1].register_forward_hook(lambda m, a, o: seen.append(o))
        got = model(**inputs).logits
        hook.remove()
        left, prefix = handle.report().stages[-1].tokens_out, handle.geometry.prefix
    x = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    x = model.dinov2_with_registers.layernorm(x)
    for g, n in enumerate(left):
        assert 0 < n < x.shape[1] - prefix
        want = model.classifier(torch.cat([x[g, 0], x[g, prefix : prefix + n].mean(0)]))
        torch.testing.assert_close(got[g], want.detach(), rtol=1e-6, atol=1e-6)


def test_options_that_cannot_be_trained(tmp_path):
    with pytest.raises(VtpruneError, match="batch=1: clca needs 2 rows in each process"):
        trained(tmp_path, batch=1)
    with pytest.raises(VtpruneError, match="nothing to train"):
        trained(tmp_path, head="own", carriers=0)
    _, part, facts = trained(tmp_path, steps=2, carriers=0)
    assert part.carriers is None
    part.head.before.num_batches_tracked.fill_(70_000)  # more than half precision holds
    path = tmp_path / "part.safetensors"
    model, _ = testing.tiny("hf-vit", "vit-classifier")
    card.save(part, path, facts, backbone.layers(bind(model)))
    options = {"layers": (1, 2), "ratio": 0.5, "head": "cla", "carriers": 0, "weights": str(path)}
    with vtprune.attach(model, "clca", **options) as handle:
        assert int(handle.modules["clca"].head.before.num_batches_tracked) == 70_000
    for other in ({"cache": False}, {"fused": True}):
        with pytest.raises(VtpruneError, match="was trained for"):
            vtprune.attach(model, "clca", **options, **other)


def test_a_head_that_averages_patches_wants_one():
    """The cache may leave none of them behind, and a mean of nothing is no number."""
    model, inputs = testing.tiny("hf-vit", "dinov2-registers-classifier")
    with (
        torch.no_grad(),
        vtprune.attach(model, "clca", ratio=0.05),
        pytest.raises(UnsupportedError, match="no patch is left, and this model's head reads the mean"),
    ):
        model(**inputs)
    with torch.no_grad(), vtprune.attach(model, "clca", ratio=0.5):
        assert bool(model(**inputs).logits.isfinite().all())
