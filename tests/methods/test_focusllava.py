"""FocusLLaVA (arXiv 2411.14228; our reconstruction) against a slow transcription: blocks pooled as a gate says, then
the text's attention; gates that are trained, and what they are told to cost."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import builders as B
import pytest
import torch
from safetensors.torch import save_file
from slow_layers import attended, entered
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vtprune.models.engine.host import cache_of, held
from vtprune.models.engine.layout import units

import vtprune
from vtprune import testing
from vtprune.check.case import Case
from vtprune.check.contract import CHECKS
from vtprune.check.verify import check
from vtprune.core.planning import bind, load_recipe
from vtprune.core.select import combine
from vtprune.core.types import Cut, Geometry, Text, TokenView, UnsupportedError, VtpruneError
from vtprune.methods.base import make
from vtprune.methods.focusllava import Gate, drawn
from vtprune.train.base import TRAININGS, Step
from watch import spent

FAMILIES = [
    ("llava", "clip-llama"),
    ("llava-next", "clip-llama"),
    ("internvl", None),
    ("qwen2-vl", "images"),
    ("qwen2.5-vl", None),
    ("llava-onevision", None),
]
Vector = list[float]


# --------------------------------------------------------------------------------------------------------------------
# the transcription


def split(size: int, scale: int) -> list[range]:
    """``size`` places in ``min(scale, size)`` parts: part p begins at the first i with i * parts / size >= p."""
    count = min(scale, size)
    starts = [math.ceil(p * size / count) for p in range(count + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def block(cells: list[list[int]], x: list[Vector], gate: Gate, fixed: bool = False) -> dict[int, list[int]]:
    """What becomes of a block, its tokens ``cells`` row by row: which tokens stand for which."""
    tokens = [i for row in cells for i in row]
    mean = [sum(x[i][c] for i in tokens) / len(tokens) for c in range(len(x[0]))]
    logits = [
        sum(a * b for a, b in zip(mean, w, strict=True)) + c
        for w, c in zip(gate.w.tolist(), gate.c.tolist(), strict=True)
    ]
    best = max(range(len(logits)), key=lambda r: logits[r])
    scale = gate.scales[-1] if fixed else gate.scales[best]
    out = {}
    for down in split(len(cells), scale):
        for across in split(len(cells[0]), scale):
            mine = [cells[i][j] for i in down for j in across]
            out[cells[(down[0] + down[-1]) // 2][(across[0] + across[-1]) // 2]] = mine
    return out


def raster(
    rows: int, columns: int, x: list[Vector], gate: Gate, lines: set[int] = frozenset(), held: set[int] = frozenset()
) -> dict[int, list[int]]:
    """Of a raster, by the token where each stands: the tokens it is the mean of."""
    out = {i: [i] for i in lines}
    made = columns - len([i for i in lines if i < columns])
    side = gate.scales[-1]
    for top in range(0, rows, side):
        for left in range(0, made, side):
            cells = [
                [i * columns + j for j in range(left, min(left + side, made))]
                for i in range(top, min(top + side, rows))
            ]
            out |= block(cells, x, gate, any(i in held for row in cells for i in row))
    return dict(sorted(out.items()))


def mean(vectors: list[Vector]) -> Vector:
    return [sum(v) / len(vectors) for v in zip(*vectors, strict=True)]


def varied(gate: Gate, x: Tensor, seed: int) -> Gate:
    """Other gates, by which blocks of tokens like ``x`` ``[n, C]`` differ."""
    with torch.no_grad():
        draw = torch.Generator().manual_seed(seed)
        w = torch.randn(gate.w.shape, generator=draw, dtype=torch.float64)
        away = x.double() - x.double().mean(0)
        w = w / (away @ w.T).std(0, keepdim=True, correction=0).clamp_min(1e-3).T
        c = 0.3 * torch.randn(len(w), generator=draw, dtype=torch.float64)
        gate.double()
        gate.w.copy_(w)
        gate.c.copy_(c - w @ x.double().mean(0))
    return gate


@torch.no_grad()
def attention(layer: Any, x: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
    """What a layer's attention makes of ``x`` ``[n, C]``, and its weights ``[H, n, n]``, read off with unit values."""
    own = layer.input_layernorm(x)
    n, kept = len(x), {}
    out = attended(layer, own, own, tables, kept)
    a = layer.self_attn
    d = a.head_dim
    q = a.q_proj(own)
    cos, sin = (t[0] for t in tables)
    heads = []
    for h in range(q.shape[1] // d):
        mine = q[:, h * d : (h + 1) * d]
        mine = a.q_norm(mine) if hasattr(a, "q_norm") else mine
        half = torch.cat([-mine[:, d // 2 :], mine[:, : d // 2]], 1)
        mine = mine * cos + half * sin
        key = kept["keys"][h // (q.shape[1] // d // len(kept["keys"]))]
        weights = []
        for t in range(n):
            logits = (key[: t + 1] * mine[t]).sum(1) * a.scaling
            weights.append(torch.cat([logits.softmax(0), logits.new_zeros(n - t - 1)]))
        heads.append(torch.stack(weights))
    return out, torch.stack(heads)


@torch.no_grad()
def slow(
    model: Any, lm: Any, x: Tensor, tables: Any, images: list[list[int]], left: set[int], asking: list[list[int]], **how
) -> tuple[Tensor, list[int], list[list[set[int]]]]:
    """Logits of the rows that are left of one prompt ``x`` ``[n, C]``, behind the projector those of ``left``; these
    rows; and of each image what each text-guided cut leaves. ``images``: columns of each; ``asking``: the text behind
    each."""
    visual = {c for columns in images for c in columns}
    there = [i for i in range(len(x)) if i not in visual or i in left]
    x, told, weights = x[there], [], None
    for number, layer in enumerate(lm.layers):
        if number in how["layers"]:
            gone, now = set(), []
            for columns, rows in zip(images, asking, strict=True):
                mine = [c for c in columns if c in there]
                count = max(1, math.ceil(how["ratio"] * len(mine) - 1e-6))
                score = {c: sum(float(weights[:, there.index(t), there.index(c)].mean()) for t in rows) for c in mine}
                best = set(sorted(mine, key=lambda c: (-score[c], c))[:count]) if rows else set(mine)
                gone |= set(mine) - best
                now.append(best)
            told.append(now)
            x = x[[i for i, c in enumerate(there) if c not in gone]]
            there = [c for c in there if c not in gone]
        own = [t[..., there, :] for t in tables[number]]
        out, weights = attention(layer, x, own)
        x = x + out
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(lm.norm(x)), there, told


# --------------------------------------------------------------------------------------------------------------------
# views made by hand


def view(x: Tensor, rows: int, columns: int, gate: Gate, lines: int = 0, held: Any = (), **more: Any) -> TokenView:
    """Rasters ``x`` ``[B, rows * columns, C]`` whose last ``lines`` columns the tower did not make."""
    b, n, _ = x.shape
    protected = torch.zeros(b, n, dtype=torch.bool)
    protected[:, list(held)] = True
    number = torch.zeros(b, n, 2, dtype=torch.long)
    number[..., 1] = torch.where(torch.arange(n) % columns >= columns - lines, -1, 0)
    return TokenView(
        features=x,
        valid=torch.ones(b, n, dtype=torch.bool),
        index=torch.arange(n).expand(b, n),
        size=torch.ones(b, n),
        protected=protected,
        grid=(rows, columns),
        sources={"origin": lambda: number},
        module=gate,
        **more,
    )


def pooled(made: TokenView, **options: Any):
    with torch.no_grad():
        return make("focusllava", options).select(made, Cut(site="projector", keep=1, adaptive=True))


@pytest.mark.parametrize("scales", [(1, 2, 4), (1, 2), (2, 3, 7), (1, 5)])
@pytest.mark.parametrize(
    ("rows", "columns", "lines", "held"),
    [
        (8, 8, 0, ()),
        (6, 6, 0, ()),
        (5, 7, 1, ()),
        (1, 9, 0, ()),
        (9, 1, 0, ()),
        (7, 10, 2, (0, 33)),
        (1, 1, 1, ()),
        (3, 2, 0, (5,)),
    ],
)
def test_views_equal_the_transcription(scales, rows, columns, lines, held):
    x = torch.randn(2, rows * columns, 6, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    met = set()
    for seed in range(4):
        gate = varied(Gate(scales, 6), x[0], seed)
        made = view(x, rows, columns, gate, lines, held)
        got = pooled(made, scales=scales)
        values, _ = combine(x, got, made.size)
        new = {i for i in range(rows * columns) if i % columns >= columns - lines}
        for b in range(2):
            want = raster(rows, columns, x[b].tolist(), gate, new, set(held))
            assert [i for i in got.kept[b].tolist() if i >= 0] == list(want)
            for slot, (place, members) in enumerate(want.items()):
                assert (got.target[b] == slot).nonzero()[:, 0].tolist() == sorted(members), place
                told = torch.tensor(mean([x[b, i].tolist() for i in members]), dtype=torch.float64)
                B.close(values[b, slot], told, 1e-12)
            met.add(len(want))
    assert len(met) > 1 or rows * (columns - lines) < 9


def test_where_means_stand():
    """A block of 4 x 4 with one row above another of 2 x 4, to be read by hand."""
    gate = Gate((1, 2, 4), 3)
    x = torch.randn(1, 24, 3).double()
    at = lambda scale: pooled(view(x, 6, 4, biased(gate, scale))).kept[0].tolist()  # noqa: E731
    assert at(4) == list(range(24))
    assert at(2) == [0, 2, 8, 10, 16, 18, 20, 22]  # 2 x 2 means at their first token; two rows are two rows
    assert at(1) == [5, 17]  # row 1, column 1 of 4 x 4; row 0, column 1 of 2 x 4


def biased(gate: Gate, scale: int) -> Gate:
    with torch.no_grad():
        gate.w.zero_()
        gate.c.copy_(torch.tensor([float(r == scale) for r in gate.scales]))
    return gate


def test_rasters_that_are_none_are_refused():
    gate, x = Gate((1, 2), 3), torch.randn(1, 8, 3)
    with pytest.raises(UnsupportedError, match="needs the whole raster"):
        pooled(view(x, 3, 3, gate))
    made = view(x, 2, 4, gate)
    odd = made.source("origin").clone()
    odd[0, 1, 1] = -1
    broken = TokenView(**{**made.__dict__, "sources": {"origin": lambda: odd}})
    with pytest.raises(UnsupportedError, match="stand elsewhere than at the end of rows"):
        pooled(broken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types(dtype):
    """Means of large values are summed in 32 bits, gates computed there."""
    x = (torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(1)) * 1e3 + 2e4).to(dtype)
    gate = varied(Gate((1, 2, 4), 8), x[0], 0)
    got = pooled(view(x, 8, 8, gate))
    want = raster(8, 8, x[0].double().tolist(), gate)
    assert [i for i in got.kept[0].tolist() if i >= 0] == list(want)
    assert torch.isfinite(combine(x, got, torch.ones(1, 64))[0]).all()


# --------------------------------------------------------------------------------------------------------------------
# whole models


def prepared(family: str, variant: str | None):
    """A model in float64, its samples, and of each what the language model is given with the rotary tables."""
    if family == "builders":
        model, inputs = B.llava(text=variant), B.prompts([[3, 5], [2, 4, 6]])
        inputs["pixel_values"] = B.images(3)
    else:
        model, inputs = testing.tiny(family, variant)
        model = model.double()
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    case = Case(model, load_recipe("focusllava"), inputs, {})
    return model, case, [(one, *entered(model, case.adapter.lm, one)) for one in case.samples()]


def runs(columns: list[int], sizes: list[int]) -> list[list[int]]:
    """The visual columns of a prompt, by raster."""
    out, at = [], 0
    for n in sizes:
        out.append(columns[at : at + n])
        at += n
    assert at == len(columns)
    return out


def images_of(case: Case, one: dict[str, Any]) -> list[list[int]]:
    """The visual columns of each image of a prompt, with all its tiles."""
    found = units(case.adapter.parts(one["input_ids"], one), case.geometry.per[0])
    return [u.columns.tolist() for u in found]


def newline(model: Any) -> Tensor | None:
    return getattr(model.model, "image_newline", None)


@pytest.mark.parametrize(("family", "variant"), [*FAMILIES, ("builders", "llama"), ("builders", "mistral")])
@pytest.mark.parametrize("scales", [(1, 2, 4), (1, 2)], ids=str)
def test_models_equal_the_transcription(family, variant, scales):
    """Logits of single prompts, what is kept at every cut and what is merged into it, under some draws of the gate."""
    model, case, samples = prepared(family, variant)
    lm, depth = case.adapter.lm, case.geometry.llm_layers
    how = {"layers": tuple(sorted({depth // 4, depth // 2, 3 * depth // 4} - {0})), "ratio": 0.6}
    met = set()
    for one, x, tables in samples:
        visual = case.adapter.prunable(one)[0].nonzero()[:, 0].tolist()
        images = images_of(case, one)
        last = x.shape[0]
        asking = [[t for t in range(max(columns) + 1, last) if t not in set(visual)] for columns in images]
        for seed in range(4):
            with vtprune.attach(model, "focusllava", scales=scales, ratio=how["ratio"]) as handle, torch.no_grad():
                gate = varied(handle.modules["focusllava"], x[visual], seed)
                got, report = model(**one).logits[0], handle.report()
            assert [s.site for s in report.stages] == ["projector", *(f"llm.{i}" for i in how["layers"])]
            entry, stands, sizes = x.clone(), {}, [r * c for r, c in report.grids[0]]
            for (rows, columns), mine in zip(report.grids[0], runs(visual, sizes), strict=True):
                line = newline(model)
                lines = {i for i, c in enumerate(mine) if line is not None and torch.equal(x[c], line.to(x))}
                found = raster(rows, columns, x[mine].tolist(), gate, lines)
                for place, members in found.items():
                    stands[mine[place]] = [mine[m] for m in members]
                    entry[mine[place]] = x[[mine[m] for m in members]].mean(0)
            want, there, told = slow(model, lm, entry, tables, images, set(stands), asking, **how)
            first = report.stages[0]
            assert [visual[i] for i in first.kept[0].tolist()] == sorted(stands)
            for slot, place in enumerate(first.kept[0].tolist()):
                mine = (first.assignment[0] == slot).nonzero()[:, 0].tolist()
                assert [visual[i] for i in mine] == sorted(stands[visual[place]])
            for stage, kept in zip(report.stages[1:], told, strict=True):
                assert [visual[i] for i in stage.kept[0].tolist()] == sorted(c for image in kept for c in image)
            assert report.layer_tokens[0] == per_layer(depth, how["layers"], len(stands), told)
            assert torch.allclose(got[there], want, rtol=0, atol=1e-9 * float(want.abs().max()))
            met.add(len(stands))
    assert len(met) > 1, "the draws all do the same"


def per_layer(depth: int, layers: tuple[int, ...], first: int, told: list[list[set[int]]]) -> list[int]:
    out, now = [], first
    for i in range(depth):
        if i in layers:
            now = sum(len(image) for image in told[layers.index(i)])
        out.append(now)
    return out


@pytest.mark.parametrize(("family", "variant"), FAMILIES)
def test_open_gates_are_the_dense_model(family, variant):
    """Every block as it is and a share of 1; alone and in a padded batch."""
    model, inputs = testing.tiny(family, variant)
    with torch.no_grad():
        want = model(**inputs).logits
        with vtprune.attach(model, "focusllava", ratio=1.0) as handle:
            assert torch.equal(model(**inputs).logits, want)
            report = handle.report()
            assert report.effective_tokens == sum(report.visual_tokens) / len(report.visual_tokens)
            assert 0 < report.flops - report.dense_flops <= sum(report.visual_tokens) * 6 * handle.geometry.width
            assert not handle.modules["focusllava"].w.any()
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize(
    ("family", "variant"), [("llava", "clip-llama"), ("llava-next", "clip-llama"), ("qwen2-vl", "images")]
)
def test_text_guided_alone_is_the_masked_dense_model(family, variant):
    """Columns hidden layer by layer, at their original positions: the engine's own reference, to which nothing was
    merged."""
    from vtprune.check.dense import masks

    model, case, _ = prepared(family, variant)
    with vtprune.attach(model, "focusllava", ratio=0.5) as handle:
        got, report = case.run(), handle.report()
    assert report.stages[0].tokens_out == report.visual_tokens
    hidden, present, ledger = masks(case, report, handle.passes)
    try:
        want = case.run()
    finally:
        ledger.undo()
    assert torch.allclose(got[present], want[present], rtol=0, atol=1e-9 * float(want.abs().max()))
    assert not torch.allclose(want[present], case.run()[present], atol=1e-4)


def saved(path: Any, model: Any, inputs: dict[str, Any], seed: int, scales: tuple[int, ...] = (1, 2)) -> str:
    """A file of gates by which blocks of these inputs differ."""
    adapter = bind(model)
    rows: list[Tensor] = []
    hook = adapter.lm.register_forward_pre_hook(lambda m, a, k: rows.append(k["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    gate = varied(Gate(scales, adapter.geometry.width), rows[0][adapter.prunable(inputs)], seed).float()
    save_file({k: v.detach() for k, v in gate.state_dict().items()}, str(path), {"scales": ",".join(map(str, scales))})
    return str(path)


@pytest.mark.parametrize(("family", "variant"), FAMILIES)
def test_the_contract_with_gates_that_differ(tmp_path, family, variant):
    """Whatever the gates do: caches, padding, interleaving, undoing, counts."""
    model, inputs = testing.tiny(family, variant)
    for seed in range(20):
        path = saved(tmp_path / "gate.safetensors", model, inputs, seed)
        with vtprune.attach(model, "focusllava", weights=path, scales=(1, 2)) as handle, torch.no_grad():
            model(**inputs)
            left = handle.report().stages[0]
        shares = [out / into for into, out in zip(left.tokens_in, left.tokens_out, strict=True)]
        if max(shares) < 1 and len(set(shares)) > 1:
            break
    else:
        pytest.fail("the draws all do the same")
    for name in (
        "cached_is_uncached",
        "batch_is_singles",
        "interleaved_is_solo",
        "restored",
        "counts_are_true",
        "deterministic",
        "clean_after_exception",
    ):
        assert name in CHECKS
        result = check(name, model, "focusllava", inputs, weights=path, scales=(1, 2))
        assert result.passed, f"{name}: {result.detail}"


@pytest.mark.parametrize("text", [True, False])
def test_counts_flops_and_caches(text):
    """6 x 6 tokens, blocks of 4 x 4 and what is left of them at scale 2: 2 x 2 in each of four blocks."""
    model = B.llava().float()
    model.set_attn_implementation("eager")
    inputs = {**B.prompts([[3, 9]]), "pixel_values": B.images(1).float()}
    inputs.pop("position_ids", None)
    dense = spent(model, inputs)
    with vtprune.attach(model, "focusllava", text=text, ratio=0.5) as handle, torch.no_grad():
        biased(handle.modules["focusllava"], 2)
        with FlopCounterMode(display=False) as counter:
            out = model(**inputs, use_cache=True, logits_to_keep=1)
        report, cache = handle.report(), cache_of(out)
    want = [16, 8, 8, 4, 2, 2] if text else [16] * 6
    assert report.layer_tokens == [want] and report.stages[0].tokens_out == [16]
    assert [held(cache, i) for i in range(6)] == [12 + n for n in want]
    ranking = 0  # asking costs what the report does not count
    if not text:
        gate = 4 * 2 * 3 * 48  # of four blocks; torch counts no products of elements
        assert report.dense_flops - report.flops + gate == dense - counter.get_total_flops() > 0
    else:
        ranking = counter.get_total_flops() - (dense - (report.dense_flops - report.flops))
        assert 0 <= ranking < 0.2 * dense
    assert report.kv_bytes * (6 * 48) == report.dense_kv_bytes * sum(12 + n for n in want)


def test_without_a_question_everything_stays():
    """A prompt that ends at its image: the last token answers, its block stays whole, and nobody asks."""
    model, _ = testing.tiny("llava", "clip-llama")
    ids = torch.tensor([[1, 5, 9, *[3] * 16]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    with vtprune.attach(model, "focusllava", init="coarsest", scales=(1, 2), ratio=0.3) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    assert [s.kept[0].tolist() for s in report.stages] == [[0, 2, 8, 10, 11, 14, 15]] * 4


def test_videos_and_encoding():
    """Frames are pooled one by one; a recipe of the sampler at the projector alone can be encoded."""
    model, inputs = testing.tiny("qwen2.5-vl", "video")
    with vtprune.attach(model, "focusllava", init="coarsest", scales=(1, 2), ratio=1.0) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    want = [sum(-(-r // 2) * -(-c // 2) for r, c in grids) for grids in report.grids]
    assert report.stages[0].tokens_out == want
    model, inputs = testing.tiny("llava", "clip-llama")
    one = Case(model, load_recipe("focusllava"), inputs, {}).samples()[0]
    recipe = vtprune.Recipe(
        name="x", stages=(vtprune.Stage(method="focusllava", options={"text": False, "init": "coarsest"}),)
    )
    assert [len(e) for e in vtprune.encode(model, recipe, one).embeds] == [1]


# --------------------------------------------------------------------------------------------------------------------
# options


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"scales": (2, 1)}, "two ascending numbers or more"),
        ({"scales": (4,)}, "two ascending numbers or more"),
        ({"scales": (1, 1)}, "two ascending numbers or more"),
        ({"scales": (0, 2)}, "at least 1"),
        ({"scales": (1, 65)}, "at most 64"),
        ({"scales": ()}, "the list is empty"),
        ({"layers": (0, 2)}, "reads the layer in front"),
        ({"layers": (2, 1)}, "must ascend"),
        ({"layers": (99,)}, "must ascend and lie in"),
        ({"layers": (1,), "text": False}, "are those of the text-guided sampler"),
        ({"ratio": 0.0}, "above 0"),
        ({"ratio": 1.5}, "at most 1"),
        ({"ratio_min": 0.0}, "above 0"),
        ({"init": "middle"}, "not one of"),
        ({"keep": 0.5}, "takes no keep="),
    ],
)
def test_bad_options(tiny, options, why):
    model, _ = tiny("llava", "clip-llama")
    with pytest.raises(VtpruneError, match=why) as caught:
        vtprune.attach(model, "focusllava", **options)
    assert "\n" not in str(caught.value)


def test_where_it_cannot_work(tiny):
    for family in ("causal-lm", "timm-vit"):
        model, _ = testing.tiny(family)
        with pytest.raises(UnsupportedError, match="focusllava"):
            vtprune.attach(model, "focusllava")
    model, _ = tiny("llava", "clip-llama")
    stages = (vtprune.Stage(method="divprune", keep=8), vtprune.Stage(method="focusllava"))
    with pytest.raises(VtpruneError, match="needs the whole raster"):
        vtprune.attach(model, vtprune.Recipe(name="two", stages=stages))


def geometry(**more: Any) -> Geometry:
    offers = {"projector": frozenset({"origin"}), "llm": frozenset({"query_attention", "text"})}
    known = {"tokens": 576, "grid": (24, 24), "prefix": 1, "vision_layers": 23, "vision_depth": 24, "llm_layers": 32}
    return Geometry(**{"family": "llava", "arch": "x", **known, "provides": offers, **more})


def test_the_plan():
    cuts = make("focusllava", {}).plan(geometry(), None)
    assert [(c.site, c.keep, c.most, c.observe) for c in cuts] == [
        ("projector", 36, None, ()),
        ("llm.8", 26, 404, (7,)),
        ("llm.16", 19, 283, (15,)),
        ("llm.24", 14, 199, (23,)),
    ]
    assert all(c.adaptive for c in cuts) and not cuts[0].joint and all(c.joint for c in cuts[1:])
    tiled = geometry(tokens=16 + 30 + 1, grid=(47, 1), rasters=((4, 4), (5, 6), (1, 1)))
    (only,) = make("focusllava", {"text": False}).plan(tiled, None)
    assert only.keep == 1 + 4 + 1


def test_calibrate_turns_the_share(tiny):
    model, inputs = tiny("llava", "clip-llama")
    recipe = vtprune.calibrate(model, "focusllava", inputs, effective_tokens=0.7)
    with vtprune.attach(model, recipe) as handle, torch.no_grad():
        model(**inputs)
        assert 0.6 < handle.report().effective_tokens / 16 <= 0.7


def test_trained_gates_are_read_and_bad_files_are_refused(tiny, tmp_path):
    model, inputs = tiny("llava", "clip-llama")
    path = str(tmp_path / "gate.safetensors")
    width = bind(model).geometry.width
    good = {"w": torch.randn(2, width), "c": torch.randn(2)}
    save_file(good, path, {"scales": "1,2"})
    with vtprune.attach(model, "focusllava", weights=path, scales=(1, 2)) as handle:
        gate = handle.modules["focusllava"]
        assert torch.equal(gate.w, good["w"]) and torch.equal(gate.c, good["c"])
        assert not any(p.requires_grad for p in gate.parameters())
    with pytest.raises(VtpruneError, match="was trained for scales=1,2, this is scales=1,2,4"):
        vtprune.attach(model, "focusllava", weights=path)
    save_file(good, path)
    with pytest.raises(VtpruneError, match="does not tell for which scales it was trained"):
        vtprune.attach(model, "focusllava", weights=path, scales=(1, 2))
    for bad, why in (
        ({"w": good["w"][:, :3].contiguous(), "c": good["c"]}, "does not fit a gate of 2 scales"),
        ({"w": good["w"]}, "does not fit"),
        ({**good, "c": good["c"] * math.nan}, "no finite numbers"),
    ):
        save_file(bad, path, {"scales": "1,2"})
        with pytest.raises(VtpruneError, match=why):
            vtprune.attach(model, "focusllava", weights=path, scales=(1, 2))


# --------------------------------------------------------------------------------------------------------------------
# training


def labelled(inputs: dict[str, Any], answer: int = 3) -> dict[str, Any]:
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    return {**inputs, "labels": labels, "use_cache": False}


@pytest.mark.parametrize(("family", "variant"), FAMILIES)
def test_gates_that_are_trained_decide_the_same(family, variant):
    """Logits, loss and what is kept are those of use, where nothing is drawn; and what is told is what is kept."""
    model, case, samples = prepared(family, variant)
    inputs = labelled(case.inputs)
    x = torch.cat([rows[case.adapter.prunable(one)[0]] for one, rows, _ in samples])
    with vtprune.attach(model, "focusllava", scales=(1, 2), ratio=1.0, ratio_min=1.0) as handle:
        gate = varied(handle.modules["focusllava"], x, 2)
        with torch.no_grad():
            want, report = model(**inputs), handle.report()
        assert handle.told() == {}
        gate.requires_grad_()
        got, told = model(**inputs), handle.told()
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
    again = handle.report()
    assert [s.tokens_out for s in again.stages] == [s.tokens_out for s in report.stages]
    assert list(told) == ["projector"]
    assert {k for k, v in told["projector"].items() if v.requires_grad} == {"left", "gate.1", "gate.2"}
    said = {k: v.detach().sum().item() for k, v in told["projector"].items()}
    lines = sum(
        int((case.adapter.sources(case.inputs, case.adapter.parts(case.inputs["input_ids"], case.inputs))[b] < 0).sum())
        for b in range(len(samples))
    )
    assert said["tokens"] == sum(report.visual_tokens) - lines
    assert said["left"] == pytest.approx(sum(report.stages[0].tokens_out) - lines)
    assert said["chosen.1"] + said["chosen.2"] == pytest.approx(said["gate.1"] + said["gate.2"])


def test_gradients_of_the_gate_go_straight_through():
    """Those of the loss with every block's tokens times ``g(w) / g``, the choice held, by finite differences; nothing
    else wants any. The text-guided cuts stand where they did."""
    model = B.llava()
    case = Case(model, load_recipe("focusllava"), {**B.prompts([[3, 8]]), "pixel_values": B.images(1, 5)}, {})
    one = case.samples()[0]
    x, tables = entered(model, case.adapter.lm, one)
    visual = case.adapter.prunable(one)[0].nonzero()[:, 0].tolist()
    inputs = labelled(one)
    for p in model.parameters():
        p.requires_grad_(False)
    with vtprune.attach(model, "focusllava", ratio_min=1.0, ratio=1.0) as handle:
        gate = varied(handle.modules["focusllava"], x[visual], 3).requires_grad_()
        output = model(**inputs)
        score = (output.logits[0, -4:] * torch.linspace(-1, 1, 64, dtype=torch.float64)).sum()
        gw, gc = torch.autograd.grad(score, [gate.w, gate.c], retain_graph=True)
        (left,) = torch.autograd.grad(handle.told()["projector"]["left"].sum(), [gate.c])
        assert handle.report().stages[0].tokens_out[0] < 36
    assert all(p.grad is None for p in model.parameters())
    assert float(gw.norm()) > 1e-6 and float(gc.norm()) > 1e-6

    w0, c0 = gate.w.detach().clone(), gate.c.detach().clone()

    def surrogate(w: Tensor, c: Tensor) -> tuple[float, float]:
        """The score with the same choices and softened tokens, and the expected number of tokens."""
        entry, stands, expected = x.clone(), set(), 0.0
        for top in (0, 4):
            for start in (0, 4):
                cells = [[i * 6 + j for j in range(start, min(start + 4, 6))] for i in range(top, min(top + 4, 6))]
                tokens = [visual[i] for row in cells for i in row]
                g0 = (w0 @ x[tokens].mean(0) + c0).softmax(0)
                g = (w @ x[tokens].mean(0) + c).softmax(0)
                best = int(g0.argmax())
                held = Gate((1, 2, 4), 48).double()
                chosen = block(cells, x[visual].tolist(), biased(held, (1, 2, 4)[best]))
                for r, scale in enumerate((1, 2, 4)):
                    expected += float(g[r]) * min(scale, len(cells)) * min(scale, len(cells[0]))
                for place, members in chosen.items():
                    stands.add(visual[place])
                    entry[visual[place]] = float(g[best] / g0[best]) * x[[visual[m] for m in members]].mean(0)
        logits, _, _ = slow(model, case.adapter.lm, entry, tables, [visual], stands, [[]], layers=(), ratio=1.0)
        return float((logits[-4:] * torch.linspace(-1, 1, 64, dtype=torch.float64)).sum()), expected

    assert surrogate(w0, c0)[0] == pytest.approx(float(score.detach()), rel=1e-9)
    for r in range(3):
        step = torch.zeros_like(c0)
        step[r] = 1e-5
        a, b = surrogate(w0, c0 + step), surrogate(w0, c0 - step)
        assert float(gc[r]) == pytest.approx((a[0] - b[0]) / 2e-5, rel=1e-4, abs=1e-8)
        assert float(left[r]) == pytest.approx((a[1] - b[1]) / 2e-5, rel=1e-4, abs=1e-8)
        for channel in (0, 17):
            step = torch.zeros_like(w0)
            step[r, channel] = 1e-5
            slope = (surrogate(w0 + step, c0)[0] - surrogate(w0 - step, c0)[0]) / 2e-5
            assert float(gw[r, channel]) == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_the_share_is_drawn_in_training_alone(tiny):
    """Uniform between the least and 1, by the seed, anew in every cut; in use it is the option's."""
    model, inputs = tiny("llava", "clip-llama")
    inputs = labelled(inputs)
    counts = []
    with vtprune.attach(model, "focusllava", ratio=0.25, ratio_min=0.5) as handle:
        with torch.no_grad():
            model(**inputs)
            use = [s.tokens_out[0] for s in handle.report().stages]
        handle.modules["focusllava"].requires_grad_()
        for seed in range(8):
            handle.reseed(seed)
            model(**inputs)
            counts.append([s.tokens_out[0] for s in handle.report().stages])
        handle.reseed(3)
        model(**inputs)
        assert [s.tokens_out[0] for s in handle.report().stages] == counts[3]
        handle.reseed((3, 4))  # one for each sample
        model(**inputs)
        assert [s.tokens_out for s in handle.report().stages] == [
            list(p) for p in zip(counts[3], counts[4], strict=True)
        ]
        with torch.no_grad():
            model(**inputs)
            assert [s.tokens_out[0] for s in handle.report().stages] == use == [16, 4, 1, 1]
            assert handle.told() == {}
    shares = [b / a for row in counts for a, b in zip(row, row[1:], strict=False)]
    assert min(shares) >= 0.5 and max(shares) <= 1 and len({tuple(row) for row in counts}) > 4
    assert any(abs(row[1] / row[0] - row[2] / row[1]) > 0.2 for row in counts), "one number for all cuts"
    made = SimpleNamespace(seed=5, valid=torch.ones(2, 3))
    many = [float(drawn(SimpleNamespace(seed=s, valid=made.valid), 3)) for s in range(400)]
    assert 0.45 < sum(many) / 400 < 0.55 and min(many) < 0.05 and max(many) > 0.95


def test_the_losses_are_the_published_ones():
    """Of told numbers, by hand: |left / tokens - target|, and R sum_r f_r p_r."""
    gate = Gate((1, 2, 4), 5)
    said = {
        "tokens": torch.tensor([16.0, 32.0]),
        "left": torch.tensor([4.0, 20.0], requires_grad=True),
        "chosen.1": torch.tensor([0.0, 1.0]),
        "chosen.2": torch.tensor([1.0, 0.0]),
        "chosen.4": torch.tensor([0.0, 1.0]),
        "gate.1": torch.tensor([0.2, 0.7], requires_grad=True),
        "gate.2": torch.tensor([0.5, 0.4]),
        "gate.4": torch.tensor([0.3, 0.9]),
    }
    settings = {"target": 0.39, "budget_weight": 2.0, "balance_weight": 0.01}
    training = TRAININGS.get("focusllava")

    def losses(told: dict[str, Any]) -> dict[str, Tensor]:
        handle = SimpleNamespace(modules={"focusllava": gate}, told=lambda: told)
        return training.losses(Step(handle=handle, settings=settings, model=None, inputs={}, output=None, done=0.0))

    found = losses({"projector": said})
    assert float(found["budget"]) == pytest.approx(2 * (24 / 48 - 0.39))
    assert float(found["balance"]) == pytest.approx(0.01 * 3 * (1 / 3 * 0.3 + 1 / 3 * 0.3 + 1 / 3 * 0.4))
    (a,) = torch.autograd.grad(found["budget"], [said["left"]])
    (b,) = torch.autograd.grad(found["balance"], [said["gate.1"]])
    assert torch.allclose(a, torch.full((2,), 2 / 48)) and torch.allclose(b, torch.full((2,), 0.01 * 3 / 3 / 3))
    assert losses({}) == {}
    even = {**said, **{k: torch.ones(1) for k in said if k.startswith(("chosen", "gate"))}}
    assert float(losses({"projector": even})["balance"]) == pytest.approx(0.01)  # its least


def test_text_has_what_the_sampler_reads():
    """Rows behind the image alone ask, and padding does not."""
    seen = {}
    text = Text(
        torch.zeros(1, 4, 2),
        torch.tensor([[True, True, True, False]]),
        torch.tensor([[False, True, True, True]]),
        torch.arange(4)[None],
    )

    def ask(**how: Any) -> Tensor:
        seen.update(how)
        return torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.0]])

    made = view(torch.zeros(1, 5, 3), 1, 5, Gate((1, 2), 3))
    made = TokenView(**{**made.__dict__, "sources": {"text": lambda: text, "query_attention": ask}})
    with torch.no_grad():
        got = make("focusllava", {"ratio": 0.5}).select(made, Cut(site="llm.3", keep=1, adaptive=True))
    assert got.kept.tolist() == [[1, 2, 3]] and seen["layer"] == "previous"
    assert seen["query"].tolist() == [[False, True, True, False]]
