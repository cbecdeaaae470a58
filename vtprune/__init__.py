"""vtprune: published visual-token pruning, merging and routing for unmodified LLaVA-style MLLMs and ViTs.

Importing this package imports no model library and changes nothing in the process.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import Any

__version__ = "0.1.0"

# In a checkout the folders models/ and kernels/ stand beside this package; installed, they lie inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "models" / "base.py").is_file():
    __path__.append(str(_root))

# The core needs torch only. It is imported here, not lazily: a public function may bear its module's name (attach,
# methods, solve, verify), and only the first import of a module binds that name, so the functions below win for good.
from vtprune.attach import Handle, attach  # noqa: E402
from vtprune.info import adapters, describe, methods, recipes  # noqa: E402
from vtprune.recipe import Recipe, Stage  # noqa: E402
from vtprune.solve import solve  # noqa: E402
from vtprune.types import Report, StageReport, UnsupportedError, VtpruneError  # noqa: E402
from vtprune.verify import VerifyReport, verify  # noqa: E402

__all__ = [
    "Handle",
    "Recipe",
    "Report",
    "Stage",
    "StageReport",
    "UnsupportedError",
    "VerifyReport",
    "VtpruneError",
    "adapters",
    "attach",
    "describe",
    "load_demo_model",
    "methods",
    "recipes",
    "solve",
    "verify",
]


def load_demo_model(device: str = "cpu", dtype: Any = None) -> tuple[Any, Any]:
    """The bundled trained VLM: ``(LlavaForConditionalGeneration, LlavaProcessor)``, stock classes, evaluation mode, no
    network. ``dtype``: float32 by default."""
    from vtprune.models._demo import load

    return load(device, dtype)
