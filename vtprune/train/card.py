"""Trained weights on disk: a safetensors file that ``attach(..., weights=path)`` reads and checks, and beside it, as
``.json``, how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..core import backbone
from ..core.types import VtpruneError
from ..measure.runs import read
from .base import TRAININGS


def save(part: nn.Module, path: Path, facts: Mapping[str, Any], layers: backbone.Layers) -> None:
    """Writes ``part``, its parameters in half precision, and the ``facts`` of its training beside it; ``layers`` are
    those of the model that it was trained beside (:func:`vtprune.core.backbone.layers`). Of a method without a part
    only the facts: its weights are the adapters (:meth:`~vtprune.train.lora.Lora.save`)."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    told = json.dumps({k: v for k, v in facts.items() if k != backbone.ADAPTERS}, indent=1) + "\n"
    training = TRAININGS.get(facts["method"])
    if not training.part:
        path.with_suffix(".json").write_text(told, encoding="utf-8")
        return
    trained = {name for name, _ in part.named_parameters()}  # what else there is, statistics, stays as it is
    state = {k: v.detach().cpu().contiguous() for k, v in part.state_dict().items()}
    short = {k: v.half() if k in trained else v for k, v in state.items()}
    if bad := [name for name, values in short.items() if not values.isfinite().all()]:
        raise VtpruneError(f"{bad[0]} holds values that are no finite numbers of half precision: nothing was saved")
    metadata = {"format": "pt", "method": facts["method"], backbone.KEY: backbone.written(layers)}
    if backbone.ADAPTERS in facts:
        metadata[backbone.ADAPTERS] = json.dumps(facts[backbone.ADAPTERS])
    save_file(short, path, metadata={**metadata, **training.tells(part, facts["options"])})
    path.with_suffix(".json").write_text(told, encoding="utf-8")


def read_facts(path: Path, method: str) -> dict[str, Any]:
    """The facts beside saved weights. Raises :class:`VtpruneError` if either file is missing or is none, or if they are
    another method's."""
    for needed in (path, path.with_suffix(".json")):
        if not needed.exists():
            raise VtpruneError(f"no such file {needed}; train first: vtprune train {method} --out {path}")
    facts = read(path.with_suffix(".json"))
    if facts.get("method") != method:
        raise VtpruneError(f"{path.with_suffix('.json')} tells of {facts.get('method')!r}, not of {method}")
    if not isinstance(facts.get("options"), dict):
        raise VtpruneError(
            f"{path.with_suffix('.json')} does not tell the options it was trained with: train once more"
        )
    return facts
