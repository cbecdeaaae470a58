"""The model that a user names - a folder, a hub id, or none for the bundled one - on a device, in a data type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..core.resources import told
from ..core.types import VtpruneError
from . import demo_model, loading

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def is_local(model: str | None) -> bool:
    """Whether ``model`` names a folder (or, ``None``, the bundled VLM) and no hub id. Raises :class:`VtpruneError` if
    it can be neither."""
    if model is None or Path(model).is_dir():
        return True
    if not HUB_ID.fullmatch(model):
        raise VtpruneError(f"no such model folder: {model}")
    return False


def load(model: str | None, device: str, dtype: str, clips: bool = False, any_kind: bool = False) -> tuple[Any, Any]:
    """``(model, processor)``; ``clips``: of the bundled model the one trained on clips; ``any_kind``: also a language
    model and its tokenizer, or a vision transformer and what makes tensors of its pictures. A folder is read without a
    network, anything else is a hub id (``HF_HUB_OFFLINE=1``: as cached). :class:`VtpruneError` for a device that is not
    there and for a folder or hub id that holds no such model or cannot be reached."""
    import torch

    place = _device(device)
    local = is_local(model)
    from transformers.utils import logging

    if local:
        logging.disable_progress_bar()
    if model is None:
        return demo_model.load(device, getattr(torch, dtype), clips)
    kind = loading.kind_of(model, local=local) if any_kind else "image-text"
    if kind == "timm":
        loaded, processor = loading.load_timm(model, dtype=getattr(torch, dtype), local=local)
    else:
        loaded, processor = loading.load(model, dtype=getattr(torch, dtype), local=local, kind=kind)
    with told(f"cannot move {model} to {place}"):
        return loaded.to(place), processor


def _device(name: str) -> Any:
    """The ``torch.device`` of this name. Raises :class:`VtpruneError` if it is not there."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise VtpruneError(f"unknown device {name!r}") from e
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise VtpruneError(
            f"device {name!r} is not available here; there are cpu and {torch.cuda.device_count()} CUDA devices"
        )
    return device
