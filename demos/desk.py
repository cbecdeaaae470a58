"""What the page asks of the model: two sides' answers, every recipe at one budget. Everything that comes back is plain
data, since it crosses from one process to another."""

from __future__ import annotations

import gc
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vtprune
from vtprune.core.types import VtpruneError
from vtprune.inputs import models
from vtprune.measure import run, samples
from vtprune.show import theatre
from vtprune.show.web import encode

from . import cards, drawings, forms, metrics, repeat
from .checks import LONGEST_TRUTH, is_video, short
from .engine import Engine
from .results import Entry, Result, Rounds, Turn
from .samples import number
from .sides import Side
from .stops import Stops

NAMES = ("A", "B")
Update = dict[str, Any]
START = ("flowcut", "pyramiddrop", "uniform")  # to begin with the first that the model takes
STOPPED: Update = {"status": "stopped", "stopped": True}


class Desk:
    """One engine and who asks it what: ``token`` names the asking page, for :meth:`stop`."""

    engine: Any

    def __init__(self) -> None:
        self._running = Stops()

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
        """``model`` in words and ``more`` of it, ``recipes`` that it takes, the one to ``start`` with, ``refused``
        ``[name, why]``, and whether it takes ``videos``."""
        offers, geometry = self.engine.recipes(), self.engine.geometry
        name = Path(self.path).name if self.path else "the bundled VLM"
        about = f"{name}, {'about ' if geometry.variable else ''}{geometry.tokens} visual tokens per image"
        more = f"{type(self.engine.model).__name__}, {geometry.llm_layers} layers, {self.device}, {self.dtype}; "
        more += f"vtprune {vtprune.__version__}, torch {version('torch')}, transformers {version('transformers')}"
        videos = getattr(self.engine.processor, "video_processor", None) is not None
        taken = [o.name for o in offers if not o.reason]
        return {
            "model": about,
            "more": more,
            "recipes": taken,
            "start": next((name for name in START if name in taken), "dense"),
            "refused": [[o.name, o.reason] for o in offers if o.reason],
            "videos": videos,
        }

    def stop(self, token: str) -> None:
        """Ends everything that ``token`` has running or waiting."""
        self._running.stop(token)

    def ask(
        self,
        token: str,
        shown: str | None,
        question: str | None,
        sides: Sequence[Mapping[str, Any]],
        max_new_tokens: int,
        truth: str | None = None,
    ) -> Iterator[Update]:
        """Two sides' answers to one question as they grow: dicts with ``side`` (0, 1), ``head`` and ``text``, or
        ``status``; the last one has ``answers``, their ``heads`` and whether they are ``right`` (``None`` without
        ``truth``), as HTML ``metrics`` and ``theatre``, and ``files`` name -> bytes.

        Args:
            shown: path of a picture or a video. sides: two, each as :meth:`side` takes it. truth: the right answer.
        """
        truth = (truth or "").strip() or None
        short(truth or "", "the right answer", LONGEST_TRUTH)
        chosen = [self.side(fields, name) for fields, name in zip(sides, NAMES, strict=True)]
        results: list[Result] = []
        with self._running.registered(token) as stop:
            for i, side in enumerate(chosen):
                yield {"status": f"{NAMES[i]} ({side.name}) waits for the model"}
                turns = self.engine.stream(side, shown, question or "", max_new_tokens=max_new_tokens, stop=stop)
                result = yield from _answer(i, side, turns)
                if result is None or stop.is_set():
                    yield STOPPED
                    return
                results.append(result)
            yield {"status": "measuring both in turns"}
            rounds = self.engine.rounds(chosen, shown, question or "", stop=stop)
            if rounds is None:
                yield STOPPED
                return
        a, b = results
        last = _both(a, b, rounds, truth)
        last["files"] |= self._program(chosen, a.question, shown, max_new_tokens) | _recipes(results)
        yield last

    def compare(
        self,
        token: str,
        shown: str | None,
        question: str | None,
        share: float,
        budget: str,
        seed: int,
        truth: str | None,
    ) -> Iterator[Update]:
        """Every recipe at one budget: dicts with ``cards`` (HTML of what is done), ``done`` and ``of``; the last one
        has ``files`` name -> bytes as well."""
        truth, asked = (truth or "").strip() or None, (question or "").strip()
        entries: list[Entry] = []
        with self._running.registered(token) as stop:
            names = [o.name for o in self.engine.recipes() if not o.reason]
            of = 1 + len(names)
            html: list[str] = []

            def so_far() -> Update:
                return {"cards": cards.cards_html(html), "done": len(entries), "of": of}

            for entry in self.engine.compare(
                shown, question or "", share, truth=truth, budget=budget, seed=seed, names=names, stop=stop
            ):
                entries.append(entry)
                html.append(cards.card(entry))
                yield {"status": f"{entry.name} is done", **so_far()}
            if stop.is_set():
                yield {**STOPPED, **so_far()}
                return
        sides = [Side(None) if e.name == "dense" else e.result.side for e in entries if e.result is not None]
        files = {
            "methods.png": encode(drawings.sheet(entries, asked, truth=truth)),
            **self._program(sides, asked, shown, run.MAX_NEW_TOKENS),
        }
        yield {"status": "all done", **so_far(), "done": of, "files": files}

    def side(self, fields: Mapping[str, Any], name: str) -> Side:
        """A side from what the page sends, see :func:`vtprune.demos.forms.side`."""
        return forms.side(fields, name, lambda: [o.name for o in self.engine.recipes()])

    def _program(
        self, sides: Sequence[Side], question: str, shown: str | None, max_new_tokens: int
    ) -> dict[str, bytes]:
        """The program that repeats ``sides``; none for a video."""
        if shown is None or is_video(shown):
            return {}
        how = {
            "sample": number(Path(shown)),
            "trained": self.engine.trained,
            "max_new_tokens": max_new_tokens,
            "device": self.device,
            "dtype": self.dtype,
        }
        return {"repeat.py": repeat.snippet(sides, question, self.path, Path(shown).name, **how).encode()}


def _answer(i: int, side: Side, turns: Iterator[Turn]) -> Generator[Update, None, Result | None]:
    """One side's answer as it grows; returns the result, ``None`` if it was stopped before the model began."""
    result, begun = None, False
    for turn in _named(NAMES[i], turns):
        if not begun:
            begun = True
            yield {"status": f"{NAMES[i]} ({side.name}) is answering"}
        yield {"side": i, "head": f"{NAMES[i]}: {side.name}", "text": turn.text}
        result = turn.result
    return result


def _both(a: Result, b: Result, rounds: Rounds, truth: str | None) -> Update:
    """The last update of two answers, without the files that repeat them."""
    heads = [f"{name}: {r.name}" for name, r in zip(NAMES, (a, b), strict=True)]
    scenes = [
        theatre.scene(r.report, r.views, title=f"{head}: {r.answer}") for head, r in zip(heads, (a, b), strict=True)
    ]
    recipes = {head: r.report.recipe or "dense" for head, r in zip(heads, (a, b), strict=True)}
    facts = json.dumps({"question": a.question, **recipes})
    return {
        "headline": metrics.headline(a, b, rounds),
        "answers": [a.answer, b.answer],
        "heads": heads,
        "right": [None if truth is None else samples.matches(r.answer, truth) for r in (a, b)],
        "metrics": metrics.metrics_html(metrics.metrics(a, b, rounds), *heads),
        "theatre": theatre.element(scenes),
        "files": {
            "vtprune.png": encode(drawings.picture(a.question, a, b)),
            "theatre.html": theatre.page(scenes, a.question, facts).encode(),
        },
    }


def _recipes(results: Sequence[Result]) -> dict[str, bytes]:
    """The recipe files of both sides; the dense model has none."""
    return {
        f"recipe-{name.lower()}.json": repeat.recipe_json(r).encode()
        for name, r in zip(NAMES, results, strict=True)
        if r.recipe is not None
    }


def _named(name: str, turns: Iterator[Turn]) -> Iterator[Turn]:
    """``turns``, with the side's name in what cannot be attached."""
    try:
        yield from turns
    except VtpruneError as e:
        raise VtpruneError(f"{name}: {e}") from e
