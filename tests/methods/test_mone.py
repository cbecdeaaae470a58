"""MoNE (arXiv 2407.19985) against a slow transcription, and the parts of a tower's width that tokens run on."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.nesting import Nest

import vtprune
from vtprune.check.verify import check
from vtprune.core.planning import bind
from vtprune.core.solve import solve
from vtprune.core.types import Nesting, UnsupportedError, VtpruneError
from vtprune.methods.base import METHODS, Action, Cut, Method, MethodInfo, option, register
from vtprune.methods.mone import Router, assigned, capacities, counts
from vtprune.train import mone as training

PRINTED = {
    0.15: (0.8163, 0.1755, 0.0081, 0.0000),
    0.2: (0.6009, 0.3104, 0.0828, 0.0059),
    0.3: (0.4135, 0.3214, 0.1942, 0.0709),
    0.4: (0.3070, 0.2825, 0.2391, 0.1714),
    0.5: (0.2268, 0.2346, 0.2511, 0.2875),
    0.6: (0.1612, 0.1844, 0.2413, 0.4131),
    0.8: (0.0594, 0.0843, 0.1696, 0.6867),
    0.95: (0.0082, 0.0160, 0.0617, 0.9141),
}


# ------------------------------------------------------------------------------------------------- capacities, routing


@pytest.mark.parametrize("budget", PRINTED)
def test_capacities_are_the_printed_ones_and_meet_both_constraints(budget):
    c = capacities(budget)
    assert c == pytest.approx(PRINTED[budget], abs=6e-5)
    assert sum(c) == pytest.approx(1, abs=1e-12)
    assert sum(x / 2 ** (3 - i) for i, x in enumerate(c)) == pytest.approx(budget, abs=1e-9)
    assert capacities(budget, beta=3.0) == pytest.approx(c, abs=1e-9)  # neither counts where delta is 2


@pytest.mark.parametrize("delta", [2.0, 1.0, 0.5, 3.0])
@pytest.mark.parametrize("budget", [0.13, 0.2, 0.37, 0.5, 0.72, 0.95])
def test_capacities_are_what_a_generic_optimiser_finds(budget, delta):
    """SLSQP, as in the paper, from the middle of the simplex."""
    optimize = pytest.importorskip("scipy.optimize")
    beta = 10.0

    def cost(c):
        return -sum(x * delta**i - beta * x * math.log(max(x, 1e-300)) for i, x in enumerate(c))

    constraints = [
        {"type": "eq", "fun": lambda c: sum(c) - 1},
        {"type": "eq", "fun": lambda c: sum(x / 2 ** (3 - i) for i, x in enumerate(c)) - budget},
    ]
    found = optimize.minimize(
        cost, [0.25] * 4, method="SLSQP", bounds=[(0, 1)] * 4, constraints=constraints, options={"ftol": 1e-14}
    )
    assert capacities(budget, delta, beta) == pytest.approx(found.x, abs=2e-4)


@pytest.mark.parametrize("budget", [0.126, 0.15, 15 / 32, 0.5, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 16, 144, 577])
def test_counts(budget, tokens):
    c, n = capacities(budget), counts(budget, tokens)
    assert sum(n) == tokens and n[1:] == tuple(math.floor(x * tokens + 1e-9) for x in c[1:])
    if budget == 15 / 32 and tokens % 4 == 0:  # each a quarter, which rounding may miss
        assert n == (tokens // 4,) * 4
    if budget == 1:
        assert n == (0, 0, 0, tokens)


def slow_routing(r: list[list[float]], sizes) -> list[int]:
    """Section 3.2 as an algorithm: scores of tokens that are taken become 0."""
    score, expert = [list(row) for row in r], [0] * len(r)
    taken: set[int] = set()
    for j in (3, 2, 1):
        for _ in range(sizes[j]):
            best = max((i for i in range(len(r)) if i not in taken), key=lambda i: (score[i][j], -i))
            taken.add(best)
            expert[best] = j
            score[best] = [0.0] * 4
    return expert


@pytest.mark.parametrize("seed", range(5))
def test_experts_choose_from_the_widest_down(seed):
    r = torch.rand(3, 21, 4, generator=torch.Generator().manual_seed(seed)).double().softmax(-1)
    if seed == 4:
        r = (r * 40).round() / 40  # ties
    for sizes in ((5, 6, 7, 3), (21, 0, 0, 0), (0, 0, 0, 21), (0, 20, 1, 0)):
        got = assigned(r, sizes)
        assert got.tolist() == [slow_routing(row.tolist(), sizes) for row in r]
        assert [[row.count(j) for j in range(4)] for row in got.tolist()] == [list(sizes)] * 3


# -------------------------------------------------------------------------------------------------- the transcription


def linear(m: nn.Linear, x: Tensor, read: int | None = None, write: int | None = None) -> Tensor:
    """One row through the first ``read`` columns, or the first ``write`` rows, of a matrix."""
    w, b = m.weight, torch.zeros(m.out_features, dtype=x.dtype) if m.bias is None else m.bias
    if read is not None:
        return w[:, :read] @ x[:read] + b
    y = w[:write] @ x + b[:write]
    return torch.cat([y, y.new_zeros(m.out_features - write)])


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """``[n, C]``, query by query and head by head."""
    out = torch.zeros_like(v)
    d = v.shape[1] // heads
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(len(q)):
            logits = torch.stack([q[i, part] @ k[j, part] for j in range(len(k))]) / math.sqrt(d)
            out[i, part] = (logits.softmax(0)[:, None] * v[:, part]).sum(0)
    return out


def parts_of(block) -> dict:
    """Of blocks of three kinds: norms, matrices, scales and the activation."""
    if hasattr(block, "ls1"):  # timm
        a = block.attn

        def qkv(x, d):
            q, k, v = linear(a.qkv, x, read=d).chunk(3)
            heads = [t.view(a.num_heads, -1) for t in (q, k)]
            return a.q_norm(heads[0]).flatten(), a.k_norm(heads[1]).flatten(), v

        scale = [getattr(m, "gamma", None) for m in (block.ls1, block.ls2)]
        return {
            "norms": (block.norm1, block.norm2),
            "qkv": qkv,
            "out": a.proj,
            "mlp": (block.mlp.fc1, block.mlp.act, block.mlp.fc2),
            "scales": scale,
            "heads": a.num_heads,
        }
    a = next(getattr(block, n) for n in ("self_attn", "attention") if hasattr(block, n))
    first = next(getattr(block, n) for n in ("layer_norm1", "layernorm_before", "norm1") if hasattr(block, n))
    second = next(getattr(block, n) for n in ("layer_norm2", "layernorm_after", "norm2") if hasattr(block, n))
    scales = [block.layer_scale1.lambda1, block.layer_scale2.lambda1] if hasattr(block, "layer_scale1") else [None] * 2
    return {
        "norms": (first, second),
        "qkv": lambda x, d: tuple(linear(m, x, read=d) for m in (a.q_proj, a.k_proj, a.v_proj)),
        "out": a.out_proj if hasattr(a, "out_proj") else a.o_proj,
        "mlp": (block.mlp.fc1, block.mlp.activation_fn, block.mlp.fc2),
        "scales": scales,
        "heads": getattr(a, "num_heads", None) or a.num_attention_heads,
    }


@torch.no_grad()
def slow(blocks, x: Tensor, prefix: int, router: Router, budget: float) -> tuple[Tensor, list[int]]:
    """One image ``[P + N, C]`` through all blocks, token by token, and each token's expert."""
    w, b = router.w.to(x), router.b.to(x)
    r = [(w @ row + b).softmax(0) for row in x[prefix:]]
    n, full = len(r), x.shape[1]
    sizes = [0, *(math.floor(c * n + 1e-9) for c in capacities(budget)[1:])]
    expert = slow_routing([row.tolist() for row in r], sizes)
    width = [full] * prefix + [full // 2 ** (3 - e) for e in expert]
    own = [0.0] * prefix + [float(row[e]) for row, e in zip(r, expert, strict=True)]
    for block, alpha in zip(blocks, router.alpha.tolist(), strict=True):
        p = parts_of(block)
        made = [p["qkv"](p["norms"][0](row), d) for row, d in zip(x, width, strict=True)]
        mixed = attention(*(torch.stack(t) for t in zip(*made, strict=True)), p["heads"])
        y = torch.stack([linear(p["out"], row, write=d) for row, d in zip(mixed, width, strict=True)])
        z = x + (y if p["scales"][0] is None else y * p["scales"][0])
        fc1, act, fc2 = p["mlp"]
        rows = []
        for row, d, mine in zip(z, width, own, strict=True):
            m = linear(fc2, act(linear(fc1, p["norms"][1](row), read=d)), write=d)
            rows.append((alpha * mine + 1) * (m if p["scales"][1] is None else m * p["scales"][1]))
        x = z + torch.stack(rows)
    return x, expert


def double(family: str, variant: str) -> tuple:
    model, inputs = ADAPTERS.get(family).tiny[variant]()
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def drawn(router: Router, seed: int = 3, alpha: bool = True) -> None:
    """Another router, whose choices differ, and other weights of it in each block."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (router.w, router.b):
            p.copy_(torch.randn(p.shape, generator=generator))
        if alpha:
            router.alpha.copy_(torch.rand(router.alpha.shape, generator=generator) * 0.9)


def watched(model, inputs, blocks) -> tuple:
    """The model's output, what enters the first of ``blocks`` and what leaves each."""
    entered, left, hooks = [], [], []
    first = blocks[0].register_forward_pre_hook(
        lambda m, a, k: entered.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    for block in blocks:
        hooks.append(block.register_forward_hook(lambda m, a, y: left.append(y[0] if isinstance(y, tuple) else y)))
    try:
        with torch.no_grad():
            out = model(**inputs)
    finally:
        for hook in (first, *hooks):
            hook.remove()
    return out, entered[0], left


PLAIN = [
    ("timm-vit", "class"),
    ("timm-vit", "layerscale-registers"),
    ("timm-vit", "avg-pool"),
    ("hf-vit", "clip"),
    ("hf-vit", "siglip"),
    ("hf-vit", "dinov2"),
    ("hf-vit", "vit-classifier"),
    ("llava", "clip-llama"),
    ("llava", "dinov2-llama"),
]


@pytest.mark.parametrize("budget", [0.5, 0.22])
@pytest.mark.parametrize(("family", "variant"), PLAIN, ids=str)
def test_equals_the_transcription(family, variant, budget):
    model, inputs = double(family, variant)
    adapter = bind(model)
    blocks, prefix = adapter.tower_blocks(), adapter.geometry.prefix
    with vtprune.attach(model, "mone", capacity=budget) as handle:
        router = handle.modules["mone"]
        drawn(router)
        _, x, left = watched(model, inputs, blocks)
        report, passes = handle.report(), handle.passes
    seen = set()
    for g, image in enumerate(x):
        want, expert = slow(blocks, image, prefix, router, budget)
        assert torch.allclose(left[-1][g], want, atol=1e-6 * float(want.abs().max()))  # norms of some run in float32
        seen.update(expert)
        run, row = passes[g]
        told = [2.0 ** (e - 3) for e in expert]
        assert run.records[0].scored(row, len(expert)).tolist() == told
        assert report.stages[0].scores[g].tolist() == told
    assert len(seen) >= 3, "nearly all on one expert"
    assert report.stages[0].tokens_out == report.stages[0].tokens_in == report.visual_tokens
    assert report.effective_tokens == report.visual_tokens[0]


@pytest.mark.parametrize("variant", ["class", "layerscale-registers", "eva02", "dinov3"])
def test_a_token_changes_only_the_first_features_of_its_expert(variant):
    """To the last bit, in every block; class and register tokens change in all."""
    model, inputs = ADAPTERS.get("timm-vit").tiny[variant]()
    blocks, prefix = bind(model).tower_blocks(), bind(model).geometry.prefix
    with vtprune.attach(model, "mone", capacity=0.3) as handle:
        drawn(handle.modules["mone"])
        _, x, left = watched(model, inputs, blocks)
        scores = torch.stack(handle.report().stages[0].scores)
    for before, after in itertools.pairwise([x, *left]):
        same = (before == after)[:, prefix:]
        for g, i in itertools.product(range(2), range(16)):
            d = int(float(scores[g, i]) * 32)
            assert bool(same[g, i, d:].all()) and not bool(same[g, i, :d].all())
        assert not bool((before == after)[:, :prefix].all(-1).any())


@pytest.mark.parametrize(
    ("family", "variant"), [("smolvlm", "whole"), ("internvl", "qwen2"), ("gemma3", "sliding")], ids=str
)
def test_the_patches_of_a_square_share_its_expert(family, variant):
    """Where patches are folded behind the tower, and stand square by square between its blocks."""
    model, inputs = ADAPTERS.get(family).tiny[variant]()
    blocks, prefix = bind(model).tower_blocks(), bind(model).geometry.prefix
    with vtprune.attach(model, "mone", capacity=0.3) as handle:
        drawn(handle.modules["mone"], alpha=False)
        _, x, left = watched(model, inputs, blocks)
        passes = handle.passes
    assert len(passes) == len(x)
    for (run, row), before, after in zip(passes, x, left[0], strict=True):
        scores = run.records[0].scored(row, run.tokens).tolist()
        same = (before == after)[prefix:].unflatten(0, (-1, run.group))
        assert run.group > 1 and len(same) == len(scores) and len(set(scores)) > 2
        for square, share in zip(same, scores, strict=True):
            d = int(share * x.shape[2])
            assert bool(square[:, d:].all()) and not bool(square[:, :d].all(1).any())


# ------------------------------------------------------------------------------------------- all tokens on one expert


@pytest.fixture
def uniform():
    """A method that runs every token on the same part of the width, registered for one test."""

    @register(
        MethodInfo(
            name="one-width",
            paper="baseline",
            idea="one part for all",
            kinds=("vision",),
            needs={"vision": frozenset({"matrices"})},
            nests=True,
            keep=None,
            budgeted=False,
            cases=({}, {}),
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class OneWidth(Method):
        share: float = option(0.5, "of the width")

        def plan(self, geometry, keep):
            widths = ((self.share, geometry.tokens), (1.0, 0))
            return (Cut(site="vision.0", action=Action.NEST, widths=widths),)

        def nest(self, view, cut):
            return Nesting(torch.zeros_like(view.index), cut.widths)

    yield "one-width"
    METHODS._forget("one-width")


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
@pytest.mark.parametrize(("family", "variant"), [("timm-vit", "avg-pool"), ("hf-vit", "siglip")], ids=str)
def test_all_tokens_on_one_expert_are_the_model_with_its_matrices_cut(uniform, family, variant, share):
    """Weights that read or write the other features are zero, and biases that write them (MatFormer's slices)."""
    model, inputs = double(family, variant)
    with torch.no_grad(), vtprune.attach(model, uniform, share=share):
        got = watched(model, inputs, bind(model).tower_blocks())[2][-1]
    d = int(32 * share)
    with torch.no_grad():
        for block in bind(model).tower_blocks():
            for name, m in block.named_modules():
                if isinstance(m, nn.Linear) and name.rpartition(".")[2] in ("proj", "out_proj", "fc2"):
                    m.weight[d:] = 0
                    m.bias[d:] = 0
                elif isinstance(m, nn.Linear):
                    m.weight[:, d:] = 0
    want = watched(model, inputs, bind(model).tower_blocks())[2][-1]
    assert torch.allclose(got, want, atol=1e-12 * float(want.abs().max()))


def test_a_width_that_has_no_such_part_is_refused(uniform):
    model, inputs = ADAPTERS.get("timm-vit").tiny["class"]()
    with vtprune.attach(model, uniform, share=0.3), pytest.raises(UnsupportedError, match="0.3 is no whole number"):
        model(**inputs)


# -------------------------------------------------------------------------------------------------------- identities


ALL = [
    ("hf-vit", "dinov3"),
    ("hf-vit", "dinov2-registers-classifier"),
    ("timm-vit", "eva02"),
    ("llava", "siglip-qwen2"),
    ("smolvlm", "smolvlm"),
    ("internvl", "qwen2"),
    ("gemma3", "sliding"),
    ("llava-next", "clip-llama"),
]


def tensor(out) -> Tensor:
    return next(getattr(out, n) for n in ("logits", "last_hidden_state") if hasattr(out, n))


@pytest.mark.parametrize(("family", "variant"), [*PLAIN, ("hf-vit", "dinov3"), ("llava", "siglip-qwen2")], ids=str)
def test_the_whole_capacity_is_the_dense_model_to_the_last_bit(family, variant):
    model, inputs = ADAPTERS.get(family).tiny[variant]()
    with torch.no_grad():
        want = model(**inputs)
        with vtprune.attach(model, "mone", capacity=1.0) as handle:
            drawn(handle.modules["mone"], alpha=False)
            got, report = model(**inputs), handle.report()
    same = torch.equal(got, want) if isinstance(got, Tensor) else torch.equal(tensor(got), tensor(want))
    assert same and report.flops == report.dense_flops


def test_the_router_has_its_weight_at_the_whole_capacity_too():
    model, inputs = double("timm-vit", "avg-pool")
    blocks = bind(model).tower_blocks()
    with vtprune.attach(model, "mone", capacity=1.0) as handle:
        drawn(handle.modules["mone"])
        _, x, left = watched(model, inputs, blocks)
        want = torch.stack([slow(blocks, image, 0, handle.modules["mone"], 1.0)[0] for image in x])
    assert torch.allclose(left[-1], want, atol=1e-6 * float(want.abs().max()))


def test_without_its_weight_the_router_only_assigns():
    """Another r with the same assignment changes nothing while alpha is 0, and something once it is not."""
    model, inputs = ADAPTERS.get("timm-vit").tiny["avg-pool"]()
    with torch.no_grad(), vtprune.attach(model, "mone", capacity=0.4) as handle:
        router, outs = handle.modules["mone"], []
        for alpha, scale in itertools.product((0.0, 0.5), (1.0, 1.0 + 1e-3)):
            drawn(router, alpha=False)
            router.alpha.fill_(alpha)
            router.w *= scale
            router.b *= scale
            outs.append((model(**inputs), handle.report().stages[0].scores))
    assert all(torch.equal(torch.stack(s), torch.stack(outs[0][1])) for _, s in outs)
    assert torch.equal(outs[0][0], outs[1][0]) and not torch.equal(outs[2][0], outs[3][0])


def test_the_weight_is_kept_below_one_and_not_negative():
    model, inputs = ADAPTERS.get("timm-vit").tiny["avg-pool"]()
    with torch.no_grad(), vtprune.attach(model, "mone", capacity=0.4) as handle:
        alpha, outs = handle.modules["mone"].alpha, []
        for value in (-3.0, 0.0, 1 - 2.0**-10, 7.0):
            alpha.fill_(value)
            outs.append(model(**inputs))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[2], outs[3]) and not torch.equal(outs[1], outs[2])


# ---------------------------------------------------------------------------- the contract, with a router that counts


@pytest.fixture
def weights(tmp_path):
    """A file with a router for a model, whose weight alpha is not 0."""

    def write(model) -> str:
        geometry, adapter = bind(model).geometry, bind(model)
        router = Router(adapter.cost.vd, geometry.vision_layers)
        drawn(router)
        path = tmp_path / "router.safetensors"
        save_file({k: v.contiguous() for k, v in router.state_dict().items()}, path)
        return str(path)

    return write


NAMES = ("prefill_is_masked_dense", "decode_is_masked_dense", "cached_is_uncached", "batch_is_singles", "restored")
NAMES = (*NAMES, "interleaved_is_solo", "clean_after_exception", "deterministic", "finite_in_half")


@pytest.mark.parametrize(("family", "variant"), [*ALL, ("llava", "clip-llama")], ids=str)
def test_a_router_with_weight_keeps_the_contract(weights, family, variant):
    """Sliced matrices give what whole ones give with zeros, in batches, alone, cached and interleaved."""
    model, inputs = ADAPTERS.get(family).tiny[variant]()
    if family == "internvl":
        pytest.importorskip("transformers")
    passed = 0
    options = {"per": "tile"} if "tile" in bind(model).geometry.per[1:] else {}
    for name in NAMES:
        result = check(name, model, "mone", inputs, capacity=0.3, weights=weights(model), **options)
        assert result.passed is not False, f"{name}: {result.detail}"
        passed += result.passed is not None
    assert passed >= 6


def test_a_router_of_another_shape_is_refused(tmp_path):
    model, _ = ADAPTERS.get("timm-vit").tiny["class"]()
    path = tmp_path / "router.safetensors"
    save_file(Router(32, 3).state_dict(), path)
    with pytest.raises(VtpruneError, match="does not fit a tower of 4 blocks that is 32 wide"):
        vtprune.attach(model, "mone", weights=str(path))


def test_images_of_another_size_have_capacities_of_their_own():
    model, _ = ADAPTERS.get("timm-vit").tiny["layerscale-registers"]()
    images = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), vtprune.attach(model, "mone", capacity=0.5) as handle:
        model(images)
        scores = handle.report().stages[0].scores
    for row in scores:
        assert [int((row == 2.0 ** (j - 3)).sum()) for j in range(4)] == list(counts(0.5, 30))


# ------------------------------------------------------------------------------------------------------------- FLOPs


def counted(model, inputs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("budget", [0.2, 0.6])
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("hf-vit", "dinov2"),
        ("hf-vit", "dinov3"),
        ("hf-vit", "siglip"),
        ("llava", "clip-llama"),
        ("smolvlm", "whole"),
        ("timm-vit", "eva02"),
        ("timm-vit", "layerscale-registers"),
    ],
    ids=str,
)
def test_flops_are_those_of_the_sliced_matrices(family, variant, budget):
    """To the last one, the router's own aside, which is no part of a report."""
    model, inputs = ADAPTERS.get(family).tiny[variant]()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])  # padding is not reported
    dense, cost = counted(model, inputs), bind(model).cost
    with vtprune.attach(model, "mone", capacity=budget) as handle:
        got, report = counted(model, inputs), handle.report()
        routed = 2 * 4 * cost.vd * sum(run.tokens for run, _ in handle.passes)
        share = sum(c * n for c, n in zip((0.125, 0.25, 0.5, 1.0), counts(budget, 16), strict=True)) / 16
        rows = sum(run.tokens * run.group for run, _ in handle.passes) * handle.geometry.vision_layers
    assert report.dense_flops - report.flops == dense - (got - routed)
    # projections and MLPs of patches fall to the mean width, attention and the class token's stay
    per_row = 2 * (4 * cost.vd**2 + cost.vmlp * cost.vd * cost.vf)
    assert report.dense_flops - report.flops == pytest.approx((1 - share) * rows * per_row, rel=1e-9)


def test_a_budget_of_flops_finds_the_capacity():
    model, inputs = ADAPTERS.get("timm-vit").tiny["avg-pool"]()
    recipe = solve(model, "mone", flops=0.6)
    found = recipe.stages[0].options["capacity"]
    with torch.no_grad(), vtprune.attach(model, recipe) as handle:
        model(**inputs)
        report = handle.report()
    assert 0.125 < found < 1 and 0.5 < report.flops / report.dense_flops <= 0.6
    with torch.no_grad(), vtprune.attach(model, "mone", capacity=found + 1 / 16) as handle:
        model(**inputs)
        report = handle.report()
    assert report.flops / report.dense_flops > 0.6
    assert solve(model, "mone", effective_tokens=16).stages[0].options["capacity"] == 1
    with pytest.raises(VtpruneError, match="its smallest schedule has 16"):
        solve(model, "mone", effective_tokens=8)


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("family", "variant"), [("timm-vit", "avg-pool"), ("llava", "dinov2-llama")], ids=str)
def test_gradients_reach_router_and_weight_and_nothing_else(family, variant):
    """By finite differences where the assignment stays; with alpha at 0 only alpha has one."""
    model, inputs = double(family, variant)
    model.requires_grad_(False)
    with vtprune.attach(model, "mone", capacity=0.4) as handle:
        router = handle.modules["mone"].double()
        drawn(router)

        def loss() -> Tensor:
            out = model(**inputs)
            out = out if isinstance(out, Tensor) else out.logits
            return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()

        assert not loss().requires_grad
        router.requires_grad_(True)
        loss().backward()
        assert all(p.grad is None for p in model.parameters())
        for p in router.parameters():
            for place in (int(p.grad.flatten().abs().argmax()), p.numel() - 1):
                ends = []
                for step in (1e-5, -1e-5):
                    with torch.no_grad():
                        p.view(-1)[place] += step
                        ends.append(float(loss()))
                        p.view(-1)[place] -= step
                assert float(p.grad.flatten()[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-4)
            assert float(p.grad.norm()) > 1e-6
            p.grad = None
        with torch.no_grad():
            router.alpha.zero_()
        loss().backward()
        assert float(router.alpha.grad.abs().min()) > 0
        assert not bool(router.w.grad.any()) and not bool(router.b.grad.any())


def test_gradient_checkpointing(tiny):
    """timm's gives the gradients of the backbone that there are without it; with a router that is trained it is
    refused, and so is transformers', which does not run a block's hooks again."""
    model, inputs = tiny("timm-vit", "avg-pool")
    model, grads = copy.deepcopy(model).train(), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        with vtprune.attach(model, "mone", capacity=0.4) as handle:
            drawn(handle.modules["mone"])
            model.zero_grad()
            model(**inputs).square().sum().backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
            if checkpointing:
                handle.modules["mone"].requires_grad_(True)
                with pytest.raises(UnsupportedError, match="being trained"):
                    model(**inputs).square().sum().backward()
    for name, g in grads[0].items():
        torch.testing.assert_close(grads[1][name], g, rtol=1e-4, atol=1e-5 * float(g.abs().max()) + 1e-7)
    model, inputs = tiny("llava", "dinov2-llama")
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with vtprune.attach(model, "mone", capacity=0.4):
        with pytest.raises(UnsupportedError, match="switch it off in the tower"):
            model(**inputs, use_cache=False)
        with torch.no_grad():
            model(**inputs)
        for block in bind(model).tower_blocks():
            block.gradient_checkpointing = False
        model(**inputs, use_cache=False).logits.sum().backward()


def test_adaptive_training_draws_a_capacity_for_every_step():
    model, inputs = ADAPTERS.get("timm-vit").tiny["avg-pool"]()
    with torch.no_grad(), vtprune.attach(model, "mone", capacity=0.5) as handle:
        seen = []
        for step in range(60):
            training.prepare(handle, {"adaptive": 1.0}, step / 60)
            model(**inputs)
            row = handle.report().stages[0].scores[0]
            budget = handle.modules["mone"].drawn
            assert [int((row == 2.0 ** (j - 3)).sum()) for j in range(4)] == list(counts(budget, 16))
            seen.append(budget)
        again = [training.prepare(handle, {"adaptive": 1.0}, s / 60) or handle.modules["mone"].drawn for s in range(60)]
        training.prepare(handle, {"adaptive": 0.0}, 0.5)
        assert handle.modules["mone"].drawn is None
    assert set(seen) == set(training.DRAWN) == {0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95} and again == seen


# ------------------------------------------------------------------------------------------------- it learns at all


CLASSES = 16


def noisy(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of 16 noisy patches, one of which bears the mark of the image's class."""
    generator = torch.Generator().manual_seed(seed)
    marks = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    patches = torch.randn(n, 16, 3, 8, 8, generator=generator)
    labels, at = torch.randint(CLASSES, (n,), generator=generator), torch.randint(16, (n,), generator=generator)
    own = torch.arange(n), at
    patches[own] = 0.8 * patches[own] + 0.6 * marks[labels]
    return patches.view(n, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 32, 32), labels


def fitted(nested: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """A ViT from scratch, with or without nested experts, and its router."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
        model = timm.VisionTransformer(**sizes, class_token=False, global_pool="avg")
    groups, state = [{"params": list(model.parameters())}], {}
    handle = vtprune.attach(model, "mone", capacity=0.2)
    if nested:
        router = handle.modules["mone"].requires_grad_(True)
        groups.append({"params": list(router.parameters()), "lr": 2e-2})
    else:
        handle.remove()
    optimiser = torch.optim.AdamW(groups, lr=4e-3, weight_decay=0.0)
    for step in range(200):
        images, labels = noisy(64, step)
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    if nested:
        state = {k: v.detach().clone() for k, v in router.state_dict().items()}
        handle.remove()
    return model.eval(), state


def accuracy(model, state: dict[str, Tensor] | None = None, capacity: float = 0.2) -> float:
    images, labels = noisy(512, 10**6)
    with torch.no_grad(), vtprune.attach(model, "mone", capacity=capacity) as handle:
        if state:
            handle.modules["mone"].load_state_dict(state)
        return float((model(images).argmax(1) == labels).float().mean())


def test_nested_weights_and_router_learn_together():
    """At a fifth of the width on average, where weights trained at full width are ruined, and so is what was trained
    nested with another router than its own."""
    plain, _ = fitted(nested=False)
    assert accuracy(plain, capacity=1.0) > 0.95 and accuracy(plain) < 0.7
    nested, router = fitted(nested=True)
    own = accuracy(nested, router)
    assert own > 0.8 and own > accuracy(plain) + 0.15 and own > accuracy(nested) + 0.1
    assert float(router["alpha"].min()) > 0.05


# ----------------------------------------------------------------------------------------------- adapters, other people


def test_adapters_beside_the_matrices_run_on_parts_too():
    """LoRA of peft in the tower: the same as merged into the weights; its matrices are not sliced, nor said to be."""
    peft = pytest.importorskip("peft")
    model, inputs = double("hf-vit", "dinov2")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "fc1", "fc2"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    with torch.no_grad(), vtprune.attach(wrapped, "mone", capacity=0.4) as handle:
        drawn(handle.modules["mone"])
        got, report = wrapped(**inputs).last_hidden_state, handle.report()
    merged = wrapped.merge_and_unload()
    with torch.no_grad(), vtprune.attach(merged, "mone", capacity=0.4) as handle:
        drawn(handle.modules["mone"])
        want, whole = merged(**inputs).last_hidden_state, handle.report()
    assert torch.allclose(got, want, atol=1e-6 * float(want.abs().max()))
    assert whole.flops < report.flops < report.dense_flops


def test_hooks_and_replacements_of_single_matrices_are_refused():
    model, inputs = ADAPTERS.get("hf-vit").tiny["clip"]()
    block = bind(model).tower_blocks()[1]
    with vtprune.attach(model, "mone"):
        hook = block.mlp.fc1.register_forward_hook(lambda m, a, y: y + 1)
        with pytest.raises(UnsupportedError, match="matrix of block 1 of the tower was replaced or hooked"):
            model(**inputs)
        hook.remove()
        model(**inputs)
        mine, block.mlp.fc1 = block.mlp.fc1, nn.Linear(32, 64)
        with pytest.raises(UnsupportedError, match="matrix of block 1 of the tower was replaced or hooked"):
            model(**inputs)
        block.mlp.fc1 = mine


class Shifted(nn.Linear):
    """A matrix that computes otherwise than its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + 1, self.bias)


def test_a_matrix_with_arithmetic_of_its_own_is_masked_instead_of_sliced():
    model, inputs = double("hf-vit", "clip")
    other = copy.deepcopy(model)
    block, twin = bind(model).tower_blocks()[1], bind(other).tower_blocks()[1]
    for name in ("fc1", "fc2"):
        old = getattr(block.mlp, name)
        odd = Shifted(old.in_features, old.out_features).double()
        odd.load_state_dict(old.state_dict())
        setattr(block.mlp, name, odd)
        with torch.no_grad():
            getattr(twin.mlp, name).weight += 1
    outs = []
    for m in (model, other):
        with torch.no_grad(), vtprune.attach(m, "mone", capacity=0.3) as handle:
            drawn(handle.modules["mone"])
            outs.append((m(**inputs).last_hidden_state, handle.report().flops))
    assert torch.allclose(outs[0][0], outs[1][0], atol=1e-10 * float(outs[1][0].abs().max()))
    assert outs[0][1] > outs[1][1]


# ---------------------------------------------------------------------------------------------------------- refusals


def test_blocks_of_another_make_are_refused():
    """A matrix that nobody knows, one that is not called, and a second way into the residual stream."""
    build = partial(ADAPTERS.get("timm-vit").tiny["class"])
    model, _ = build()
    model.blocks[2].extra = nn.Linear(32, 32)
    with pytest.raises(UnsupportedError, match="block 2 .* has a matrix extra.weight"):
        vtprune.attach(model, "mone")
    model, _ = build()
    model.blocks[1].mlp.forward = lambda x: F.linear(
        F.relu(x @ model.blocks[1].mlp.fc1.weight.T), model.blocks[1].mlp.fc2.weight
    )  # noqa: E501
    with pytest.raises(UnsupportedError, match="block 1 .* does not read and write its residual stream through"):
        vtprune.attach(model, "mone")
    model, _ = build()
    own = model.blocks[1].forward
    model.blocks[1].forward = lambda x, **kwargs: own(x, **kwargs) + 0.1
    with pytest.raises(UnsupportedError, match="block 1 .* does not read and write its residual stream through"):
        vtprune.attach(model, "mone")
    model, _ = build()
    del model.blocks[3].mlp.fc2
    model.blocks[3].mlp.last = nn.Linear(128, 32)
    with pytest.raises(UnsupportedError, match="block 3 .* Mlp has no matrix under the usual names"):
        vtprune.attach(model, "mone")


def test_a_width_without_an_eighth_is_refused():
    timm = pytest.importorskip("timm.models.vision_transformer")
    model = timm.VisionTransformer(img_size=32, patch_size=8, embed_dim=36, depth=2, num_heads=2, num_classes=3).eval()
    with pytest.raises(UnsupportedError, match="36 wide, which has no eighth"):
        vtprune.attach(model, "mone")


@pytest.mark.parametrize(("family", "variant", "why"), [
    ("open-clip", "clip", "takes the weights of its projections as they are"),
    ("timm-vit", "rope-mixed", "adds a bias of its own"),
    ("qwen2-vl", "images", "whose blocks see each image by itself"),
    ("causal-lm", "llama", "reads no images"),
])  # fmt: skip
def test_towers_that_cannot_are_refused_with_the_reason(tiny, family, variant, why):
    if family == "open-clip":
        pytest.importorskip("open_clip")
    model, _ = tiny(family, variant)
    with pytest.raises(UnsupportedError, match=why):
        vtprune.attach(model, "mone")


@pytest.mark.parametrize(("options", "word"), [
    ({"capacity": 0.125}, "above 0.125 and at most 1"),
    ({"capacity": 1.01}, "at most 1"),
    ({"capacity": True}, "expected number"),
    ({"keep": 9}, "takes no keep="),
    ({"weights": "none.safetensors"}, "no such file"),
    ({"layer": 2}, "no option 'layer'"),
])  # fmt: skip
def test_bad_options(tiny, options, word):
    model, _ = tiny("llava", "clip-llama")
    with pytest.raises(VtpruneError, match=word) as e:
        vtprune.attach(model, "mone", **options)
    assert "\n" not in str(e.value)


def recipe(*stages) -> vtprune.Recipe:
    return vtprune.Recipe(name="r", stages=tuple(vtprune.Stage(method=m, keep=k, options=o) for m, k, o in stages))


@pytest.mark.parametrize("other", [
    ("downsample", 4, {}), ("flowcut", 8, {}), ("tome", 8, {}), ("visionzip", 8, {}), ("mone", None, {})
], ids=lambda o: o[0])  # fmt: skip
def test_other_stages_in_the_tower_are_refused(tiny, other):
    model, _ = tiny("llava", "clip-llama")
    stages = (other, ("mone", None, {})) if other[0] == "downsample" else (("mone", None, {}), other)
    with pytest.raises(VtpruneError, match="not composed with other stages there yet"):
        vtprune.attach(model, recipe(*stages))


def test_stages_behind_the_tower_compose(tiny, weights):
    model, inputs = tiny("llava", "clip-llama")
    stages = (("mone", None, {"capacity": 0.4, "weights": weights(model)}), ("uniform", 10, {}))
    chosen = recipe(*stages, ("fastv", 5, {"layer": 2}))
    for name in NAMES:
        result = check(name, model, chosen, inputs)
        assert result.passed, f"{name}: {result.detail}"
    with torch.no_grad(), vtprune.attach(model, chosen) as handle:
        model(**inputs)
        report = handle.report()
    assert [s.tokens_out[0] for s in report.stages] == [16, 10, 5]
    assert report.stages[0].scores is not None
    with torch.no_grad(), vtprune.attach(model, recipe(*stages[1:], ("fastv", 5, {"layer": 2}))) as handle:
        model(**inputs)
        assert handle.report().flops > report.flops


def test_the_engine_leaves_nothing_behind(tiny):
    model, inputs = tiny("hf-vit", "clip")
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    handle = vtprune.attach(model, "mone", capacity=0.3)
    assert isinstance(handle.adapter.engine.nest, Nest)
    with torch.no_grad():
        assert not torch.equal(model(**inputs).last_hidden_state, want)
    handle.remove()
    assert all("forward" not in m.__dict__ or "forward" in before[n] for n, m in model.named_modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state, want)
