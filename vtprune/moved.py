"""Where modules of the first layout went: programs that were written against it go on working.

Each old name is a module in :data:`sys.modules` that looks its attributes up in the new ones when they are asked for,
so that nothing is imported earlier than it was.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module -> the modules that its names lie in now.
MOVED = {
    "answer": ("inputs.chats", "inputs.images"),
    "attach": ("core.planning", "core.composition", "core.wrappers", "core.handle", "check.attach"),
    "bench": (
        "measure.samples",
        "measure.run",
        "measure.bench",
        "measure.statistics",
        "measure.environment",
        "measure.prefill",
        "measure.text",
    ),
    "ledger": ("core.ledger", "core.stopwatch"),
    "models._books": ("models.engine.books",),
    "models._demo": ("inputs.demo_model",),
    "models._host": ("models.engine.host",),
    "models._mllm": ("models.parts.mllm", "models.parts.tiny"),
    "recipe": ("core.recipe",),
    "recipes": ("core.recipes",),
    "render": ("show.pictures", "show.views", "show.web", "show.heat", "show.row_bias", "show.token_states"),
    "select": ("core.select",),
    "solve": ("core.solve",),
    "types": ("core.types", "core.report"),
    "verify": ("check.verify", "check.contract", "check.case", "check.dense"),
}
RENAMED = {"_Case": "Case", "_masks": "masks"}


class _Moved(ModuleType):
    """One old module."""

    def __init__(self, name: str, places: tuple[str, ...]):
        super().__init__(name, f"Moved to {', '.join(places)}.")
        self.__dict__["places"] = places
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what tools look for in all modules is no name of ours
            raise AttributeError(name)
        for place in self.__dict__["places"]:
            module = import_module(f"vtprune.{place}")
            for known in (name, RENAMED.get(name, name)):
                if hasattr(module, known):
                    return getattr(module, known)
        raise AttributeError(f"{self.__name__} has moved to {', '.join(self.__dict__['places'])}; none has {name!r}")


def keep_old_names(package: dict[str, Any], taken: Collection[str]) -> None:
    """Makes the old modules importable, and attributes of ``package`` where none of its public names, ``taken``, is
    theirs."""
    for old, places in MOVED.items():
        module = sys.modules[f"vtprune.{old}"] = _Moved(f"vtprune.{old}", places)
        if "." not in old and old not in taken:
            package.setdefault(old, module)
