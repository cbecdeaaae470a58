"""Plug-ins: what other distributions add to the registries. Each entry point of the group ``vtprune.plugins`` names a
module that registers methods, adapters or recipes when it is imported (docs/plugins.md)."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from os.path import commonprefix

from .failures import FAILURES

GROUP = "vtprune.plugins"
RAISED: tuple[type[Exception], ...] = (*FAILURES, ImportError)  # what somebody else's module may raise when imported

LOG = logging.getLogger("vtprune")  # not warnings: the command line hides those


@dataclass(frozen=True)
class Plugin:
    """One entry point of :data:`GROUP`."""

    distribution: str  # name of the distribution that has it
    module: str  # dotted name of what is imported


class _Importing(threading.local):
    """What this thread is importing as plug-ins."""

    busy = False
    undo: list[tuple[str, Callable[[], None]]] | None = None  # (registering module, what takes its entry out again)


_importing = _Importing()
_lock = threading.Lock()
_plugins: list[Plugin] = []  # those that there are, also where the import failed: what is whole of them stays
_skipped: set[tuple[str, str]] = set()  # (distribution, value) of those that are named in the log already
_done = False


def load() -> None:
    """Imports every plug-in, once; a look-up that a plug-in makes while it is imported sees what is there so far.

    No lock of ours is held meanwhile: a second thread imports the same modules and waits where Python does, so that a
    plug-in that somebody imports by hand in another thread cannot lock both up. Raises nothing of :data:`RAISED`: a
    plug-in that fails is named in one line of the log and skipped.
    """
    global _done
    if _done or _importing.busy:
        return
    _importing.busy = True
    try:
        try:
            declared = list(entry_points(group=GROUP))
        except RAISED as e:  # the metadata of some distribution
            LOG.warning("vtprune: no plug-in is looked for: %s", _reason(e))
            declared = []
        entries = sorted(declared, key=lambda e: (_distribution(e), e.name))
        whole = [_load(entry) for entry in entries]
        _done = _done or all(whole)
    finally:
        _importing.busy = False


def _load(entry: EntryPoint) -> bool:
    """Imports one plug-in, or takes out what it has registered and says why. Tells whether that is over: it is not for
    a look-up from inside a plug-in that somebody imports by hand."""
    plugin = Plugin(_distribution(entry), entry.value)
    if not all(part.isidentifier() for part in entry.value.split(".")):
        _skip(plugin, "an entry point of this group is a module, package.module")
        return True
    with _lock:
        if plugin not in _plugins:
            _plugins.append(plugin)
    _importing.undo = []
    try:
        imported = import_module(plugin.module)
        return not getattr(imported.__spec__, "_initializing", False)
    except RAISED as e:
        for module, undo in _importing.undo:
            if module not in sys.modules:  # Python has dropped it: its import failed. Others are whole.
                undo()
        _skip(plugin, _reason(e))
        return True
    finally:
        _importing.undo = None


def _skip(plugin: Plugin, reason: str) -> None:
    with _lock:
        known = (plugin.distribution, plugin.module) in _skipped
        _skipped.add((plugin.distribution, plugin.module))
    if not known:
        LOG.warning("vtprune: plug-in %s of %s is skipped: %s", plugin.module, plugin.distribution, reason)


def _reason(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split()) or 'no reason given'}"


def _distribution(entry: EntryPoint) -> str:
    name = entry.dist.name if entry.dist is not None else None
    return name or "an unknown distribution"


def note(module: str, undo: Callable[[], None]) -> None:
    """``module`` has registered something, ``undo`` takes it out: kept while this thread imports a plug-in."""
    if _importing.undo is not None:
        _importing.undo.append((module, undo))


def distribution(module: str) -> str | None:
    """The distribution whose plug-in ``module`` belongs to: the one with the longest common package; ``None`` for our
    own modules and those of no plug-in."""

    def common(plugin: Plugin) -> int:
        """How many leading names both have."""
        return len(commonprefix([plugin.module.split("."), module.split(".")]))

    with _lock:
        nearest = max(_plugins, key=common, default=None)
    return nearest.distribution if nearest is not None and common(nearest) else None
