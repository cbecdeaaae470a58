"""vtprune: published visual-token pruning, merging and routing for unmodified LLaVA-style MLLMs and ViTs.

Importing this package imports no model library and changes nothing in the process.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import Any

# In a checkout the folders models/ and kernels/ stand beside this package; installed, they lie inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "models" / "base.py").is_file():
    __path__.append(str(_root))

# The core needs torch only. It is imported here, not lazily: `methods` is a package and a function, and only the first
# import of a package binds its name, so that the function below wins for good.
from vtprune.check.attach import attach  # noqa: E402
from vtprune.check.verify import VerifyReport, verify  # noqa: E402
from vtprune.core.handle import Handle  # noqa: E402
from vtprune.core.info import adapters, describe, methods, recipes  # noqa: E402
from vtprune.core.recipe import Recipe, Stage  # noqa: E402
from vtprune.core.report import Report, StageReport  # noqa: E402
from vtprune.core.solve import solve  # noqa: E402
from vtprune.core.steer import Steering, steer  # noqa: E402
from vtprune.core.types import UnsupportedError, VtpruneError  # noqa: E402
from vtprune.measure.calibrate import calibrate  # noqa: E402
from vtprune.moved import keep_old_names  # noqa: E402
from vtprune.serving.encode import encode  # noqa: E402
from vtprune.serving.encoded import Encoded  # noqa: E402
from vtprune.version import __version__  # noqa: E402, F401

__all__ = [
    "Encoded",
    "Handle",
    "Recipe",
    "Report",
    "Stage",
    "StageReport",
    "Steering",
    "UnsupportedError",
    "VerifyReport",
    "VtpruneError",
    "adapters",
    "attach",
    "calibrate",
    "describe",
    "encode",
    "load_demo_model",
    "methods",
    "recipes",
    "solve",
    "steer",
    "verify",
]

keep_old_names(globals())


def load_demo_model(device: str = "cpu", dtype: Any = None, clips: bool = False) -> tuple[Any, Any]:
    """The bundled trained VLM: ``(LlavaForConditionalGeneration, LlavaProcessor)``, stock classes, evaluation mode, no
    network.

    Args:
        dtype: float32 by default.
        clips: with the language model that was trained further on short videos, whose frames are the images of one
            prompt, one behind the other (``vtprune/data/clips.py``).
    """
    from vtprune.inputs.demo_model import load

    return load(device, dtype, clips)
