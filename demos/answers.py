"""Answers of one model, dense or with a recipe attached for as long as the answer takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import vtprune
from vtprune.core.handle import Handle
from vtprune.core.planning import bind, load_recipe
from vtprune.core.recipe import Recipe
from vtprune.core.report import Report
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.inputs import chats, demo_model
from vtprune.lmms import meter
from vtprune.measure import run
from vtprune.show.views import views_or_blank

from . import TRAINED
from .results import Result
from .sides import Side, solved

ENOUGH = 3  # later tokens from which on their median says something


class _Tell(BaseStreamer):
    """Passes on the text of the answer so far, without the half of a character that further tokens will complete, and
    keeps by ``clock`` when each token came."""

    def __init__(self, decode: Callable[[list[int]], str], tell: Callable[[str], object], clock: Callable[[], float]):
        self.decode, self.tell, self.clock = decode, tell, clock
        self.tokens, self.came = list[int](), list[float]()

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:  # the prompt comes first, as [1, T]
            self.tokens += value.tolist()
            self.came.append(self.clock())
            self.tell(self.decode(self.tokens).rstrip("\ufffd"))

    def later(self) -> float | None:
        """The median seconds of a token behind the first; ``None``: there are too few."""
        steps = [after - before for before, after in zip(self.came, self.came[1:], strict=False)]
        return statistics.median(steps) if len(steps) >= ENOUGH else None

    def end(self) -> None:
        pass


class _Halt(StoppingCriteria):
    """Ends the generation when ``halted()`` says so, and remembers it."""

    def __init__(self, halted: Callable[[], bool]):
        self.halted, self.fired = halted, False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        self.fired = self.halted()
        return torch.full((len(input_ids),), self.fired, device=input_ids.device)


class Answerer:
    """One model with its processor, and nothing of threads: whoever calls is alone with the model until it returns.

    Attributes:
        geometry: of the model's visual tokens, as its adapter describes it.
        bundled: whether this is the model that comes with the library.
        trained: the bundled model's recipe with a trained branch, if there is one.
    """

    def __init__(self, model: Any, processor: Any):
        """Raises :class:`UnsupportedError` for a model that no adapter takes or that has no language model."""
        self.model, self.processor = model, processor
        self.geometry = bind(model).geometry
        if self.geometry.llm_layers == 0:
            raise UnsupportedError(f"{type(model).__name__} has no language model, so it answers no questions")
        self.bundled = Path(getattr(model, "name_or_path", "") or ".") == demo_model.FOLDER
        self.trained = demo_model.branch() if self.bundled else None

    @contextmanager
    def attached(self, side: Side) -> Iterator[Handle | None]:
        """The model with ``side`` attached; ``None`` for dense."""
        if side.recipe is None:
            yield None
            return
        with vtprune.attach(self.model, self.recipe(side), **side.attach_options()) as handle:
            yield handle

    def recipe(self, side: Side) -> Recipe:
        """The recipe of a side that has one."""
        if side.recipe == TRAINED and self.trained is not None:
            return self.trained
        assert side.recipe is not None
        return load_recipe(side.recipe)

    def answer(
        self,
        side: Side,
        parts: list[dict[str, Any]],
        question: str,
        max_new_tokens: int,
        halted: Callable[[], bool],
        tell: Callable[[str], object],
    ) -> Result:
        """One question. ``tell`` gets the text so far with every token; the answer ends when ``halted`` says so."""
        with self.attached(side) as handle:
            clock = meter.clock(self.model.device)
            asked = clock()
            inputs = self.inputs(parts, question)
            halt = _Halt(halted)
            streamer = _Tell(self.text, tell, clock)
            out, cost = self.generate(
                inputs, asked, handle, max_new_tokens, streamer=streamer, stopping_criteria=[halt]
            )
            report = self.report(inputs, handle)
            times = chats.seconds(parts)
            views, note = views_or_blank(self.processor, inputs, report, frames=len(parts) > 1, times=times)
        later = streamer.later()
        return Result(
            side=side,
            name="dense" if handle is None else handle.recipe.name,
            question=question,
            answer=self.text(out[0, inputs["input_ids"].shape[1] :].tolist()),
            stopped=halt.fired,
            report=report,
            recipe=None if handle is None else handle.recipe,
            views=tuple(views),
            note=note,
            overview=self.geometry.overview % max(len(report.grids[0]), 1),
            new_tokens=cost["new_tokens"],
            ttft_ms=1000 * cost["ttft"],
            prefill_ms=1000 * cost["prefill"],
            token_ms=None if later is None else 1000 * later,
            total_ms=1000 * cost["seconds"],
        )

    def first_token(self, side: Side, parts: list[dict[str, Any]], question: str) -> tuple[tuple[float, float], Side]:
        """Seconds of a prefill and to the first token, behind a warm-up; and the side as solved."""
        with self.attached(side) as handle:
            for _ in range(2):  # the first one is the warm-up
                asked = meter.clock(self.model.device)()
                _, cost = self.generate(self.inputs(parts, question), asked, handle, 1)
            return (cost["prefill"], cost["ttft"]), solved(side, handle)

    def inputs(self, parts: list[dict[str, Any]], question: str) -> Any:
        """Model inputs for one question, where the model is."""
        try:
            inputs = chats.prepare_chats(
                self.processor, [[{"role": "user", "content": [*parts, chats.text_part(question)]}]]
            )
        except VtpruneError:
            raise
        except ValueError as e:  # e.g. a picture that is too long and narrow for this processor
            raise VtpruneError(f"the processor cannot take this: {e}") from e
        return inputs.to(self.model.device, self.model.dtype)

    def generate(
        self, inputs: Any, asked: float, handle: Handle | None, max_new_tokens: int, **extra: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """A greedy answer and what it cost; ``asked``: when its question came, by the clock of ``meter``."""
        return meter.generate(
            self.model,
            inputs,
            lambda: self.report(inputs, handle),
            asked,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            **extra,
        )

    def report(self, inputs: Any, handle: Handle | None) -> Report:
        """Of the prefill that has just run."""
        return run.dense_report(self.model, inputs) if handle is None else handle.report()

    def text(self, tokens: list[int]) -> str:
        """Decoded, without special tokens."""
        return self.processor.batch_decode(torch.tensor([tokens]), skip_special_tokens=True)[0].strip()
