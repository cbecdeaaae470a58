"""Another lmms-eval model as the base: it keeps its own prompts, we listen to its ``generate`` and count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core.failures import FAILURES
from ..core.ledger import UndoLedger
from ..core.types import VtpruneError
from . import meter
from .errors import first_line
from .pruned import PrunedModel

# keywords of generate() that are settings though they may hold tensors
SETTINGS = {"generation_config", "stopping_criteria", "logits_processor", "streamer", "synced_gpus"}


def build(name: str, batch_size: int, arguments: dict[str, Any]) -> Any:
    """The lmms-eval model ``name``."""
    from lmms_eval.models import get_model

    return get_model(name)(batch_size=batch_size, **arguments)


def listen(pruned: PrunedModel, name: str, failures: list[str], ledger: UndoLedger) -> None:
    """Measures every ``generate`` of the model that ``name`` holds: its cost is added to ``pruned.costs``, what it
    raises also to ``failures``, because the base may swallow that as an empty answer."""
    model, inner = pruned.model, pruned.model.generate

    def listened(*args: Any, **kwargs: Any) -> Any:
        if args or "input_ids" not in kwargs:
            raise VtpruneError(
                f"base={name} calls generate() without input_ids by name, which cannot be measured; use our own "
                "model class"
            )
        settings = {k: v for k, v in kwargs.items() if k in SETTINGS or not isinstance(v, torch.Tensor | list)}
        inputs = {k: v for k, v in kwargs.items() if k not in settings}
        try:
            out, cost = meter.generate(_Inner(model, inner), inputs, lambda: pruned.report(inputs), **settings)
        except FAILURES as e:
            failures.append(f"{type(e).__name__}: {first_line(e)}")
            raise
        pruned.costs.append(cost)
        return out

    ledger.replace(model, "generate", listened)


class _Inner:
    """A model whose ``generate`` is the one from before we listened."""

    def __init__(self, model: Any, generate: Callable[..., Any]):
        self.device, self.generate = model.device, generate
