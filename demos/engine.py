"""Questions to one model by many users, dense or with a recipe: streamed answers, times measured in turns, every recipe
at one budget. Knows no Gradio.

All work on the model runs in one thread of the engine's own, request after request: a model carries one attachment at a
time. A consumer that is slow, goes away or never comes back holds nothing up, because attaching and removing happen in
that thread.
"""

from __future__ import annotations

import mimetypes
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
from PIL import Image, ImageOps
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from vtprune.demos import TRAINED

import vtprune
from vtprune.core.handle import Handle
from vtprune.core.planning import ATTACH_OPTIONS, TARGETS, bind, check_seed, load_recipe
from vtprune.core.recipe import Recipe
from vtprune.core.report import Report
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.inputs import chats, demo_model, images
from vtprune.lmms import meter
from vtprune.measure import run, samples
from vtprune.show import pictures

BUDGETS = ("own", "keep", "effective")
LONGEST_QUESTION = 2000  # characters
LONGEST_TRUTH = 500
LARGEST_SIDE = 2048  # pixels of a picture before it goes to the processor
MOST_NEW_TOKENS = 512
POLL = 0.05  # seconds between two looks at `stop` while others have the model
T = TypeVar("T")
Shown = Image.Image | str | os.PathLike  # a picture, or the path of a picture or video


@dataclass(frozen=True)
class Side:
    """What runs on one side of a comparison.

    ``recipe``: ``None`` is the dense model; else a registered name, ``"dpvr-lf (trained)"``, a :class:`vtprune.Recipe`
    or a path to its file · ``budget``: ``"own"`` as the recipe says, ``"keep"`` the ``share`` of tokens behind the last
    cut, ``"effective"`` the ``share`` of the dense model's effective tokens, for the solver · ``share`` in (0, 1],
    unused with ``"own"`` · ``options`` of the last stage's method, and ``positions`` and ``per`` of
    :func:`vtprune.attach` · ``seed`` for methods that draw at random. Raises :class:`VtpruneError` for anything else.
    """

    recipe: str | os.PathLike | Recipe | None = None
    budget: str = "own"
    share: float = 0.5
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recipe is not None and not isinstance(self.recipe, str | os.PathLike | Recipe):
            raise VtpruneError(f"recipe={self.recipe!r} is neither a name, a file nor a recipe")
        if self.budget not in BUDGETS:
            raise VtpruneError(f"budget={self.budget!r} is not one of {', '.join(map(repr, BUDGETS))}")
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise VtpruneError(f"the share of tokens lies above 0 and is at most 1, got {self.share!r}")
        check_seed(self.seed)
        if not isinstance(self.options, Mapping) or not all(
            isinstance(name, str) and name.isidentifier() for name in self.options
        ):
            raise VtpruneError(f"options={self.options!r} are not names with values")
        taken = sorted({"keep", "seed", *TARGETS} & set(self.options))
        if taken:
            raise VtpruneError(f"{taken[0]} is not an option: set it with the budget, the share or the seed")

    def attach_options(self) -> dict[str, Any]:
        """The keywords for :func:`vtprune.attach`."""
        given = {"own": {}, "keep": {"keep": float(self.share)}, "effective": {"effective_tokens": float(self.share)}}[
            self.budget
        ]
        return {**given, **self.options, "seed": self.seed}

    @property
    def name(self) -> str:
        return (
            "dense"
            if self.recipe is None
            else self.recipe.name
            if isinstance(self.recipe, Recipe)
            else os.fspath(self.recipe)
        )


@dataclass(frozen=True)
class Result:
    """What one side did with one question.

    ``name`` of the recipe (of an uploaded file the one inside) · ``recipe`` as it ran, behind the solver (``None``:
    dense) · ``report`` of its prefill · ``views`` one picture for each raster of ``report.grids[0]`` (plain grey where
    none can be matched: ``note`` says why), ``overview`` the number of the one that shows the whole image ·
    milliseconds, with the device's queue empty: ``ttft_ms`` from the question to the first token, with the preparation
    of the picture and without attaching and waiting for others; ``prefill_ms`` from the start of ``generate`` to the
    first token; ``token_ms`` per later token (``None``: there is none); ``total_ms`` from the question to the last
    token · ``new_tokens`` with the end token.
    """

    side: Side
    name: str
    question: str
    answer: str
    stopped: bool
    report: Report
    recipe: Recipe | None
    views: tuple[Image.Image, ...]
    overview: int
    new_tokens: int
    ttft_ms: float
    prefill_ms: float
    token_ms: float | None
    total_ms: float
    note: str = ""


@dataclass(frozen=True)
class Turn:
    """One step of a streamed answer: all of its text so far. The last one is ``done`` and carries ``result`` (``None``:
    stopped before the model began)."""

    text: str
    done: bool = False
    result: Result | None = None


@dataclass(frozen=True)
class Rounds:
    """Times of two sides measured in turns, milliseconds: ``(first, second)`` of every round. Both of a round saw the
    same machine, so their ratio means more than that of two medians, and the spread of the ratios tells how far to
    believe it."""

    prefill_ms: tuple[tuple[float, float], ...]
    ttft_ms: tuple[tuple[float, float], ...]

    @property
    def rounds(self) -> int:
        return len(self.prefill_ms)


def medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of either side."""
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def ratios(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Second over first, round by round: the median, the lowest and the highest."""
    found = [second / first for first, second in pairs]
    return statistics.median(found), min(found), max(found)


@dataclass(frozen=True)
class Offer:
    """A recipe by ``name``; ``reason`` says why this model does not take it (empty: it does)."""

    name: str
    reason: str = ""


@dataclass(frozen=True)
class Entry:
    """One line of a comparison. ``result`` is ``None`` where the recipe cannot run at the budget: ``note`` says why.
    ``right``: ``None`` where no right answer is known. ``prefill_ms`` is one prefill behind a warm-up;
    :meth:`Engine.rounds` compares times properly."""

    name: str
    result: Result | None = None
    right: bool | None = None
    prefill_ms: float | None = None
    note: str = ""

    @property
    def answer(self) -> str | None:
        return None if self.result is None else self.result.answer

    @property
    def report(self) -> Report | None:
        return None if self.result is None else self.result.report

    @property
    def effective_tokens(self) -> float | None:
        return None if self.result is None else self.result.report.effective_tokens

    @property
    def flops_share(self) -> float | None:
        """Of the dense model's."""
        return None if self.result is None else self.result.report.flops / self.result.report.dense_flops

    @property
    def kv_share(self) -> float | None:
        """Of the dense model's."""
        return None if self.result is None else self.result.report.kv_bytes / self.result.report.dense_kv_bytes


# ----------------------------------------------------------------------------------------------------------------
# inputs


def short(text: str, what: str, most: int) -> None:
    """Raises :class:`VtpruneError` for a text of more than ``most`` characters, and as :func:`proper` does."""
    if len(text) > most:
        raise VtpruneError(f"{what} has {len(text)} characters; at most {most} are taken")
    proper(text, what)


def proper(text: str, what: str) -> None:
    """Raises :class:`VtpruneError` for a text with half of a character, which no file, picture or page can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise VtpruneError(f"{what} holds half of a character (a lone surrogate)") from e


def checked_question(text: str | None, processor: Any) -> str:
    """``text`` without spaces around it. Raises :class:`VtpruneError` if it is empty, too long, no proper text, or
    holds a token with a meaning of its own."""
    question = (text or "").strip()
    if not question:
        raise VtpruneError("type a question")
    short(question, "the question", LONGEST_QUESTION)
    tokenizer = getattr(processor, "tokenizer", None)
    special = [
        getattr(processor, "image_token", None),
        getattr(processor, "video_token", None),
        *getattr(tokenizer, "all_special_tokens", ()),
    ]
    found = [token for token in special if token and token in question]
    if found:
        raise VtpruneError(f"the question must not contain {found[0]}: it means something else to this model")
    return question


def is_video(path: str | os.PathLike) -> bool:
    """Told by the file's name."""
    return (mimetypes.guess_type(os.fspath(path))[0] or "").startswith("video/")


def part_of(shown: Shown | None, processor: Any) -> dict[str, Any]:
    """A message part for :func:`vtprune.inputs.chats.prepare_chats`; pictures are upright, in RGB and at most
    :data:`LARGEST_SIDE` pixels long.

    Raises :class:`VtpruneError` for ``None``, for files that cannot be read (:func:`vtprune.inputs.images.open_image`,
    :func:`vtprune.inputs.chats.video_part`) and for a video where the processor takes none."""
    if shown is None:
        raise VtpruneError("choose a picture")
    if isinstance(shown, Image.Image):
        if shown.width * shown.height > images.MEGAPIXELS * 1_000_000:
            raise VtpruneError(
                f"the picture has {shown.width} x {shown.height} pixels; the limit is {images.MEGAPIXELS} megapixels"
            )
        image = ImageOps.exif_transpose(shown).convert("RGB")
    elif is_video(shown):
        if getattr(processor, "video_processor", None) is None:  # told before the video is decoded
            raise VtpruneError(f"{type(processor).__name__} takes no videos")
        return chats.video_part(Path(shown))
    else:
        image = images.open_image(Path(shown))
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))  # leaves smaller ones as they are
    return chats.image_part(image)


# ----------------------------------------------------------------------------------------------------------------
# engine


class _Tell(BaseStreamer):
    """Passes on the text of the answer so far, without the half of a character that further tokens will complete."""

    def __init__(self, decode: Callable[[list[int]], str], tell: Callable[[str], object]):
        self.decode, self.tell, self.tokens = decode, tell, list[int]()

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:  # the prompt comes first, as [1, T]
            self.tokens += value.tolist()
            self.tell(self.decode(self.tokens).rstrip("\ufffd"))

    def end(self) -> None:
        pass


class _Halt(StoppingCriteria):
    """Ends the generation when ``halted()`` says so, and remembers it."""

    def __init__(self, halted: Callable[[], bool]):
        self.halted, self.fired = halted, False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        self.fired = self.halted()
        return torch.full((len(input_ids),), self.fired, device=input_ids.device)


class Engine:
    """One model with its processor, shared by many users: requests are served one after the other, in the order in
    which they came."""

    def __init__(self, model: Any, processor: Any):
        """Raises :class:`UnsupportedError` for a model that no adapter takes or that has no language model."""
        self.model, self.processor = model, processor
        self.geometry = bind(model).geometry
        if self.geometry.llm_layers == 0:
            raise UnsupportedError(f"{type(model).__name__} has no language model, so it answers no questions")
        self.bundled = Path(getattr(model, "name_or_path", "") or ".") == demo_model.FOLDER
        self.trained = demo_model.branch() if self.bundled else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="vtprune-engine")
        self._worker_id = 0  # of the thread that works on the model
        self._offers: list[Offer] | None = None

    def close(self) -> None:
        """Ends the engine's thread; requests that wait are cancelled."""
        self._worker.shutdown(cancel_futures=True)

    # -- the one thread
    # ----------------------------------------------------------------------------------------------------

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        def work() -> T:
            self._worker_id = threading.get_ident()
            return job()

        return self._worker.submit(work)

    def _settle(self, future: Future) -> None:
        """Returns when ``future`` is over or will never begin. The garbage collector may call this from the working
        thread, which cannot wait for itself."""
        if not future.cancel() and threading.get_ident() != self._worker_id:
            wait([future])

    def _do(self, job: Callable[[], T], stop: threading.Event | None) -> T | None:
        """The job's value, ``None`` if ``stop`` came before its turn; its exceptions as they are."""
        future = self._submit(job)
        try:
            while not wait([future], POLL).done:
                if stop is not None and stop.is_set() and future.cancel():
                    return None
            return future.result()
        finally:
            self._settle(future)

    @contextmanager
    def _attached(self, side: Side) -> Iterator[Handle | None]:
        """The model with ``side`` attached; ``None`` for dense."""
        if side.recipe is None:
            yield None
            return
        with vtprune.attach(self.model, self._recipe(side), **side.attach_options()) as handle:
            yield handle

    def _recipe(self, side: Side) -> Recipe:
        if side.recipe == TRAINED and self.trained is not None:
            return self.trained
        assert side.recipe is not None
        return load_recipe(side.recipe)

    # -- what there is
    # -----------------------------------------------------------------------------------------------------

    def recipes(self) -> list[Offer]:
        """Every registered recipe, and the bundled model's trained one, with the reason why this model refuses it if it
        does; found out by trying, once for each."""
        if self._offers is None or [o.name for o in self._offers] != self._names():
            self._do(self._try_all, None)  # once all are known, nobody has to wait for the model
        assert self._offers is not None
        return list(self._offers)

    def _names(self) -> list[str]:
        return [*vtprune.recipes(), *([TRAINED] if self.trained is not None else [])]

    def _try_all(self) -> None:
        known = {offer.name: offer for offer in self._offers or ()}
        self._offers = [known.get(name) or Offer(name, self._refusal(name)) for name in self._names()]

    def _refusal(self, name: str) -> str:
        try:
            with self._attached(Side(name)):
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
            max_new_tokens: 1 to :data:`MOST_NEW_TOKENS`.
            stop: ends the answer behind the token at hand, or takes the request out of the queue. Closing or dropping
                the iterator does the same.

        The model is free and unpatched again when the iterator has ended, however it ended.

        Raises:
            VtpruneError: at once for a question, picture or number that is not taken; while iterating, whatever
                :func:`vtprune.attach` and the processor refuse. Exceptions of the model come as they are.
        """
        if (
            isinstance(max_new_tokens, bool)
            or not isinstance(max_new_tokens, int)
            or not 1 <= max_new_tokens <= MOST_NEW_TOKENS
        ):
            raise VtpruneError(f"max_new_tokens={max_new_tokens!r} is not a whole number from 1 to {MOST_NEW_TOKENS}")
        asked, part = checked_question(question, self.processor), part_of(shown, self.processor)
        return self._stream(side, part, asked, max_new_tokens, threading.Event() if stop is None else stop)

    def _stream(
        self, side: Side, part: dict[str, Any], question: str, max_new_tokens: int, stop: threading.Event
    ) -> Iterator[Turn]:
        told: SimpleQueue[str | None] = SimpleQueue()
        gone, tell = threading.Event(), told.put  # the job must not hold this generator: dropping it has to end it

        def halted() -> bool:
            return stop.is_set() or gone.is_set()

        future = self._submit(
            lambda: None if halted() else self._answer(side, part, question, max_new_tokens, halted, tell)
        )
        future.add_done_callback(lambda _: tell(None))
        try:
            while True:
                try:
                    text = told.get(timeout=POLL)
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
            self._settle(future)

    def _answer(
        self,
        side: Side,
        part: dict[str, Any],
        question: str,
        max_new_tokens: int,
        halted: Callable[[], bool],
        tell: Callable[[str], object],
    ) -> Result:
        """One question, in the engine's thread."""
        with self._attached(side) as handle:
            asked = meter.clock(self.model.device)()
            inputs = self._inputs(part, question)
            halt = _Halt(halted)
            out, cost = self._generate(
                inputs, asked, handle, max_new_tokens, streamer=_Tell(self._text, tell), stopping_criteria=[halt]
            )
            report = self._report(inputs, handle)
            views, note = pictures.views_or_blank(self.processor, inputs, report)
        later = cost["new_tokens"] - 1
        return Result(
            side=side,
            name="dense" if handle is None else handle.recipe.name,
            question=question,
            answer=self._text(out[0, inputs["input_ids"].shape[1] :].tolist()),
            stopped=halt.fired,
            report=report,
            recipe=None if handle is None else handle.recipe,
            views=tuple(views),
            note=note,
            overview=self.geometry.overview % max(len(report.grids[0]), 1),
            new_tokens=cost["new_tokens"],
            ttft_ms=1000 * cost["ttft"],
            prefill_ms=1000 * cost["prefill"],
            token_ms=1000 * cost["decode"] / later if later else None,
            total_ms=1000 * cost["seconds"],
        )

    def _inputs(self, part: dict[str, Any], question: str) -> Any:
        try:
            inputs = chats.prepare_chats(
                self.processor, [[{"role": "user", "content": [part, chats.text_part(question)]}]]
            )
        except VtpruneError:
            raise
        except ValueError as e:  # e.g. a picture that is too long and narrow for this processor
            raise VtpruneError(f"the processor cannot take this: {e}") from e
        return inputs.to(self.model.device, self.model.dtype)

    def _report(self, inputs: Any, handle: Handle | None) -> Report:
        return run.dense_report(self.model, inputs) if handle is None else handle.report()

    def _generate(
        self, inputs: Any, asked: float, handle: Handle | None, max_new_tokens: int, **extra: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        return meter.generate(
            self.model,
            inputs,
            lambda: self._report(inputs, handle),
            asked,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            **extra,
        )

    def _text(self, tokens: list[int]) -> str:
        return self.processor.batch_decode(torch.tensor([tokens]), skip_special_tokens=True)[0].strip()

    # -- comparisons
    # -------------------------------------------------------------------------------------------------------

    def rounds(
        self,
        sides: Sequence[Side],
        shown: Shown | None,
        question: str,
        *,
        repeats: int = 6,
        limit_s: float = 5.0,
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
        asked, part = checked_question(question, self.processor), part_of(shown, self.processor)
        return self._do(
            lambda: self._rounds(
                list(sides), part, asked, repeats, limit_s, threading.Event() if stop is None else stop
            ),
            stop,
        )

    def _rounds(
        self,
        sides: list[Side],
        part: dict[str, Any],
        question: str,
        repeats: int,
        limit_s: float,
        stop: threading.Event,
    ) -> Rounds | None:
        found: list[list[tuple[float, float]]] = []  # per round, per side: (prefill, ttft)
        begin = time.perf_counter()
        while len(found) < repeats and (
            not found or (time.perf_counter() - begin) * (len(found) + 1) / len(found) <= limit_s
        ):
            turn: list[tuple[float, float]] = [(0.0, 0.0)] * 2
            for i in (0, 1) if len(found) % 2 == 0 else (1, 0):
                if stop.is_set():
                    break
                turn[i], sides[i] = self._first_token(sides[i], part, question)
            if stop.is_set():
                break
            found.append(turn)
        if not found:
            return None
        prefill, ttft = (tuple((1000 * first[k], 1000 * second[k]) for first, second in found) for k in (0, 1))
        return Rounds(prefill, ttft)

    def _first_token(self, side: Side, part: dict[str, Any], question: str) -> tuple[tuple[float, float], Side]:
        """Seconds of a prefill and to the first token, behind a warm-up; and the side as solved."""
        with self._attached(side) as handle:
            for _ in range(2):  # the first one is the warm-up
                asked = meter.clock(self.model.device)()
                _, cost = self._generate(self._inputs(part, question), asked, handle, 1)
            return (cost["prefill"], cost["ttft"]), solved(side, handle)

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
        asked, part = checked_question(question, self.processor), part_of(shown, self.processor)
        Side(None, budget, share, seed=seed)  # says now what is wrong
        return self._compare(
            part, asked, share, truth, budget, seed, names, threading.Event() if stop is None else stop
        )

    def _compare(
        self,
        part: dict[str, Any],
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
            entry = None if stop.is_set() else self._do(partial(self._entry, side, part, question, truth), stop)
            if entry is None:
                return
            yield (
                replace(entry, note="at its own budget: the branch is trained for one layer")
                if own and name and entry.result
                else entry
            )

    def _entry(self, side: Side, part: dict[str, Any], question: str, truth: str | None) -> Entry:
        try:
            result = self._answer(side, part, question, run.MAX_NEW_TOKENS, lambda: False, lambda text: None)
            (prefill, _), _ = self._first_token(solved(side, result.recipe), part, question)
        except VtpruneError as e:
            return Entry(side.name, note=str(e))
        return Entry(
            side.name, result, None if truth is None else samples.matches(result.answer, truth), 1000 * prefill
        )


def solved(side: Side, ran: Handle | Recipe | None) -> Side:
    """``side`` with the schedule that ran, so that nothing is solved again."""
    if ran is None:
        return side
    recipe = ran.recipe if isinstance(ran, Handle) else ran
    return Side(recipe, options={k: v for k, v in side.options.items() if k in ATTACH_OPTIONS}, seed=side.seed)
