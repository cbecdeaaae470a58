"""Wrong calls and hostile files, for every command that there is: one line on stderr, an exit code that is not 0, no
traceback, no code of anybody's run."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import vtprune
from fake import picture, tiny
from vtprune.cli import main, methods, models, quickstart
from vtprune.inputs import demo_model, images, loading
from vtprune.train.base import TRAININGS


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command, those of ``train`` as ``train NAME``."""
    out: dict[str, argparse.ArgumentParser] = {}

    def walk(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> None:
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not inner:
            out[" ".join(words)] = parser
        for name, sub in inner[0].choices.items() if inner else ():
            walk(sub, (*words, name))

    walk(main.parser(), ())
    return out


COMMANDS = commands()
# What a command cannot do without, beside the option under test.
ASKED = ["--image", "GOOD.png", "--question", "what"]
NEEDED: dict[str, list[str]] = {
    "run": ASKED,
    "encode": ["--out", "OUT.safetensors", *ASKED],
    "fit vtw": ["--recipe-out", "OUT.json", *ASKED],
    "fit adaskip": ["--recipe-out", "OUT.json", *ASKED],
    "fit fitprune": ["--recipe-out", "OUT.json", "--keep", "4", *ASKED],
    "fit gamma-mod": ["--recipe-out", "OUT.json", *ASKED],
    **{f"train {name}": ["--out", "OUT.safetensors"] for name in TRAININGS},
    "train pyramiddrop": ["--out", "OUT.lora", "--lora", "2"],
    "train table": ["A.compare.json", "B.compare.json"],
    "report": ["RESULTS"],
    "analyze suggest": ["FOUND.json"],
}


def option(command: str, *names: str) -> str | None:
    """The first of ``names`` that ``command`` has."""
    known = COMMANDS[command]._option_string_actions
    return next((n for n in names if n in known), None)


def having(*names: str) -> list[tuple[str, str]]:
    """(command, option) of every command that has one of ``names``."""
    return [(c, found) for c in COMMANDS if (found := option(c, *names)) is not None]


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What other libraries say when they are first imported is not ours."""
    tiny()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with good inputs, and nothing that loads a model by accident."""
    monkeypatch.chdir(tmp_path)
    picture().save("GOOD.png")
    Path("RESULTS").mkdir()
    Path("EMPTY").write_bytes(b"")
    Path("JUNK").write_bytes(bytes(range(256)) * 4)
    Path("FOLDER.json").mkdir()

    def never(args):
        raise AssertionError("the model was loaded before the mistake was told")

    monkeypatch.setattr(models, "load", never)
    return tmp_path


def one_line(capfd, code: int) -> str:
    lines = capfd.readouterr().err.splitlines()
    assert code not in (0, None) and len(lines) == 1 and lines[0].startswith("vtprune: error: "), (code, lines)
    assert "unexpected" not in lines[0], lines[0]
    return lines[0]


def call(command: str, *words: str) -> int:
    given = list(NEEDED.get(command, []))
    for name in (w for w in words if w.startswith("--")):
        if name in given:
            at = given.index(name)
            del given[at : at + 2]
    return main.main([*command.split(), *given, *words])


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_flags_and_help(capfd, here, command):
    assert "no-such-flag" in one_line(capfd, call(command, "--no-such-flag"))
    assert main.main([*command.split(), "--help"]) == 0 and "usage: vtprune" in capfd.readouterr().out


def numbers() -> list[tuple[str, str, str]]:
    """(command, option, bad value) of every option that takes a number."""
    bad = {
        "seed": ("-1", "x", "1e3", "9" * 30),
        "batch": ("0", "-1", "x"),
        "samples": ("0", "x"),
        "repeats": ("0", "x"),
        "seeds": ("0",),
        "port": ("0", "x"),
    }
    bad |= {
        "budgets": ("0", "2", "x", "nan", ""),
        "keep": ("x",),
        "option": ("x", "1=2", "=3"),
        "max_new_tokens": ("0", "x"),
        "dtype": ("int3",),
    }
    bad |= {
        "timing": ("-1", "x"),
        "new_tokens": ("0",),
        "batches": ("0", "x"),
        "images": ("0",),
        "steps": ("x", "0"),
        "lr": ("x", "0", "nan"),
        "limit": ("0",),
    }
    return [
        (c, a.option_strings[0], v)
        for c, p in COMMANDS.items()
        for a in p._actions
        if a.option_strings
        for v in bad.get(a.dest, ())
    ]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("command", "name", "value"), numbers())
def test_values_that_are_none(capfd, here, monkeypatch, command, name, value):
    if (command, name) == ("bench", "--timing"):
        monkeypatch.setattr(models, "load", lambda args: tiny())
    one_line(capfd, call(command, f"{name}={value}"))


RECIPES: dict[str, bytes] = {
    "deep.json": b"[" * 100_000,
    "deep.yaml": b"[" * 2_000,
    "huge.json": b'{"type":"vtprune.Recipe","version":1,"stages":[{"method":"fastv","keep":%s}]}' % (b"9" * 5000),
    "large.json": b'{"type":"vtprune.Recipe","version":1,"stages":[{"method":"fastv","options":{"layer":%s}}]}'
    % (b"9" * 400),
    "keys.yaml": b"type: vtprune.Recipe\nversion: 1\n3: 4\nstages: [{method: fastv}]\n",
    "name.json": b'{"type":"vtprune.Recipe","version":1,"name":5,"stages":[{"method":"fastv"}]}',
    "source.json": b'{"type":"vtprune.Recipe","version":1,"source":[],"stages":[{"method":"fastv"}]}',
    "true.json": b'{"type":"vtprune.Recipe","version":true,"stages":[{"method":"fastv"}]}',
    "float.yaml": b"type: vtprune.Recipe\nversion: 1.0\nstages: [{method: fastv}]\n",
    "nan.json": b'{"type":"vtprune.Recipe","version":1,"stages":[{"method":"fastv","keep":NaN}]}',
    "nested.json": b'{"type":"vtprune.Recipe","version":1,"stages":[{"method":"fastv","options":{"layer":{"a":1}}}]}',
    "alias.yaml": b"a: &a [x]\ntype: vtprune.Recipe\nversion: 1\nstages: [{method: fastv}]\nname: *a\n",
    "tag.yaml": b"!!python/object/apply:os.system ['touch RAN']\n",
    "date.yaml": b"x: !!timestamp '2020-13-45'\n",
    "pairs.yaml": b"? [a]\n: b\n",
    "twice.json": b'{"type":"vtprune.Recipe","version":1,"stages":[{"method":"fastv","keep":0.5,"keep":0.25}]}',
    "twice.yaml": b"type: vtprune.Recipe\nversion: 1\nversion: 1\nstages: [{method: fastv}]\n",
    "key.json": b'{"type":"vtprune.Recipe","version":1,"key":"fastv-0","stages":[{"method":"fastv"}]}',
    "lines.json": b'{"type":"vtprune.Recipe","version":1,"name":"a\\nb","stages":[{"method":"fastv"}]}',
    "half.json": b'{"type":"vtprune.Recipe","version":1,"name":"\\ud800","stages":[{"method":"fastv"}]}',
    "latin.yaml": "type: vtprune.Recipe\nname: é\n".encode("latin-1"),
    "empty.json": b"",
    "empty.yaml": b"",
    "junk.yaml": bytes(range(256)),
    "many.json": b'{"type":"vtprune.Recipe","version":1,"stages":[%s]}' % b",".join([b'{"method":"fastv"}'] * 200),
    "long.yaml": b"# " + b"x" * 200_000,
}


@pytest.mark.parametrize("name", RECIPES)
def test_hostile_recipe_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(RECIPES[name])
    with pytest.raises(vtprune.VtpruneError) as told:
        vtprune.Recipe.load(path)
    assert len(str(told.value)) < 600 and name in str(told.value)


@pytest.mark.parametrize(("command", "name"), having("--recipe", "--recipes", "--methods"))
@pytest.mark.parametrize("value", ["deep.json", "gone.yaml", "FOLDER.json", "no-such-recipe"])
def test_recipes_that_are_none(capfd, here, command, name, value):
    if command == "eval" and not loaded("lmms_eval"):
        pytest.skip("lmms-eval is not installed")
    Path("deep.json").write_bytes(RECIPES["deep.json"])
    one_line(capfd, call(command, name, value))
    assert not Path("RAN").exists()


def loaded(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


@pytest.mark.ci
def test_recipe_files_say_what_they_mean_in_utf_8(tmp_path):
    """Also where the locale's encoding is another."""
    recipe = vtprune.Recipe(name="größer", stages=(vtprune.Stage(method="uniform", keep=3),), source="二")
    code = (
        "import sys, vtprune; r = vtprune.Recipe.load(sys.argv[1]); r.save(sys.argv[2]); print(ascii(r.name), "
        "ascii(r.source))"
    )
    for kind in ("json", "yaml"):
        recipe.save(tmp_path / f"a.{kind}")
        env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        command = [sys.executable, "-c", code, str(tmp_path / f"a.{kind}"), str(tmp_path / f"b.{kind}")]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.stdout.split() == [ascii("größer"), ascii("二")], done.stderr
        assert vtprune.Recipe.load(tmp_path / f"b.{kind}") == recipe


def test_what_recipes_prints_is_a_recipe_file(capfd, tmp_path):
    for name in vtprune.recipes():
        assert main.main(["recipes", name, "--json"]) == 0
        (tmp_path / "r.json").write_text(capfd.readouterr().out, encoding="utf-8")
        assert vtprune.Recipe.load(tmp_path / "r.json").name == name
    assert main.main(["recipes", "fastv*", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert [vtprune.Recipe.from_dict(entry).key() for entry in listed] == [entry["key"] for entry in listed] and len(
        listed
    ) > 2
    assert "did you mean" in one_line(capfd, main.main(["recipes", "fastv-k2-r51"]))


@pytest.mark.parametrize(("command", "name"), having("--image"))
@pytest.mark.parametrize(
    "value", ["gone.png", "RESULTS", "EMPTY", "JUNK", "script.png", "cut.png", "bomb.png", "claims.png"]
)
def test_pictures_that_are_none(capfd, here, command, name, value):
    Path("script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    Path("cut.png").write_bytes(Path("GOOD.png").read_bytes()[:-500])
    whole = Path("GOOD.png").read_bytes()
    Path("bomb.png").write_bytes(whole[:16] + (60_000).to_bytes(4, "big") + (60_000).to_bytes(4, "big") + whole[24:])
    picture().convert("L").save("claims.png", "PCX")  # a format that Pillow reads and nobody sends
    one_line(capfd, call(command, name, value))


def test_no_picture_starts_another_program(tmp_path, monkeypatch):
    """Pillow runs Ghostscript for PostScript, whatever the file is called."""
    ran, program = tmp_path / "ran", tmp_path / "gs"
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "$@" >> {ran}\nexit 1\n', encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "picture.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(vtprune.VtpruneError, match="not an image in a format"):
        images.open_image(tmp_path / "picture.png")
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_raster_formats_are_read(tmp_path, kind):
    picture().save(tmp_path / "x", kind)
    assert images.open_image(tmp_path / "x").size == picture().size


OUTPUTS = ("--out", "--picture", "--rows", "--recipe-out")


@pytest.mark.parametrize(
    ("command", "name"), [(c, n) for c in COMMANDS if c != "report" for n in OUTPUTS if option(c, n)]
)
@pytest.mark.parametrize("place", ["gone/x{}", "RESULTS", "EMPTY/x{}", "{}"])
def test_outputs_that_cannot_be_written(capfd, here, command, name, place):
    ending = {"--picture": ".png", "--rows": ".png"}.get(
        name, ".safetensors" if command.startswith("train") else ".json"
    )
    one_line(capfd, call(command, name, place.format(ending) if place != "{}" else "."))


@pytest.mark.parametrize(
    ("command", "name"), [(c, n) for c in COMMANDS if c not in ("report",) for n in OUTPUTS if option(c, n)]
)
@pytest.mark.parametrize("ending", [".csv", ".txt", "", ".jsonl"])
def test_endings_say_what_is_written(capfd, here, command, name, ending):
    told = one_line(capfd, call(command, name, f"x{ending}"))
    assert "end" in told and not Path(f"x{ending}").exists()


@pytest.mark.parametrize(("command", "name"), having("--results"))
def test_results_folders_that_are_none(capfd, here, command, name):
    if command == "eval" and not loaded("lmms_eval"):
        pytest.skip("lmms-eval is not installed")
    one_line(capfd, call(command, name, "EMPTY" if command == "demo" else "EMPTY/x"))


def test_quickstart_says_it_in_one_line(capfd, here):
    assert quickstart.main(["--no-such-flag"]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert quickstart.main(["--out", "EMPTY"]) == 1
    assert len(capfd.readouterr().err.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------------
# models


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(demo_model.FOLDER / "model.safetensors")


class Runs:
    """A pickle that runs a command when it is read."""

    def __reduce__(self):
        return os.mkdir, ("RAN",)


def pickled(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def set_json(name: str, **more: object) -> Callable[[Path, dict], None]:
    def damage(folder: Path, weights: dict) -> None:
        path = folder / name
        told = {**json.loads(path.read_text(encoding="utf-8")), **more}
        path.unlink()
        path.write_text(json.dumps(told), encoding="utf-8")

    return damage


def put(name: str, data: bytes) -> Callable[[Path, dict], None]:
    def damage(folder: Path, weights: dict) -> None:
        (folder / name).unlink()
        (folder / name).write_bytes(data)

    return damage


def cut(size: int) -> Callable[[Path, dict], None]:
    return lambda folder, weights: put("model.safetensors", (folder / "model.safetensors").read_bytes()[:size])(
        folder, weights
    )


def saved(change: Callable[[dict], dict]) -> Callable[[Path, dict], None]:
    def damage(folder: Path, weights: dict) -> None:
        (folder / "model.safetensors").unlink()
        save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def own_code(folder: Path, weights: dict) -> None:
    set_json(
        "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForImageTextToText": "evil.Evil"},
    )(folder, weights)
    (folder / "evil.py").write_text("import os\nos.mkdir('RAN')\n", encoding="utf-8")


def own_processor(folder: Path, weights: dict) -> None:
    set_json("processor_config.json", processor_class="Evil", auto_map={"AutoProcessor": "evil.Evil"})(folder, weights)
    (folder / "evil.py").write_text("import os\nos.mkdir('RAN')\n", encoding="utf-8")


def query(weights: dict) -> str:
    """The name of one weight of the language model."""
    return next(name for name in weights if "language_model" in name and name.endswith("q_proj.weight"))


DAMAGES: dict[str, Callable[[Path, dict], None]] = {
    "no weights": lambda folder, weights: (folder / "model.safetensors").unlink(),
    "half a download": cut(100_000),
    "four bytes": cut(4),
    "empty weights": cut(0),
    "junk weights": put("model.safetensors", bytes(range(256)) * 100),
    "a weight is missing": saved(lambda w: {k: v for k, v in w.items() if k != query(w)}),
    "another shape": saved(lambda w: {**w, query(w): w[query(w)][:5].contiguous()}),
    "a pickle that runs": lambda folder, weights: pickled(folder, {"a": Runs()}),
    "a pickle of junk": lambda folder, weights: [
        (folder / "model.safetensors").unlink(),
        (folder / "pytorch_model.bin").write_bytes(b"junk"),
    ][0],
    "code of its own": own_code,
    "a processor of its own": own_processor,
    "no configuration": lambda folder, weights: (folder / "config.json").unlink(),
    "an empty configuration": put("config.json", b""),
    "a junk configuration": put("config.json", bytes(range(256))),
    "a number as configuration": put("config.json", b"5"),
    "a deep configuration": put("config.json", b"[" * 100_000),
    "a type nobody knows": set_json("config.json", model_type=5),
    "a text model": set_json("config.json", model_type="bert"),
    "a size that is none": set_json("config.json", text_config={"model_type": "llama", "hidden_size": "x"}),
    "no processor": lambda folder, weights: (folder / "processor_config.json").unlink(),
    "a list as processor": put("processor_config.json", b"[]"),
    "a junk tokenizer": put("tokenizer.json", b"{}"),
    "a deep tokenizer": put("tokenizer.json", b"[" * 100_000),
    "an odd generation": put("generation_config.json", b"[]"),
    "a template that fails": put("chat_template.jinja", b"{{ 1 / 0 }}"),
    "a template that is none": put("chat_template.jinja", b"{% for %}"),
    "a template that reaches out": put("chat_template.jinja", b"{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "a template that raises": put("chat_template.jinja", b"{{ raise_exception('no') }}"),
    "a template that counts": put("chat_template.jinja", b"{% for i in range(10**12) %}{% endfor %}"),
    "a template without pictures": put("chat_template.jinja", b"hello"),
    "a template of many pictures": put("chat_template.jinja", b"<image> <image> <image>"),
}


def folder_of(tmp_path: Path, damage: str, weights: dict) -> Path:
    """The bundled model with one thing wrong; what is not changed is linked."""
    out = tmp_path / "model"
    shutil.copytree(demo_model.FOLDER, out, copy_function=os.link)
    DAMAGES[damage](out, weights)
    return out


@pytest.mark.sampled(2)
@pytest.mark.parametrize("damage", DAMAGES)
def test_model_folders_with_something_wrong(capfd, tmp_path, monkeypatch, weights, damage):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    picture().save("GOOD.png")
    folder = folder_of(tmp_path, damage, weights)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question on the terminal"))
    one_line(capfd, main.main(["run", "--image", "GOOD.png", "--question", "what", "--model", str(folder)]))
    assert not Path("RAN").exists()


@pytest.mark.parametrize(("command", "name"), [pair for pair in having("--model") if pair[0] not in ("eval", "demo")])
def test_every_command_refuses_them(capfd, tmp_path, monkeypatch, weights, command, name):
    monkeypatch.chdir(tmp_path)
    picture().save("GOOD.png")
    folder = folder_of(tmp_path, "half a download", weights)
    assert "cannot load" in one_line(capfd, call(command, name, str(folder)))


@pytest.mark.parametrize(("command", "name"), having("--model"))
@pytest.mark.parametrize("value", ["./gone", "a/b/c"])
def test_model_folders_that_are_not_there(capfd, tmp_path, monkeypatch, command, name, value):
    if command == "eval" and not loaded("lmms_eval"):
        pytest.skip("lmms-eval is not installed")
    monkeypatch.chdir(tmp_path)
    picture().save("GOOD.png")
    assert "no such model folder" in one_line(capfd, call(command, name, value))


def test_a_good_folder_still_loads(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(demo_model.FOLDER, folder, copy_function=os.link)
    model, _ = loading.load(folder, dtype=torch.float32, local=True)
    assert not model.training
    before = transformers.utils.logging.get_verbosity()
    with pytest.raises(vtprune.VtpruneError):
        loading.load(tmp_path, dtype=torch.float32, local=True)
    assert transformers.utils.logging.get_verbosity() == before


def test_marks_of_pictures_in_a_question(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture().save("GOOD.png")
    assert "'<image>'" in one_line(capfd, main.main(["run", "--image", "GOOD.png", "--question", "<image> what color"]))


# -------------------------------------------------------------------------------------------------------------- the
# rest


def test_what_nobody_foresaw_is_one_line_as_well(capfd, monkeypatch):
    def fails(args):
        raise IndexError("tuple index out of range\nsecond line")

    monkeypatch.setattr(methods, "run", fails)
    assert main.main(["methods"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "vtprune: error: unexpected IndexError: tuple index out of range second line (--debug shows where)"
    ]
    with pytest.raises(IndexError):
        main.main(["methods", "--debug"])


@pytest.mark.ci
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout():
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vtprune", "methods"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    lines = [
        line
        for line in done.stderr.splitlines()
        if line.startswith("vtprune") or "Error" in line or "Traceback" in line
    ]
    assert done.returncode == 1 and len(lines) == 1 and "No space left" in lines[0], done.stderr


def test_options_of_attach_are_options_of_every_command(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load", lambda args: tiny())
    monkeypatch.chdir(tmp_path)
    picture().save("GOOD.png")
    small = ["--option", 'positions="compact"', "--option", "per=image"]
    assert main.main(["run", "--image", "GOOD.png", "--question", "what", "--recipe", "uniform", *small]) == 0
    bench = ["bench", "--samples", "1", "--budgets", "0.5", "--methods", "uniform", "--no-baselines"]
    assert main.main([*bench, "--timing", "1", "--out", "b.json", *small]) == 0
    assert "error" not in json.loads(Path("b.json").read_text(encoding="utf-8"))["rows"][1]
    analyze = [
        "analyze",
        "--recipes",
        "uniform",
        "--budgets",
        "0.5",
        "--batches",
        "1",
        "--repeats",
        "3",
        "--new-tokens",
        "1",
        "--out",
        "a.json",
    ]
    assert main.main([*analyze, *small]) == 0
    assert "error" not in json.loads(Path("a.json").read_text(encoding="utf-8"))["rows"][0]
    capfd.readouterr()
    for words in (
        ["seed=3"],
        ["keep=3"],
        ["flops=0.5"],
        ["positions=compact", "positions=compact"],
        ["model=x"],
        ["foo=1"],
    ):
        one_line(capfd, main.main([*bench, "--timing", "0", *(w for word in words for w in ("--option", word))]))
    for command in (["run", "--image", "GOOD.png", "--question", "what"], ["verify"]):
        for word in ("model=x", "recipe=y", "self=1", "foo=1"):
            one_line(capfd, main.main([*command, "--option", word]))
