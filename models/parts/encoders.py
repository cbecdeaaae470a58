"""Encoders of a multimodal model: what each call was given, and which passes of the vision tower it made.

``generate`` encodes images before the forward and does not hand their sizes on; so they are noted here.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from ..engine import host
from ..engine.encoder_call import EncoderCall
from ..engine.packed import PackedRun
from ..engine.request import Call
from ..engine.rows import put
from ..engine.run import Run


class Encoders:
    """Watches the encoders of ``core`` and the ``projector`` that they call.

    Attributes:
        core: the model that has them as methods.
        projector: what turns the tower's output into rows of the prompt.
        notes: an encoder's output, and how it was made.
        local: of this thread: the call of an encoder that it is in (``now``) and the tower's pass that the projector's
            call belongs to (``run``).
    """

    def __init__(self, core: Any, projector: Any):
        self.core, self.projector = core, projector
        self.notes: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.local = threading.local()

    def names(self) -> list[str]:
        """The methods of the core that turn pixels into rows of the prompt: tower, projector, and packing where there
        is some."""
        return [name for name in host.ENCODERS.values() if hasattr(self.core, name)]

    def known(self, inputs: dict[str, Any]) -> dict[str, EncoderCall]:
        """What those encoders did whose outputs are among a forward's ``inputs``, by modality."""
        outputs = (inputs.get(host.ENCODED) or {}).items()
        return {kind: known for kind, output in outputs if (known := self.notes.get(output)) is not None}

    @property
    def now(self) -> EncoderCall | None:
        """The call of an encoder that this thread is in."""
        return getattr(self.local, "now", None)

    def passed(self, run: Run) -> None:
        """The tower has made a pass, which the projector reads next; of one that only notes are taken of nothing has
        to be put back behind it, and it may be a part of the tower."""
        known: EncoderCall | None = getattr(self.local, "now", None)
        if not isinstance(run, PackedRun):
            self.local.run = run
        elif known is not None:
            known.runs.append(run)

    def watch(self, ledger: UndoLedger, call: Callable[[], Call | None]) -> None:
        """Notes from now on what the encoders do, also in the forward ``call()`` that a thread is in."""
        for kind, name in host.ENCODERS.items():
            if hasattr(self.core, name):
                ledger.replace(self.core, name, self._noted(kind, name, getattr(self.core, name), call))

    def _noted(self, kind: str, name: str, original: Callable, call: Callable[[], Call | None]) -> Callable:
        @functools.wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if getattr(self.local, "now", None) is not None:  # one encoder does another one's work: Qwen3-VL's videos
                return original(*args, **kwargs)
            known = self.local.now = EncoderCall(_by_name(original, args, kwargs))
            try:
                output = original(*args, **kwargs)
            finally:
                self.local.now = None
                run = self._taken()
            if run is not None:
                raise UnsupportedError(
                    f"{name}() did not hand the tower's output to the {type(self.projector).__name__} that was "
                    "there at attach(): it was replaced since; "
                    "remove() and attach again"
                )
            if hasattr(output, "__dataclass_fields__"):
                self.notes[output] = known
            forward = call()
            if forward is not None:
                forward.encoded[kind] = known
            return output

        return noted

    def expand(self, ledger: UndoLedger) -> None:
        """What the tower leaves is put back to its placeholders behind the projector, with zeros in between: which rows
        those are is known from the books of the passes, never from the values."""

        def spread(module: nn.Module, args: tuple, kwargs: dict, features: Tensor) -> Tensor | None:
            run = self._taken()
            if run is None:
                return None
            known: EncoderCall | None = getattr(self.local, "now", None)
            if known is not None:
                known.runs.append(run)
            if run.squares is not None or (features.shape[1] == run.handed_over(0) and run.slot is run.raster):
                return None
            where = torch.where(run.valid, run.index, run.tokens)
            whole = put(features.new_zeros(run.images, run.tokens + 1, features.shape[2]), where, features)
            return whole[:, : run.tokens]

        ledger.after(self.projector, spread)

    def _taken(self) -> Run | None:
        """The pass that the projector's call belongs to, which is then over."""
        run, self.local.run = getattr(self.local, "run", None), None
        return run


def _by_name(function: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call, pixels by their shape alone."""
    inputs = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    inputs |= inputs.pop("kwargs", {})
    return {
        k: v.to("meta") if k.startswith("pixel") and isinstance(v, Tensor) else v
        for k, v in inputs.items()
        if v is not None
    }
