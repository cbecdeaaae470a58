"""One registry class, three instances: methods, recipes, adapters. It stores classes and data, never configured instances."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

from .types import VtpruneError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to records. A clash raises; an unknown name raises with close matches. ``load`` is called once, before the first look-up, to import the entries."""

    def __init__(self, what: str, load: Callable[[], None] = lambda: None):
        self.what, self._load, self._loaded = what, load, False
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        if name != name.lower() or not name:
            raise ValueError(f"{self.what} names are lower case, got {name!r}")
        if name in self._entries:
            raise ValueError(f"{self.what} {name!r} is registered already")
        self._entries[name] = entry
        return entry

    def _ready(self) -> dict[str, T]:
        if not self._loaded:
            self._loaded = True
            self._load()
        return self._entries

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
