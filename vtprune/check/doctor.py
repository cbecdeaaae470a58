"""Which releases are installed and which are tested, and whether every model family computes right
with them, on its tiny model."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from vtprune.models.base import ADAPTERS

from ..core.failures import FAILURES
from ..core.types import UnsupportedError, VtpruneError
from ..methods.base import METHODS
from ..version import __version__
from . import versions
from .contract import CHECKS
from .verify import check

PROOFS = ("fastv", "tome")  # a cut in the language model, merging in the tower; where a family takes neither:
ELSE = "random"
BROKEN = ("older", "missing")
RAISED: tuple[type[Exception], ...] = (
    *FAILURES,
    ImportError,
)  # what an adapter or a model of another release may raise


def dependencies() -> list[dict[str, Any]]:
    """For every package that :mod:`vtprune.check.versions` names: ``package``, ``installed`` (``None``: not there),
    ``oldest`` and ``newest`` tested, ``status``."""
    return [asdict(versions.find(t.package)) for t in versions.TESTED]


def verified(family: str, checks: Sequence[str] | None = None) -> str | None:
    """The correctness contract (``checks``: these of it) on the family's first tiny model, with a cut in the language
    model and merging in the tower where it takes them.

    Returns ``None`` if every check passes, else the first that fails; raises what the libraries raise. A second or two.
    """
    model, inputs = next(iter(ADAPTERS.get(family).tiny.values()))()
    ran, why = False, ""
    for method in (*PROOFS, ELSE):
        if method == ELSE and ran:
            break
        taken = False
        for name in checks or CHECKS:
            try:
                result = check(name, model, method, inputs, **METHODS.get(method).cases[0])
            except UnsupportedError as e:
                if taken:  # the method is, and this check of it is refused
                    raise
                why = str(e)
                break
            ran = taken = True
            if result.passed is False:
                return f"{method}: {result.name}: {result.detail}"
    return None if ran else f"takes none of {', '.join((*PROOFS, ELSE))}: {why}"


def families(
    names: Sequence[str],
    prove: Callable[[str], str | None] | None = None,
    done: Callable[[str], object] = lambda family: None,
) -> list[dict[str, Any]]:
    """For each of ``names``: ``family``, ``passed`` (``None``: its optional package is not there), ``detail`` (why
    not), ``seconds``.

    ``prove`` tells what is wrong with a family, or ``None`` (default :func:`verified`); what it raises is what is
    wrong. ``done`` is told each family that is through. Raises :class:`VtpruneError` for an unknown family.
    """
    out = []
    for name, info in [(name, ADAPTERS.get(name)) for name in names]:
        began = time.perf_counter()
        passed: bool | None = None
        if info.package is not None and find_spec(info.package) is None:
            detail = f"needs the package {info.package}"
        else:
            try:
                detail = (prove or verified)(name) or ""
            except RAISED as e:
                detail = f"{type(e).__name__}: {' '.join(str(e).split()) or 'no reason given'}"
            passed = not detail
        out.append({"family": name, "passed": passed, "detail": detail, "seconds": time.perf_counter() - began})
        done(name)
    return out


def diagnose(
    names: Sequence[str] | None = None,
    prove: Callable[[str], str | None] | None = None,
    done: Callable[[str], object] = lambda family: None,
) -> dict[str, Any]:
    """Everything as plain data. ``names``: the families to try (default: all). ``passed``: nothing is missing, too old
    or in conflict, and no family failed."""
    packages, conflicts = dependencies(), versions.conflicts()
    try:
        tried = families(list(ADAPTERS) if names is None else names, prove, done)
    except VtpruneError:
        raise
    except RAISED as e:  # an adapter that cannot even be imported takes all of them along
        detail = f"the adapters cannot be imported: {type(e).__name__}: {' '.join(str(e).split())}"
        tried = [{"family": "(all)", "passed": False, "detail": detail, "seconds": 0.0}]
    sound = (
        not conflicts
        and all(p["status"] not in BROKEN for p in packages)
        and all(f["passed"] is not False for f in tried)
    )
    machine = {"python": platform.python_version(), "vtprune": __version__, "system": platform.platform()}
    return {
        "type": "vtprune.Doctor",
        "version": 1,
        **machine,
        "packages": packages,
        "conflicts": conflicts,
        "families": tried,
        "passed": sound,
    }
