"""Every way into an attached language model: the model's forward, that of its core, and ``generate``. A forward that is
left by an error or by Ctrl-C leaves nothing behind; what is open is open in its own thread.

What the prompt is, is decided here. A forward reads a prompt up to its last token; with labels a prompt ends in front
of every answer; inside ``generate`` it is what ``generate`` was given, also where nothing is cached and everything is
read again for every token; and a sequence that ``generate`` returned is read as the prompt and the answer that it was
(log-likelihoods of a model's own answers, without labels).
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger, live
from ...core.types import UnsupportedError
from . import host
from .request import Call

REMEMBERED = 256  # answers of generate that are known again


@dataclass(eq=False)
class Generation:
    """One call of ``generate``: the ids ``[B, T]`` of the prompt, which of them are real, whether its prefill has been
    reported."""

    prompt: Tensor | None = None
    real: Tensor | None = None
    reported: bool = False


class Entry:
    """Wraps the forwards of ``roots`` (the first takes labels and generates). ``opens(call, inputs)`` answers with what
    the forward is called with, ``closes( call, output)`` sees what it returned."""

    def __init__(
        self,
        roots: list[nn.Module],
        ledger: UndoLedger,
        *,
        opens: Callable[[Call, dict[str, Any]], dict[str, Any]],
        closes: Callable[[Call, Any], None],
        continues: Callable[[Any], None],
    ):
        self.ledger, self.opens, self.closes, self.continues = ledger, opens, closes, continues
        self.local = threading.local()
        # a whole sequence -> how much of it is the prompt
        self.answers: OrderedDict[tuple[int, ...], int] = OrderedDict()
        self.lock = threading.Lock()
        for root in roots:
            ledger.before(root, _only(root))
            ledger.replace(root, "forward", self._forward(root))
        model: Any = roots[0]
        if hasattr(model, "generate"):
            ledger.replace(model, "generate", self._generate(model.generate))
            for name, wrap in (("assistant", _refuse_assistant), ("prefill", _whole_prompts)):
                private = host.private(model, name)
                if private is not None:
                    ledger.replace(model, host.PRIVATE[name], wrap(private))

    # What is open in this thread, the last innermost.

    @property
    def stack(self) -> list[Call]:
        if not hasattr(self.local, "stack"):
            self.local.stack = []
        return self.local.stack

    @property
    def generations(self) -> list[Generation]:
        if not hasattr(self.local, "generations"):
            self.local.generations = []
        return self.local.generations

    @property
    def call(self) -> Call | None:
        stack = self.stack
        return stack[-1] if stack else None

    @property
    def generation(self) -> Generation | None:
        running = self.generations
        return running[-1] if running else None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it, forwards of the language model alone are let through: they read no prompt."""
        call = Call()
        self.stack.append(call)
        try:
            yield
        finally:
            self.stack.remove(call)

    def _forward(self, root: nn.Module) -> Callable:
        original = root.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.stack:  # the core, called by the model
                return original(*args, **kwargs)
            live()
            inputs = host.arguments(root, args, kwargs)
            call, output = Call(), None
            self.stack.append(call)
            try:
                call.cache, call.mask = host.cache_in(inputs), inputs.get("attention_mask")
                call.positions = inputs.get("position_ids")
                inputs = opens(call, inputs)
                output = original(**inputs)
                closes(call, output)
            finally:
                self.stack.remove(call)
                if self.ledger.undone:  # another error, or an answer, of a forward that was half hooked
                    raise UnsupportedError(REMOVED)
            return output

        opens, closes = self.ledger.timed(self.opens), self.ledger.timed(self.closes)
        opens, closes = torch.compiler.disable(opens), torch.compiler.disable(closes)
        return torch.compiler.disable(forward, recursive=False)

    def _generate(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            self.continues(host.cache_in(kwargs))
            generation = Generation()
            self.generations.append(generation)
            try:
                output = original(*args, **kwargs)
            finally:
                self.generations.remove(generation)
            self._remember(generation, output)
            return output

        return generate

    # ------------------------------------------------------------------------------------------------------------ the
    # prompt

    def prompt(self, ids: Tensor, real: Tensor) -> Tensor | None:
        """How many columns of ``ids`` ``[B, T]`` are the prompt, ``[B]``; ``None``: all of them. ``real`` ``[B, T]`` is
        no padding."""
        running = self.generation
        if running is not None:
            known = running.prompt
            if known is None:
                running.prompt, running.real = ids, real
                return None
            length = known.shape[1]
            if (
                ids.shape[1] > length
                and len(ids) == len(known)
                and torch.equal(ids[:, :length].to(known.device), known)
            ):
                return torch.full((len(ids),), length, device=ids.device)
            return None
        if not self.answers:
            return None
        lengths = []
        for row, mask in zip(ids.cpu(), real.cpu(), strict=True):
            column = mask.nonzero()[:, 0]
            answered = self._answered(tuple(row[column].tolist()))
            lengths.append(ids.shape[1] if answered is None else int(column[answered - 1]) + 1)
        return None if all(n == ids.shape[1] for n in lengths) else torch.tensor(lengths, device=ids.device)

    def _answered(self, tokens: tuple[int, ...]) -> int | None:
        """The length of the prompt if ``tokens`` are a prompt and (the beginning of) an answer that ``generate`` gave
        to it."""
        with self.lock:
            fits = [
                n
                for whole, n in self.answers.items()
                if n < len(tokens) <= len(whole) and whole[: len(tokens)] == tokens
            ]
        return fits[-1] if fits else None

    def _remember(self, generation: Generation, output: Any) -> None:
        prompt, real = generation.prompt, generation.real
        sequences = getattr(output, "sequences", output)
        if prompt is None or real is None or not isinstance(sequences, Tensor) or sequences.shape[1] <= prompt.shape[1]:
            return
        for r, row in enumerate(sequences.tolist()):
            mask = real[
                r * len(prompt) // len(sequences)
            ].tolist()  # a prompt has as many rows as beams, and as few answers
            asked = [token for token, there in zip(row, mask, strict=False) if there]
            with self.lock:
                self.answers[(*asked, *row[len(mask) :])] = len(asked)
                while len(self.answers) > REMEMBERED:
                    self.answers.popitem(last=False)


REMOVED = "the attachment was removed while this forward ran; run it again"


def _only(root: nn.Module) -> Callable:
    """Refuses replicas: what is hooked into them would compute with the weights of ``root``."""

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module is not root:
            raise UnsupportedError(
                f"this {type(module).__name__} is a replica of the one that was attached (nn.DataParallel makes one "
                "per device); use one process per device"
            )

    return enter


def _whole_prompts(prefill: Callable) -> Callable:
    """``generate``'s reading of the prompt, which must not come in chunks: the last token of each would choose the
    visual tokens."""

    @functools.wraps(prefill)
    def whole(input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(generation_config, "prefill_chunk_size", None) is not None:
            raise UnsupportedError("the prompt has to be read at once; generate without prefill_chunk_size")
        return prefill(input_ids, generation_config, *args, **kwargs)

    return whole


def _refuse_assistant(original: Callable) -> Callable:
    @functools.wraps(original)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            "assisted decoding reads the prompt together with guessed tokens, which would choose other visual tokens "
            "(and measure other vectors); generate without an assistant"
        )

    return refuse
