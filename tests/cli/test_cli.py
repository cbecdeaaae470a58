"""The command line: what it prints, and one line for every mistake."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vtprune
from cases import mixes_pictures
from fake import picture, tiny
from vtprune.cli import main, models, quickstart
from vtprune.inputs import demo_model
from vtprune.inputs.chats import prepare
from vtprune.measure import bench, samples
from vtprune.show import views


@pytest.fixture
def vlm(monkeypatch):
    """The tiny model in place of the bundled one."""
    monkeypatch.setattr(models, "load", lambda args: tiny())


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "picture.png"
    picture().save(path)
    return str(path)


def refused(capsys, code: int, *words: str) -> str:
    """The one error line that ``words`` give."""
    assert main.main(list(words)) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vtprune: error: "), lines
    return lines[0]


def test_import_loads_no_model_library(tmp_path):
    code = (
        "import sys, vtprune.cli.main, vtprune.cli.quickstart; vtprune.cli.main.parser(); print([m for m in "
        "('transformers', 'timm', "
        "'gradio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_python_m(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vtprune", "methods", "py*"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and "pyramiddrop" in done.stdout


@pytest.mark.parametrize(
    ("command", "names"),
    [("methods", vtprune.methods), ("recipes", vtprune.recipes), ("adapters", vtprune.adapters)],
)
def test_lists(capsys, command, names):
    assert main.main([command]) == 0
    plain = capsys.readouterr().out
    assert all(name in plain for name in names())
    assert main.main([command, "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == names()


def test_one_method_shows_its_options(capsys):
    assert main.main(["methods", "pyramiddrop"]) == 0
    assert "score_layer" in capsys.readouterr().out
    assert "did you mean pyramiddrop" in refused(capsys, 1, "methods", "pyramid-drop")


@pytest.mark.parametrize(
    "words",
    [
        [],
        *([c] for c in ("methods", "recipes", "adapters", "run", "bench", "verify", "train", "report")),
        ["train", "dpvr-lf"],
    ],
)
def test_help(capsys, words):
    assert main.main([*words, "--help"]) == 0
    assert "usage: vtprune" in capsys.readouterr().out


def test_run(capsys, vlm, image, tmp_path):
    out = tmp_path / "kept.png"
    words = ["run", "--image", image, "--question", "what is it", "--keep", "4", "--option", "layers=[2]"]
    assert main.main([*words, "--picture", str(out)]) == 0
    text = capsys.readouterr().out
    assert "16 16 4 4 4 4" in text and out.read_bytes().startswith(b"\x89PNG")
    assert main.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layer_tokens"] == [[16, 16, 4, 4, 4, 4]] and {"dense", "pruned", "flops", "kv_bytes"} <= set(told)


@pytest.mark.skipif(mixes_pictures(), reason="this transformers takes no encoded images")
def test_encode(capsys, vlm, image, tmp_path):
    out = tmp_path / "prompt.safetensors"
    words = ["encode", "--image", image, "--question", "what is it", "--recipe", "uniform"]
    assert main.main([*words, "--keep", "4", "--out", str(out)]) == 0
    assert "picture.png: 4 rows of 48 numbers" in capsys.readouterr().out
    model, processor = tiny()
    encoded = vtprune.Encoded.load(out, model)
    inputs = prepare(processor, [picture()], ["what is it"])
    with vtprune.attach(model, "uniform", keep=4), torch.no_grad():
        want = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    got = model.generate(**encoded.inputs, max_new_tokens=4, do_sample=False)[:, encoded.input_ids.shape[1] :]
    assert torch.equal(got, want)
    assert main.main([*words, "--keep", "4", "--openai"]) == 0
    *parts, text = json.loads(capsys.readouterr().out)
    sent = [torch.load(io.BytesIO(base64.b64decode(p["image_embeds"])), weights_only=True) for p in parts]
    assert all(map(torch.equal, sent, encoded.embeds)) and text["text"] == "what is it"
    assert main.main([*words, "--keep", "4", "--openai", "--placed"]) == 0
    *parts, text = json.loads(capsys.readouterr().out)
    sent = [torch.load(io.BytesIO(base64.b64decode(p["image_embeds"])), weights_only=True) for p in parts]
    assert all(map(torch.equal, sent, encoded.placed))
    for more, said in (
        ([], "say what for"),
        (["--openai", "--json"], "choose one"),
        (["--out", "a.safetensors", "--placed"], "--placed says"),
        (["--out", "a.bin"], "cannot write"),
    ):
        assert said in refused(capsys, 1, *words, "--keep", "4", *more)


def test_run_says_what_was_left_out(capsys, vlm, image):
    ask = ["run", "--model", str(vlm), "--image", str(image), "--question", "what color ?", "--recipe", "mindskip"]
    gates = ["--option", "layers=[1, 2]", "--option", 'init="random"', "--option", "threshold=1.0"]
    assert main.main([*ask, *gates]) == 0
    assert "left out          llm.1.attention llm.2.attention" in capsys.readouterr().out
    assert main.main(ask) == 0
    assert "left out" not in capsys.readouterr().out


def test_run_writes_the_theatre(capsys, vlm, image, tmp_path):
    out = tmp_path / "kept.html"
    words = [
        "run",
        "--image",
        image,
        "--question",
        "is <b> it",
        "--keep",
        "4",
        "--option",
        "layers=[2]",
        "--picture",
        str(out),
    ]
    assert main.main([*words, "--json"]) == 0
    told, page = json.loads(capsys.readouterr().out), out.read_text(encoding="utf-8")
    shown = json.loads(html.unescape(re.search("data-scenes='([^']*)'", page)[1]))
    assert [s["title"] for s in shown["scenes"]] == [f"dense: {told['dense']}", f"pyramiddrop: {told['pruned']}"]
    assert [[p["tokens"] for p in s["steps"][1:]] for s in shown["scenes"]] == [[16] * 6, told["layer_tokens"][0]]
    assert len(shown["pictures"]) == 1 and "is &lt;b&gt; it" in page


@pytest.mark.parametrize("name", ["kept.png", "kept.html"])
def test_rasters_that_lie_on_no_picture_cost_no_answer(capsys, vlm, image, tmp_path, monkeypatch, name):
    def fails(*args, **how):
        raise vtprune.VtpruneError("nothing true to draw")

    monkeypatch.setattr(views, "views", fails)
    assert (
        main.main(["run", "--image", image, "--question", "what", "--keep", "4", "--picture", str(tmp_path / name)])
        == 0
    )
    told = capsys.readouterr()
    assert (
        "answer, pruned" in told.out
        and told.err == "vtprune: note: drawn without the picture behind the tokens: nothing true to draw\n"
    )
    assert (tmp_path / name).stat().st_size > 1000


def test_run_takes_a_recipe_file(capsys, vlm, image, tmp_path):
    path = tmp_path / "r.yaml"
    vtprune.Recipe(name="mine", stages=(vtprune.Stage(method="uniform", keep=9),)).save(path)
    assert main.main(["run", "--image", image, "--question", "q", "--recipe", str(path)]) == 0
    assert "16 -> 9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--recipe", "pyramiddrup"], 1, "did you mean"),
        (["--recipe", "gone.json"], 1, "gone.json"),
        (["--keep", "0"], 1, "1..16"),
        (["--keep", "17"], 1, "1..16"),
        (["--keep", "1.5"], 1, "(0, 1]"),
        (["--keep", "some"], 2, "neither"),
        (["--option", "keep"], 2, "KEY=VALUE"),
        (["--option", "nothing=1"], 1, "no option"),
        (["--option", "rope=3"], 1, "expected"),
        (["--recipe", "flowcut", "--option", "every=two"], 1, "expected"),
        (["--picture", "no/such/place.png"], 1, "cannot write"),
        (["--picture", "kept.pdf"], 1, "ends in .png"),
        (["--dtype", "int8"], 2, "invalid choice"),
    ],
)
def test_run_refuses(capsys, vlm, image, words, code, says):
    assert says in refused(capsys, code, "run", "--image", image, "--question", "q", *words)


def test_bad_images_and_models(capsys, monkeypatch, tmp_path, image):
    words = tmp_path / "words.png"
    words.write_text("hello")
    assert "not an image" in refused(capsys, 1, "run", "--image", str(words), "--question", "q")
    assert "no such image" in refused(capsys, 1, "run", "--image", str(tmp_path / "gone.png"), "--question", "q")
    ask = ("run", "--image", image, "--question", "q")
    assert "no such model" in refused(capsys, 1, *ask, "--model", str(tmp_path / "gone"))
    assert "cannot load" in refused(capsys, 1, *ask, "--model", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("./relative", "a/b/c", "C:\\models"):
        assert "no such model" in refused(capsys, 1, *ask, "--model", name)
    assert "unknown device" in refused(capsys, 1, *ask, "--device", "toaster")
    assert "not available" in refused(capsys, 1, *ask, "--device", "cuda:99")


def test_unknown_commands_list_what_exists(capsys):
    assert "'bench'" in refused(capsys, 2, "evil")
    assert "--question" in refused(capsys, 2, "run")
    assert "--image" in refused(capsys, 2, "run", "--question", "what")
    assert "METHOD" in refused(capsys, 2, "train")


def test_debug_gives_the_traceback(vlm, image):
    with pytest.raises(vtprune.VtpruneError):
        main.main(["run", "--image", image, "--question", "q", "--keep", "0", "--debug"])


def test_interrupt(capsys, monkeypatch, image):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load", stop)
    assert "interrupted" in refused(capsys, 130, "run", "--image", image, "--question", "q")


def test_bench(capsys, vlm, tmp_path):
    out = tmp_path / "b.json"
    words = [
        "bench",
        "--samples",
        "1",
        "--budgets",
        "0.5",
        "--methods",
        "uniform,pyramiddrop",
        "--timing",
        "0",
        "--out",
        str(out),
    ]
    words += ["--out", str(tmp_path / "b.md"), "--rows", str(tmp_path / "rows.png")]
    assert main.main(words) == 0
    assert "| pyramiddrop |" in (tmp_path / "b.md").read_text() and (tmp_path / "rows.png").stat().st_size > 1000
    assert "pyramiddrop" in capsys.readouterr().out
    told = json.loads(out.read_text())
    others = [b for b in bench.baselines() if b != "uniform"]
    assert [r["method"] for r in told["rows"]] == ["dense", "uniform", "pyramiddrop", *others] and told[
        "command"
    ].startswith("vtprune bench")
    assert "unknown question set" in refused(capsys, 1, "bench", "--abilities", "vqav2")
    assert "cannot write" in refused(capsys, 1, "bench", "--rows", "no/such/place.png")
    assert "budgets" in refused(capsys, 2, "bench", "--budgets", "2")
    assert "did you mean" in refused(capsys, 1, "bench", "--methods", "unifrom")
    small = ("bench", "--samples", "1", "--timing", "0")
    assert "no option" in refused(capsys, 1, *small, "--methods", "uniform", "--option", "foo=1")
    assert "each once" in refused(capsys, 1, *small, "--methods", "uniform,uniform")
    assert "must not be negative" in refused(capsys, 1, *small[:3], "--timing", "-1", "--methods", "uniform")
    assert main.main([*small, "--methods", "uniform", "--budgets", "0.01", "--no-baselines"]) == 1
    assert "no method could be measured" in capsys.readouterr().err
    assert "at least 1" in refused(capsys, 2, "bench", "--samples", "0")


def test_bench_shows_both_positions(capsys, vlm, tmp_path):
    small = ["bench", "--samples", "1", "--timing", "0", "--budgets", "0.5", "--no-baselines", "--both-positions"]
    assert main.main([*small, "--methods", "uniform,random", "--seeds", "2", "--results", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["dense", "uniform", "random", "uniform-compact", "random-compact"]
    assert rows[1]["effective_tokens"] == rows[3]["effective_tokens"]
    runs = [json.loads((tmp_path / "runs" / f"{name}-0.5-0.json").read_text()) for name in ("random", "random-compact")]
    assert runs[0]["rows"] == runs[1]["rows"] and runs[0]["answers"] != runs[1]["answers"]
    capsys.readouterr()
    said = refused(capsys, 1, *small, "--methods", "uniform", "--option", 'positions="compact"')
    assert "choose one" in said


def test_bench_goes_on_in_its_folder(capsys, vlm, tmp_path):
    words = [
        "bench",
        "--samples",
        "1",
        "--budgets",
        "0.5",
        "--methods",
        "tome",
        "--no-baselines",
        "--timing",
        "1",
        "--results",
        str(tmp_path / "a" / "b"),
    ]
    assert main.main(words) == 0
    files = {p.name for p in (tmp_path / "a" / "b" / "runs").iterdir()}
    assert (
        files == {"dense.json", "tome-0.5-0.json", "tome-0.5-0.time.json"}
        and (tmp_path / "a" / "b" / "bench.md").is_file()
    )
    first = (tmp_path / "a" / "b" / "bench.json").read_text()
    assert main.main([*words, "--methods", "tome,uniform"]) == 0
    assert json.loads(first)["rows"] == json.loads((tmp_path / "a" / "b" / "bench.json").read_text())["rows"][:2]
    assert "choose another folder" in refused(capsys, 1, *words, "--samples", "2")
    (tmp_path / "file").write_text("")
    assert "cannot make the folder" in refused(capsys, 1, *words[:-1], str(tmp_path / "file" / "x"))


def test_verify(capsys, vlm):
    assert main.main(["verify", "--recipe", "uniform", "--keep", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] and len(told["checks"]) > 3


@pytest.mark.ci
def test_quickstart(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load", lambda args: tiny())
    monkeypatch.setattr(vtprune, "methods", lambda: ["dpvr-lf", "random", "tome", "uniform"])
    monkeypatch.setattr(quickstart, "easy_vqa_samples", lambda n: samples.scenes_samples(1)[:n])
    own = vtprune.Recipe(
        name="dpvr-lf (trained)",
        stages=(vtprune.Stage(method="dpvr-lf", options={"split": 3}),),
        source="as if trained",
    )
    monkeypatch.setattr(demo_model, "branch", lambda: own)
    assert quickstart.main(["--samples", "3", "--scenes", "1", "--budgets", "0.6", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "untrained side branch" in text and "dpvr-lf (trained)" in text and "as if trained" in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"quickstart.html", "quickstart.png", "quickstart.json"}
    (tmp_path / "file").write_text("")
    assert quickstart.main(["--out", str(tmp_path / "file" / "x")]) == 1
    assert capsys.readouterr().err.startswith("vtprune: error: ")


def test_quickstart_finds_the_trained_branch(tmp_path):
    assert demo_model.branch(tmp_path) is None
    (tmp_path / "dpvr_lf.safetensors").write_bytes(b"")
    with pytest.raises(vtprune.VtpruneError, match="cannot be read"):
        demo_model.branch(tmp_path)
    (tmp_path / "dpvr_lf.json").write_text('{"options": {"split": 7, "init": "copy"}, "other": 1}')
    assert demo_model.branch(tmp_path).stages[0].options == {
        "weights": str(tmp_path / "dpvr_lf.safetensors"),
        "split": 7,
    }
    for told in ("{", "[]", '{"split": 7}'):
        (tmp_path / "dpvr_lf.json").write_text(told)
        with pytest.raises(vtprune.VtpruneError, match="cannot be read"):
            demo_model.branch(tmp_path)
    (tmp_path / "dpvr_lf.json").write_text("{")
    with pytest.raises(vtprune.VtpruneError, match="cannot be read"):
        demo_model.branch(tmp_path)


def test_run_on_the_bundled_model(capsys, tmp_path):
    path = tmp_path / "scene.png"
    samples.scenes_samples(1)[0].picture().save(path)
    assert (
        main.main(
            [
                "run",
                "--image",
                str(path),
                "--question",
                "what color is the cross ?",
                "--recipe",
                "flowcut",
                "--keep",
                "0.5",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "answer, pruned" in text and "72 of 144" in text.replace("72.0", "72")


def shown(path) -> list[dict]:
    """The scenes of a page."""
    return json.loads(html.unescape(re.search("data-scenes='([^']*)'", path.read_text(encoding="utf-8"))[1]))["scenes"]


@pytest.mark.ci
def test_run_on_a_video_shows_its_frames(capsys, tmp_path):
    """The bundled model takes no videos: their frames are images, and one budget."""
    frames = [s.picture().resize((168, 168)) for s in samples.scenes_samples(3)]
    # the same picture again lengthens the frame that is there: 1.2, 1.1 and 1.0 seconds
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    ask = ["run", "--question", "what color is the cross ?", "--recipe", "evs", "--keep", "0.5"]
    out = tmp_path / "clip.html"
    assert main.main([*ask, "--video", str(tmp_path / "clip.gif"), "--picture", str(out)]) == 0
    assert "evs" in (told := capsys.readouterr().out) and "432 -> 216 visual tokens" in told
    pruned = shown(out)[1]
    times = ("0.0", "1.2", "2.3")
    assert [(r["label"], r["film"]) for r in pruned["rasters"]] == [
        (f"frame {i} of 3, {at} s", 0) for i, at in enumerate(times, 1)
    ]
    assert "clip.gif" in out.read_text(encoding="utf-8")
    assert main.main([*ask, "--video", *files, "--frames", "2", "--picture", str(out)]) == 0
    assert "288 -> 144 visual tokens" in capsys.readouterr().out and len(shown(out)[1]["rasters"]) == 2
    several = [word for path in files for word in ("--image", path)]
    assert main.main([*ask, *several, "--picture", str(out)]) == 0
    capsys.readouterr()
    assert [(r["label"], r["film"]) for r in shown(out)[1]["rasters"]] == [(f"image {i} of 3", None) for i in (1, 2, 3)]


def test_run_refuses_videos_that_are_none(capsys, vlm, image, tmp_path):
    picture(1, 20).save(tmp_path / "small.png")
    picture().save(tmp_path / "moving.gif", save_all=True, append_images=[picture(1)])
    small, moving = str(tmp_path / "small.png"), str(tmp_path / "moving.gif")
    for words, code, says in [
        (["--video", image], 1, "still picture"),
        (["--video", image, small], 1, "differ in size"),
        (["--video", image, moving], 1, "a video of its own"),
        (["--video", str(tmp_path / "gone.mp4")], 1, "no such video file"),
        (["--video", image, str(tmp_path / "gone.png")], 1, "no such image file"),
        (["--video", moving, "--image", image], 2, "not allowed with"),
        (["--image", image, "--image", moving], 1, "moving.gif is animated: give it as --video"),
        (["--image", image, "--frames", "3"], 1, "--frames is about a --video"),
        (["--video", moving, "--frames", "0"], 2, "at least 1"),
    ]:
        assert says in refused(capsys, code, "run", "--question", "q", *words)


def test_a_hub_id_is_asked_for_at_the_hub(monkeypatch, capsys, image):
    """A folder never is."""
    import transformers

    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options["local_files_only"]))
        raise OSError("not there")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    for name in ("llava-hf/llava-1.5-7b-hf", str(Path(image).parent)):
        assert "not there" in refused(capsys, 1, "run", "--image", image, "--question", "q", "--model", name)
    assert asked == [("llava-hf/llava-1.5-7b-hf", False), (str(Path(image).parent), True)]


def test_demo_says_what_is_wrong_before_it_starts_anything(capsys, monkeypatch, tmp_path):
    import socket

    from vtprune.demos import worker

    from vtprune.cli import demo

    def never(*args):
        raise AssertionError("a process was started")

    monkeypatch.setattr(worker, "Worker", never)
    assert "there are dense" in refused(capsys, 1, "demo", "--recipe", "none")
    assert "no such model folder" in refused(capsys, 1, "demo", "--model", "./none")
    for port in ("0", "70000", "x"):
        assert "not a port" in refused(capsys, 2, "demo", "--port", port)
    assert "no such folder" in refused(capsys, 1, "demo", "--results", str(tmp_path / "gone"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in refused(capsys, 1, "demo", "--port", str(taken.getsockname()[1]))
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "vtprune[demo]" in refused(capsys, 1, "demo")


def test_gradio_writes_no_stubs_and_inspect_is_as_before():
    import inspect

    from vtprune.cli.demo import without_stubs

    before = inspect.getfile
    with without_stubs():
        assert inspect.getfile(Path) == before(Path)
        with pytest.raises(OSError):
            inspect.getfile(type("Some", (), {"__module__": "gradio.components.some"}))
    assert inspect.getfile is before


@pytest.mark.parametrize(
    "words, said",
    [
        (["serve", "--encoded"], "--encoded is for --engine vllm"),
        (["serve", "--", "--max-model-len", "512"], "is for --engine vllm"),
        (["serve", "--engine", "vllm", "--offer", "tome"], "--offer is not known"),
        (["serve", "--engine", "vllm", "--max-tokens", "5"], "--max-tokens is not known"),
        (["serve", "--engine", "vllm", "--allow-host", "a"], "--allow-host is not known"),
        (["serve", "--engine", "vllm", "--device", "cuda"], "--device is not known"),
        (["serve", "--engine", "vllm", "--encoded", "--keep", "3"], "where images are encoded"),
        (["serve", "--engine", "vllm", "--option", "per=sample"], "one of attach"),
        (["serve", "--engine", "vllm", "--recipe", "uniform"], "no vLLM"),
        (["verify", "--engine", "vllm", "--seed", "3"], "seed 0"),
        (["verify", "--engine", "vllm", "--samples", "1", "--recipe", "uniform"], "no vLLM"),
        (["verify", "--engine", "vllm", "--samples", "1", "--recipe", "uniform", "--compact"], "compact ones"),
    ],
)
def test_engines_are_told_nothing_that_they_would_ignore(capsys, words, said):
    assert said in refused(capsys, 1, *words)
