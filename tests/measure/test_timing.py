"""Times: the parts of a generation, the stopwatch on the library's own code, and a model left as it was."""

from __future__ import annotations

import time

import pytest
import torch
from vtprune.models.engine.routing import Routing

import moulds
import vtprune
from vtprune.core.ledger import snapshot
from vtprune.core.stopwatch import stopwatch
from vtprune.measure import generation, prefill, timing
from vtprune.measure.text import prefill_text
from vtprune.methods.tome import ToMe
from vtprune.methods.uniform import Uniform

FAMILIES = [
    ("llava", "clip-llama"),
    ("llava-next", "clip-llama"),
    ("qwen2.5-vl", "images"),
    ("internvl", "qwen2"),
    ("gemma3", "sliding"),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models on a busy machine: two threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llava():
    return moulds.tiny("llava", "clip-llama")


def test_spread_and_clock():
    assert timing.spread([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    assert timing.spread([5.0, 1, 2, 3, 4, 0]) == {"median": 2.5, "p20": 1.0, "p80": 4.0}
    assert 4 < timing.clock(lambda: time.sleep(0.005), CPU, calls=2) < 500


def test_rounds_take_turns_and_throw_the_warm_up_away():
    seen: list[str] = []
    sides = {name: lambda name=name: seen.append(name) for name in "ab"}
    found = timing.rounds(sides, 3, CPU, calls={"a": 1, "b": 2})
    assert seen == [*"abb", *"bba", *"abb", *"bba"] and [len(v) for v in found.values()] == [3, 3]


def test_cpu_time_leaves_out_what_is_waited_for(monkeypatch):
    monkeypatch.setattr(timing, "timer", timing.timer)
    timing.use_cpu_time("cpu")
    assert timing.clock(lambda: time.sleep(0.05), CPU) < 25 and torch.get_num_threads() == 1
    with pytest.raises(vtprune.VtpruneError, match="--device cpu"):
        timing.use_cpu_time("cuda")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family, variant", FAMILIES)
def test_parts_of_every_family(family, variant):
    """Parts lie within the whole, and the model is left as it was."""
    model, inputs = moulds.tiny(family, variant)
    before = snapshot(model)
    out = generation.measure(model, inputs, "random", new_tokens=3, repeats=1, effective_tokens=0.5)
    assert snapshot(model) == before
    for side in ("dense", "pruned"):
        ms = {name: out[side][name]["median"] for name in generation.PARTS}
        assert all(ms[name] > 0 for name in generation.PARTS[:-1])
        assert ms["vision_ms"] + ms["prefill_ms"] <= 1.001 * ms["ttft_ms"]  # of one turn, nested
        assert 2 * ms["decode_ms"] < ms["e2e_ms"]
        assert out[side]["peak_bytes"] is None
    assert out["dense"]["scorer_ms"]["median"] == 0 < out["pruned"]["scorer_ms"]["median"]
    assert out["pruned"]["kv_bytes"] < out["dense"]["kv_bytes"] and out["effective_tokens"] <= 0.5 * out["tokens"]
    assert (
        set(out["ratio"]) == set(generation.COMPARED)
        and len(out["dense_over_dense"]) == 1
        and out["attention"] == "sdpa"
    )


def test_every_token_is_generated(llava):
    """Also where the model wants to stop at once, and with one token there is no decoding."""
    model, inputs = llava
    model.generation_config.eos_token_id = list(range(model.config.text_config.vocab_size - 1))
    lengths = []
    stock = model.generate

    def generate(*args, **kwargs):
        out = stock(*args, **kwargs)
        lengths.append(out.shape[1] - inputs["input_ids"].shape[1])
        return out

    model.generate = generate
    out = generation.measure(model, inputs, "uniform", new_tokens=1, repeats=1, keep=4)
    assert set(lengths) == {1} and out["dense"]["decode_ms"] is None is out["ratio"]["decode"]
    lengths.clear()
    generation.measure(model, inputs, "uniform", new_tokens=4, repeats=1, keep=4)
    assert set(lengths) == {1, 4}
    model.generate = lambda **kwargs: inputs["input_ids"]
    with pytest.raises(vtprune.VtpruneError, match="0 tokens instead of 1"):
        generation.generate(model, inputs, 1)


def own(model, inputs, recipe, **options) -> float:
    return generation.measure(model, inputs, recipe, new_tokens=1, repeats=1, **options)["pruned"]["scorer_ms"][
        "median"
    ]


@pytest.mark.ci
def test_the_scorer_is_the_librarys_own_time(llava, monkeypatch):
    """Methods that take 50 ms longer to decide: one behind the projector, and one inside the tower's blocks, where no
    hook is."""
    assert own(*llava, "flowcut", keep=0.5) > 0
    for method, name in ((Uniform, "uniform"), (ToMe, "tome")):
        before = own(*llava, name, keep=0.5)
        monkeypatch.setattr(
            method, "select", lambda self, view, cut, stock=method.select: time.sleep(0.05) or stock(self, view, cut)
        )
        assert own(*llava, name, keep=0.5) >= max(50, before), name


def test_a_side_branch_is_no_overhead(llava, monkeypatch):
    """A layer of the model that takes 30 ms, run by the branch from within a hook."""
    model, inputs = llava
    stock = Routing._branch
    monkeypatch.setattr(Routing, "_branch", lambda self, *args: time.sleep(0.03) or stock(self, *args))
    with stopwatch() as watch, vtprune.attach(model, "dpvr-lf"), torch.no_grad():
        spent = timing.clock(lambda: model(**inputs), CPU)
    signs = [sign for sign, *_ in watch.laps]
    total = timing.Moments(model).ms(watch.laps)
    gross = timing.Moments(model).ms(lap for lap in watch.laps if lap[0] > 0)
    assert signs.count(-1) >= 1 and gross >= 30 and gross - total >= 30 and 0 < total < spent - 30


def test_without_a_stopwatch_hooks_are_as_they_are(llava):
    model, inputs = llava
    with stopwatch() as watch:
        pass
    with vtprune.attach(model, "uniform", keep=4) as handle, torch.no_grad():
        model(**inputs)
        assert watch.laps == [] and handle._ledger._watch is None
        assert "Watch" not in str(
            [hook.__qualname__ for m in model.modules() for hook in m._forward_pre_hooks.values()]
        )
    with stopwatch() as watch, vtprune.attach(model, "uniform", keep=4):
        pass
    assert watch.laps == []


@pytest.mark.parametrize("at", [1, 2, 5, 17])
def test_the_model_is_clean_after_an_exception(llava, monkeypatch, at):
    """In the first attachment, in a dense turn, in a pruned one, under the stopwatch: wherever the language model's
    pass ends badly."""
    model, inputs = llava
    before, passes, last = snapshot(model), [], model.model.language_model.norm
    stock = type(last).forward

    def forward(self, *args, **kwargs):
        passes.extend([self] * (self is last))
        if len(passes) == at:
            raise RuntimeError("as asked")
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(type(last), "forward", forward)
    with pytest.raises(RuntimeError, match="as asked"):
        generation.measure(model, inputs, "fastv", new_tokens=1, repeats=1, keep=4, layer=2)
    assert snapshot(model) == before
    vtprune.attach(model, "uniform").remove()


def test_refusals(llava):
    model, inputs = llava
    with pytest.raises(vtprune.VtpruneError, match="at least 1"):
        generation.measure(model, inputs, "uniform", new_tokens=0, repeats=1)
    with pytest.raises(vtprune.VtpruneError, match="did you mean"):
        generation.measure(model, inputs, "unifrom", new_tokens=1, repeats=1)
    tower, pixels = moulds.tiny("hf-vit", "clip")
    with pytest.raises(vtprune.UnsupportedError, match="no language model"):
        generation.measure(tower, pixels, "uniform", new_tokens=1, repeats=1)


def test_moments_on_a_gpu_are_events(monkeypatch):
    """Nothing waits for them, and laps are read from them; a model on two devices is waited for instead."""
    stream = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, where):
            stream.append(self)

        def elapsed_time(self, other):
            return 2.0 * (stream.index(other) - stream.index(self))

    waits = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)

    class Model:
        def __init__(self, *devices):
            self.devices = devices

        def parameters(self):
            return [type("P", (), {"device": torch.device(d)})() for d in self.devices]

    moments = timing.Moments(Model("cuda:0", "cuda:0"))
    a, b, c = moments.now(), moments.now(), moments.now()
    assert moments.ms([(1, a, c), (-1, a, b)]) == 2.0 and waits == []
    moments = timing.Moments(Model("cuda:0", "cuda:1"))
    assert moments.ms([(1, moments.now(), moments.now())]) >= 0 and len(waits) == 4


@pytest.mark.parametrize(
    ("ratios", "noise", "rest", "says"),
    [
        ([0.7, 0.72, 0.8], [1.0, 1.1], [0.6, 0.6, 0.7], ""),
        ([0.7, 0.9, 1.01], [1.0], [0.6, 0.6, 0.7], "noise"),  # on both sides
        ([0.7, 0.72], [1.0], [0.6, 0.6], "noise"),  # too few rounds
        ([1.2, 1.25, 1.3], [1.0, 1.01], [0.9, 1.0, 1.0], ""),  # the scorer costs more than the layers save
        ([1.7, 1.83, 1.9], [1.0, 1.8], [1.6, 1.7, 1.8], "noise"),  # two dense runs differ as much
        ([1.7, 1.83, 1.9], [1.0, 1.02], [1.6, 1.7, 1.8], "?"),  # slower for less work, and nothing says why
    ],
)
def test_what_ratios_of_times_tell(ratios, noise, rest, says):
    assert timing.verdict(ratios, noise, rest) == says
    row = {"prefill_ratio": ratios[1], "prefill_range": [min(ratios), max(ratios)], "prefill_verdict": says}
    text = prefill_text(row)
    assert text.startswith(says or f"{ratios[1]:.2f}") and f"[{min(ratios):.2f}, {max(ratios):.2f}]" in text


def test_cpu_time_is_of_one_thread_and_ends(llava):
    before, threads = timing.timer, torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), timing.cpu_time():
        assert timing.timer is time.thread_time and torch.get_num_threads() == 1
        1 / 0  # noqa: B018
    assert timing.timer is before and torch.get_num_threads() == threads
    model, inputs = llava
    out = prefill.prefill(
        model,
        inputs,
        vtprune.Recipe(name="u", stages=(vtprune.Stage(method="uniform", keep=2),)),
        repeats=3,
        cpu_time=True,
    )
    low, high = out["prefill_range"]
    assert (
        0 < low <= out["prefill_ratio"] <= high
        and out["prefill_verdict"] in ("", "noise", "?")
        and timing.timer is before
    )


def test_every_pruned_prefill_stands_between_two_dense_ones(llava, monkeypatch):
    """Work that grows steadily, as on a machine that gets busier, leaves no trace in the ratio."""
    model, inputs = llava
    seen, now = [], iter(range(1, 100))

    def clock(call, device):
        seen.append(bool(model._forward_hooks or any(m._forward_pre_hooks for m in model.modules())))
        return float(next(now))

    monkeypatch.setattr(timing, "clock", clock)
    out = prefill.prefill(
        model, inputs, vtprune.Recipe(name="u", stages=(vtprune.Stage(method="uniform", keep=2),)), repeats=3
    )
    assert seen == [False, False, *[True, True, False] * 3]
    assert out["prefill_ratio"] == pytest.approx(7 / 6.5)  # 4 / (2+5)/2, 7 / (5+8)/2, 10 / (8+11)/2


def test_the_prefill_of_the_benchmark_keeps_its_ways(llava):
    model, inputs = llava
    out = prefill.prefill(model, inputs, None, repeats=1)
    assert out["prefill_ratio"] == 1 and out["prefill_ms"] == out["dense_prefill_ms"] > 0
