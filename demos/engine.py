"""Questions to one model by many users, dense or with a recipe: streamed answers, times measured in turns, every recipe
at one budget. Knows no Gradio.

All work on the model runs in one thread of the engine's own, request after request: a model carries one attachment at a
time. A consumer that is slow, goes away or never comes back holds nothing up, because attaching and removing happen in
that thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import vtprune
from vtprune.core.recipe import Recipe
from vtprune.core.types import Geometry, VtpruneError
from vtprune.measure.bench import of_pictures

from . import TRAINED
from .answers import Answerer
from .checks import LONGEST_TRUTH, Shown, check_length, checked_question, parts_of, short
from .comparisons import entry, in_turns
from .results import Entry, Offer, Rounds, Turn
from .sides import Side
from .thread import POLL, ModelThread


class Engine:
    """One model with its processor, shared by many users: requests are served one after the other, in the order in
    which they came."""

    def __init__(self, model: Any, processor: Any):
        """Raises :class:`UnsupportedError` for a model that no adapter takes or that has no language model."""
        self.answerer = Answerer(model, processor)  # used in the thread alone
        self.thread = ModelThread()
        self._offers: list[Offer] | None = None

    @property
    def model(self) -> Any:
        return self.answerer.model

    @property
    def processor(self) -> Any:
        return self.answerer.processor

    @property
    def geometry(self) -> Geometry:
        return self.answerer.geometry

    @property
    def trained(self) -> Recipe | None:
        """What ``"dpvr-lf (trained)"`` stands for; the bundled model alone has it."""
        return self.answerer.trained

    def close(self) -> None:
        """Ends the engine's thread; requests that wait are cancelled."""
        self.thread.close()

    # -- what there is
    # -----------------------------------------------------------------------------------------------------

    def recipes(self) -> list[Offer]:
        """Every registered recipe, and the bundled model's trained one, with the reason why this model refuses it if it
        does; found out by trying, once for each."""
        if self._offers is None or [o.name for o in self._offers] != self._names():
            self.thread.do(self._try_all, None)  # once all are known, nobody has to wait for the model
        assert self._offers is not None
        return list(self._offers)

    def _names(self) -> list[str]:
        return [*vtprune.recipes(), *([TRAINED] if self.trained is not None else [])]

    def _try_all(self) -> None:
        known = {offer.name: offer for offer in self._offers or ()}
        self._offers = [known.get(name) or Offer(name, self._refusal(name)) for name in self._names()]

    def _refusal(self, name: str) -> str:
        try:
            with self.answerer.attached(Side(name)):
                return ""
        except VtpruneError as e:
            return str(e)

    # -- answers
    # -----------------------------------------------------------------------------------------------------------

    def stream(
        self,
        side: Side,
        shown: Shown | None,
        question: str,
        *,
        max_new_tokens: int = 32,
        stop: threading.Event | None = None,
    ) -> Iterator[Turn]:
        """The greedy answer as it grows, one :class:`Turn` per token and a last one with the full :class:`Result`.

        Args:
            shown: a picture, or the path of a picture or a video.
            max_new_tokens: 1 to :data:`vtprune.demos.checks.MOST_NEW_TOKENS`.
            stop: ends the answer behind the token at hand, or takes the request out of the queue. Closing or dropping
                the iterator does the same.

        The model is free and unpatched again when the iterator has ended, however it ended.

        Raises:
            VtpruneError: at once for a question, picture or number that is not taken; while iterating, whatever
                :func:`vtprune.attach` and the processor refuse. Exceptions of the model come as they are.
        """
        check_length(max_new_tokens)
        asked, parts = checked_question(question, self.processor), parts_of(shown, self.processor)
        return self._stream(side, parts, asked, max_new_tokens, stop or threading.Event())

    def _stream(
        self, side: Side, parts: list[dict[str, Any]], question: str, max_new_tokens: int, stop: threading.Event
    ) -> Iterator[Turn]:
        texts: SimpleQueue[str | None] = SimpleQueue()
        gone, tell = threading.Event(), texts.put  # the job must not hold this generator: dropping it has to end it

        def halted() -> bool:
            return stop.is_set() or gone.is_set()

        future = self.thread.submit(
            lambda: None if halted() else self.answerer.answer(side, parts, question, max_new_tokens, halted, tell)
        )
        future.add_done_callback(lambda _: tell(None))
        try:
            while True:
                try:
                    text = texts.get(timeout=POLL)
                except Empty:
                    if stop.is_set():
                        future.cancel()  # changes nothing once it runs
                    continue
                if text is None:
                    break
                yield Turn(text)
            result = None if future.cancelled() else future.result()
            yield Turn("" if result is None else result.answer, True, result)
        finally:
            gone.set()
            self.thread.settle(future)

    # -- comparisons
    # -------------------------------------------------------------------------------------------------------

    def rounds(
        self,
        sides: Sequence[Side],
        shown: Shown | None,
        question: str,
        *,
        repeats: int = 12,
        limit_s: float = 15.0,
        stop: threading.Event | None = None,
    ) -> Rounds | None:
        """Prefill and time to the first token of two sides in turns, A B, B A, A B ...: up to ``repeats`` rounds, as
        many as fit into ``limit_s`` seconds but at least one. Attaching, and the first prefill of an attachment, which
        plans for the picture's size, are in no time. ``None`` if ``stop`` came before a round was complete.

        Raises :class:`VtpruneError` for anything but two sides and one repeat or more, and as :meth:`stream` does.
        """
        if len(sides) != 2 or repeats < 1:
            raise VtpruneError(
                f"two sides and at least one repeat are compared, got {len(sides)} sides and {repeats} repeats"
            )
        asked, parts = checked_question(question, self.processor), parts_of(shown, self.processor)
        halt = stop or threading.Event()

        def first_token(side: Side) -> tuple[tuple[float, float], Side]:
            return self.answerer.first_token(side, parts, asked)

        return self.thread.do(lambda: in_turns(first_token, sides, repeats, limit_s, halt), stop)

    def compare(
        self,
        shown: Shown | None,
        question: str,
        share: float,
        *,
        truth: str | None = None,
        budget: str = "effective",
        seed: int = 0,
        names: Sequence[str] | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[Entry]:
        """The dense model and then every recipe (or ``names``) at one budget, one :class:`Entry` as soon as it is
        there. Other users' questions are served in between. What cannot run is an entry with a note. The trained branch
        knows one schedule and runs at its own budget, as in ``vtprune bench``.

        Args:
            truth: the right answer, if known; judged as ``vtprune bench`` does.
            stop: no further entries.

        Raises :class:`VtpruneError` at once for a question, right answer, picture, budget or share that is not taken.
        """
        short(truth or "", "the right answer", LONGEST_TRUTH)
        asked, parts = checked_question(question, self.processor), parts_of(shown, self.processor)
        Side(None, budget, share, seed=seed)  # says now what is wrong
        return self._compare(parts, asked, share, truth, budget, seed, names, stop or threading.Event())

    def _compare(
        self,
        parts: list[dict[str, Any]],
        question: str,
        share: float,
        truth: str | None,
        budget: str,
        seed: int,
        names: Sequence[str] | None,
        stop: threading.Event,
    ) -> Iterator[Entry]:
        for name in (None, *([o.name for o in self.recipes()] if names is None else names)):
            own = name is None or (name == TRAINED and self.trained is not None)
            side = Side(name, "own" if own else budget, share, seed=seed)
            if name and not own and len(parts) == 1 and parts[0]["type"] == "image" and not of_pictures(name):
                yield Entry(side.name, note=f"{name} prunes videos; this is a picture, which it leaves whole")
                continue
            job = partial(entry, self.answerer, side, parts, question, truth)
            line = None if stop.is_set() else self.thread.do(job, stop)
            if line is None:
                return
            if own and name and line.result:
                line = replace(line, note="at its own budget: the branch is trained for one layer")
            yield line
