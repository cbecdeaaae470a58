"""Long use: attachments come and go, forwards break off anywhere, threads and interleaved requests share a model;
answers stay equal and memory stays flat.

Scaled down by default; ``-m slow`` runs 1,000 cycles, 300 exceptions, 4 threads x 25 requests and 200 interleaved
requests.
"""

from __future__ import annotations

import gc
import inspect
import os
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.core.ledger import snapshot

RECIPES: dict[str, dict[str, Any]] = {
    "fastv": {"keep": 3},
    "pyramiddrop": {"keep": 2},
    "random": {"keep": 4, "site": "llm.0"},
    "pool": {"keep": 4},
    "flowcut": {"keep": 4},
    "tome": {"keep": 6},
    "dpvr-lf": {},
    "drop-all": {"layer": 2},
}
RULES: dict[str, Any] = {
    "max_new_tokens": 3,
    "min_new_tokens": 3,
    "do_sample": False,
    "suppress_tokens": list(range(8)),
}
OBJECTS, MEGABYTES = 1500, 40  # that a run may leave behind: far less than one per cycle or request
Inputs = dict[str, Tensor]


class SequenceLength:
    """Live objects and resident memory, now against then."""

    def __init__(self) -> None:
        gc.collect()
        self.objects, self.memory = len(gc.get_objects()), self._resident()

    @staticmethod
    def _resident() -> int:
        if not os.path.exists("/proc/self/statm"):  # no such file elsewhere than on Linux: objects alone are counted
            return 0
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def flat(self) -> None:
        now = SequenceLength()
        assert now.objects - self.objects < OBJECTS, f"{now.objects - self.objects} more objects"
        assert now.memory - self.memory < MEGABYTES << 20, f"{(now.memory - self.memory) >> 20} MB more"


def answer(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        out = model.generate(**inputs, **RULES, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits, 1)


def requests(inputs: Inputs, count: int, draw: random.Random) -> list[Inputs]:
    """Prompts of their own length, words and picture."""
    out = []
    for i in range(count):
        b, g = i % len(inputs["input_ids"]), torch.Generator().manual_seed(i)
        real = inputs["attention_mask"][b].bool()
        ids = inputs["input_ids"][b : b + 1, real]
        ids = torch.cat([ids, torch.full((1, draw.randint(0, 9)), 8)], 1)
        ids = torch.where(ids >= 8, torch.randint(8, 64, ids.shape, generator=g), ids)
        pixels = torch.randn(inputs["pixel_values"][b : b + 1].shape, generator=g)
        out.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    return out


def cycles(model: Any, inputs: Inputs, count: int) -> None:
    """Attach, generate, remove, one recipe after the other: each answers as at first, and the model is as it was."""
    dense, clean = answer(model, inputs), snapshot(model)
    first: dict[str, Tensor] = {}
    level = None
    for i in range(count):
        name = list(RECIPES)[i % len(RECIPES)]
        with vtprune.attach(model, name, **RECIPES[name]) as handle:
            got = answer(model, inputs)
            assert handle.report().stages
        assert torch.equal(got, first.setdefault(name, got)), f"cycle {i}: {name} answers otherwise than at first"
        if i % 10 == 0:
            assert snapshot(model) == clean and torch.equal(answer(model, inputs), dense), f"cycle {i}: not restored"
        if i == 2 * len(RECIPES):
            level = SequenceLength()
    assert level is not None
    level.flat()


class Planted(Exception):
    pass


def exceptions(model: Any, inputs: Inputs, count: int, draw: random.Random) -> None:
    """Exceptions, among them Ctrl-C, in front of or behind any module of the model, in a forward or in ``generate``:
    the next answer is right."""
    modules = [
        m for n, m in model.named_modules() if n and len(list(m.children())) != 1 and "vision_model.post" not in n
    ]
    dense, clean = answer(model, inputs), snapshot(model)
    broken, level = 0, None
    for i in range(count):
        name = draw.choice(list(RECIPES))
        with vtprune.attach(model, name, **RECIPES[name]):
            want = answer(model, inputs) if i % 5 == 0 else None
            for _ in range(2):
                broken += _break(model, inputs, draw.choice(modules), draw)
            if want is not None:
                assert torch.equal(answer(model, inputs), want), f"{i}: {name} answers otherwise after an exception"
        if i % 5 == 0:
            assert snapshot(model) == clean and torch.equal(answer(model, inputs), dense), f"{i}: not restored"
        if i == count // 4:
            level = SequenceLength()
    assert broken > count, "most of the planted exceptions came through"
    assert level is not None
    level.flat()


def _break(model: Any, inputs: Inputs, module: Any, draw: random.Random) -> bool:
    """One forward or generation with an exception planted at ``module``'s first, second or third call; whether it was
    raised."""
    kind, left = draw.choice((Planted, KeyboardInterrupt)), [draw.choice((1, 1, 2, 3))]

    def trap(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise kind

    hook = module.register_forward_pre_hook(trap) if draw.random() < 0.5 else module.register_forward_hook(trap)
    try:
        if draw.random() < 0.5:
            answer(model, inputs)
        else:
            with torch.no_grad():
                model(**inputs)
    except (Planted, KeyboardInterrupt):
        return True
    finally:
        hook.remove()
    return False


def in_threads(model: Any, inputs: Inputs, threads: int, each: int, draw: random.Random) -> None:
    """Threads share an attached model: every request is answered as alone."""
    asked = requests(inputs, threads * each, draw)
    for name in ("fastv", "flowcut", "pool"):
        with vtprune.attach(model, name, **RECIPES[name]):
            want = [answer(model, r) for r in asked]
            level, got, errors = SequenceLength(), {}, []

            def work(mine: range, got: dict = got, errors: list = errors) -> None:
                try:
                    for i in mine:
                        got[i] = answer(model, asked[i])
                except Exception as e:  # told below, in the thread that waits
                    errors.append(e)

            workers = [threading.Thread(target=work, args=(range(t * each, t * each + each),)) for t in range(threads)]
            for w in workers:
                w.start()
            for w in workers:
                w.join()
            assert not errors, errors[0]
            for i, right in enumerate(want):
                assert torch.allclose(got[i], right, atol=1e-5 * float(right.abs().max())), (
                    f"{name}: request {i} of {len(want)} is answered otherwise"
                )
            got.clear()
            level.flat()


def interleaved(model: Any, inputs: Inputs, count: int, draw: random.Random) -> None:
    """Requests are open at once and go on in any order: each gives what it gives alone."""
    asked = requests(inputs, count, draw)
    for name in ("pyramiddrop", "tome", "dpvr-lf"):
        with vtprune.attach(model, name, **RECIPES[name]):
            alone = [list(_steps(model, r)) for r in asked[:8]]
            level = SequenceLength()
            alone += [list(_steps(model, r)) for r in asked[8:]]
            running = {i: _steps(model, r) for i, r in enumerate(asked)}
            got: dict[int, list[Tensor]] = {
                i: [next(s)] for i, s in running.items()
            }  # all prompts are read before any goes on
            while running:
                i = draw.choice(list(running))
                step = next(running[i], None)
                if step is None:
                    del running[i]
                else:
                    got[i].append(step)
            for i, right in enumerate(alone):
                assert all(torch.equal(a, b) for a, b in zip(got[i], right, strict=True)), (
                    f"{name}: request {i} of {count} gives something else"
                )
            del alone, got
            level.flat()


def _steps(model: Any, request: Inputs) -> Iterator[Tensor]:
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    mask = request["attention_mask"]
    with torch.no_grad():
        out = model(**request, use_cache=True)
    yield out.logits[:, -1]
    for i in range(3):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        with torch.no_grad():
            more = {name: getattr(out, name), "position_ids": mask.sum(1, keepdim=True) - 1}
            out = model(input_ids=torch.tensor([[9 + i]]), attention_mask=mask, use_cache=True, **more)
        yield out.logits[:, -1]


@pytest.fixture
def model_and_inputs(tiny):
    return tiny("llava", "clip-llama")


full = pytest.mark.slow


@pytest.mark.ci
@pytest.mark.parametrize("count", [32, pytest.param(1000, marks=full)])
def test_attach_generate_remove(model_and_inputs, count):
    cycles(*model_and_inputs, count)


@pytest.mark.ci
@pytest.mark.parametrize("count", [20, pytest.param(300, marks=full)])
def test_injected_exceptions(model_and_inputs, count):
    exceptions(*model_and_inputs, count, random.Random(0))


@pytest.mark.ci
@pytest.mark.parametrize(("threads", "each"), [(3, 2), pytest.param(4, 25, marks=full)])
def test_requests_in_threads(model_and_inputs, threads, each):
    in_threads(*model_and_inputs, threads, each, random.Random(1))


@pytest.mark.ci
@pytest.mark.parametrize("count", [6, pytest.param(200, marks=full)])
def test_interleaved_requests(model_and_inputs, count):
    interleaved(*model_and_inputs, count, random.Random(2))


@pytest.mark.ci
def test_a_leak_is_seen(model_and_inputs):
    model, inputs = model_and_inputs
    level, kept = SequenceLength(), []
    for _ in range(30):
        with vtprune.attach(model, "fastv", keep=3) as handle:
            answer(model, inputs)
        kept.append(handle)
    with pytest.raises(AssertionError, match="more objects"):
        level.flat()
