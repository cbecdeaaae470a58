"""Any list of stages plans or is refused at ``attach``; what plans equals the dense model under masks. Generated from
the registries."""

from __future__ import annotations

import itertools
import random
import sys
import warnings

import pytest
import torch
from torch import Tensor
from vtprune.models.base import ADAPTERS

import vtprune
from cases import mixes_pictures
from vtprune.check.case import Case, output
from vtprune.check.dense import masks
from vtprune.check.verify import check
from vtprune.core.planning import bind, for_units, plan
from vtprune.core.recipe import Recipe, Stage
from vtprune.core.select import bands
from vtprune.core.types import VtpruneError
from vtprune.methods._sites import cells
from vtprune.methods.base import METHODS

# What a stage may be: every method with its defaults and at every kind of site it can be put, routing and ranking
# variants, mild and aggressive.
OPTIONS: dict[str, tuple[dict, ...]] = {
    "random": ({"site": "vision.1"}, {}, {"site": "llm.0"}, {"site": "llm.4"}),
    "uniform": ({"site": "vision.1"}, {}, {"site": "llm.3"}),
    "keep-last": ({"site": "vision.0"}, {}, {"site": "llm.2"}),
    "pool": ({}, {"site": "vision.1"}, {"site": "llm.3"}),
    "fastv": ({}, {"layer": 4}),
    "pyramiddrop": ({"layers": (1, 3)}, {"layers": (2, 4), "score_layer": "previous"}),
    "drop-all": ({"layer": 2}, {"layer": 5}),
    "dpvr-lf": (
        {"split": 2},
        {"split": 2, "variant": "pc"},
        {"split": 3, "variant": "kv"},
        {"split": 2, "fusion": 2},
        {"split": 1, "fusion": 0},
    ),
    "flowcut": ({}, {"every": 1}),
}
FAMILIES = (("llava", "clip-llama"), ("internvl", "qwen2"), ("llava-next", "clip-llama"), ("timm-vit", "class"))


def _stages(keep: float) -> list[Stage]:
    found = []
    for name in METHODS:
        budget = keep if METHODS.get(name).budgeted else None
        found += [Stage(method=name, keep=budget, options=o) for o in OPTIONS.get(name, ({},))]
    return found


def _lists(number: int, seed: int, most: int) -> list[tuple[Stage, ...]]:
    """``most`` lists of ``number`` stages whose budgets fall, drawn with ``seed``; every pair of methods comes
    first."""
    drawn = random.Random(seed)
    columns = [_stages(0.75 / 1.5**i) for i in range(number)]
    everything = (
        list(itertools.product(*columns))
        if number == 2
        else [tuple(drawn.choice(c) for c in columns) for _ in range(most)]
    )
    drawn.shuffle(everything)
    return everything[:most]


def _try(model, inputs, stages: tuple[Stage, ...]) -> str:
    """Attaches, runs once, and compares with the dense model under masks: what became of it."""
    recipe = Recipe(name="+".join(s.method for s in stages), stages=stages)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            handle = vtprune.attach(model, recipe)
        except VtpruneError:
            return "refused"
        with handle, torch.no_grad():
            out = model(**inputs)  # whatever is wrong with a recipe was said at attach
            report = handle.report()
        assert bool(torch.isfinite(output(out)).all())
        for stage in report.stages:
            assert all(len(k) == n for k, n in zip(stage.kept, stage.tokens_out, strict=True))
        if not any(METHODS.get(s.method).merges or METHODS.get(s.method).routes for s in stages):
            result = check("prefill_is_masked_dense", model, recipe, inputs)
            assert result.passed is not False, f"{[(s.method, dict(s.options)) for s in stages]}: {result.detail}"
            return "compared"
    return "ran"


def _all(tiny, family: str, variant: str, lists: list[tuple[Stage, ...]]) -> dict[str, int]:
    model, inputs = tiny(family, variant)
    counts = dict.fromkeys(("refused", "ran", "compared"), 0)
    for stages in lists:
        try:
            counts[_try(model, inputs, stages)] += 1
        except Exception as e:
            if "differ in size" in str(e) and any(METHODS.get(s.method).video for s in stages):
                counts["refused"] += 1  # this prompt's images are no frames of one video, which no attachment can know
                continue
            raise AssertionError(f"{family}: {[(s.method, s.keep, dict(s.options)) for s in stages]}") from e
    return counts


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family, variant", FAMILIES, ids=[f for f, _ in FAMILIES])
def test_pairs_of_stages(tiny, family, variant):
    counts = _all(tiny, family, variant, _lists(2, 0, 60))
    assert counts["refused"] and counts["ran"] + counts["compared"], counts


def test_triples_of_stages(tiny):
    counts = _all(tiny, "llava", "clip-llama", _lists(3, 1, 150))
    assert counts["refused"] and counts["compared"], counts


@pytest.mark.slow
@pytest.mark.parametrize("family, variant", FAMILIES, ids=[f for f, _ in FAMILIES])
def test_all_pairs_and_many_triples_of_stages(tiny, family, variant):
    counts = _all(tiny, family, variant, _lists(2, 0, 10**6) + _lists(3, 2, 600))
    assert counts["refused"] and counts["ran"] + counts["compared"], counts


def _recipe(*stages: tuple) -> Recipe:
    return Recipe(name="r", stages=tuple(Stage(method=m, keep=k, options=o) for m, k, o in stages))


REFUSED = [
    ((("tome", 12, {}), ("flowcut", 6, {})), "both cut at vision"),
    ((("flowcut", 12, {}), ("pitome", 8, {})), "same number of tokens in every image"),
    ((("flowcut", 12, {}), ("pool", 6, {"site": "vision.2"}), ("fastv", 4, {})), "whole raster"),
    ((("flowcut", 6, {}), ("pool", 4, {"site": "vision.1"})), "whole raster"),
    ((("random", 0.5, {}), ("pool", 0.25, {})), "whole raster"),
    ((("downsample", 0.5, {}), ("pool", 0.25, {})), "whole raster"),
    ((("pool", 4, {"site": "llm.3"}),), "works at projector / vision, not at llm.3"),
    (
        (("pyramiddrop", 0.5, {"layers": (1, 3)}), ("dpvr-lf", None, {"split": 2, "variant": "pc"})),
        "put the visual tokens aside",
    ),
    ((("dpvr-lf", None, {"split": 2}), ("random", 0.5, {"site": "llm.3"})), "put the visual tokens aside"),
    (
        (("dpvr-lf", None, {"split": 2, "variant": "kv"}), ("random", 0.5, {"site": "llm.5"})),
        "put the visual tokens aside",
    ),
    ((("drop-all", None, {"layer": 1}), ("dpvr-lf", None, {"split": 2})), "finds no visual tokens"),
    (
        (("dpvr-lf", None, {"split": 2, "fusion": 0}), ("random", 0.5, {"site": "llm.4"})),
        "put the visual tokens aside|finds no visual tokens",
    ),
    ((("drop-all", None, {"layer": 1}), ("drop-all", None, {"layer": 2})), "finds no visual tokens"),
    (
        (("apet", 4, {"site": "projector", "layer": 4}), ("drop-all", None, {"layer": 1})),
        "apet at llm.4 finds no visual tokens: drop-all has taken them all",
    ),
    ((("random", 0.5, {"site": "llm.2"}), ("fastv", 0.25, {})), "attention from before the first"),
    ((("flowcut", 12, {}), ("flowcut", 6, {})), "both cut at vision"),
    ((("random", 0.5, {"site": "vision.0"}), ("flowcut", 6, {})), "both cut at vision.0"),
    ((("tome", 12, {}), ("pitome", 6, {"variant": "deit"})), "both cut at vision.0"),
    ((("random", 0.5, {"site": "vision.01"}),), "does not exist"),
    # one between them only notes, and looks at no attention
    ((("holov", 12, {"site": "tower"}), ("mmtok", 8, {}), ("tops", 4, {})), "holov and tops both cut at vision"),
]


@pytest.mark.parametrize("stages, words", REFUSED, ids=["+".join(s[0] for s in stages) for stages, _ in REFUSED])
def test_what_cannot_follow_each_other_is_refused_at_attach(tiny, stages, words):
    model, _ = tiny("llava", "clip-llama")
    with pytest.raises(VtpruneError, match=words):
        vtprune.attach(model, _recipe(*stages))


@pytest.mark.parametrize(
    "stages",
    [
        (("flowcut", 6, {"every": 1}), ("random", 10, {"site": "vision.1"})),
        (("flowcut", 12, {}), ("uniform", 10, {"site": "vision.2"}), ("fastv", 6, {"layer": 2})),
    ],
    ids=["random-between", "uniform-behind"],
)
def test_flowcut_carries_its_average_over_what_others_drop(tiny, stages):
    model, inputs = tiny("llava", "clip-llama")
    for name in ("prefill_is_masked_dense", "decode_is_masked_dense", "batch_is_singles", "deterministic"):
        result = check(name, model, _recipe(*stages), inputs)
        assert result.passed, f"{name}: {result.detail}"


def test_flowcuts_average_stays_with_its_token():
    """By hand: a token that another stage dropped takes its average along, and its neighbours keep theirs."""
    from vtprune.core.types import Projections, TokenView
    from vtprune.methods.base import Cut, make

    generator = torch.Generator().manual_seed(0)
    method = make("flowcut", {})

    def view(index: Tensor, memory: dict) -> TokenView:
        q, k, v = (torch.randn(1, 2, 1 + index.shape[1], 4, generator=generator) for _ in range(3))
        whole = torch.ones_like(index, dtype=torch.bool)
        sources = {"projections": lambda: Projections(q, k, v, 0.5, 1)}
        return TokenView(
            torch.zeros(1, index.shape[1], 8),
            whole,
            index,
            whole.float(),
            ~whole,
            (2, 3),
            prefix=1,
            memory=memory,
            sources=sources,
        )

    memory: dict = {}
    first, second = view(torch.arange(6)[None], memory), view(torch.tensor([[0, 2, 3, 5]]), memory)
    alone = [method._score(x, "class")[1] for x in (first, second)]
    method.select(first, Cut(site="vision.0", keep=2, data={"remaining": 3, "query": "class"}))
    found = method.select(second, Cut(site="vision.1", keep=2, data={"remaining": 0, "query": "class"}))
    assert torch.allclose(found.score, 0.5 * alone[0][:, [0, 2, 3, 5]] + 0.5 * alone[1])


def _tiles(tiles: int) -> dict[str, Tensor]:
    """InternVL: two prompts with an image of so many tiles of 16 tokens."""
    ids = torch.randint(8, 64, (2, 12 + 16 * tiles), generator=torch.Generator().manual_seed(0))
    ids[:, 4 : 4 + 16 * tiles] = 3
    pixels = torch.randn(2 * tiles, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("keep, want", [(1.0, 24), (0.25, 12), (7, 7), (1, 1), (40, 24)])
def test_shares_of_rasters_go_by_what_is_left(tiny, keep, want):
    """Three tiles of which half the tokens are gone: exactly the budget stays, or all that is left, and of each tile
    its share."""
    model, _ = tiny("internvl", "qwen2")
    recipe = _recipe(("random", 0.5, {"site": "llm.1"}), ("uniform", keep, {"site": "llm.4"}))
    with warnings.catch_warnings(), torch.no_grad(), vtprune.attach(model, recipe) as handle:
        warnings.simplefilter("ignore")
        handle.reseed([3, 4])
        model(**_tiles(3))
        before, after = handle.report().stages
    assert after.tokens_out == [want, want]
    for b in range(2):
        left = torch.bincount(before.kept[b] // 16, minlength=3)
        got = torch.bincount(after.kept[b] // 16, minlength=3)
        assert bool(((got - left * want / 24).abs() < 1).all()) and set(after.kept[b].tolist()) <= set(
            before.kept[b].tolist()
        )


def test_a_budget_per_image_may_be_more_than_one_tile(tiny):
    model, _ = tiny("internvl", "qwen2")
    for method in ("random", "fastv", "pyramiddrop", "uniform", "pool"):
        with torch.no_grad(), vtprune.attach(model, method, keep=20) as handle:
            model(**_tiles(2))
            assert handle.report().stages[-1].tokens_out == [20, 20]
    with pytest.raises(VtpruneError, match="lies in 1..16"):
        vtprune.attach(model, "random", keep=20, per="tile")


def test_a_stage_that_changes_nothing_is_said(tiny):
    model, _ = tiny("llava", "clip-llama")
    with pytest.warns(UserWarning, match="fastv changes nothing"):
        vtprune.attach(model, _recipe(("tome", 0.25, {}), ("fastv", 0.5, {}))).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stages in (
            (("tome", 0.5, {}), ("fastv", 0.25, {})),
            (("tome", 0.5, {}), ("fastv", 1.0, {})),
        ):  # everything was asked for
            vtprune.attach(model, _recipe(*stages)).remove()


NUMBERS = (
    float("nan"),
    float("inf"),
    -float("inf"),
    -1,
    -0.5,
    0,
    10**400,
    True,
    "x",
    None,
    [],
    [1.5, float("nan")],
    [3, 1],
    [1, 1],
    [99],
    [-1],
)


@pytest.mark.sampled(3)
def test_odd_values_of_every_option_are_refused_or_run(tiny, method_name):
    """Never a raw error, and never NaN or infinity taken in."""
    model, inputs = tiny("llava", "clip-llama")
    for option in vtprune.describe(method_name).options:
        for value in NUMBERS:
            try:
                handle = vtprune.attach(model, method_name, **{option: value})
            except VtpruneError:
                continue
            assert not (isinstance(value, float) and not abs(value) < float("inf")), f"{option}={value} was accepted"
            with handle, torch.no_grad():
                assert bool(torch.isfinite(model(**inputs).logits).all()), f"{option}={value}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, 0.0, -1, 1.5, True, "all", 10**400])
def test_odd_budgets_are_refused(tiny, value):
    model, _ = tiny("llava", "clip-llama")
    for budget in ("keep", "effective_tokens", "flops"):
        if (budget, value) in (("effective_tokens", 1.5), ("flops", 10**400)):
            continue  # a number of tokens; more FLOPs than there are
        with pytest.raises(VtpruneError):
            vtprune.attach(model, "random", **{budget: value})


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("flowcut", {"every": 0}, "at least 1"),
        ("flowcut", {"ema": 1.0}, "below 1"),
        ("tome", {"r": [1, 1, 1, -1]}, "at least 0"),
        ("tome", {"r": 2, "inflect": 1.5}, "at most 1"),
        ("tome", {"inflect": 0.5}, "integer r="),
        ("pitome", {"alpha": 0.0}, "above 0"),
        ("pitome", {"energy": "x"}, "not one of 'elu', 'paper'"),
        ("pitome", {"ratio": 0.2}, "at least 0.5"),
        ("pyramiddrop", {"ratios": ()}, "empty"),
        ("dpvr-lf", {"branch_layers": 1000}, "more than the 6 layers"),
    ],
)
def test_option_values_are_declared(tiny, method, options, words):
    model, _ = tiny("llava", "clip-llama")
    with pytest.raises(VtpruneError, match=words):
        vtprune.attach(model, method, **options)


def test_promised_sources_are_the_ones_that_answer(tiny, monkeypatch):
    """``Geometry.provides`` names what a view answers at a site, in every family."""
    from vtprune.methods.random import Random

    right, seen = Random.select, []
    monkeypatch.setattr(
        Random, "select", lambda self, view, cut: (seen.append(set(view.sources)), right(self, view, cut))[1]
    )
    for family in ("llava", "llava-next", "internvl", "paligemma", "hf-vit", "timm-vit"):
        model, inputs = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
        geometry = bind(model).geometry
        for kind, site in (("vision", "vision.1"), ("projector", "projector"), ("llm", "llm.2")):
            if kind in geometry.provides:
                with torch.no_grad(), vtprune.attach(model, "random", keep=0.5, site=site):
                    model(**inputs)
                assert seen.pop() == geometry.provides[kind], (family, kind)


def test_a_video_shows_a_method_its_frames(tiny, monkeypatch):
    from vtprune.methods.random import Random

    model, inputs = tiny("qwen2.5-vl", "video")
    right, seen = Random.select, []
    monkeypatch.setattr(
        Random, "select", lambda self, view, cut: (seen.append(view.rasters), right(self, view, cut))[1]
    )
    with torch.no_grad(), vtprune.attach(model, "random", keep=0.5, per="video"):
        model(**inputs)
    assert any(len(rasters[0]) > 1 and len(set(rasters[0])) == 1 for rasters in seen if rasters)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("split", [1, 3])
def test_routed_variants_give_the_same_text(tiny, positions, split):
    """dpvr-lf, section 3: 'kv' and 'pc' are two ways to compute one thing, wherever positions are counted from."""
    model, x = tiny("llava", "clip-llama")
    text = (x["attention_mask"] == 1) & (x["input_ids"] != 3)
    found = []
    for variant in ("kv", "pc"):
        with torch.no_grad(), vtprune.attach(model, "dpvr-lf", split=split, variant=variant, positions=positions):
            found.append(model(**x).logits[text])
    assert torch.allclose(*found, atol=1e-5 * float(found[0].abs().max()))


def test_two_routing_stages_meet_at_one_layer(tiny):
    """The second takes out what the first has just brought back: other columns than were taken before."""
    model, inputs = tiny("qwen3-vl", "images")
    recipe = _recipe(("dpvr-lf", None, {"split": 5}), ("dpvr-lf", None, {"split": 5, "variant": "kv"}))
    names = (
        "decode_is_masked_dense",
        "cached_is_uncached",
        "batch_is_singles",
        "interleaved_is_solo",
        "counts_are_true",
    )
    results = [check(name, model, recipe, inputs) for name in names]
    assert all(r.passed is not False for r in results) and sum(r.passed is True for r in results) >= 4, results


@pytest.mark.parametrize("init", ["identity", "random"])
def test_a_branch_of_experts_begins_as_asked(tiny, init):
    model, inputs = tiny("qwen3-vl-moe", "images")
    with torch.no_grad(), vtprune.attach(model, "dpvr-lf", split=2, init=init) as handle:
        model(**inputs)
        (layer,) = handle.modules["dpvr-lf"]
        found, x = layer.mlp.experts.down_proj.detach(), torch.randn(1, 3, 48)
        tables = torch.ones(1, 3, 12), torch.zeros(1, 3, 12)
        same = torch.equal(layer(x, position_embeddings=tables), x)
    assert same == (init == "identity") and (0.01 < float(found.std()) < 0.03) == (init == "random")


def test_each_routing_stage_has_a_module(tiny):
    model, inputs = tiny("llava", "clip-llama")
    stages = (("dpvr-lf", None, {"split": 1, "fusion": 3, "branch_layers": 2}), ("dpvr-lf", None, {"split": 4}))
    with torch.no_grad(), vtprune.attach(model, _recipe(*stages)) as handle:
        model(**inputs)
        assert {name: len(m) for name, m in handle.modules.items()} == {"dpvr-lf": 2, "dpvr-lf.1": 1}
        several = handle.report().flops
    with (
        torch.no_grad(),
        vtprune.attach(model, _recipe((*stages[0][:2], {**stages[0][2], "branch_layers": 1}), stages[1])) as handle,
    ):
        model(**inputs)
        assert handle.report().flops < several


@pytest.mark.parametrize(
    "method, positions",
    [("fastv", "compact"), ("pyramiddrop", "compact"), ("flowcut", "compact"), ("random", "compact")],
)
def test_verify_knows_compact_positions(tiny, method, positions):
    model, inputs = tiny("llava", "clip-llama")
    for name in ("prefill_is_masked_dense", "decode_is_masked_dense"):
        assert check(name, model, method, inputs, keep=4, positions=positions).passed


def test_the_compact_reference_can_fail(tiny, monkeypatch):
    from vtprune.models.engine.serving import Serving

    model, inputs = tiny("llava", "clip-llama")
    right = Serving._compact
    monkeypatch.setattr(
        Serving, "_compact", lambda self, level, ids: right(self, level, ids) + level.valid.cumsum(1) // 9
    )
    assert check("prefill_is_masked_dense", model, "fastv", inputs, keep=4, positions="compact").passed is False


@pytest.mark.parametrize("rows, columns", [(3, 5), (4, 4), (7, 2), (1, 9), (12, 12)])
def test_cells_are_those_of_the_loop(rows, columns):
    """The token nearest to the mean of its cell; of equally near ones the first."""
    at = [(i // columns, i % columns) for i in range(rows * columns)]
    for keep in range(1, rows * columns + 1, 1 + rows * columns // 12):
        cell = bands(rows, columns, keep).tolist()
        kept, destination = cells(rows, columns, keep)
        for c in range(keep):
            members = [i for i in range(len(at)) if cell[i] == c]
            total = [sum(at[i][d] for i in members) for d in (0, 1)]
            far = [sum((at[i][d] * len(members) - total[d]) ** 2 for d in (0, 1)) for i in members]
            centre = members[far.index(min(far))]
            assert all(int(destination[i]) == centre for i in members) and bool(kept[centre])
        assert int(kept.sum()) == keep


def test_the_solver_searches(tiny, monkeypatch):
    """A budget is found in a few plans, not in one for every number of tokens; the reason is the real one."""
    solver = sys.modules[vtprune.solve.__module__]
    model, inputs = tiny("internvl", "qwen2")
    calls: list[int] = []
    _predict = solver._predict
    monkeypatch.setattr(solver, "_predict", lambda *a: (calls.append(1), _predict(*a))[1])
    recipe = vtprune.solve(model, "random", effective_tokens=0.4, inputs=inputs)
    assert len(calls) <= 8 and 0 < recipe.stages[0].keep <= 0.4 + 1e-6
    llava, _ = tiny("llava", "clip-llama")
    with pytest.raises(VtpruneError, match="whole raster"):
        vtprune.solve(llava, _recipe(("random", 0.5, {}), ("pool", 0.25, {})), effective_tokens=0.4)


def test_the_solver_takes_what_attach_takes(tiny):
    model, inputs = tiny("llava", "clip-llama")
    recipe = vtprune.solve(model, "fastv", effective_tokens=0.6, layer=1, positions="compact", seed=3, per="image")
    assert recipe.stages[0].options["layer"] == 1
    with torch.no_grad(), vtprune.attach(model, "fastv", effective_tokens=0.6, layer=1, positions="compact") as handle:
        model(**inputs)
        assert 0.5 * 16 < handle.report().effective_tokens <= 0.6 * 16
    for wrong in ({"per": "tile"}, {"positions": "x"}, {"seed": -1}, {"layre": 1}):
        with pytest.raises(VtpruneError):
            vtprune.solve(model, "fastv", effective_tokens=0.6, **wrong)


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision"])
@pytest.mark.parametrize("method", ["downsample", "random", "flowcut"])
def test_the_solver_counts_new_lines(tiny, family, method):
    """No target is passed by more than rounding although stages in the tower leave the new-line tokens of rows that
    keep a patch; one that they alone pass is refused for that reason. With the inputs given, the target is never
    passed."""
    model, x = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    more = {"site": "vision.1"} if method == "random" else {}
    first = {k: v[:1] if k in ("input_ids", "attention_mask") else v for k, v in x.items()} | {
        k: x[k][:2] for k in ("pixel_values", "image_sizes")
    }
    first |= {"batch_num_images": x["batch_num_images"][:1]} if "batch_num_images" in x else {}
    for target in (0.1, 0.2, 0.4):
        chosen = vtprune.solve(model, method, effective_tokens=max(target, 0.15), per="tile", inputs=first, **more)
        with torch.no_grad(), vtprune.attach(model, chosen, per="tile") as handle:
            model(**first)
            report = handle.report()
        assert report.effective_tokens <= max(target, 0.15) * sum(report.visual_tokens)
        with torch.no_grad(), vtprune.attach(model, method, effective_tokens=target, per="tile", **more) as handle:
            model(**x)
            report = handle.report()
        assert report.effective_tokens * len(report.visual_tokens) <= (target + 0.02) * sum(report.visual_tokens)
    with pytest.raises(VtpruneError, match="new-line tokens"):
        vtprune.attach(model, method, effective_tokens=0.05, per="tile", **more)


def test_a_new_line_token_leaves_with_its_row(tiny):
    """Behind a stage in the tower a row without patches has no new-line token either; any other keeps it."""
    model, x = tiny("llava-next", "clip-llama")
    with torch.no_grad(), vtprune.attach(model, "downsample", keep=1, per="tile") as handle:
        model(**x)
        report = handle.report()
        parts = handle.adapter.parts(x["input_ids"], x)
    (stage,), gone, left = report.stages, 0, 0
    for sample, kept in zip(parts, stage.kept, strict=True):
        there = torch.zeros(sum(len(p.columns) for p in sample), dtype=torch.bool)
        there[kept] = True
        for part, mine in zip(sample, there.split([len(p.columns) for p in sample]), strict=True):
            if part.grid != (4, 4):  # tiles, with a new-line token at the end of each row
                rows = mine.view(part.grid)
                assert torch.equal(rows[:, -1], rows[:, :-1].any(1))
                gone, left = gone + int((~rows[:, -1]).sum()), left + int(rows[:, -1].sum())
    assert gone and left and [row[0] for row in report.layer_tokens] == [len(k) for k in stage.kept]


def test_a_prompt_may_end_with_a_new_line_token(tiny):
    """It is what the answer follows, so it stays although its row is empty."""
    model, x = tiny("llava-next", "clip-llama")
    ids = x["input_ids"][1:]
    ids = ids[:, x["attention_mask"][1].bool()]
    ids = ids[:, : int((ids[0] == model.config.image_token_id).nonzero()[-1]) + 1]
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": x["pixel_values"][2:],
        "image_sizes": x["image_sizes"][2:],
    }
    with torch.no_grad(), vtprune.attach(model, "downsample", keep=1, per="tile") as handle:
        logits = model(**given).logits
        report = handle.report()
        (part,) = handle.adapter.parts(ids, given)[0][1:]
    mine = torch.zeros(report.visual_tokens[0], dtype=torch.bool)
    mine[report.stages[0].kept[0]] = True
    rows = mine[-len(part.columns) :].view(part.grid)
    assert not rows[-1, :-1].any() and rows[-1, -1], "the last row is empty, and its new-line token is there"
    assert bool((logits[0, -1] != 0).any())


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision"])
@pytest.mark.parametrize("size", [(8, 90), (90, 8), (4, 90), (200, 3)])
def test_long_thin_images(tiny, family, size):
    """Unpadding may leave no row of tiles, or rows of new-line tokens alone."""
    model, _ = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    sizes, pixels = torch.tensor([size]), torch.randn(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        n = len(model.model.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output[0])
    ids = torch.tensor([[9, 10] + [3] * n + [11, 12]])
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}
    for method in ("fastv", "uniform", "flowcut"):
        result = check("prefill_is_masked_dense", model, method, x, keep=0.5)
        assert result.passed, result.detail


@pytest.mark.parametrize(
    "ways", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=["beams", "answers"]
)
@pytest.mark.parametrize("family", ["llava-next", "llava-onevision"])
def test_several_answers_with_a_stage_in_the_tower(tiny, family, ways):
    """``generate`` repeats prompts but not the sizes of their images; each answer is that of the dense model under
    masks."""
    from vtprune.core.planning import load_recipe

    model, x = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    if mixes_pictures():
        pytest.skip(
            "this transformers repeats picture by picture, so that an answer to a prompt with two sees one of them "
            "twice, dense as well"
        )
    case = Case(model, load_recipe("flowcut").override(keep=0.5), x, {})
    rules = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "suppress_tokens": [3, 4],
        "return_dict_in_generate": True,
        "output_logits": True,
        **ways,
    }
    with case.attach() as handle:
        torch.manual_seed(0)
        got = model.generate(**x, **rules)
        report, passes = handle.report(), list({(id(run), g): (run, g) for run, g in handle.passes}.values())
    repeated = {k: x[k].repeat_interleave(2, 0) for k in ("input_ids", "attention_mask")}
    ledger = masks(Case(model, case.recipe, repeated, {}), report, passes)[2]
    torch.manual_seed(0)
    want = model.generate(**x, **rules)
    ledger.undo()
    assert torch.equal(got.sequences, want.sequences)
    assert all(
        torch.allclose(a, b, atol=1e-5 * float(b.abs().max())) for a, b in zip(got.logits, want.logits, strict=True)
    )


def test_tables_are_bounded(tiny):
    model, _ = tiny("llava-next", "clip-llama")
    bound = bind(model)
    for h, w in itertools.product(range(30, 50), repeat=2):
        bound.packed(torch.tensor([h, w]), True)
    assert len(bound.known) <= 256
    assert plan(for_units(bound.geometry, None), vtprune.Recipe(name="x", stages=(Stage(method="random"),)))
