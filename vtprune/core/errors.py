"""The errors of this library, importable without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 0.7  # how alike a name must be for "did you mean": pyramid-drop for pyramiddrop, not foo for pool


class VtpruneError(ValueError):
    """Anything the user can put right: what was asked, what exists, what would work."""


class UnsupportedError(VtpruneError):
    """A method needs something that the model (or one of its sites) does not provide."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """``did you mean a or b?``, empty where no name is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=NEAR)
    return f"did you mean {' or '.join(near)}?" if near else ""


def unknown(what: str, name: str, known: Iterable[str]) -> VtpruneError:
    """The error for a name that there is not."""
    names = list(known)
    return VtpruneError(f"unknown {what} {name!r}; {suggestion(name, names) or ('there are ' + ', '.join(names))}")
