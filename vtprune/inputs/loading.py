"""Loading a model and its processor from a folder or the hub: no code of the folder's own is run, and whatever is wrong
with the files is one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


def load(source: Any, *, dtype: Any, local: bool, **extra: Any) -> tuple[Any, Any]:
    """``(model, processor)`` of a folder (``local``: no network) or hub id, on the CPU, in evaluation mode; ``extra``
    goes to the model's ``from_pretrained``.

    Raises :class:`VtpruneError` for files that are missing, cut or of another kind, for a checkpoint that lacks
    weights, which transformers would fill with random numbers, and for a model that only its folder's own code can
    build: that code is never run.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    extra = {"trust_remote_code": False, **extra}
    with quiet():
        with told(f"cannot load {source}"):
            model, info = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, local_files_only=local, output_loading_info=True, **extra
            )
        if missing := sorted(map(str, info["missing_keys"])):
            raise VtpruneError(
                f"cannot load {source}: its files lack {len(missing)} of the model's weights, {missing[0]} among them"
            )
        with told(f"cannot load the processor of {source}"):
            return model.eval(), AutoProcessor.from_pretrained(
                source, local_files_only=local, trust_remote_code=extra["trust_remote_code"]
            )
