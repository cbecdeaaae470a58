"""What the entry point ``lmms_eval.models`` loads; light, since a failure here would take other plugins along."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """The model ``vtprune``: a chat class, and a simple one (``--force_simple``) for log-likelihood tasks."""
    from lmms_eval.models.registry_v2 import ModelManifest

    where = "vtprune.lmms.model."
    return [ModelManifest(model_id="vtprune", chat_class_path=where + "Chat", simple_class_path=where + "Simple")]
