"""Loading a model and its processor from a folder or the hub: no code of the folder's own is run, and whatever is wrong
with the files is one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.resources import told
from ..core.types import VtpruneError


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' reports of what does not fit are many lines; ours is one."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


# What a checkpoint is -> transformers' classes that load it and what goes in.
KINDS = {
    "image-text": ("AutoModelForImageTextToText", "AutoProcessor"),
    "text": ("AutoModelForCausalLM", "AutoTokenizer"),
    "classifier": ("AutoModelForImageClassification", "AutoImageProcessor"),
    "tower": ("AutoModel", "AutoImageProcessor"),
}


def kind_of(source: Any, *, local: bool) -> str:
    """Which of :data:`KINDS` the checkpoint is, by the class that it says it was saved from, or ``"timm"``. Raises
    :class:`VtpruneError` for one without a configuration."""
    from transformers import PreTrainedConfig

    with quiet(), told(f"cannot load {source}"):
        config, _ = PreTrainedConfig.get_config_dict(source, local_files_only=local)
    if "architecture" in config:
        return "timm"
    saved = str((config.get("architectures") or [""])[0])
    if saved.endswith("ForCausalLM"):
        return "text"
    if saved.endswith("ForImageClassification"):
        return "classifier"
    return "tower" if saved.endswith("Model") else "image-text"


def load_timm(source: Any, *, dtype: Any, local: bool) -> tuple[Any, Any]:
    """``(model, transform)`` of a timm checkpoint: a folder with ``config.json``, or a hub id; the transform makes a
    tensor of one picture. Raises :class:`VtpruneError` as :func:`load`."""
    import timm

    name = f"local-dir:{Path(source).resolve()}" if local else f"hf-hub:{source}"
    with told(f"cannot load {source}"):
        model = timm.create_model(name, pretrained=True)
    settings = timm.data.resolve_model_data_config(model)
    return model.to(dtype).eval(), timm.data.create_transform(**settings)


def load(source: Any, *, dtype: Any, local: bool, kind: str = "image-text", **extra: Any) -> tuple[Any, Any]:
    """``(model, processor)`` of a folder (``local``: no network) or hub id, on the CPU, in evaluation mode; ``extra``
    goes to the model's ``from_pretrained``; ``kind``: of :data:`KINDS`.

    Raises :class:`VtpruneError` for files that are missing, cut or of another kind, for a checkpoint that lacks
    weights, which transformers would fill with random numbers, and for a model that only its folder's own code can
    build: that code is never run.
    """
    import transformers

    model_class, processor_class = (getattr(transformers, name) for name in KINDS[kind])
    extra = {"trust_remote_code": False, **extra}
    with quiet():
        with told(f"cannot load {source}"):
            model, info = model_class.from_pretrained(
                source, dtype=dtype, local_files_only=local, output_loading_info=True, **extra
            )
        if missing := sorted(map(str, info["missing_keys"])):
            raise VtpruneError(
                f"cannot load {source}: its files lack {len(missing)} of the model's weights, {missing[0]} among them"
            )
        with told(f"cannot load the processor of {source}"):
            return model.eval(), processor_class.from_pretrained(
                source, local_files_only=local, trust_remote_code=extra["trust_remote_code"]
            )
