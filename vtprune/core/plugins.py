"""Plug-ins: what other distributions add to the registries. Each entry point of the group ``vtprune.plugins`` names a
module that registers methods, adapters or recipes when it is imported (docs/plugins.md). Besides, modules and files
that somebody names: to :func:`bring`, or for a process and all that it starts in the environment variable
:data:`IMPORTS`."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from os.path import commonprefix
from pathlib import Path
from types import ModuleType

from .errors import VtpruneError
from .failures import FAILURES
from .log import LOG

GROUP, IMPORTS = "vtprune.plugins", "VTPRUNE_IMPORT"
RAISED: tuple[type[Exception], ...] = (*FAILURES, ImportError)  # what somebody else's module may raise when imported


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
    plug-in that fails is named in one line of the log (a warning would be hidden by the command line) and skipped.
    What the environment names is not skipped: :class:`VtpruneError`.
    """
    global _done
    if _done or _importing.busy:
        return
    _importing.busy = True
    try:
        for name in listed(IMPORTS):
            _import(name)
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


def bring(name: str) -> None:
    """Imports a module, or a ``.py`` file, that registers something, here and in every process that this one starts.
    Modules are looked for in the working folder as well. Raises :class:`VtpruneError` if that fails."""
    name = str(Path(name).resolve()) if name.endswith(".py") else name
    _import(name)
    hand_on(IMPORTS, name)


def listed(variable: str) -> list[str]:
    """What a variable of the environment lists, as ``PATH`` does."""
    return [entry for entry in os.environ.get(variable, "").split(os.pathsep) if entry]


def hand_on(variable: str, entry: str) -> None:
    """Adds to what a variable lists, here and in every process that this one starts."""
    os.environ[variable] = os.pathsep.join(dict.fromkeys([*listed(variable), entry]))


def _import(name: str) -> None:
    if name.endswith(".py"):
        module, origin = Path(name).stem, Path(name).name
    else:
        module = origin = name
        if not all(part.isidentifier() for part in name.split(".")):
            raise VtpruneError(f"{name!r} is neither a module (package.module) nor a .py file")
    try:
        _from_file(module, Path(name)) if name.endswith(".py") else _from_path(module)
    except RAISED as e:
        raise VtpruneError(f"cannot import {name}: {_reason(e)}") from e
    with _lock:
        if (plugin := Plugin(origin, module)) not in _plugins:
            _plugins.append(plugin)


def _from_path(module: str) -> None:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # last: nothing there takes the place of what is installed
    import_module(module)


def _from_file(module: str, path: Path) -> ModuleType:
    """The file as a module of its name, which later imports find."""
    known = sys.modules.get(module)
    if known is not None:
        if getattr(known, "__file__", None) == str(path):
            return known
        raise ImportError(f"there is a module {module} already; call the file otherwise")
    if not path.is_file():
        raise FileNotFoundError("no such file")
    spec = spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    made = sys.modules[module] = module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[module]
        raise
    return made


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
