"""The vLLM plug-in: with ``VTPRUNE_RECIPE`` set, stock vLLM serves LLaVA and Qwen-VL models with that recipe, their
tokens at their original positions. Without it the plug-in does nothing."""

from __future__ import annotations

import functools
import os
from typing import Any

from .settings import RECIPE, Prepared

# architecture -> class in .models
CLASSES = {
    "LlavaForConditionalGeneration": "Llava",
    "LlavaOnevisionForConditionalGeneration": "LlavaOnevision",
    "Qwen2_5_VLForConditionalGeneration": "Qwen25VL",
    "Qwen3VLForConditionalGeneration": "Qwen3VL",
}


def register() -> None:
    """Entry point ``vllm.general_plugins``; called in every process of an engine, possibly twice."""
    if not os.environ.get(RECIPE):
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform

    for architecture, name in CLASSES.items():
        ModelRegistry.register_model(architecture, f"vtprune.serving.vllm.models:{name}")
        MODELS_CONFIG_MAP[architecture] = Prepared
    if current_platform.is_cpu():
        _ask_for_positions()


def _ask_for_positions() -> None:
    """vLLM's runner for CPUs loads the model without finding out, as the other runners do, whether its embeddings bring
    positions along (0.32: ``cpu_model_runner.py``, ``load_model``)."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = CPUModelRunner.load_model
    if getattr(load, "by_vtprune", False):
        return

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        images = self.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = (
            getattr(self.get_model(), "supports_multimodal_pruning", False)
            and images is not None
            and images.is_multimodal_pruning_enabled()
        )

    load_model.by_vtprune = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model
