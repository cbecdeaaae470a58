"""The bundled VLM: loading only. How it was trained: ``vtprune/train/demo_vlm.py``; what it is and can do: ``demo_vlm/README.md``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "demo_vlm"


def load(device: str = "cpu", dtype: Any = None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=dtype or torch.float32, local_files_only=True)
    return model.to(device).eval(), AutoProcessor.from_pretrained(FOLDER, local_files_only=True)
