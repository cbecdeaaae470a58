"""The pair contract (ARCHITECTURE.md, "What is always true"), generated from the registries: every method x every
family x every check."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from vtprune.models.base import ADAPTERS

import vtprune
from cases import case_options
from choice import covering, kinds, refused, taken
from vtprune.check.case import Case
from vtprune.check.contract import CHECKS
from vtprune.check.verify import check
from vtprune.core.planning import load_recipe
from vtprune.core.types import UnsupportedError

# Variants of a family meet the checks in which their parts could make a difference, and so do, in the choice of every
# run, methods whose kind the family has met with another. Those of what is computed are FAST, the rest is CI's.
FAST = ("prefill_is_masked_dense", "decode_is_masked_dense", "batch_is_singles", "counts_are_true")
CORE = (*FAST, "full_budget", "restored")
FIRST = "counts_are_true"  # attaches and runs before anything else: what is refused, is refused there


def _checks(pair: tuple[str, str, str, int]) -> tuple[str, ...]:
    family, variant, method, _ = pair
    if pair not in covering():
        return tuple(CHECKS) if variant == next(iter(ADAPTERS.get(family).tiny)) else CORE
    number = list(ADAPTERS).index(family)
    kind = next((k for k, group in enumerate(kinds()) if group[number % len(group)] == method), None)
    if kind is None or variant != next(iter(ADAPTERS.get(family).tiny)):
        return CORE
    # the others by turns: each family meets all of them, and so does each kind
    return tuple(c for i, c in enumerate(CHECKS) if c in CORE or (i + number + kind) % 2)


def test_pair(pair, tiny):
    family, variant, method, case = pair
    model, inputs = tiny(family, variant)
    options = case_options(model, method, case)
    pairs = refused().get(f"{family}/{variant}", {})
    listed = pairs.get(f"{method} {case}", pairs.get(method))
    try:
        first = check(FIRST, model, method, inputs, **options)
    except UnsupportedError as e:
        assert listed == str(e), "this pair is refused, and refused_pairs.json does not say so"
        pytest.skip(str(e))
    assert listed is None, "this pair works, and refused_pairs.json says that it is refused"
    assert first.passed, first.detail
    names = FAST if pair in covering() else _checks(pair)
    assert _passes([name for name in names if name != FIRST], model, method, inputs, options) >= 1


# Every other one in CI, the rest is slow.
CHOSEN = [
    pytest.param(pair, id="-".join(map(str, pair)), marks=pytest.mark.slow if i % 2 else pytest.mark.ci)
    for i, pair in enumerate(sorted(p for p in covering() if taken(p)))
]


@pytest.mark.parametrize("chosen", CHOSEN)
def test_further_checks_of_a_chosen_pair(chosen, tiny):
    family, variant, method, case = chosen
    model, inputs = tiny(family, variant)
    rest = [name for name in _checks(chosen) if name not in FAST]
    assert _passes(rest, model, method, inputs, case_options(model, method, case)) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("chosen", sorted(p for p in covering() if taken(p)), ids=lambda p: "-".join(map(str, p)))
def test_checks_that_a_chosen_pair_leaves_to_others(chosen, tiny):
    family, variant, method, case = chosen
    model, inputs = tiny(family, variant)
    rest = [name for name in CHECKS if name not in _checks(chosen)]
    _passes(rest, model, method, inputs, case_options(model, method, case))


def _passes(names, model, method, inputs, options) -> int:
    """How many of the checks could be made."""
    results = {name: check(name, model, method, inputs, **options) for name in names}
    failed = [f"{name}: {r.detail}" for name, r in results.items() if r.passed is False]
    assert not failed, "\n".join(failed)
    return sum(r.passed is not None for r in results.values())


def test_the_choice_of_every_run_covers():
    """Each family meets every kind of method, each method three families and every case, also once there are forty."""
    chosen = covering()
    for family in ADAPTERS:
        met = {name for f, _, name, _ in chosen if f == family}
        assert all(met & set(group) for group in kinds())
    for name in vtprune.methods():
        works = [pair for pair in chosen if pair[2] == name and taken(pair)]
        able = {f for f in ADAPTERS if any(taken((f, next(iter(ADAPTERS.get(f).tiny)), name, i)) for i in (0, 1))}
        assert len({family for family, *_ in works}) >= min(3, len(able)) > 0, name
        assert {case for *_, case in works} == set(range(len(vtprune.describe(name).cases))), name


@pytest.mark.slow
def test_refused_pairs_are_the_listed_ones(tiny):
    """Coverage cannot shrink unseen: the table of impossible pairs is checked in. A method, or ``method case`` where
    only some of its cases are refused."""
    found: dict[str, dict[str, str]] = {}
    listed = refused()
    for family in ADAPTERS:
        info = ADAPTERS.get(family)
        if info.package is not None and find_spec(info.package) is None:  # an optional package
            found |= {name: pairs for name, pairs in listed.items() if name.startswith(f"{family}/")}
            continue
        for variant in info.tiny:
            model, inputs = tiny(family, variant)
            mine = found.setdefault(f"{family}/{variant}", {})
            for method in vtprune.methods():
                for number in range(len(vtprune.describe(method).cases)):
                    try:
                        with vtprune.attach(model, method, **case_options(model, method, number)), torch.no_grad():
                            model(**inputs)
                    except UnsupportedError as e:
                        if mine.get(method) != str(e):
                            mine[f"{method} {number}" if number else method] = str(e)
    assert {pair: why for pair, why in found.items() if why} == listed


def _with_text(inputs):
    """The batch with one more sample that has no image."""
    rows, length = inputs["input_ids"].shape
    text = torch.randint(8, 64, (1, length), generator=torch.Generator().manual_seed(9))
    text[0, : length - 9] = 0
    out = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], text]),
        "attention_mask": torch.cat([inputs["attention_mask"], (text != 0).long()]),
    }
    for name, value in inputs.items():
        if name.endswith("token_type_ids"):
            out[name] = torch.cat([value, torch.zeros_like(value[:1])])
        elif (
            name.startswith("pixel")
            and value.ndim >= 4
            and len(value) == rows
            and "image_sizes" not in inputs
            and value.shape[1] != 3
        ):
            out[name] = torch.cat([value, torch.zeros_like(value[:1])])  # one row of tiles per sample
    return out


FAMILIES = [name for name in ADAPTERS if name not in ("hf-vit", "timm-vit", "open-clip", "causal-lm")]


MIXED = ("pyramiddrop", "fastv", "random", "uniform", "flowcut")
# Two methods and the one inside the tower for each family, with either attention by turns; the rest is slow.
TURNS = [
    pytest.param(
        family,
        method,
        attention,
        marks=() if (f + m + a) % (2 if method == "flowcut" else 4) == 0 else pytest.mark.slow,
        id=f"{family}-{method}-{attention}",
    )
    for f, family in enumerate(FAMILIES)
    for m, method in enumerate(MIXED)
    for a, attention in enumerate(("sdpa", "eager"))
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("family", "method", "attention"), TURNS)
def test_mixed_batches_and_single_samples_equal_the_masked_dense_model(tiny, family, method, attention):
    """Every multimodal family, in the language model, behind the projector and in the tower: samples with several
    images, one and none in one padded batch, and the first alone; prefill and cached generation within 1e-5 of the
    dense model under masks, batches equal to single samples, text untouched."""
    model, inputs = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    model.set_attn_implementation(attention)
    mixed, options = _with_text(inputs), case_options(model, method, 1)
    try:
        handle = vtprune.attach(model, method, **options)
    except UnsupportedError as e:
        pytest.skip(str(e))
    with handle, torch.no_grad():
        got = model(**mixed).logits[-1]
        assert handle.report().visual_tokens[-1] == 0 < min(handle.report().visual_tokens[:-1])
    with torch.no_grad():
        want = model(**mixed).logits[-1]
    assert torch.allclose(got[-9:], want[-9:], atol=1e-5 * float(want.abs().max()))
    for name in ("prefill_is_masked_dense", "decode_is_masked_dense", "batch_is_singles"):
        result = check(name, model, method, mixed, **options)
        assert result.passed, f"{name}: {result.detail}"
    result = check(
        "decode_is_masked_dense", model, method, Case(model, load_recipe(method), mixed, {}).samples()[0], **options
    )
    assert result.passed, f"alone: {result.detail}"


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "random", "flowcut"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_eager_attention_and_compact_positions(tiny, method, positions):
    """Eager attention (additive masks) gives what sdpa gives; compact positions decode as they prefill."""
    model, inputs = tiny("llava", "clip-llama")
    options = vtprune.describe(method).cases[1]
    with torch.no_grad(), vtprune.attach(model, method, positions=positions, **options):
        want = model(**inputs).logits
    model.set_attn_implementation("eager")
    with torch.no_grad(), vtprune.attach(model, method, positions=positions, **options):
        got = model(**inputs).logits
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
    for name in ("cached_is_uncached", "batch_is_singles", "decode_is_masked_dense")[
        : 3 if positions == "original" else 2
    ]:
        result = check(name, model, method, inputs, positions=positions, **options)
        assert result.passed, f"{name}: {result.detail}"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(
    "stages",
    [
        (("random", 5, {"site": "llm.0"}),),
        (("drop-all", None, {"layer": 0}),),
        (("flowcut", 9, {}), ("random", 6, {"site": "llm.0"}), ("random", 3, {"site": "llm.3"})),
    ],
    ids=["random", "drop-all", "after-a-vision-stage"],
)
def test_cuts_before_layer_zero(tiny, stages, positions):
    """Layer 0's cache is what transformers builds masks and positions from, so a cut before it is a case of its own."""
    model, inputs = tiny("llava", "clip-llama")
    recipe = vtprune.Recipe(name="zero", stages=tuple(vtprune.Stage(method=m, keep=k, options=o) for m, k, o in stages))
    names = ("cached_is_uncached", "batch_is_singles", "interleaved_is_solo", "counts_are_true")
    for name in names if positions == "compact" else (*names, "prefill_is_masked_dense", "decode_is_masked_dense"):
        result = check(name, model, recipe, inputs, positions=positions)
        assert result.passed, f"{name}: {result.detail}"


def test_stages_compose(tiny):
    """A tower stage, a projector stage and two language-model stages in one recipe."""
    model, inputs = tiny("llava", "clip-llama")
    stages = (("flowcut", 14, {}), ("uniform", 10, {}), ("fastv", 6, {"layer": 2}), ("random", 3, {"site": "llm.4"}))
    recipe = vtprune.Recipe(name="four", stages=tuple(vtprune.Stage(method=m, keep=k, options=o) for m, k, o in stages))
    for name in CHECKS:
        result = check(name, model, recipe, inputs)
        assert result.passed is not False, f"{name}: {result.detail}"
    with vtprune.attach(model, recipe) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    assert [s.method for s in report.stages][-4:] == ["flowcut", "uniform", "fastv", "random"]
    assert [row[0] for row in zip(*report.layer_tokens, strict=True)] == [10, 10, 6, 6, 3, 3]
    assert report.effective_tokens == pytest.approx((10 + 10 + 6 + 6 + 3 + 3) / 6)


def test_samples_with_no_image_and_two_images(tiny):
    """A batch of text only, one image and two images: text-only rows are untouched, each image has its own budget."""
    model, inputs = tiny("llava", "clip-llama")
    text = torch.randint(4, 64, (3, 44), generator=torch.Generator().manual_seed(3))
    text[1, 5:21] = 3
    text[2, 2:18] = 3
    text[2, 20:36] = 3
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    mixed = {"input_ids": text, "attention_mask": torch.ones_like(text), "pixel_values": pixels}
    with torch.no_grad():
        dense = model(**mixed).logits
        for method, options in (("fastv", {"keep": 3}), ("flowcut", {"keep": 3}), ("random", {"keep": 3})):
            with vtprune.attach(model, method, **options) as handle:
                got = model(**mixed).logits
                report = handle.report()
            assert report.visual_tokens == [0, 16, 32]
            assert report.stages[-1].tokens_out == [0, 3, 6]
            assert sum(report.stages[-1].kept[2] >= 16) == 3, "each image keeps its own three"
            assert torch.allclose(got[0], dense[0], atol=1e-5)
            for name in (
                "prefill_is_masked_dense",
                "decode_is_masked_dense",
                "batch_is_singles",
                "interleaved_is_solo",
            ):
                result = check(name, model, method, mixed, **options)
                assert result.passed, f"{method} {name}: {result.detail}"


@pytest.fixture(scope="module")
def bundled():
    """The bundled VLM and one padded batch of two questions."""
    from PIL import Image

    from vtprune.data import scenes
    from vtprune.inputs.chats import prepare

    model, processor = vtprune.load_demo_model()
    found = [scenes.scene(i, "test") for i in (0, 1)]
    questions = [found[0].questions[0].text, found[1].questions[6].text]
    return model, dict(prepare(processor, [Image.fromarray(s.image) for s in found], questions))


@pytest.mark.ci
def test_bundled_model_meets_the_contract(bundled, some_method):
    """Pruned equals masked dense to 1e-5 on the trained model, prefill and cached generation."""
    model, inputs = bundled
    info = vtprune.describe(some_method)
    options = {"layer": 3} if some_method == "drop-all" else {} if not info.budgeted else {"keep": 36}
    names = (
        "prefill_is_masked_dense",
        "decode_is_masked_dense",
        "cached_is_uncached",
        "batch_is_singles",
        "restored",
        "counts_are_true",
    )
    results = [check(name, model, some_method, inputs, **options) for name in names]
    assert all(r.passed is not False for r in results), results
    assert sum(r.passed is True for r in results) >= 4


def test_a_check_can_fail(tiny, monkeypatch):
    """The contract notices a wrong position: rotary rows taken one too far."""
    from vtprune.models.engine import cuts

    model, inputs = tiny("llava", "clip-llama")
    right = cuts.take
    monkeypatch.setattr(cuts, "take", lambda table, rows: right(table, (rows + 1).clamp_max(table.shape[1] - 1)))
    assert check("prefill_is_masked_dense", model, "fastv", inputs, keep=4).passed is False
