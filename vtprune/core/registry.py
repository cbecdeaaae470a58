"""One registry class, three instances: methods, recipes, adapters. It stores classes and data, never configured
instances."""

from __future__ import annotations

import difflib
import sys
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

from .types import VtpruneError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to records. An unknown name raises with close matches. ``load`` is called once, before the first look-up,
    to import the entries; look-ups of other threads wait for it.

    An entry belongs to whoever registered it: registering again replaces it (a notebook's cell that is run a second
    time, a module that is reloaded), anybody else's name raises."""

    def __init__(self, what: str, load: Callable[[], None] = lambda: None):
        self.what, self._load, self._loaded = what, load, False
        self._entries: dict[str, T] = {}
        self._owners: dict[str, str] = {}
        # Two locks: whoever loads waits for imports, and a module that another thread is importing must be able to
        # register meanwhile.
        self._loading, self._lock = threading.RLock(), threading.Lock()
        self._begun = False

    def register(self, name: str, entry: T, owner: str | None = None) -> T:
        """``owner``: who may replace the entry (default: the calling module). Raises ``ValueError`` for another's name
        and for one that is not lower case."""
        mine = owner or sys._getframe(1).f_globals.get("__name__", "")
        self.reserve(name, mine, self.what)
        with self._lock:
            self._entries[name] = entry
        return entry

    def reserve(self, name: str, owner: str, what: str) -> None:
        """Keeps ``name`` for ``owner``, as a ``what``. Raises ``ValueError`` if it is another's."""
        if not isinstance(name, str) or name != name.lower() or not name:
            raise ValueError(f"{what} names are lower case, got {name!r}")
        with self._lock:
            if self._owners.setdefault(name, owner) != owner:
                raise ValueError(f"{self.what} {name!r} is registered already, by {self._owners[name]}")

    def _ready(self) -> dict[str, T]:
        """All entries, a copy."""
        if not self._loaded:
            with self._loading:
                # else another thread has done it, or this is a look-up from inside the loading
                if not self._loaded and not self._begun:
                    self._begun = True
                    try:
                        self._load()
                        self._loaded = True
                    finally:
                        self._begun = False
        with self._lock:
            return dict(self._entries)

    def names(self, pattern: str = "*") -> list[str]:
        """Registered names that match an ``fnmatch`` pattern, sorted."""
        return sorted(n for n in self._ready() if fnmatchcase(n, pattern))

    def get(self, name: str) -> T:
        """The record of ``name``; raises :class:`VtpruneError` naming close matches."""
        entries = self._ready()
        if name in entries:
            return entries[name]
        near = difflib.get_close_matches(name, entries, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(entries))}"
        raise VtpruneError(f"unknown {self.what} {name!r}; {hint}")

    def __contains__(self, name: str) -> bool:
        return name in self._ready()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._ready()))
