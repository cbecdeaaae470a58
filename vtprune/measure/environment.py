"""What a result file says of how it was made: versions and hardware, and what a run was asked."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..version import __version__
from .run import MAX_NEW_TOKENS
from .runs import digest, fingerprint
from .samples import Sample


def environment(model: Any) -> dict[str, Any]:
    """Versions and hardware, for result files."""
    parameter = next(model.parameters())
    device = torch.cuda.get_device_name(parameter.device) if parameter.device.type == "cuda" else _cpu()
    dtype = str(parameter.dtype).removeprefix("torch.")
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "vtprune": __version__,
        },
        "device": {
            "type": parameter.device.type,
            "name": device,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "dtype": dtype,
        },
    }


def in_words(facts: dict[str, Any]) -> str:
    """An :func:`environment` as it stands above a table."""
    return ", ".join(f"{name} {value}" for part in facts.values() for name, value in part.items())


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def protocol(model: Any, processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """What a run was asked and how; the same questions in another order are another protocol."""
    asked = [[s.question, s.answer, s.ability, s.source] for s in samples]
    return {
        "harness": "vtprune bench",
        "model": {
            "name": Path(str(model.config._name_or_path)).name,
            "class": type(model).__name__,
            "fingerprint": fingerprint(model),
        },
        "sets": dict(Counter(s.set for s in samples)),
        "questions": digest(asked),
        "chat_template": digest(processor.chat_template),
        "decoding": f"greedy, {MAX_NEW_TOKENS} new tokens",
        "scoring": "exact match without spaces and case",
        "seeds": "sample i of a set draws with seed * 1000003 + i",
    }
