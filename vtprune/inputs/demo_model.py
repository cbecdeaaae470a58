"""The bundled VLM: loading only. How it was trained: ``vtprune/train/demo_vlm.py``; what it is and can do:
``models/demo_vlm/README.md``. It lies in a checkout, and installed it is the distribution ``vtprune-demo-vlm``."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import models
from ..core.recipe import Recipe, Stage
from ..core.types import VtpruneError

CLIPS = "clips.safetensors"


def _place() -> Path:
    """The model's folder: that of a checkout, or else that of the installed distribution."""
    own = Path(models.__file__).parent / "demo_vlm"
    found = find_spec("vtprune_demo_vlm")
    if (own / "config.json").is_file() or found is None or found.origin is None:
        return own
    return Path(found.origin).parent / "model"


FOLDER = _place()


def bundled() -> Path:
    """:data:`FOLDER`. Raises :class:`VtpruneError` if there is no model."""
    if not (FOLDER / "config.json").is_file():
        raise VtpruneError(
            "the bundled VLM is not installed: pip install 'vtprune[demo-vlm]' (the distribution vtprune-demo-vlm), or "
            "name a model of yours (--model on the command line)"
        )
    return FOLDER


def load(device: str = "cpu", dtype: Any = None, clips: bool = False, folder: Path = FOLDER) -> tuple[Any, Any]:
    """The stock model; ``clips``: with the language model of the file :data:`CLIPS` in ``folder``.
    :class:`VtpruneError` if that is missing or damaged, or no model is installed."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    place = bundled()
    model = LlavaForConditionalGeneration.from_pretrained(
        place, dtype=dtype or torch.float32, local_files_only=True, trust_remote_code=False
    )
    if clips:
        _replace(model, folder / CLIPS)
    return model.to(device).eval(), AutoProcessor.from_pretrained(place, local_files_only=True, trust_remote_code=False)


def load_demo_model(device: str = "cpu", dtype: Any = None, clips: bool = False) -> tuple[Any, Any]:
    """The bundled trained VLM: ``(LlavaForConditionalGeneration, LlavaProcessor)``, stock classes, evaluation mode, no
    network.

    Args:
        dtype: float32 by default.
        clips: with the language model that was trained further on short videos, whose frames are the images of one
            prompt, one behind the other (``vtprune/data/clips.py``).

    Raises:
        VtpruneError: it is not installed (``pip install 'vtprune[demo-vlm]'``).
    """
    return load(device, dtype, clips)


def _replace(model: Any, path: Path) -> None:
    """Loads the weights of ``path`` over those of the same names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise VtpruneError(
            f"{path}, the language model trained on clips, is missing; python -m vtprune.train.demo_clips makes it"
        )
    try:
        odd = model.load_state_dict(load_file(path), strict=False).unexpected_keys
    except (OSError, RuntimeError, SafetensorError) as e:
        raise VtpruneError(f"{path}, the language model trained on clips, cannot be read: {e}") from e
    if odd:
        raise VtpruneError(f"{path} holds weights that the bundled model has not: {', '.join(odd[:3])}")


def branch(folder: Path = FOLDER) -> Recipe | None:
    """DPVR-LF with the side branch that ``vtprune train dpvr-lf`` left in ``folder``, ``None`` if there is none.
    :class:`VtpruneError` for a damaged one."""
    weights, facts = folder / "dpvr_lf.safetensors", folder / "dpvr_lf.json"
    if not weights.is_file():
        return None
    try:
        description = json.loads(facts.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise VtpruneError(f"{facts}, the description of the trained branch, cannot be read: {e}") from e
    told = description.get("options") if isinstance(description, dict) else None
    if not isinstance(told, dict):
        raise VtpruneError(f"{facts}, the description of the trained branch, cannot be read: it holds no options")
    options = {k: told[k] for k in ("split", "fusion", "branch_layers", "variant") if k in told}
    stage = Stage(method="dpvr-lf", options={"weights": str(weights), **options})
    return Recipe(name="dpvr-lf (trained)", stages=(stage,), source="trained side branch")
