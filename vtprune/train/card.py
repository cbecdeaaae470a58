"""Trained weights on disk: a safetensors file that ``attach(..., weights=path)`` reads and checks, and beside it, as
``.json``, how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..core import backbone
from ..core.types import VtpruneError
from ..measure.runs import read
from .base import TRAININGS


def save(part: nn.Module, path: Path, facts: Mapping[str, Any], layers: Sequence[nn.Module]) -> None:
    """Writes ``part`` in half precision and the ``facts`` of its training beside it; ``layers`` are those of the model
    that it was trained beside."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    short = {k: v.detach().cpu().half().contiguous() for k, v in part.state_dict().items()}
    if bad := [name for name, values in short.items() if not values.isfinite().all()]:
        raise VtpruneError(f"{bad[0]} holds values that are no finite numbers of half precision: nothing was saved")
    told = TRAININGS.get(facts["method"]).tells(part, facts["options"])
    save_file(
        short,
        path,
        metadata={"format": "pt", "method": facts["method"], backbone.KEY: backbone.written(layers), **told},
    )
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_facts(path: Path, method: str) -> dict[str, Any]:
    """The facts beside saved weights. Raises :class:`VtpruneError` if either file is missing or is none, or if they are
    another method's."""
    for needed in (path, path.with_suffix(".json")):
        if not needed.is_file():
            raise VtpruneError(f"no such file {needed}; train first: vtprune train {method} --out {path}")
    facts = read(path.with_suffix(".json"))
    if facts.get("method") != method:
        raise VtpruneError(f"{path.with_suffix('.json')} tells of {facts.get('method')!r}, not of {method}")
    if not isinstance(facts.get("options"), dict):
        raise VtpruneError(
            f"{path.with_suffix('.json')} does not tell the options it was trained with: train once more"
        )
    return facts
