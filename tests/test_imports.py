"""Importing vtprune is cheap and harmless, from an installation and from a bare checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"transformers", "timm", "triton", "gradio", "lmms_eval", "open_clip", "torchvision"}


def fresh(code: str, cwd: Path, *flags: str, env: dict[str, str] | None = None):
    """Runs ``code`` in a new interpreter and gives what it prints as its last line, as JSON."""
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What an installed vtprune says of itself in one new interpreter: they take seconds to start."""
    code = """
import importlib, importlib.util, inspect, json, sys, torch
from torch import nn
modules = {"torch": torch, "functional": nn.functional, "Module": nn.Module, "Linear": nn.Linear, "MultiheadAttention": nn.MultiheadAttention}
before = {name: dict(vars(module)) for name, module in modules.items()}
import vtprune
told = {"loaded": sorted(sys.modules)}
told["changed"] = [f"{name}.{key}" for name, module in modules.items() for key, value in before[name].items() if vars(module).get(key) is not value]
told["state"] = torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32 and not torch.are_deterministic_algorithms_enabled()
told["packages"] = [folder for folder in ("models", "kernels", "demos") if importlib.util.find_spec(folder)]

from vtprune.types import Report, TokenView, VtpruneError
from vtprune.select import top
from vtprune.recipe import Recipe
from vtprune.ledger import snapshot, stopwatch
from vtprune.attach import attach, load_recipe
from vtprune.verify import CHECKS, _Case, _masks, check
from vtprune.core import types
try:
    from vtprune.select import nothing
except ImportError as e:
    told["missing"] = "vtprune.select" in str(e)
told["same"] = [types.VtpruneError is vtprune.types.VtpruneError, types.VtpruneError is VtpruneError]
told["same"] += [Recipe is vtprune.Recipe, attach is vtprune.attach, vtprune.verify.__name__ == "verify"]

names = ["adapters", "attach", "describe", "encode", "load_demo_model", "methods", "recipes", "solve", "verify"]
for name in names:
    if importlib.util.find_spec(f"vtprune.{name}"):
        importlib.import_module(f"vtprune.{name}")
told["hidden"] = [name for name in names if not inspect.isroutine(getattr(vtprune, name, None))]
print(json.dumps(told))
"""  # noqa: E501
    return fresh(code, tmp_path_factory.mktemp("elsewhere"), "-I")


def test_import_loads_nothing_heavy(told):
    assert "vtprune" in told["loaded"]
    assert HEAVY & {name.split(".")[0] for name in told["loaded"]} == set()


def test_import_leaves_no_mark_on_torch(told):
    assert told["changed"] == [] and told["state"] is True


def test_folders_are_no_top_level_packages(told):
    assert told["packages"] == []


def test_public_functions_survive_their_namesake_modules(told):
    """The first import of a submodule binds it on the package, over a function of the same name (``vtprune.methods`` is
    both)."""
    assert told["hidden"] == []


def test_names_of_the_first_layout_lead_to_where_things_are(told):
    """Own methods import them; the function ``vtprune.verify`` is still the function."""
    assert told["same"] == [True] * 5 and told["missing"] is True


@pytest.mark.slow
def test_transformers_takes_no_folder_of_a_checkout_for_a_package():
    """It looks for a package named ``kernels`` (the hub's), and a Python started in a checkout's root finds ours."""
    code = (
        "import json; import transformers.activations; import sys; print(json.dumps('vtprune.kernels' in sys.modules))"
    )
    assert fresh(code, ROOT) is False
    code = (
        "import json, vtprune.kernels, transformers.activations, kernels; print(json.dumps([n for n in vars(kernels) "
        "if n in ('KERNELS', 'match')]))"
    )
    assert fresh(code, ROOT) == []


def test_a_checkout_works_without_installation(tmp_path):
    """``-S`` leaves out the .pth files, and with them an editable install; the installed dependencies come back by
    path, after the checkout."""
    paths = [str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    code = """
import json, sys
import vtprune, vtprune.kernels, vtprune.models
print(json.dumps([vtprune.__file__, vtprune.models.__file__, vtprune.kernels.__file__, "models" in sys.modules or "kernels" in sys.modules]))
"""  # noqa: E501
    core, models, kernels, doubled = fresh(
        code, tmp_path, "-S", env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    assert [Path(core), Path(models), Path(kernels)] == [
        ROOT / "vtprune/__init__.py",
        ROOT / "models/__init__.py",
        ROOT / "kernels/__init__.py",
    ]
    assert not doubled


def test_every_old_name_has_a_place():
    from importlib import import_module

    from vtprune.moved import MOVED

    for places in MOVED.values():
        for place in places:
            import_module(f"vtprune.{place}")
