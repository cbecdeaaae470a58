"""One registry class, three instances: methods, recipes, adapters. It stores classes and data, never configured
instances."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

from . import plugins
from .errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to records. An unknown name raises with close matches. ``load`` is called once, before the first look-up
    and before anything from outside is registered, to import our own entries; look-ups of other threads wait for it.
    An ``extensible`` one has what plug-ins add as well (:mod:`vtprune.core.plugins`).

    An entry belongs to whoever registered it: registering again replaces it (a notebook's cell that is run a second
    time, a module that is reloaded), anybody else's name raises."""

    def __init__(self, what: str, load: Callable[[], None] = lambda: None, *, extensible: bool = False):
        self.what, self._load, self._extensible, self._loaded = what, load, extensible, False
        self._entries: dict[str, T] = {}
        self._owners: dict[str, str] = {}
        self._modules: dict[str, str] = {}  # where each entry was registered
        # Two locks: whoever loads waits for imports, and a module that another thread is importing must be able to
        # register meanwhile.
        self._loading, self._lock = threading.RLock(), threading.Lock()
        self._begun = False

    def register(self, name: str, entry: T, owner: str | None = None, module: str | None = None) -> T:
        """Adds ``entry`` and returns it.

        Args:
            name: lower case.
            owner: who may replace the entry (default: ``module``).
            module: where it comes from (default: the calling module).

        Raises:
            ValueError: the name is another's, or not lower case.
        """
        module = module or sys._getframe(1).f_globals.get("__name__", "")
        self.reserve(name, owner or module, self.what, module)
        with self._lock:
            self._entries[name], self._modules[name] = entry, module
        return entry

    def reserve(self, name: str, owner: str, what: str, module: str) -> None:
        """Keeps ``name`` for ``owner``, as a ``what`` that ``module`` registers. Raises ``ValueError`` if it is
        another's."""
        if not isinstance(name, str) or name != name.lower() or not name:
            raise ValueError(f"{what} names are lower case, got {name!r}")
        if module.partition(".")[0] != "vtprune":
            self._own()  # else an outsider could take a name of ours that is not loaded yet
        with self._lock:
            if self._owners.setdefault(name, owner) != owner:
                raise ValueError(f"{self.what} {name!r} is registered already, by {self._owners[name]}")
        plugins.note(module, lambda: self._forget(name))

    def _forget(self, name: str) -> None:
        with self._lock:
            for table in (self._entries, self._owners, self._modules):
                table.pop(name, None)

    def _own(self) -> bool:
        """Loads our own entries if that is still to do; tells whether they are there, which they are not for a look-up
        from inside the loading."""
        if not self._loaded:
            with self._loading:
                if not self._loaded and not self._begun:  # else another thread has done it
                    self._begun = True
                    try:
                        self._load()
                        self._loaded = True
                    finally:
                        self._begun = False
        return self._loaded

    def _ready(self) -> dict[str, T]:
        """All entries, a copy."""
        if self._own() and self._extensible:
            plugins.load()
        with self._lock:
            return dict(self._entries)

    def names(self, pattern: str = "*") -> list[str]:
        """Registered names that match an ``fnmatch`` pattern, sorted."""
        return sorted(n for n in self._ready() if fnmatchcase(n, pattern))

    def items(self) -> list[tuple[str, T]]:
        """Names with their records, sorted."""
        return sorted(self._ready().items(), key=lambda pair: pair[0])

    def get(self, name: str) -> T:
        """The record of ``name``; raises :class:`VtpruneError` naming close matches."""
        entries = self._ready()
        if name in entries:
            return entries[name]
        raise unknown(self.what, name, sorted(entries))

    def distribution(self, name: str) -> str | None:
        """The distribution whose plug-in registered ``name``, ``None`` for our own entries and those of a script or a
        notebook; raises :class:`VtpruneError` for an unknown name."""
        self.get(name)
        return plugins.distribution(self._modules.get(name, ""))

    def __contains__(self, name: str) -> bool:
        return name in self._ready()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._ready()))
