"""Registry, recipes, budgets, solver, ledger: what is not about one method or family."""

from __future__ import annotations

import json
import pickle
import re
import threading
import time
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from vtprune.models.engine.host import cache_of, cached

import vtprune
from vtprune import Recipe, Stage, UnsupportedError, VtpruneError
from vtprune.core.decider import _shares
from vtprune.core.ledger import UndoLedger, snapshot
from vtprune.core.planning import bind, load_recipe, plan
from vtprune.core.recipe import resolve
from vtprune.core.recipes import RECIPES
from vtprune.core.registry import Registry
from vtprune.core.select import bands, combine, merged, top
from vtprune.methods.base import METHODS, Cut, Method, MethodInfo, register
from vtprune.methods.fastv import FastV


def test_registry_refuses_clashes_and_suggests():
    r: Registry[int] = Registry("thing")
    r.register("fastv", 1)
    with pytest.raises(ValueError, match="registered already, by test_core"):
        r.register("fastv", 2, owner="another")
    assert r.get("fastv") == 1
    r.register("fastv", 3)  # the same module again
    assert r.get("fastv") == 3
    with pytest.raises(VtpruneError, match="did you mean fastv"):
        r.get("fasttv")
    assert r.names("fast*") == ["fastv"] and r.names("x*") == []


def own_method(name: str, idea: str = "x", qualname: str = "Mine"):
    """A method as a notebook's cell defines it."""

    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        def plan(self, geometry, keep):
            return (Cut(site="projector", keep=keep),)

        def select(self, view, cut):
            return top(view.features.norm(dim=-1), cut.keep, view.valid, view.protected)

    Mine.__qualname__ = qualname
    return register(
        MethodInfo(name=name, paper="baseline", idea=idea, kinds=("projector",), cases=({"keep": 0.5}, {"keep": 2}))
    )(Mine)


@pytest.fixture
def registries(monkeypatch):
    """What a test registers is gone behind it."""
    for registry in (METHODS, RECIPES):
        for name in ("_entries", "_owners"):
            monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


def test_a_method_that_comes_late_has_its_recipe_and_its_cell_runs_again(registries, tiny):
    assert "mine" not in vtprune.recipes()
    own_method("mine", "first")
    own_method("mine", "second")
    assert "mine" in vtprune.recipes() and vtprune.describe("mine").idea == "second"
    model, inputs = tiny("llava", "clip-llama")
    with vtprune.attach(model, "mine", keep=3) as handle:
        model(**inputs)
    assert handle.recipe.name == "mine"
    for name in ("mine", "fastv"):  # a class of another name, and one that another module has
        with pytest.raises(ValueError, match=f"method '{name}' is registered already"):
            own_method(name, qualname="Other")
    assert vtprune.describe("fastv").paper == "arXiv 2403.06764" and "cls" not in vtprune.describe("mine").options


def test_methods_and_recipes_share_their_names(registries):
    recipe = vtprune.Recipe(name="two", stages=(vtprune.Stage(method="fastv"),))
    RECIPES.register("two", recipe)
    RECIPES.register("two", recipe.override(keep=3))  # the same module again
    assert RECIPES.get("two").stages[-1].keep == 3
    with pytest.raises(ValueError, match="registered already"):
        RECIPES.register("fastv", recipe)
    for taken in ("two", "fastv-k2-r50"):
        with pytest.raises(ValueError, match="registered already"):
            own_method(taken)
        assert taken not in vtprune.methods()


def test_registries_are_loaded_once_also_by_many_threads():
    loads: list[int] = []

    def load() -> None:
        loads.append(1)
        assert registry.names() == []  # a look-up from inside
        time.sleep(0.05)
        for i in range(50):
            registry.register(f"n{i}", i)

    registry: Registry[int] = Registry("thing", load)
    gate, found = threading.Barrier(8), []

    def look() -> None:
        gate.wait()
        found.append(len(registry.names()))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert loads == [1] and found == [50] * 8


def test_a_registry_whose_loading_failed_tries_again():
    tries: list[int] = []

    def load() -> None:
        tries.append(1)
        registry.register("a", 1)
        if len(tries) == 1:
            raise ImportError("not yet")

    registry: Registry[int] = Registry("thing", load)
    with pytest.raises(ImportError):
        registry.get("a")
    assert registry.get("a") == 1 and len(tries) == 2


def test_public_look_ups():
    assert {
        "pyramiddrop",
        "flowcut",
        "pitome",
        "dpvr-lf",
        "fastv",
        "tome",
        "random",
        "uniform",
        "pool",
        "keep-last",
        "drop-all",
        "downsample",
    } <= set(vtprune.methods())
    assert set(vtprune.methods()) <= set(vtprune.recipes())
    alone = {"hf-vit", "timm-vit", "open-clip", "causal-lm"}
    tiled = {"llava", "llava-next", "llava-onevision", "internvl", "smolvlm", "gemma3", "paligemma", "mistral3"}
    assert set(vtprune.adapters()) == alone | tiled | {
        "qwen2-vl",
        "qwen2.5-vl",
        "qwen3-vl",
        "qwen3-vl-moe",
        "glm4v",
        "generic",
    }
    info = vtprune.describe("flowcut")
    assert info.paper == "arXiv 2505.19536" and info.options["ema"] == 0.5 and all(info.option_help.values())


def test_every_option_has_a_help_text(method_name):
    info = vtprune.describe(method_name)
    assert info.idea and all(info.option_help[name] for name in info.options)


@pytest.mark.parametrize(
    ("keep", "tokens", "want"),
    [(1.0, 144, 144), (0.25, 144, 36), (0.11, 144, 15), (1e-6, 144, 1), (7, 144, 7), (144, 144, 144)],
)
def test_resolve(keep, tokens, want):
    assert resolve(keep, tokens) == want


@pytest.mark.parametrize("keep", [0, -1, 145, 0.0, 1.5, -0.1, float("nan"), True, "9", None])
def test_resolve_refuses(keep):
    with pytest.raises(VtpruneError, match="keep"):
        resolve(keep, 144)


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_recipe_round_trip(tmp_path, ending):
    recipe = Recipe(
        name="two",
        source="here",
        stages=(Stage(method="flowcut", keep=0.5, options={"batch": "max"}), Stage(method="fastv", keep=16)),
    )
    recipe.save(tmp_path / f"r.{ending}")
    again = Recipe.load(tmp_path / f"r.{ending}")
    assert again == recipe and again.key() == recipe.key() and hash(again) == hash(recipe)
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert recipe.key() != recipe.override(keep=15).key()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 99}, "version 99"),
        ({"type": "x"}, "not a recipe"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"stages": [{"keep": 1}]}, "needs 'method'"),
        ({"stages": []}, "no stages"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, change, words):
    data = Recipe(name="r", stages=(Stage(method="random"),)).to_dict() | change
    path = tmp_path / "r.json"
    path.write_text(json.dumps(data))
    with pytest.raises(VtpruneError, match=words):
        Recipe.load(path)


def test_missing_and_malformed_recipe_files(tmp_path):
    with pytest.raises(VtpruneError, match="cannot read"):
        Recipe.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(VtpruneError, match="not JSON"):
        Recipe.load(tmp_path / "bad.json")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(VtpruneError, match="not YAML"):
        Recipe.load(tmp_path / "bad.yaml")


def test_attach_errors_say_what_would_work(tiny):
    model, _ = tiny("llava", "clip-llama")
    before = snapshot(model)
    cases = [
        (("nope", {}), "unknown recipe 'nope'"),
        (("fastv", {"keep": 17}), "keep lies in 1..16"),
        (("fastv", {"keep": 0}), "keep lies in 1..16"),
        (("fastv", {"bogus": 1}), "its options: layer"),
        (("fastv", {"layer": 99}), "0..5"),
        (("fastv", {"layer": 0}), "layer >= 1"),
        (("fastv", {"positions": "odd"}), "'original', 'compact'"),
        (("random", {"site": "llm.6"}), "0..5"),
        (("drop-all", {"keep": 3}), "takes no keep="),
        (("tome", {"r": (1, 2)}), "2 entries"),
        (("pyramiddrop", {"ratios": (0.5,)}), "falling fractions"),
        (("fastv", {"effective_tokens": 1e-3}), "cannot reach"),
        (("fastv", {"effective_tokens": 8, "keep": 3}), "one budget"),
        (("dpvr-lf", {"split": 6}), "0..5"),
        (("dpvr-lf", {"weights": "none.safetensors"}), "no such file"),
    ]
    for (recipe, options), words in cases:
        with pytest.raises(VtpruneError, match=words):
            vtprune.attach(model, recipe, **options)
    assert snapshot(model) == before
    with pytest.raises(UnsupportedError, match="no adapter takes a Linear"):
        vtprune.attach(nn.Linear(2, 2), "random")
    with pytest.raises(VtpruneError, match="execution order"):
        vtprune.attach(model, Recipe(name="r", stages=(Stage(method="fastv"), Stage(method="flowcut"))))
    assert snapshot(model) == before


def test_inputs_that_cannot_be_pruned_are_refused(tiny):
    model, inputs = tiny("llava", "clip-llama")
    with vtprune.attach(model, "fastv") as handle, torch.no_grad():
        with pytest.raises(VtpruneError, match="no prefill"):
            handle.report()
        with pytest.raises(UnsupportedError, match="input_ids"):
            model(inputs_embeds=torch.randn(1, 4, 48))
        with pytest.raises(UnsupportedError, match="2-D attention_mask"):
            model(**{**inputs, "attention_mask": torch.ones(2, 1, 30, 30)})


def test_a_prompt_without_images_is_reported_as_one(tiny):
    model, inputs = tiny("llava", "clip-llama")
    text = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, 9)
    with torch.no_grad():
        want = model(input_ids=text, attention_mask=inputs["attention_mask"]).logits
        with vtprune.attach(model, "fastv", keep=3) as handle:
            model(**inputs)
            got = model(input_ids=text, attention_mask=inputs["attention_mask"]).logits
            report = handle.report()
    assert torch.equal(got, want)
    assert report.visual_tokens == [0, 0] and report.stages == () and report.effective_tokens == 0
    assert report.flops == report.dense_flops > 0 and report.kv_bytes == report.dense_kv_bytes > 0


def test_attaching_draws_no_random_numbers(tiny):
    model, inputs = tiny("llava", "clip-llama")
    state = torch.random.get_rng_state()
    with vtprune.attach(model, "dpvr-lf"), torch.no_grad():
        model(**inputs)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_cache_from_before_stays_dense(tiny):
    """A prompt that was read without the attachment decodes densely under it, and the other way round."""
    model, inputs = tiny("llava", "clip-llama")
    token = torch.tensor([[5], [6]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    with torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
        want = model(input_ids=token, attention_mask=mask, **cached(model, cache), use_cache=True).logits
        cache = cache_of(model(**inputs, use_cache=True))
        with vtprune.attach(model, "fastv", keep=2):
            got = model(input_ids=token, attention_mask=mask, **cached(model, cache), use_cache=True).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "flowcut", "random", "pool", "tome", "drop-all", "dpvr-lf"])
def test_solver_meets_effective_tokens(tiny, method):
    model, inputs = tiny("llava", "clip-llama")
    with torch.no_grad(), vtprune.attach(model, method, effective_tokens=0.7) as handle:
        model(**inputs)
        effective = handle.report().effective_tokens
    assert 0.7 * 16 - 3.0 < effective <= 0.7 * 16 + 1e-6


def test_solver_counts_the_most_that_an_adaptive_cut_leaves(tiny, monkeypatch):
    """Six layers of 16 tokens, a cut before the third: 11.2 on average are at most 8 behind it."""
    model, _ = tiny("llava", "clip-llama")
    plain = FastV.plan
    for over, keep in ((0, 8), (2, 6)):
        wider = lambda *a, over=over: (replace(c := plain(*a)[0], adaptive=True, most=c.keep + over),)  # noqa: E731
        monkeypatch.setattr(FastV, "plan", wider)
        assert vtprune.solve(model, "fastv", effective_tokens=0.7).stages[-1].keep == keep
    monkeypatch.setattr(FastV, "plan", lambda *a: (replace(plain(*a)[0], adaptive=True),))
    with pytest.raises(VtpruneError, match="cannot reach"):
        vtprune.solve(model, "fastv", effective_tokens=0.7, layer=2)


@pytest.mark.parametrize(
    "method, name", [("fastv", "layer"), ("pyramiddrop", "layers"), ("drop-all", None), ("dpvr-lf", None)]
)
def test_solver_moves_cuts_forward_for_a_small_budget(tiny, method, name):
    """Only where the method's own layers cannot reach it; layers that the user states are never moved."""
    model, inputs = tiny("llava", "clip-llama")
    own = [c.layer for c in _cuts(model, method, keep=None if name is None else 1)]
    recipe = vtprune.solve(model, method, effective_tokens=0.3 if method != "dpvr-lf" else 0.26)
    moved = [c.layer for c in _cuts(model, recipe)]
    assert moved[0] < own[0]
    with torch.no_grad(), vtprune.attach(model, recipe) as handle:
        model(**inputs)
        assert handle.report().effective_tokens <= 0.3 * 16
    if name is not None:
        assert name not in vtprune.solve(model, method, effective_tokens=0.9).stages[-1].options
        with pytest.raises(VtpruneError, match="smallest schedule"):
            vtprune.solve(
                model, load_recipe(method).override(**{name: own if name == "layers" else own[0]}), effective_tokens=0.3
            )


def test_the_solver_refuses_in_the_words_of_attach(tiny, method_name):
    """On a bare tower, which has no text, no projector and no language model."""
    model, _ = tiny("hf-vit", "clip")
    try:
        vtprune.attach(model, method_name).remove()
    except vtprune.UnsupportedError as e:
        with pytest.raises(vtprune.UnsupportedError, match=re.escape(str(e))):
            vtprune.solve(model, method_name, effective_tokens=0.5)


def _cuts(model, recipe, keep=None):
    recipe = load_recipe(recipe)
    return plan(bind(model).geometry, recipe if keep is None else recipe.override(keep=keep))[-1][2]


def test_solver_meets_flops(tiny):
    model, inputs = tiny("llava", "clip-llama")
    recipe = vtprune.solve(model, "fastv", flops=0.8, inputs=inputs)
    with torch.no_grad(), vtprune.attach(model, recipe) as handle:
        model(**{k: v[:1] for k, v in inputs.items()})
        report = handle.report()
    assert 0.76 < report.flops / report.dense_flops <= 0.8
    with pytest.raises(VtpruneError, match="exactly one"):
        vtprune.solve(model, "fastv")


def test_ledger_undoes_in_reverse_also_after_a_failed_attach(tiny, monkeypatch):
    model, _ = tiny("llava", "clip-llama")
    before = snapshot(model)
    calls = {"n": 0}
    real = UndoLedger.before

    def failing(self, *args, **kwargs):
        calls["n"] += 1
        if calls["n"] == 5:
            raise RuntimeError("planted")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(UndoLedger, "before", failing)
    with pytest.raises(RuntimeError, match="planted"):
        vtprune.attach(model, "fastv")
    assert calls["n"] == 5 and snapshot(model) == before
    monkeypatch.undo()
    vtprune.attach(model, "fastv").remove()


def test_snapshot_sees_changes(tiny):
    model, _ = tiny("llava", "clip-llama")
    before = snapshot(model)
    ledger = UndoLedger()
    ledger.replace(model.lm_head, "forward", lambda x: x)
    assert snapshot(model) != before
    ledger.undo()
    assert snapshot(model) == before
    model.config.text_config.rms_norm_eps = 0.5
    assert snapshot(model) != before


def test_top_orders_ties_padding_and_nan():
    score = torch.tensor([[1.0, 3.0, 3.0, float("nan"), 2.0], [5.0, 4.0, 9.0, 9.0, 9.0]])
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert top(score, 3, valid).kept.tolist() == [[1, 2, 4], [0, 1, -1]]
    assert top(score, 1, valid).kept.tolist() == [[1], [0]]
    protected = torch.zeros_like(valid)
    protected[0, 3] = True
    assert top(score, 2, valid, protected).kept.tolist() == [[1, 3], [0, 1]]
    assert top(score, torch.tensor([2, 1]), valid).kept.tolist() == [[1, 2], [0, -1]]
    assert top(score, 0, valid).kept.shape == (2, 0)


def test_combine_is_the_weighted_mean():
    x = torch.arange(8.0).reshape(1, 4, 2)
    kept = torch.tensor([[False, True, False, True]])
    selection = merged(kept, torch.tensor([[1, 1, -1, 3]]))
    out, size = combine(x, selection, torch.tensor([[3.0, 1.0, 5.0, 2.0]]))
    assert size.tolist() == [[4.0, 2.0]]
    assert torch.allclose(out, torch.tensor([[[(0 * 3 + 2) / 4, (1 * 3 + 3) / 4], [6.0, 7.0]]]))
    assert selection.target.tolist() == [[0, 0, -1, 1]]


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (4, 4), (3, 7), (1, 5)])
def test_bands_give_exactly_keep_cells(rows, columns):
    for keep in range(1, rows * columns + 1):
        cell = bands(rows, columns, keep)
        assert sorted(cell.unique().tolist()) == list(range(keep))


def _follow(model, cache, ids, length, **more):
    mask = torch.ones(1, length, dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=mask, **cached(model, cache), **more)


@pytest.mark.parametrize("method", ["uniform", "flowcut", "pyramiddrop"])
def test_what_cannot_continue_a_pruned_cache_is_refused(tiny, method):
    """A copy of the cache, a second image, or the whole history again: each would give wrong answers without a word."""
    import copy

    model, inputs = tiny("llava", "clip-llama")
    one = {k: v[:1] for k, v in inputs.items()}
    length = one["input_ids"].shape[1]
    with vtprune.attach(model, method, keep=4):
        with torch.no_grad():
            cache = cache_of(model(**one, use_cache=True))
        with pytest.raises(UnsupportedError, match="copy of a pruned"):
            _follow(model, copy.deepcopy(cache), [7], length + 1)
        with pytest.raises(UnsupportedError, match="continuation"), torch.no_grad():
            model(**one, **cached(model, cache))
        if method != "pyramiddrop":  # whose first layers hold the whole prompt, so that generate() finds the new tokens
            history = torch.cat([one["input_ids"], torch.tensor([[7, 8]])], 1)
            with pytest.raises(UnsupportedError, match="start a new prompt"):
                model.generate(
                    input_ids=history, attention_mask=torch.ones_like(history), **cached(model, cache), max_new_tokens=2
                )
        assert torch.isfinite(_follow(model, cache, [7], length + 1).logits).all()  # the cache itself goes on


def test_an_image_behind_a_text_turn_is_refused(tiny):
    model, inputs = tiny("llava", "clip-llama")
    one = {k: v[:1] for k, v in inputs.items()}
    with vtprune.attach(model, "uniform", keep=4), torch.no_grad():
        cache = cache_of(model(input_ids=torch.tensor([[5, 6]]), use_cache=True))
        with pytest.raises(UnsupportedError, match="continuation"):
            model(**{**one, "attention_mask": torch.ones(1, 32, dtype=torch.long)}, **cached(model, cache))


def test_threads_do_not_meet_between_tower_and_projector(tiny):
    """Two threads, each stopped between the tower and the projector until the other is there."""
    import threading

    model, inputs = tiny("llava", "clip-llama")
    jobs = [{k: v[:1] for k, v in inputs.items()}, inputs]
    with vtprune.attach(model, "flowcut", keep=6), torch.no_grad():
        want = [model(**job).logits for job in jobs]
        barrier = threading.Barrier(2, timeout=60)

        def wait(module, args):
            barrier.wait()

        hook = model.model.multi_modal_projector.register_forward_pre_hook(wait)
        got: dict[int, torch.Tensor] = {}

        def run(k):
            with torch.no_grad():
                got[k] = model(**jobs[k]).logits

        threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        hook.remove()
    for k in range(2):
        assert torch.allclose(got[k], want[k], atol=1e-5)


@pytest.mark.parametrize("method", ["fastv", "random", "dpvr-lf"])
def test_sliding_windows_count_the_callers_positions(method):
    """A window of 8 tokens is 8 tokens of the prompt, whatever was dropped, also in a cache that holds fewer of
    them."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig
    from vtprune.models.base import ADAPTERS

    from vtprune.check.verify import check

    model, inputs = ADAPTERS.get("llava").tiny["dinov2-mistral"]()
    words = {**model.config.text_config.to_dict(), "sliding_window": 8}
    other = LlavaForConditionalGeneration(
        LlavaConfig(**{**model.config.to_dict(), "text_config": MistralConfig(**words).to_dict()})
    ).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    with torch.no_grad():
        assert not torch.allclose(other(**inputs).logits, model(**inputs).logits, atol=1e-3), "the window matters"
    options = {"keep": 6} if method != "dpvr-lf" else {}
    for name in (
        "prefill_is_masked_dense",
        "decode_is_masked_dense",
        "cached_is_uncached",
        "batch_is_singles",
        "full_budget",
        "interleaved_is_solo",
    ):
        result = check(name, other, method, inputs, **options)
        assert result.passed is not False, f"{name}: {result.detail}"


def test_a_dropped_model_is_freed(tiny):
    """Attaching keeps nothing alive, and a handle that nobody holds still owns its model."""
    import copy
    import gc
    import weakref

    model = copy.deepcopy(tiny("llava", "clip-llama")[0])
    vtprune.attach(model, "random")
    gc.collect()
    with pytest.raises(VtpruneError, match="attached already"):
        vtprune.attach(model, "random")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_budgets_that_contradict_each_other_and_wrong_values_are_refused(tiny):
    model, _ = tiny("llava", "clip-llama")
    wrong = [
        ("pyramiddrop", {"keep": 3, "ratios": (0.5, 0.4, 0.3)}, "one budget"),
        ("pyramiddrop", {"ratios": (0.5, 0.4, 0.3), "effective_tokens": 0.3}, "one budget"),
        ("pyramiddrop", {"ratios": 0.5}, "expected a list of numbers"),
        ("pyramiddrop", {"layers": ()}, "empty"),
        ("random", {"site": 5}, "expected word"),
        ("random", {"seed": "abc"}, "seed"),
        ("dpvr-lf", {"weights": 5}, "expected word"),
        ("fastv", {"rope": 3}, "expected true or false"),
        ("fastv", {"effective_tokens": "a"}, "not a number"),
        ("fastv", {"effective_tokens": 1000}, "above the 16"),
        ("drop-all", {"layer": 4, "effective_tokens": 0.3}, "cannot reach"),
    ]
    for method, options, reason in wrong:
        with pytest.raises(VtpruneError, match=reason):
            vtprune.attach(model, method, **options)
    assert vtprune.solve(
        model, vtprune.Recipe(name="x", stages=(Stage(method="drop-all", options={"layer": 1}),)), effective_tokens=0.9
    ).stages[0].options == {"layer": 1}


@pytest.mark.parametrize(
    "options", [{"split": 2}, {"split": 0}, {"split": 1, "variant": "kv"}, {"split": 1, "fusion": 0}]
)
def test_predicted_flops_and_tokens_are_the_reported_ones(tiny, options):
    """Behind a stage that dropped some: what returns is what was put aside, and a side branch that never runs costs
    nothing."""
    from vtprune.core.solve import _predict

    model, inputs = tiny("llava", "clip-llama")
    one = {k: v[:1] for k, v in inputs.items()}
    recipe = Recipe(name="both", stages=(Stage(method="uniform", keep=4), Stage(method="dpvr-lf", options=options)))
    with torch.no_grad(), vtprune.attach(model, recipe) as handle:
        model(**one)
        report, adapter = handle.report(), bind(model)
    tokens, flops = _predict(adapter.geometry, adapter.cost, recipe, one["input_ids"].shape[1] - 16)
    assert tokens == pytest.approx(report.effective_tokens) and flops == report.flops


def test_damaged_recipe_files_are_refused(tmp_path):
    good = vtprune.Recipe(name="x", stages=(Stage(method="fastv"),)).to_dict()
    for name, change in (
        ("stages", {"stages": None}),
        ("method", {"stages": [{"method": 5}]}),
        ("options", {"stages": [{"method": "fastv", "options": 5}]}),
    ):
        path = tmp_path / "r.json"
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(VtpruneError, match=name):
            Recipe.load(path)
    path.write_bytes(bytes(range(256)))
    with pytest.raises(VtpruneError, match="not text"):
        Recipe.load(path)


@pytest.mark.parametrize("model", [None, "llava", [1], torch.zeros(2)])
def test_what_is_no_model_is_refused_in_words(model):
    for call in (vtprune.attach, lambda *a: vtprune.solve(*a, effective_tokens=0.5), lambda *a: vtprune.verify(*a, {})):
        with pytest.raises(vtprune.UnsupportedError, match="a model is"):
            call(model, "random")


@pytest.mark.parametrize(
    ("budget", "left", "shares"),
    [
        (7, (10, 3, 4), [4, 1, 2]),  # 4.12, 1.24, 1.65: the largest remainder gets the last one
        (8, (10, 3, 4), [5, 1, 2]),  # 4.71, 1.41, 1.88
        (3, (2, 2, 2), [1, 1, 1]),
        (2, (2, 2, 2), [1, 1, 0]),  # equal remainders: in front
        (4, (0, 5), [0, 4]),
        (0, (3, 5), [0, 0]),
    ],
)
def test_rasters_share_a_budget_by_what_is_left_of_them(budget, left, shares):
    assert _shares(budget, left) == shares and sum(shares) == budget
