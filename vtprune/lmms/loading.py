"""Making the model: its device, a checkpoint, and what other libraries raise meanwhile as errors of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..core.failures import FAILURES
from ..core.types import VtpruneError
from ..inputs import loading
from .errors import first_line

LOADING: tuple[type[Exception], ...] = (*FAILURES, ImportError, SafetensorError)


@contextmanager
def plain() -> Iterator[None]:
    """What other libraries raise while a model is made, as errors of ours."""
    try:
        yield
    except VtpruneError:
        raise
    except LOADING as e:
        raise VtpruneError(f"{type(e).__name__}: {first_line(e)}") from e


def placed(device: str | None, local_process: int, processes: int) -> torch.device:
    """The device of one of ``processes``: ``device``, or the GPU of its own where there are several."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and processes > 1:
        name = f"cuda:{local_process}"
    return torch.device(name)


def load(
    pretrained: str, device: torch.device, dtype: str | None, attention: str | None, trust: bool
) -> tuple[Any, Any]:
    """``(model, processor)`` of a folder or hub id, on ``device``."""
    if not pretrained:
        raise VtpruneError("say which model: pretrained=FOLDER_OR_ID")
    kind = dtype or ("auto" if device.type == "cuda" else "float32")
    extra = {"attn_implementation": attention} if attention else {}
    model, processor = loading.load(
        pretrained, dtype=kind, local=Path(pretrained).is_dir(), trust_remote_code=trust, **extra
    )
    return model.to(device), processor
