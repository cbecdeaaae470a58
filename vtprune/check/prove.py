"""A release that the tests have not seen proves itself before anything is attached: once per release and family, on the
family's tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..core.types import UnsupportedError
from ..version import __version__
from . import versions
from .doctor import families, verified

PACKAGES = {
    "timm-vit": "timm",
    "open-clip": "open_clip_torch",
}  # whose release a family depends on; the others: transformers
CHECKS = ("full_budget", "prefill_is_masked_dense", "decode_is_masked_dense", "cached_is_uncached")
SKIP = "VTPRUNE_SKIP_PROOF"
_proved: set[str] = set()


def memory() -> Path:
    """The file that remembers what has passed: in ``VTPRUNE_CACHE``, or the user's cache folder."""
    folder = (
        os.environ.get("VTPRUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtprune"
    )
    return Path(folder) / "proofs.json"


def _remembered() -> list[str]:
    try:
        lines = json.loads(memory().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or not ours: it is proved again
        return []
    return [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []


def _remember(line: str) -> None:
    path = memory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(sorted({*_remembered(), line}), indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError:  # a read-only home: the next process proves it again
        pass


def prove(family: str) -> None:
    """Lets ``family`` prove itself if its host library is newer than what was tested: prefill and cached decoding of
    its tiny model, pruned, against the dense model under masks. A second or two, then remembered;
    ``VTPRUNE_SKIP_PROOF=1`` leaves it out.

    Raises:
        UnsupportedError: it does not come out exact, with what failed.
    """
    release = versions.find(PACKAGES.get(family, "transformers"))
    if release.status != "newer" or os.environ.get(SKIP) == "1":
        return
    line = (
        f"vtprune {__version__}, torch {versions.installed('torch')}, {release.package} {release.installed}: {family}"
    )
    if line in _proved or line in _remembered():
        _proved.add(line)
        return
    result = families([family], lambda name: verified(name, CHECKS))[0]
    if result["passed"] is False:
        raise UnsupportedError(
            f"{release.package} {release.installed} is newer than {release.newest}, the newest release tested, and "
            f"{family} does not come out exact with it: {result['detail']}; install {release.package} "
            f"{release.newest}, or a newer vtprune ('vtprune doctor' tells of every family)"
        )
    _proved.add(line)
    _remember(line)
