"""Whether results can be written where the user wants them: checked before the long work, not after it."""

from __future__ import annotations

import os
from pathlib import Path

from .types import VtpruneError


def output(path: Path | None, *endings: str) -> Path | None:
    """``path`` if a file can be put there, told before the long work, and its name ends in one of ``endings`` (none:
    anyhow). Raises :class:`VtpruneError`."""
    if path is not None and endings and path.suffix.lower() not in endings:
        raise VtpruneError(f"cannot write {path}: its name ends in {' or '.join(endings)}, which says what is written")
    if path is not None and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
        what = (
            "is a folder"
            if path.is_dir()
            else "lies in a folder that cannot be written"
            if path.parent.is_dir()
            else "lies in a folder that does not exist"
        )
        raise VtpruneError(f"cannot write {path}: it {what}")
    return path


def folder(path: Path | None) -> Path | None:
    """``path``, made if need be. Raises :class:`VtpruneError` if it cannot be written."""
    if path is None:
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise VtpruneError(f"cannot make the folder {path}: {e.strerror or e}") from e
    if not os.access(path, os.W_OK):
        raise VtpruneError(f"the folder {path} cannot be written")
    return path
