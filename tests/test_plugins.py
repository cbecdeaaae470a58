"""What others add through entry points of the group ``vtprune.plugins``: the example in tests/plugin, installed and
used everywhere, plug-ins that are broken, and many threads at once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vtprune.demos.engine import Engine
from vtprune.models.base import ADAPTERS, AdapterInfo

import vtprune
from fake import picture
from fake import tiny as fake_model
from vtprune.cli import main
from vtprune.core import plugins
from vtprune.core.planning import bind
from vtprune.core.recipes import RECIPES
from vtprune.methods.base import METHODS

ROOT = Path(__file__).resolve().parents[1]

METHOD = """
from dataclasses import dataclass
from vtprune.methods.base import METHODS, Cut, Method, MethodInfo, register

@register(MethodInfo(name={name!r}, paper="none", idea="x", kinds=("projector",), cases=({{}}, {{}})))
@dataclass(frozen=True, kw_only=True)
class {cls}(Method):
    pass
"""
RECIPE = """
from vtprune import Recipe, Stage
from vtprune.core.recipes import RECIPES
RECIPES.register({name!r}, Recipe(name={name!r}, stages=(Stage(method="fastv"),)))
"""


def write(folder: Path, distribution: str, entries: dict[str, str], **modules: str) -> None:
    """A distribution as installed: its metadata, and modules by name."""
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[vtprune.plugins]", *lines, ""]), encoding="utf-8")
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")


def python(site: Path, *words: str, cwd: Path, timeout: int = 600) -> subprocess.CompletedProcess:
    """A fresh interpreter that finds this checkout and what ``site`` holds."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done


# ---------------------------------------------------------------------------------------------------------------------
# the example distribution


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the example installed by pip, and a broken plug-in beside it."""
    source, folder = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "tests" / "plugin", source, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "-q", *offline, "--target", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    write(folder, "brk", {"b": "brk_plugin"}, brk_plugin=METHOD.format(name="half", cls="Half") + "import nothing_here")
    return folder


LINE = "vtprune: plug-in brk_plugin of brk is skipped: ModuleNotFoundError: No module named 'nothing_here'"


@pytest.fixture(scope="module")
def used(site, tmp_path_factory):
    """What one process with the plug-in gives, by way in."""
    folder = tmp_path_factory.mktemp("used")
    picture().save(folder / "picture.png")
    (folder / "use.py").write_text(USE, encoding="utf-8")
    done = python(site, "use.py", cwd=folder)
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


USE = """
import contextlib, io, json, sys
import vtprune
loaded = "vtprune_example" in sys.modules
from vtprune import testing
from vtprune.cli.main import main
from vtprune.core.info import describe

def printed(*words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(words) == 0, words
    return text.getvalue()

model, inputs = testing.tiny("llava")
with vtprune.attach(model, "loudest", keep=3) as handle:
    model(**inputs)
    tiny = [(s.site, s.method, s.tokens_out) for s in handle.report().stages]
question = ["--image", "picture.png", "--question", "how many red shapes are there ?", "--json"]
run = json.loads(printed("run", "--recipe", "loudest-then-fastv", *question))
fast = ["--samples", "1", "--budgets", "0.5", "--no-baselines", "--timing", "0", "--json"]
bench = json.loads(printed("bench", "--methods", "loudest", *fast))
bundled = vtprune.load_demo_model()
from vtprune.demos.engine import Engine
engine = Engine(*bundled)
offers = {o.name: o.reason for o in engine.recipes()}
engine.close()
try:
    import lmms_eval
except ImportError:
    lmms = None
else:
    from vtprune.lmms.model import Chat
    chat = Chat(loaded=bundled, exits=False, device="cpu", recipe="loudest", keep=0.5)
    lmms = chat.pruned.handle.recipe.name
    chat.clean()
print(json.dumps({
    "early": loaded, "tiny": tiny, "run": run["stages"], "offers": offers, "lmms": lmms,
    "bench": [[r["method"], r.get("error")] for r in bench["rows"]],
}))
"""


@pytest.mark.ci
def test_the_command_line_lists_a_plugin_with_its_distribution(site, tmp_path):
    done = python(site, "-m", "vtprune", "methods", cwd=tmp_path)
    head, _, *rows = done.stdout.splitlines()
    column = head.index("distribution")  # in front of the idea, which is cut
    sources = {row.split()[0]: row[column:].split()[0] for row in rows if row[column:].strip()}
    assert sources["loudest"] == "vtprune-example" and sources["fastv"] == "vtprune" and "half" not in sources
    assert done.stderr.splitlines() == [LINE]
    done = python(site, "-m", "vtprune", "recipes", "--json", cwd=tmp_path)
    entries = {e["name"]: e for e in json.loads(done.stdout)}
    ours = {name for name, entry in entries.items() if entry["distribution"] is None}
    assert set(entries) - ours == {"loudest", "loudest-then-fastv"}
    assert {entries[name]["distribution"] for name in set(entries) - ours} == {"vtprune-example"}
    assert vtprune.Recipe.from_dict(entries["loudest-then-fastv"]).stages[0].method == "loudest"


@pytest.mark.ci
def test_attach_prunes_with_a_plugin_that_nobody_imported(used):
    assert used["early"] is False, "import vtprune has imported a plug-in"
    assert used["tiny"] == [["projector", "loudest", [3, 3]]]
    assert used["stderr"].count(LINE) == 1


@pytest.mark.ci
def test_run_and_bench_take_it(used):
    assert [s["method"] for s in used["run"]] == ["loudest", "fastv"]
    assert ["loudest", None] in used["bench"]


@pytest.mark.ci
def test_the_demo_offers_it(used):
    assert used["offers"]["loudest"] == "" and used["offers"]["loudest-then-fastv"] == ""


@pytest.mark.ci
def test_lmms_eval_takes_it(used):
    if used["lmms"] is None:
        pytest.skip("lmms-eval is not installed")
    assert used["lmms"] == "loudest"


@pytest.mark.ci
def test_its_own_tests_pass(site, tmp_path):
    shutil.copy(ROOT / "tests" / "plugin" / "test_example.py", tmp_path)
    done = python(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_example.py", cwd=tmp_path)
    assert "5 passed" in done.stdout and "skipped" not in done.stdout, done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# plug-ins of every kind


@pytest.fixture
def fresh(monkeypatch, tmp_path, caplog):
    """A folder of distributions, and registries that have not looked for plug-ins; all is as before afterwards."""
    for registry in (METHODS, RECIPES, ADAPTERS):
        list(registry)
        for name in ("_entries", "_owners", "_modules"):
            monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    for name, value in {"_done": False, "_plugins": [], "_skipped": set()}.items():
        monkeypatch.setattr(plugins, name, value)
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    caplog.set_level(logging.WARNING, logger="vtprune")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("plug_"):
            del sys.modules[name]


def lines(caplog) -> list[str]:
    """What the log says of plug-ins, each on one line."""
    said = [r.getMessage() for r in caplog.records if r.name == "vtprune"]
    assert all("\n" not in line for line in said)
    return said


def test_a_plugin_registers_methods_recipes_and_adapters(fresh, caplog, capsys):
    adapter = (
        "\nfrom vtprune.models.base import ADAPTERS, AdapterInfo\n"
        "ADAPTERS.register('outer', AdapterInfo(name='outer', idea='x', matches=lambda m: False, bind=None, tiny={}))\n"
    )
    text = METHOD.format(name="outside", cls="Outside") + RECIPE.format(name="outside-two") + adapter
    write(fresh, "all-three", {"a": "plug_all"}, plug_all=text)
    assert "outer" in vtprune.adapters()
    assert "outside" in vtprune.methods() and {"outside", "outside-two"} <= set(vtprune.recipes("*"))
    named = [METHODS.distribution("outside"), RECIPES.distribution("outside"), RECIPES.distribution("outside-two")]
    assert [*named, ADAPTERS.distribution("outer")] == ["all-three"] * 4
    assert METHODS.distribution("fastv") is None and RECIPES.distribution("fastv-k2-r50") is None
    assert ADAPTERS.distribution("llava") is None and lines(caplog) == []
    assert main.main(["adapters"]) == main.main(["adapters", "--json"]) == 0
    table, listed = capsys.readouterr().out.split("\n[", 1)
    rows = {row.split()[0]: row.split()[-1] for row in table.splitlines()}
    assert (rows["family"], rows["outer"], rows["llava"]) == ("distribution", "all-three", "vtprune")
    sources = {entry["name"]: entry["distribution"] for entry in json.loads("[" + listed)}
    assert sources["outer"] == "all-three" and sources["llava"] is None
    with pytest.raises(vtprune.VtpruneError, match="unknown method"):
        METHODS.distribution("outsider")


@pytest.mark.parametrize(
    ("value", "text", "reason"),
    [
        ("plug_b", "import nothing_here", "ModuleNotFoundError: No module named 'nothing_here'"),
        ("plug_b", "raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("plug_b", "raise KeyError()", "KeyError: no reason given"),
        ("plug_b", "METHODS.names()\nraise OSError('no')", "OSError: no"),  # after a look-up
        ("plug_b", "def f(:", "SyntaxError: "),
        ("plug_b", METHOD.format(name="fastv", cls="Mine"), "ValueError: method 'fastv' is registered already"),
        ("plug_b", RECIPE.format(name="tome"), "ValueError: method 'tome' is registered already"),
        ("plug_b:thing", "thing = 1", "an entry point of this group is a module, package.module"),
        ("plug_b [extra]", "", "an entry point of this group is a module, package.module"),
        ("plug_missing", "", "ModuleNotFoundError: No module named 'plug_missing'"),
    ],
)
def test_a_broken_plugin_is_named_once_and_skipped(fresh, caplog, value, text, reason):
    good = METHOD.format(name="good", cls="Good")
    write(fresh, "a-bad-one", {"b": value}, plug_b=METHOD.format(name="half", cls="Half") + text)
    write(fresh, "the-good-one", {"g": "plug_good"}, plug_good=good)
    for _ in range(2):
        assert "good" in vtprune.methods() and "half" not in vtprune.methods() + vtprune.recipes()
    (line,) = lines(caplog)
    assert line.startswith(f"vtprune: plug-in {value} of a-bad-one is skipped: {reason}")
    assert METHODS.get("fastv").paper == "arXiv 2403.06764"
    exec(METHOD.format(name="half", cls="Other"), {"__name__": "plug_another"})  # the name is free again
    assert "half" in vtprune.methods()


def test_what_a_broken_plugin_has_whole_stays(fresh, caplog):
    write(fresh, "parts", {"b": "plug_b"}, plug_b="import plug_whole, nothing_here")
    (fresh / "plug_whole.py").write_text(METHOD.format(name="whole", cls="Whole"), encoding="utf-8")
    assert "whole" in vtprune.methods() and len(lines(caplog)) == 1


def test_metadata_that_cannot_be_read_costs_the_plugins_only(fresh, caplog, monkeypatch):
    def fails(**_):
        raise ValueError("damaged")

    monkeypatch.setattr(plugins, "entry_points", fails)
    assert "fastv" in vtprune.methods()
    assert lines(caplog) == ["vtprune: no plug-in is looked for: ValueError: damaged"]


def test_a_plugin_that_looks_up_sees_what_is_there(fresh, caplog):
    text = "from vtprune.methods.base import METHODS\nseen = METHODS.names()\n" + METHOD.format(name="late", cls="Late")
    write(fresh, "curious", {"c": "plug_curious"}, plug_curious=text)
    assert "late" in vtprune.methods() and lines(caplog) == []
    assert "fastv" in sys.modules["plug_curious"].seen and "late" not in sys.modules["plug_curious"].seen


def test_what_is_registered_late_is_offered_and_listed(fresh, capsys):
    engine = Engine(*fake_model())
    try:
        before = {offer.name: offer for offer in engine.recipes()}
        text = (ROOT / "tests" / "plugin" / "vtprune_example.py").read_text(encoding="utf-8")
        for _ in range(2):  # as a notebook's cell that is run again
            exec(text, {"__name__": "plug_cell"})
        after = {offer.name: offer for offer in engine.recipes()}
    finally:
        engine.close()
    assert set(after) - set(before) == {"loudest", "loudest-then-fastv"} and after["loudest"].reason == ""
    assert all(after[name] is before[name] for name in before), "what was tried is not tried again"
    for command in ("methods", "recipes"):
        assert main.main([command]) == 0
        table = capsys.readouterr().out
        assert "loudest" in table and "distribution" not in table.splitlines()[0]  # of no plug-in


@pytest.mark.ci
def test_an_outsider_takes_none_of_our_names_before_they_are_loaded(tmp_path):
    code = """
import json, vtprune
from vtprune.core.recipes import RECIPES
from vtprune.models.base import ADAPTERS
refused = []
for registry, name in ((RECIPES, "tome"), (ADAPTERS, "llava")):
    try:
        registry.register(name, None)
    except ValueError as e:
        refused.append(str(e))
print(json.dumps([refused, vtprune.describe("tome").paper, "llava" in vtprune.adapters()]))
"""
    refused, paper, llava = json.loads(python(tmp_path, "-c", code, cwd=tmp_path).stdout)
    assert len(refused) == 2 and all("registered already, by vtprune." in r for r in refused)
    assert paper == "arXiv 2210.09461" and llava


# ---------------------------------------------------------------------------------------------------------------------
# who gets a model


def adapter(name: str, priority: int) -> None:
    def matches(model):
        return type(model).__name__ == "LlavaForConditionalGeneration"

    info = AdapterInfo(name=name, idea="x", matches=matches, bind=lambda m: name, tiny={}, priority=priority)
    ADAPTERS.register(name, info)


def test_the_highest_priority_gets_a_model(fresh, tiny):
    model, _ = tiny("llava", "clip-llama")
    assert ADAPTERS.get("generic").priority < 0 and ADAPTERS.get("generic").matches(model)
    assert bind(model).geometry.family == "llava"
    adapter("zz-lower", -2)
    assert bind(model).geometry.family == "llava"
    adapter("zz-higher", 1)
    assert bind(model) == "zz-higher"
    adapter("zz-equal", 1)
    with pytest.raises(vtprune.UnsupportedError, match="2 adapters take a LlavaFor.* priority 1: zz-equal, zz-higher"):
        bind(model)


def test_no_two_of_our_adapters_take_one_model(tiny):
    for family in ADAPTERS:
        if (package := ADAPTERS.get(family).package) is not None:
            pytest.importorskip(package)
        model, _ = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
        taken = [name for name, info in ADAPTERS.items() if info.matches(model) and info.priority >= 0]
        assert taken == ([] if family in ("generic", "causal-lm") else [family])


# ---------------------------------------------------------------------------------------------------------------------
# many threads


THREADS = """
import faulthandler, importlib, json, os, random, sys, threading, time
faulthandler.dump_traceback_later(200, exit=True)
{before}

def race(seed):
    gate, failed = threading.Barrier(8), []
    actions = [
        lambda: importlib.import_module("vtprune").methods(),
        lambda: importlib.import_module("vtprune").recipes("*"),
        lambda: importlib.import_module("vtprune").adapters(),
        lambda: importlib.import_module("vtprune.core.recipes").RECIPES.get("slow"),
        lambda: importlib.import_module("plug_slow"),
        lambda: importlib.import_module("vtprune.methods.tome"),
        lambda: importlib.import_module("vtprune").describe("slow"),
        lambda: importlib.import_module("vtprune.models.base").ADAPTERS.get("slow-model"),
    ]
    wants = {{0: "slow", 1: "slow", 2: "slow-model"}}
    draw = random.Random(seed)
    waits = [draw.random() * 0.03 for _ in actions]
    draw.shuffle(order := list(range(8)))

    def act(i):
        gate.wait()
        time.sleep(waits[i])
        try:
            importlib.import_module("vtprune")
            names = actions[i]()
            assert i not in wants or wants[i] in names and len(names) > 10, names
        except BaseException as e:
            failed.append(f"{{i}}: {{type(e).__name__}}: {{e}}")

    threads = [threading.Thread(target=act, args=(i,), daemon=True) for i in order]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        if t.is_alive():
            faulthandler.dump_traceback(all_threads=True)
            return ["a thread hangs"]
    return failed

bad = []
for seed in range({rounds}):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, json.dumps(race(seed)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    bad += json.loads(text or '["a round died"]')
print(json.dumps(bad))
"""
SLOW = (
    "import time\nfrom vtprune.methods.base import METHODS\nfrom vtprune.models.base import ADAPTERS, AdapterInfo\n"
    "time.sleep(0.03)\nassert 'fastv' in METHODS\n"
    + METHOD.format(name="slow", cls="Slow")
    + "ADAPTERS.register('slow-model', AdapterInfo(name='slow-model', idea='x', matches=None, bind=None, tiny={}))\n"
    "time.sleep(0.03)\nassert 'slow' in METHODS and 'llava' in ADAPTERS\n"
)


@pytest.mark.ci
@pytest.mark.skipif(not hasattr(os, "fork"), reason="every round is a process of its own")
@pytest.mark.parametrize(
    ("before", "rounds"),
    [
        pytest.param("import torch", 4, id="import"),
        pytest.param("import vtprune", 12, id="look-up"),
    ],
)
def test_many_threads_at_once(tmp_path, before, rounds):
    """The first import and the first look-up, with a plug-in that looks up while it is imported and that one of the
    threads imports by hand."""
    write(tmp_path, "slow", {"s": "plug_slow"}, plug_slow=SLOW)
    done = python(tmp_path, "-c", THREADS.format(before=before, rounds=rounds), cwd=tmp_path, timeout=300)
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr
