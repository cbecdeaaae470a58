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
from vtprune.measure import run
from vtprune.show import theatre
from vtprune.show.web import encode

from . import cards, drawings, forms, metrics, repeat
from .checks import is_video
from .engine import Engine
from .results import Entry, Result, Rounds, Turn
from .sides import Side
from .stops import Stops

NAMES = ("A", "B")
Update = dict[str, Any]
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
        self._running.stop(token)

    def ask(
        self,
        token: str,
        shown: str | None,
        question: str | None,
        sides: Sequence[Mapping[str, Any]],
        max_new_tokens: int,
    ) -> Iterator[Update]:
        """Two sides' answers to one question as they grow: dicts with ``side`` (0, 1) and ``text``, or ``status``; the
        last one has ``answers``, as HTML ``metrics`` and ``theatre``, and ``files`` name -> bytes.

        Args:
            shown: path of a picture or a video. sides: two, each as :meth:`side` takes it.
        """
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
        last = _both(a, b, rounds)
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
        yield {"side": i, "text": turn.text}
        result = turn.result
    return result


def _both(a: Result, b: Result, rounds: Rounds) -> Update:
    """The last update of two answers, without the files that repeat them."""
    heads = [f"{name}: {r.name}" for name, r in zip(NAMES, (a, b), strict=True)]
    scenes = [
        theatre.scene(r.report, r.views, title=f"{head}: {r.answer}") for head, r in zip(heads, (a, b), strict=True)
    ]
    recipes = {head: r.report.recipe or "dense" for head, r in zip(heads, (a, b), strict=True)}
    facts = json.dumps({"question": a.question, **recipes})
    return {
        "status": f"done: {outcome(a, b)}",
        "answers": [a.answer, b.answer],
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


def outcome(a: Result, b: Result) -> str:
    """Two results in a sentence."""
    work = (
        f"B reads {100 * b.report.effective_tokens / a.report.effective_tokens:.0f} % of A's visual tokens"
        if a.report.effective_tokens
        else ""
    )
    same = "the same answer" if a.answer == b.answer else "another answer"
    return ", ".join(part for part in (work, same, a.note and f"patches are drawn on grey ({a.note})") if part)


def _named(name: str, turns: Iterator[Turn]) -> Iterator[Turn]:
    """``turns``, with the side's name in what cannot be attached."""
    try:
        yield from turns
    except VtpruneError as e:
        raise VtpruneError(f"{name}: {e}") from e
