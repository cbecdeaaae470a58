"""The errors of this library, importable without torch."""

from __future__ import annotations


class VtpruneError(ValueError):
    """Anything the user can put right: what was asked, what exists, what would work."""


class UnsupportedError(VtpruneError):
    """A method needs something that the model (or one of its sites) does not provide."""
