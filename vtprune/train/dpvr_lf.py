"""Trains the side branch of DPVR-LF (arXiv 2606.09131, section 3) beside a frozen LLaVA, and compares it with the
controls that cost no training.

    vtprune train dpvr-lf --out branch.safetensors               # the bundled VLM, about ten minutes on two cores
    vtprune train dpvr-lf --out branch.safetensors --compare-only

The model is used through :func:`vtprune.attach` and its own forward: labels in, its own loss out. Every parameter of
the model is frozen, so the gradient runs from the answers through the keys and values of the last ``fusion`` layers
into the branch and nowhere else. The visual tokens of an image are computed once (transformers 5.18 and later take
them; older ones get the pixels each time) and serve all of its questions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..core.types import VtpruneError
from ..measure.runs import read

METHOD = "dpvr-lf"
BRANCH = ("split", "fusion", "branch_layers", "init", "variant")  # options of the method that a branch was trained with

Say = Callable[[str], None]


def tell(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def save(branch: nn.Module, path: Path, facts: dict[str, Any]) -> None:
    """Writes the branch in half precision (``attach(..., weights=path)`` reads it) and, beside it as ``.json``, how it
    was made."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    shape: dict[str, str] = {name: str(facts[name]) for name in ("split", "branch_layers") if name in facts}
    save_file(
        {k: v.detach().cpu().half().contiguous() for k, v in branch.state_dict().items()},
        path,
        metadata={"format": "pt", "method": METHOD, **shape},
    )
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_facts(path: Path) -> dict[str, Any]:
    """The facts beside a saved branch. Raises :class:`VtpruneError` if either file is missing or is none."""
    for needed in (path, path.with_suffix(".json")):
        if not needed.is_file():
            raise VtpruneError(f"no such file {needed}; train first: vtprune train {METHOD} --out {path}")
    return read(path.with_suffix(".json"))
