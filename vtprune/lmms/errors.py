"""How a run of lmms-eval says that it never began, or broke off: one line behind a mark that ``vtprune eval`` looks
for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..check.versions import conflicts
from ..core.types import VtpruneError

REFUSED, FAILED = "vtprune: refused: ", "vtprune: error: "  # the run never began; it broke off


def usable() -> None:
    """Raises :class:`VtpruneError` where an installed release is known to stop lmms-eval."""
    if reasons := conflicts():
        raise VtpruneError("; ".join(reasons))


@contextmanager
def fatal(exits: bool, prefix: str = FAILED) -> Iterator[None]:
    """lmms-eval logs an error and still ends with code 0: where ``exits`` is set, errors of the library end the process
    with code 1."""
    try:
        yield
    except VtpruneError as e:
        if not exits:
            raise
        raise SystemExit(prefix + " ".join(str(e).split())) from e


def first_line(e: BaseException) -> str:
    """Of what an exception says."""
    return (str(e).strip() or "no reason given").splitlines()[0]
