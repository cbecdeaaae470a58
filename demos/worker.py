"""The model in a process of its own, and what the page asks of it. Both start at the same time, the page stays quick
while the model computes, and everything that crosses between the two is plain data."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing import connection, util
from multiprocessing.managers import BaseManager, IteratorProxy  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import vtprune
from vtprune.core.recipe import Recipe
from vtprune.core.types import VtpruneError
from vtprune.inputs import demo_model, models
from vtprune.measure import run
from vtprune.show import theatre
from vtprune.show.web import encode

from . import render
from .checks import is_video, proper, short
from .engine import Engine
from .sides import Side

NAMES = ("A", "B")
KILL = 9  # what Linux does to a process when memory runs out
LONGEST_JSON, LONGEST_NAME = 100_000, 200  # characters of a recipe file, and of the name in it


class Desk:
    """One engine and who asks it what: ``token`` names the asking page, for :meth:`stop`."""

    engine: Any

    def __init__(self) -> None:
        self._running: dict[str, set[threading.Event]] = {}
        self._lock = threading.Lock()

    def load(self, model: str | None, device: str, dtype: str) -> None:
        """Loads ``model`` (folder or hub id, ``None``: the bundled one). Raises :class:`VtpruneError` as
        :func:`vtprune.inputs.models.load` does."""
        import torch

        gc.enable()
        # the page needs a core as well; threads that wait for each other take it away
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
        self.path, self.device, self.dtype = model, device, dtype
        self.engine = Engine(*models.load(model, device, dtype))

    def about(self) -> dict[str, Any]:
        """``model`` in words, ``recipes`` that it takes, ``refused`` ``[name, why]``, and whether it takes
        ``videos``."""
        offers, geometry = self.engine.recipes(), self.engine.geometry
        name = Path(self.path).name if self.path else "the bundled VLM"
        about = (
            f"{name}: {type(self.engine.model).__name__}, {'about ' if geometry.variable else ''}{geometry.tokens} "
            "visual tokens per image, "
        )
        about += f"{geometry.llm_layers} layers, {self.device}, {self.dtype} - vtprune {vtprune.__version__}, "
        about += f"torch {version('torch')}, transformers {version('transformers')}"
        videos = getattr(self.engine.processor, "video_processor", None) is not None
        return {
            "model": about,
            "recipes": [o.name for o in offers if not o.reason],
            "refused": [[o.name, o.reason] for o in offers if o.reason],
            "videos": videos,
        }

    def stop(self, token: str) -> None:
        """Ends everything that ``token`` has running or waiting."""
        with self._lock:
            for event in self._running.get(token, ()):
                event.set()

    def ask(
        self,
        token: str,
        shown: str | None,
        question: str | None,
        sides: Sequence[Mapping[str, Any]],
        max_new_tokens: int,
    ) -> Iterator[dict[str, Any]]:
        """Two sides' answers to one question as they grow: dicts with ``side`` (0, 1) and ``text``, or ``status``; the
        last one has ``answers``, as HTML ``metrics`` and ``theatre``, and ``files`` name -> bytes.

        Args:
            shown: path of a picture or a video. sides: two, each as :meth:`side` takes it.
        """
        chosen = [self.side(given, name) for given, name in zip(sides, NAMES, strict=True)]
        with self._registered(token) as stop:
            results = []
            for i, side in enumerate(chosen):
                yield {"status": f"{NAMES[i]} ({side.name}) waits for the model"}
                begun = False
                turns = self.engine.stream(side, shown, question or "", max_new_tokens=max_new_tokens, stop=stop)
                for turn in _named(NAMES[i], turns):
                    if not begun:
                        begun = True
                        yield {"status": f"{NAMES[i]} ({side.name}) is answering"}
                    yield {"side": i, "text": turn.text}
                if turn.result is None or stop.is_set():
                    yield {"status": "stopped", "stopped": True}
                    return
                results.append(turn.result)
            yield {"status": "measuring both in turns"}
            rounds = self.engine.rounds(chosen, shown, question or "", stop=stop)
            if rounds is None:
                yield {"status": "stopped", "stopped": True}
                return
        a, b = results
        heads = [f"{name}: {r.name}" for name, r in zip(NAMES, results, strict=True)]
        scenes = [
            theatre.scene(r.report, r.views, title=f"{head}: {r.answer}")
            for head, r in zip(heads, results, strict=True)
        ]
        facts = json.dumps(
            {
                "question": a.question,
                **{head: r.report.recipe or "dense" for head, r in zip(heads, results, strict=True)},
            }
        )
        files = {
            f"recipe-{name.lower()}.json": render.recipe_json(r).encode()
            for name, r in zip(NAMES, results, strict=True)
            if r.recipe is not None
        }
        yield {
            "status": f"done: {outcome(a, b)}",
            "answers": [r.answer for r in results],
            "metrics": render.metrics_html(render.metrics(a, b, rounds), *heads),
            "theatre": theatre.element(scenes),
            "files": {
                "vtprune.png": encode(render.picture(a.question, *results)),
                "theatre.html": theatre.page(scenes, a.question, facts).encode(),
                **self._program(chosen, a.question, shown, max_new_tokens),
                **files,
            },
        }

    def compare(
        self,
        token: str,
        shown: str | None,
        question: str | None,
        share: float,
        budget: str,
        seed: int,
        truth: str | None,
    ) -> Iterator[dict[str, Any]]:
        """Every recipe at one budget: dicts with ``cards`` (HTML of what is done), ``done`` and ``of``; the last one
        has ``files`` name -> bytes as well."""
        truth = (truth or "").strip() or None
        entries: list[Any] = []
        cards: list[str] = []
        with self._registered(token) as stop:
            names = [o.name for o in self.engine.recipes() if not o.reason]
            of = 1 + len(names)
            for entry in self.engine.compare(
                shown, question or "", share, truth=truth, budget=budget, seed=seed, names=names, stop=stop
            ):
                entries.append(entry)
                cards.append(render.card(entry))
                yield {
                    "status": f"{entry.name} is done",
                    "cards": render.cards_html(cards),
                    "done": len(entries),
                    "of": of,
                }
            if stop.is_set():
                yield {
                    "status": "stopped",
                    "stopped": True,
                    "done": len(entries),
                    "of": of,
                    "cards": render.cards_html(cards),
                }
                return
        sides = [Side(None) if e.name == "dense" else e.result.side for e in entries if e.result is not None]
        yield {
            "status": "all done",
            "cards": render.cards_html(cards),
            "done": of,
            "of": of,
            "files": {
                "methods.png": encode(render.sheet(entries, (question or "").strip(), truth=truth)),
                **self._program(sides, (question or "").strip(), shown, run.MAX_NEW_TOKENS),
            },
        }

    def side(self, given: Mapping[str, Any], name: str) -> Any:
        """A :class:`vtprune.demos.engine.Side` from what the page sends: ``recipe`` (a name; ``"dense"``), ``file`` (a
        recipe's JSON text instead), ``budget``, ``share``, ``options`` (JSON text) and ``seed``. Raises
        :class:`VtpruneError` that says which side and what is wrong."""
        try:
            options = _json(given.get("options") or "{}", "options")
            recipe: Any = None if given["recipe"] == "dense" else given["recipe"]
            if given.get("file") is not None:
                if not given["file"].strip():
                    raise VtpruneError("the recipe file is empty")
                recipe = Recipe.from_dict(_json(given["file"], "recipe file"))
                short(str(recipe.name), "the recipe's name", LONGEST_NAME)
            elif recipe is not None and recipe not in [o.name for o in self.engine.recipes()]:
                raise VtpruneError(f"unknown recipe {recipe!r}")
            stages = recipe.stages if isinstance(recipe, Recipe) else ()
            weights = [o["weights"] for o in (options, *(s.options for s in stages)) if o.get("weights")]
            if any(Path(str(w)).parent != demo_model.FOLDER for w in weights):
                raise VtpruneError(
                    "weights= names a file of the machine that runs the demo; give it on the command line"
                )
            return Side(recipe, given.get("budget", "own"), given.get("share", 0.5), options, given.get("seed", 0))
        except VtpruneError as e:
            raise VtpruneError(f"{name}: {e}") from e

    def _program(self, sides: Sequence[Any], question: str, shown: str | None, max_new_tokens: int) -> dict[str, bytes]:
        """The program that repeats ``sides``; none for a video."""
        if shown is None or is_video(shown):
            return {}
        how = {
            "trained": self.engine.trained,
            "max_new_tokens": max_new_tokens,
            "device": self.device,
            "dtype": self.dtype,
        }
        return {"repeat.py": render.snippet(sides, question, self.path, Path(shown).name, **how).encode()}

    def _registered(self, token: str) -> _Registered:
        return _Registered(self._running, self._lock, token)


def outcome(a: Any, b: Any) -> str:
    """Two results in a sentence."""
    work = (
        f"B reads {100 * b.report.effective_tokens / a.report.effective_tokens:.0f} % of A's visual tokens"
        if a.report.effective_tokens
        else ""
    )
    same = "the same answer" if a.answer == b.answer else "another answer"
    return ", ".join(part for part in (work, same, a.note and f"patches are drawn on grey ({a.note})") if part)


class _Registered:
    """An event that :meth:`Desk.stop` finds for as long as the block runs."""

    def __init__(self, running: dict[str, set[threading.Event]], lock: threading.Lock, token: str):
        self.running, self.lock, self.token, self.event = running, lock, token, threading.Event()

    def __enter__(self) -> threading.Event:
        with self.lock:
            self.running.setdefault(self.token, set()).add(self.event)
        return self.event

    def __exit__(self, *exc: object) -> None:
        self.event.set()
        with self.lock:
            self.running[self.token].discard(self.event)
            if not self.running[self.token]:
                del self.running[self.token]


def _named(name: str, turns: Iterator[Any]) -> Iterator[Any]:
    """``turns``, with the side's name in what cannot be attached."""
    try:
        yield from turns
    except VtpruneError as e:
        raise VtpruneError(f"{name}: {e}") from e


def _json(text: str, what: str) -> dict[str, Any]:
    short(text, what, LONGEST_JSON)
    try:
        found = json.loads(text)
        plain = json.dumps(found, ensure_ascii=False)
    except (ValueError, RecursionError) as e:  # also numbers that are too long, and lists in lists without end
        raise VtpruneError(f"{what}: not JSON ({e})") from e
    proper(plain, what)  # an escape in the text may have become half of a character
    if not isinstance(found, dict):
        raise VtpruneError(f'{what}: a JSON object is needed, such as {{"layer": 3}}')
    return found


# ---------------------------------------------------------------------------------------------------------------
# process


class _Manager(BaseManager):
    """Serves a :class:`Desk`, one thread per caller."""


_Manager.register(
    "Desk",
    Desk,
    exposed=("load", "about", "ask", "compare", "stop"),
    method_to_typeid={"ask": "Iterator", "compare": "Iterator"},
)
_Manager.register("Iterator", proxytype=IteratorProxy, create_method=False)


def _begin() -> None:
    """In the new process: it ends with its parent, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes sends it to both; the parent tidies up

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Worker:
    """A :class:`Desk` in another process. :attr:`desk` waits until the model is there."""

    def __init__(self, model: str | None, device: str, dtype: str):
        # A forked process keeps the torch that is imported here already; elsewhere, or once CUDA is in use, it starts
        # anew.
        self._manager = _Manager(ctx=multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"))
        # of the socket between the two: made here, it goes with this process, however the other one ends
        util.get_temp_dir()
        before = multiprocessing.active_children()
        self._manager.start(_begin)
        (self.process,) = [p for p in multiprocessing.active_children() if p not in before]
        self._desk: Any = self._manager.Desk()  # type: ignore[attr-defined]
        self._loaded = ThreadPoolExecutor(1).submit(self._desk.load, model, device, dtype)

    @property
    def desk(self) -> Any:
        """The desk, once the model is loaded. Raises what loading raised."""
        self._loaded.result()
        return self._desk

    def state(self) -> str:
        """Why the process has ended; empty while it lives."""
        if (code := self.process.exitcode) is None:
            return ""
        how = (
            f"code {code}"
            if code >= 0
            else f"{signal.Signals(-code).name}{', perhaps for want of memory' if -code == KILL else ''}"
        )
        return f"the model's process has ended ({how})"

    def wait(self) -> str:
        """Returns when the process has ended, and :meth:`state`."""
        connection.wait([self.process.sentinel])
        while not (why := self.state()):  # another thread may be collecting its code just now
            time.sleep(0.01)
        return why

    def close(self) -> None:
        """Ends the process."""
        self._manager.shutdown()
