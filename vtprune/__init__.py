"""vtprune: published visual-token pruning, merging and routing for unmodified LLaVA-style MLLMs and ViTs.

Importing this package imports no torch and no model library, and changes nothing in the process: what it offers is
imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module as _import
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# In a checkout the folders models/ and kernels/ stand beside this package; installed, they lie inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "models" / "base.py").is_file():
    __path__.append(str(_root))

# `methods` is a package and a function: the first import of a package binds its name here, later ones do not, so that
# the function below wins for good. The package itself is empty; its files are imported when a method is looked up.
_import("vtprune.methods")
from vtprune.moved import keep_old_names  # noqa: E402
from vtprune.version import __version__ as __version__  # noqa: E402

if TYPE_CHECKING:
    from vtprune.check.attach import attach
    from vtprune.check.verify import VerifyReport, verify
    from vtprune.core.errors import UnsupportedError, VtpruneError
    from vtprune.core.handle import Handle
    from vtprune.core.info import adapters, describe, recipes
    from vtprune.core.recipe import Recipe, Stage
    from vtprune.core.report import Report, StageReport
    from vtprune.core.solve import solve
    from vtprune.core.steer import Steering, steer
    from vtprune.inputs.demo_model import load_demo_model
    from vtprune.measure.calibrate import calibrate
    from vtprune.serving.encode import encode
    from vtprune.serving.encoded import Encoded

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

# Module -> the public names that it has.
_PLACES = {
    "check.attach": ("attach",),
    "check.verify": ("VerifyReport", "verify"),
    "core.errors": ("UnsupportedError", "VtpruneError"),
    "core.handle": ("Handle",),
    "core.info": ("adapters", "describe", "recipes"),
    "core.recipe": ("Recipe", "Stage"),
    "core.report": ("Report", "StageReport"),
    "core.solve": ("solve",),
    "core.steer": ("Steering", "steer"),
    "inputs.demo_model": ("load_demo_model",),
    "measure.calibrate": ("calibrate",),
    "serving.encode": ("encode",),
    "serving.encoded": ("Encoded",),
}
_PLACE = {name: place for place, names in _PLACES.items() for name in names}
_ROOMS = ("check", "core", "inputs", "measure", "models", "serving")  # programs use vtprune.core.types and the like


def methods(pattern: str = "*") -> list[str]:
    """Names of the registered methods that match an ``fnmatch`` pattern."""
    return _import("vtprune.core.info").methods(pattern)


keep_old_names(globals(), __all__)


def __getattr__(name: str) -> Any:
    """What is not imported yet (PEP 562)."""
    if name in _PLACE:
        value = globals()[name] = getattr(_import(f"vtprune.{_PLACE[name]}"), name)
        return value
    if name in _ROOMS:
        for place in _PLACES:
            _import(f"vtprune.{place}")
        return _import(f"vtprune.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
