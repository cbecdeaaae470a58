"""Runs that survive: a journal of what is done so far, one JSON file per finished run, both told apart from runs made
in another way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.failures import FAILURES
from ..core.types import UnsupportedError, VtpruneError


class RunError(VtpruneError):
    """A run broke off, or what lies in its place is none of it; the message says where, why, and what is kept."""


def digest(*parts: object) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of ``parts`` as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(model: Any) -> str:
    """Tells models apart: a digest of the configuration and of a few values of every parameter."""
    values = [
        (name, list(p.shape), p.detach().flatten()[:4096:512].float().tolist()) for name, p in model.named_parameters()
    ]
    return digest(model.config.to_dict() | {"_name_or_path": None, "transformers_version": None}, values)


def slug(name: str) -> str:
    """A name as a file name."""
    return "".join(c if c.isalnum() or c in "-_.+" else "-" for c in name).strip("-")


def write(path: Path, data: str) -> None:
    """Puts ``data`` at ``path`` whole or not at all. Raises :class:`RunError` if it cannot be written."""
    draft = path.with_name(path.name + ".draft")
    try:
        draft.write_text(data, encoding="utf-8")
        os.replace(draft, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {e.strerror or e}") from e


def read(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises :class:`RunError` if there is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise RunError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise RunError(f"{path} is not a result: {e}") from e
    if not isinstance(result, dict):
        raise RunError(f"{path} is not a result: it holds a {type(result).__name__}")
    return result


def alike(path: Path, result: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Raises :class:`RunError` unless ``result``, from ``path``, was made as ``head`` says; how many threads did it
    does not matter."""
    for key, value in json.loads(json.dumps(head)).items():
        if _essence(result.get(key)) != _essence(value):
            raise RunError(
                f"{path} was made with {key} {result.get(key)!r}, this run has {value!r}: choose another folder, or "
                "delete the file"
            )


def _essence(value: Any) -> Any:
    return {k: v for k, v in value.items() if k not in ("threads", "cores")} if isinstance(value, dict) else value


class Journal:
    """The records of a run so far, on disk after every batch.

    ``path``: a file of one JSON object per line, the first the run's ``head``; ``None`` keeps the journal in memory
    only. A last line that a crash cut short is dropped. ``batches``: what :meth:`add` was given, those of an earlier
    start first.

    Raises :class:`RunError` if the file was begun by a run with another head, is damaged, is being written by another
    process, or cannot be written.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any]):
        self.path, self.batches = path, list[dict[str, Any]]()
        self._file: Any = None
        if path is None:
            return
        try:
            self._file = path.open("a+b")
            _lock(self._file, path)
            self._file.seek(0)
            lines = self._file.read().splitlines(keepends=True)
            good = 0
            for number, line in enumerate(lines):
                entry = _whole(line)
                if entry is None and number < len(lines) - 1:
                    raise RunError(f"line {number + 1} of {path} is damaged: delete the file to begin anew")
                if entry is None:
                    break
                if number == 0:
                    alike(path, entry, head)
                else:
                    self.batches.append(entry)
                good += len(line)
            self._file.truncate(good)
            if not good:
                self._append(dict(head))
        except OSError as e:
            self.close()
            raise RunError(f"cannot write {path}: {e.strerror or e}") from e
        except VtpruneError:
            self.close()
            raise

    @property
    def records(self) -> list[dict[str, Any]]:
        """Per sample, in order."""
        return [r for b in self.batches for r in b["records"]]

    def add(self, records: Sequence[Mapping[str, Any]], **totals: Any) -> None:
        """The next batch: one record per sample, and sums over the batch. On disk when this returns."""
        entry = {"records": list(records), **totals}
        if self._file is not None:
            try:
                self._append(entry)
            except OSError as e:
                raise RunError(f"cannot write {self.path}: {e.strerror or e}") from e
        self.batches.append(entry)

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has been told already
                self._file.close()
            self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def located(self, what: str) -> Iterator[None]:
        """Failures inside become a :class:`RunError` that names ``what`` was being done and what is kept; refusals of a
        method pass."""
        try:
            yield
        except UnsupportedError:
            raise
        except FAILURES as e:
            reason = str(e).strip().splitlines()[0] if str(e).strip() else "no reason given"
            kind = "" if isinstance(e, VtpruneError) else f"{type(e).__name__}: "
            kept = (
                f"{len(self.records)} samples are kept in {self.path}; the same command goes on from there"
                if self.path
                else "nothing was kept"
            )
            raise RunError(f"{what}: {kind}{reason} ({kept})") from e


def _whole(line: bytes) -> dict[str, Any] | None:
    """The entry in a line, unless a crash cut it short."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _lock(file: Any, path: Path) -> None:
    """One writer per journal, where the system has advisory locks."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise RunError(f"another process is writing {path}") from e
