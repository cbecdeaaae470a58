"""The releases that the tests have seen, in this one place: pyproject.toml's bounds and the lock files are compared
with it, ``vtprune doctor`` shows it.

It needs nothing but Python, so that the Makefile can ask before anything is installed: ``python -I
vtprune/check/versions.py lock``. A release behind the newest tested one is not forbidden; one of transformers has to
prove itself (``vtprune doctor``).
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PYTHONS = ("3.10", "3.11", "3.12", "3.13")  # the lock files were resolved for these


@dataclass(frozen=True)
class Tested:
    """Releases of a package with which the tests passed.

    Attributes:
        package: as the index names it.
        oldest: the lowest of them.
        newest: the highest of them.
        extra: the extra that brings the package, "": it is always there.
        below: a release that is known to break.
        why: it does, or the package is here.
        bound: whether pyproject.toml asks for the package by name.
    """

    package: str
    oldest: str
    newest: str
    extra: str = ""
    below: str = ""
    why: str = ""
    bound: bool = True


TESTED = (
    Tested("torch", "2.11.0", "2.14.1"),
    Tested("torchvision", "0.26.0", "0.29.1"),
    Tested("triton", "3.6.0", "3.8.0", bound=False, why="torch brings its own"),
    Tested("transformers", "5.17.0", "5.24.0"),
    Tested("timm", "1.0.31", "1.0.31"),
    Tested("open_clip_torch", "3.0.0", "3.3.0", extra="open-clip"),
    Tested(
        "lmms-eval",
        "0.7.3",
        "0.7.3",
        extra="lmms-eval",
        below="0.8",
        why="the plugin follows 0.7's interface and task files",
    ),
    Tested(
        "filelock",
        "3.32.7",
        "3.32.7",
        extra="lmms-eval",
        below="4",
        why="lmms-eval 0.7.1 to 0.7.3 import filelock._api, which filelock 4 does not have",
    ),
    Tested("gradio", "6.25.0", "6.31.0", extra="demo"),
)


@dataclass(frozen=True)
class Found:
    """A package and what is installed of it (``None``: nothing). ``status``: "tested", "newer" or "older" than the
    tested releases, "absent", or "missing" where the library cannot do without."""

    package: str
    installed: str | None
    oldest: str
    newest: str
    status: str


def release(text: str) -> tuple[int, ...]:
    """``"5.24.0"`` as ``(5, 24)``: the numbers in front, without zeros at the end; ``2.14.1+cpu`` and ``2.14.1rc1``
    count as 2.14.1.

    Raises :class:`ValueError` for a text that begins with no number.
    """
    match = re.match(r"\d+(\.\d+)*", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no release number")
    numbers = [int(part) for part in match[0].split(".")]
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def installed(package: str) -> str | None:
    """The release of ``package`` in this environment, or ``None``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tested(package: str) -> Tested:
    """The entry of ``package``. Raises :class:`KeyError` if there is none."""
    return {t.package: t for t in TESTED}[package]


def find(package: str) -> Found:
    """What is installed of a package of :data:`TESTED`, beside what is tested."""
    entry, there = tested(package), installed(package)
    if there is None:
        status = "absent" if entry.extra or not entry.bound else "missing"
    elif release(there) > release(entry.newest):
        status = "newer"
    else:
        status = "older" if release(there) < release(entry.oldest) else "tested"
    return Found(package, there, entry.oldest, entry.newest, status)


def conflicts() -> list[str]:
    """Installed releases that are known not to work together, one sentence with its cure for each."""
    lmms, locks = installed("lmms-eval"), installed("filelock")
    out = []
    if lmms and locks and (0, 7, 1) <= release(lmms) <= (0, 7, 3) and find_spec("filelock._api") is None:
        out.append(
            f"lmms-eval {lmms} imports filelock._api, which filelock {locks} does not have: pip install 'filelock<4'"
        )
    return out


# -------------------------------------------------------------------------------------------------- for the Makefile
# and make lock


def newest() -> list[str]:
    """Requirements that keep every package at or below the newest tested release."""
    return [f"{t.package}<={t.newest}" for t in TESTED]


def oldest() -> list[str]:
    """Requirements for the oldest tested releases; triton comes with torch, and numpy 2.4 breaks that triton's
    interpreter, which the kernels' tests use."""
    return [f"{t.package}=={t.oldest}" for t in TESTED if t.bound] + ["numpy<2.4"]


def main(words: list[str]) -> int:
    """``lock``, ``lock-oldest``: where the lock file lies, as a URL (pip splits paths at spaces), or a line on stderr
    if it is not for this Python; ``newest``, ``oldest``: requirements."""
    files, lists = {"lock": "lock.txt", "lock-oldest": "oldest.txt"}, {"newest": newest, "oldest": oldest}
    asked = words[0] if len(words) == 1 else ""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if asked in lists:
        print("\n".join(lists[asked]()))
    elif asked not in files:
        print(f"usage: python -I vtprune/check/versions.py {' | '.join((*files, *lists))}", file=sys.stderr)
        return 2
    elif python in PYTHONS:
        print((Path(__file__).resolve().parents[2] / "requirements" / files[asked]).as_uri())
    else:
        print(
            f"requirements/{files[asked]} is for Python {', '.join(PYTHONS)}, not {python}: installing by "
            "pyproject.toml's bounds instead",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
