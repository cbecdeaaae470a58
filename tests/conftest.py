"""Cases are generated from the registries: what is registered is covered."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# processes that tests start share the cores too: two threads each that wait for one another take several times as long
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if "wandb" not in sys.modules:  # timm would import it, for four seconds in every process
    sys.modules["wandb"] = None  # type: ignore[assignment]
if not torch.cuda.is_available():  # before anything imports triton: its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vtprune.models.base import ADAPTERS

import moulds
import vtprune
from browser import CHROMIUM, QUIET
from choice import covering, kinds, of_pictures, pairs

collect_ignore = ["plugin"]  # a distribution of its own: test_plugins.py installs it and runs its tests

# Parallel test processes share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


# What takes longest begins first.
FIRST = ("test_demo_browser.py", "test_contract.py", "test_kernels.py", "test_plugins.py", "test_runs.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Every module runs in one process: what its tests share is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # xdist's own order is by the number of tests
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)  # before -m leaves tests out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _leave_to_ci(items)
    order = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(FIRST)))


def _leave_to_ci(items: list[pytest.Item]) -> None:
    """Of a test's cases that ``sampled(n)`` marks all but one in n carry ``ci``: which follows from their names, as if
    drawn, so that no parameter is left out by a rhythm of its own."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for own in cases.values():
        (count,) = own[0].get_closest_marker("sampled").args
        own.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in own[-(-len(own) // count) :]:
            item.add_marker("ci")


@pytest.fixture
def tiny():
    """``tiny(family, variant) -> (model, inputs)``: a private copy of a tiny random model."""

    def build(family: str, variant: str) -> tuple[Any, dict[str, Any]]:
        if (package := ADAPTERS.get(family).package) is not None:
            pytest.importorskip(package)
        return moulds.tiny(family, variant)

    return build


@pytest.fixture
def checkpointed(monkeypatch):
    """``checkpointed(layer, reentrant)``: from now on ``torch.utils.checkpoint`` runs a layer, and its host does not
    know."""

    def wrap(layer: Any, reentrant: bool) -> None:
        whole = layer.forward

        def again(x: Any, **kwargs: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(lambda y: whole(y, **kwargs), x, use_reentrant=reentrant)

        monkeypatch.setattr(layer, "forward", again)

    return wrap


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser; its pages and contexts are the tests' own."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)("no chromium found; CHROMIUM=PATH names one")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "some_method" in metafunc.fixturenames:
        # with the bundled model, which is asked about pictures, one of each kind; the others are slow
        # and on their defaults, which those that have to be fitted do not have
        every = [name for name in vtprune.methods() if of_pictures(name) and not vtprune.describe(name).fitted]
        asked = [[name for name in group if name in every] for group in kinds()]
        some = {group[0] for group in asked if group}
        names = [pytest.param(name, marks=() if name in some else pytest.mark.slow) for name in every]
        metafunc.parametrize("some_method", names)
    if "method_name" in metafunc.fixturenames:
        metafunc.parametrize("method_name", vtprune.methods())
    if "pair" in metafunc.fixturenames:
        everything = [
            pytest.param(p, id="-".join(map(str, p)), marks=() if p in covering() else pytest.mark.slow)
            for p in pairs()
        ]
        metafunc.parametrize("pair", everything)
