"""What there is, as plain data, without importing it: methods, recipes and model families as ``catalogue.json`` has
them. ``python -m vtprune.cli.registered`` (``make support``) writes that file.

The registries are asked instead where the file cannot know: plug-ins, modules that were imported by hand, and sources
that have changed since it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import vtprune

FILE = Path(__file__).with_name("catalogue.json")
GROUP, IMPORTS = "vtprune.plugins", "VTPRUNE_IMPORT"  # as in core/plugins.py, which imports more than there is time for

Entry = dict[str, Any]


def fingerprint() -> str:
    """Of the files that register something of ours."""
    package = Path(vtprune.__path__[0])
    models = next(folder / "models" for folder in map(Path, reversed(vtprune.__path__)) if (folder / "models").is_dir())
    single = [package / "core" / "recipes.py", package / "core" / "info.py", package / "cli" / "registered.py"]
    files = [*sorted((package / "methods").glob("*.py")), *single, *sorted(models.glob("*.py"))]
    known = hashlib.sha256()
    for path in files:
        known.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return known.hexdigest()


def _stored() -> dict[str, list[Entry]] | None:
    """The file's lists, or ``None`` where the registries know more."""
    if "vtprune.methods.base" in sys.modules or os.environ.get(IMPORTS) or entry_points(group=GROUP):
        return None
    try:
        told = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told["lists"] if told["fingerprint"] == fingerprint() else None


def entries(kind: str, pattern: str) -> list[Entry]:
    """The ``kind`` (``"methods"``, ``"recipes"``, ``"adapters"``) whose names match an ``fnmatch`` pattern. Raises
    :class:`VtpruneError` where there are none, for a name with close matches."""
    stored = _stored()
    found = [] if stored is None else [e for e in stored[kind] if fnmatchcase(e["name"], pattern)]
    if found:
        return found
    live: Callable[[str, str], list[Entry]] = import_module("vtprune.cli.registered").entries
    return live(kind, pattern)
