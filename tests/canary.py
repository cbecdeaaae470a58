"""The first release of a package that breaks us: installs one release after the other, beside the environment that runs
this, and tries a covering subset.

``python tests/canary.py transformers``: from the oldest tested release to the newest on the index (``--from``,
``--to``); 0 if none breaks. ``--here``: the subset on this environment as it is (``make test-newest``).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from vtprune.check import versions

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow")
# Every family on its tiny model; what the README says to type; then what meets other packages most: generate, towers,
# the page, the kernels' interpreter.
SUBSET = (
    ("-m", "vtprune", "doctor"),
    (
        *PYTEST,
        "tests/test_readme.py",
        "tests/test_imports.py",
        "tests/demos/test_demo_app.py",
        "tests/models/test_overhead.py",
    ),
    (*PYTEST, "tests/models/test_generate.py", "tests/models/test_vits.py"),
    (*PYTEST, "tests/test_kernels.py", "-k", "63"),
)
LIMIT = 1800  # seconds for one command


def broken(env: Mapping[str, str]) -> str | None:
    """The first command of the subset that fails, and the end of what it said; ``None`` if all pass."""
    for words in SUBSET:
        try:
            done = subprocess.run(
                [sys.executable, *words],
                cwd=ROOT,
                env={**env},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT,
            )
        except subprocess.TimeoutExpired:
            return f"python {' '.join(words)}: not done after {LIMIT} s"
        if done.returncode:
            return f"python {' '.join(words)}: code {done.returncode}\n" + "\n".join(done.stdout.splitlines()[-25:])
    return None


def releases(package: str, first: str, last: str | None) -> list[str]:
    """The final releases on the index, ascending, both ends included."""
    done = subprocess.run([sys.executable, "-m", "pip", "index", "versions", package], capture_output=True, text=True)
    listed = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    if done.returncode or listed is None:
        raise SystemExit(f"pip does not find {package}: {done.stderr.strip()[-500:]}")
    found = sorted({Version(text) for text in listed[1].split(", ")})
    return [
        str(v)
        for v in found
        if not v.is_prerelease and not v.local and Version(first) <= v and (last is None or v <= Version(last))
    ]


def overlay(package: str, release: str, folder: Path) -> None:
    """Puts the release into ``folder``, and what it needs in another release than the one that is installed; everything
    else is the environment's.

    Raises :class:`SystemExit` if pip cannot install it.
    """
    there = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}
    todo = [Requirement(f"{package}=={release}")]
    while todo:
        wanted = todo.pop()
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--upgrade",
            "--target",
            str(folder),
            f"{wanted.name}{wanted.specifier}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"pip cannot install {wanted}: {done.stderr.strip()[-500:]}")
        for d in distributions(path=[str(folder)]):
            name = d.metadata["Name"].lower().replace("_", "-")
            if there.get(name) == d.version:
                continue
            there[name] = d.version
            needs = [Requirement(text) for text in d.requires or ()]
            needs = [r for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
            todo += [
                r
                for r in needs
                if (v := there.get(r.name.lower().replace("_", "-"))) is None
                or not r.specifier.contains(v, prereleases=True)
            ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", default="transformers", help="default: transformers")
    parser.add_argument("--from", dest="first", metavar="RELEASE", help="default: the oldest tested")
    parser.add_argument("--to", dest="last", metavar="RELEASE", help="default: the newest there is")
    parser.add_argument("--here", action="store_true", help="only the subset, on this environment")
    args = parser.parse_args()
    if args.here:
        told = broken(os.environ)
        print("the subset passes" if told is None else told)
        return int(told is not None)
    known = {t.package: t.oldest for t in versions.TESTED}
    if args.first is None and args.package not in known:
        parser.error(f"say --from: vtprune/check/versions.py names {', '.join(known)}, not {args.package}")
    wanted = releases(args.package, args.first or known[args.package], args.last)
    if not wanted:
        parser.error(f"there is no release of {args.package} in that range")
    for release in wanted:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            overlay(args.package, release, Path(name))
            told = broken(
                {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (name, os.environ.get("PYTHONPATH"))))}
            )
        print(
            f"{args.package} {release}: {'passes' if told is None else 'BREAKS'} ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        if told is not None:
            print(told)
            return 1
    print(f"no release of {args.package} from {wanted[0]} to {wanted[-1]} breaks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
