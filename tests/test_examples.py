"""Every program in examples/ as a user runs it, unmodified, on the tiny model of its family in a folder."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import checkpoints
import vtprune
from vtprune.cli.main import main
from vtprune.core.planning import bind
from vtprune.core.recipes import RECIPES
from vtprune.inputs.chats import generate, prepare
from vtprune.methods.base import METHODS

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

# Of those about one image: the family, arguments besides --model, --image and --question, and what else is printed.
ONE_IMAGE = {
    "llava_image": ("llava", ["--keep", "0.5"], r"(?m)^(?:[.#] ){3}[.#]$"),
    "llava_next_tiles": ("llava-next", ["--per", "tile", "--keep", "0.5"], r"overview: \d+ of 4 x 4 tokens stayed"),
    "llava_onevision_images": ("llava-onevision", [], r"rasters: +4 x 4, \d+ x \d+"),
    "qwen2_vl_screenshot": ("qwen2-vl", ["--tolerance", "8"], ""),
    "qwen2_5_vl_image": ("qwen2.5-vl", [], r"this picture: +4 x 7 visual tokens"),
    "qwen3_vl_image": ("qwen3-vl", [], r"tokens by layer: 28 "),
    "glm4v_image": ("glm4v", ["--max-new-tokens", "24"], r"cache: +\d+% of"),
    "internvl_tiles": ("internvl", [], r"tiles: +5, the overview"),
    "smolvlm_image": ("smolvlm", [], r"answer, dense, without splitting: \S"),
    "gemma3_image": ("gemma3", [], r"images: +4, crops included"),
    "paligemma_image": ("paligemma", [], ""),
    "mistral3_image": ("mistral3", [], r"4 rows of 6 visual tokens"),
    "generic_image": ("generic", [], r"refused: "),
    "recipe_file": ("qwen2.5-vl", [], r"llm\.\d: pyramiddrop"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``folders(family)``: a checkpoint."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = checkpoints.save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures of 90 x 60 pixels, the right half of each plain."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(2):
        pixels = np.random.RandomState(seed).randint(0, 255, (60, 90, 3), dtype=np.uint8)
        pixels[:, 45:] = 40
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return [folder / "0.png", folder / "1.png"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """``run(name, *arguments)``: the program in an empty folder; its names and what it prints."""

    def program(name: str, *arguments: object):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return names, capsys.readouterr().out

    return program


def told(out: str, what: str) -> str:
    (line,) = re.findall(rf"(?m)^{re.escape(what)}: *(.*)$", out)
    return line


def check_costs(out: str, report: vtprune.Report) -> None:
    """What is printed of costs is the report's, and less than the dense model's; there is a time."""
    before, after = report.visual_tokens[0], report.stages[-1].tokens_out[0]
    assert 0 < after < before
    if "visual tokens:" in out:
        assert told(out, "visual tokens") == f"{before} -> {after}"
    share = round(100 * report.flops / report.dense_flops)
    assert 0 < share < 100 and told(out, "prefill FLOPs").startswith(f"{share}% of the dense model's")
    assert float(re.match(r"after ([\d.]+) of", told(out, "first token"))[1]) > 0


def check_answers(out: str, names: dict, **options: object) -> None:
    """Those of the model as the program leaves it, and of the same recipe attached again."""
    answer = names["answer"]
    assert told(out, "answer, dense") == answer()
    with vtprune.attach(names["model"], names["handle"].recipe, **options):
        assert told(out, "answer, pruned") == answer()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ONE_IMAGE)
def test_a_question_about_one_image(name, run, folders, pictures, tmp_path):
    family, more, printed = ONE_IMAGE[name]
    if family == "smolvlm":
        pytest.importorskip("num2words")
    shown = pictures[0]
    if family == "gemma3":  # wide enough to be cropped
        shown = tmp_path / "wide.png"
        Image.open(pictures[0]).resize((900, 300)).save(shown)
    names, out = run(name, "--model", folders(family), "--image", shown, "--question", "what is it ?", *more)
    assert bind(names["model"]).geometry.family == family
    assert re.search(printed, out), out
    check_costs(out, names["report"])
    if name == "smolvlm_image":
        assert told(out, "answer, dense, without splitting") == names["answer"](names["prepare"](False))
    else:
        check_answers(out, names, **({"per": "tile"} if "tiles" in name else {}))


@pytest.mark.ci
def test_qwen3_vl_with_experts(run, folders, pictures):
    names, out = run("qwen3_vl_image", "--model", folders("qwen3-vl-moe"), "--image", pictures[0])
    assert bind(names["model"]).geometry.family == "qwen3-vl-moe"
    check_costs(out, names["report"])


@pytest.mark.ci
@pytest.mark.parametrize("per", ["image", "sample"])
def test_several_images(per, run, folders, pictures):
    shown = ["--image", pictures[0], "--image", pictures[1], "--per", per]
    names, out = run("several_images", "--model", folders("qwen2.5-vl"), *shown, "--question", "how many ?")
    check_answers(out, names, per=per)
    check_costs(out, names["report"])
    stayed = [int(re.match(r"28 -> (\d+)", told(out, str(path)))[1]) for path in pictures]
    assert sum(stayed) == names["report"].stages[-1].tokens_out[0] == 14
    assert per == "sample" or stayed == [7, 7]


@pytest.mark.ci
@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava-onevision"])
def test_a_video(family, run, folders, tmp_path):
    frames = [Image.new("RGB", (64, 48), (20 * i, 40, 90)) for i in range(8)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=200)
    names, out = run(
        "video", "--model", folders(family), "--video", tmp_path / "clip.gif", "--frames", 4, "--keep", 0.5
    )
    check_costs(out, names["report"])
    by_frame = list(map(int, told(out, "by frame").split()))
    assert len(by_frame) == (2 if family == "qwen2.5-vl" else 4 + 1)
    assert sum(by_frame) == names["report"].stages[-1].tokens_out[0]


@pytest.mark.ci
@pytest.mark.skipif(tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24), reason="cache= is newer")
def test_a_chat_of_two_turns(run, folders, pictures):
    names, out = run(
        "chat_two_turns", "--model", folders("qwen2.5-vl"), "--image", pictures[0], "--then", "where is it ?"
    )
    chosen = [re.findall(r"llm\.\d \d+ -> \d+", told(out, what)) for what in ("chosen from", "chosen again")]
    assert len(chosen[0]) == 3 and chosen[0] == chosen[1]
    # the whole conversation as one new prompt
    model, turn = names["model"], names["turn"]
    media = {k: v for k, v in names["inputs"].items() if k.startswith(("pixel", "image"))}
    media["mm_token_type_ids"] = (turn == model.config.image_token_id).int()
    with vtprune.attach(model, names["handle"].recipe) as handle:
        anew = model.generate(turn, attention_mask=torch.ones_like(turn), **media, **names["how"])
        kept = handle.report().stages[-1].kept[0]
    assert torch.equal(anew, names["second"]) and torch.equal(kept, names["report"].stages[-1].kept[0])


@pytest.mark.ci
def test_a_batch(run, folders, pictures, tmp_path):
    asked = [(pictures[0], "what is it ?"), (pictures[1], "how many w40 w41 are there ?"), (pictures[1], "what ?")]
    (tmp_path / "q.tsv").write_text("".join(f"{p}\t{q}\n" for p, q in asked), encoding="utf-8")
    names, out = run("batched_generate", "--model", folders("qwen2.5-vl"), "--questions", "q.tsv", "--batch", 2)
    rows = [line.split(" | ") for line in out.splitlines() if " | " in line]
    assert [row[1] for row in rows] == [question for _, question in asked]
    model, inputs = names["model"], names["prepare"](asked[1:2])
    with vtprune.attach(model, "divprune", keep=0.25):
        alone = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert rows[1][2] == names["processor"].decode(alone, skip_special_tokens=True).strip()
    assert all(row[3] == "28 -> 7 tokens" for row in rows)


@pytest.mark.ci
def test_a_budget(run, folders, pictures, tmp_path):
    shown = ["--image", pictures[0], "--question", "what is it ?", "--effective-tokens", 0.5]
    names, out = run("budget", "--model", folders("qwen2.5-vl"), *shown)
    found = {m[1]: float(m[2]) for m in re.finditer(r"(?m)^([a-z]+): .*\n  ([\d.]+) of 28 effective tokens", out)}
    assert sorted(found) == ["divprune", "fastv", "pyramiddrop"]
    assert all(0.8 * 14 <= tokens <= 14 for tokens in found.values())
    with vtprune.attach(names["model"], tmp_path / "fastv-solved.yaml") as handle:
        names["answer"]()
        assert handle.report().effective_tokens == pytest.approx(found["fastv"], abs=0.06)


@pytest.mark.ci
def test_a_long_prompt(run, folders, tmp_path):
    (tmp_path / "text.txt").write_text("w20 w21 w22 w23 " * 20, encoding="utf-8")
    asked = ["--text", "text.txt", "--question", "what is it ?", "--keep", "0.5"]
    names, out = run("causal_lm_long_prompt", "--model", folders("causal-lm"), *asked)
    check_answers(out, names)
    check_costs(out, names["report"])
    assert re.match(r"\d+ -> \d+ of those", told(out, "prompt tokens"))


def test_a_hugging_face_classifier(run, folders, pictures):
    names, out = run("hf_vit_classifier", "--model", folders("hf-vit"), "--image", pictures[0])
    report = names["report"]
    assert told(out, "patches") == f"16 -> {report.stages[-1].tokens_out[0]}" and report.stages[-1].tokens_out[0] == 4
    assert told(out, "classes, dense") == names["classes"]()
    assert f"{report.flops / report.dense_flops:.0%}" in told(out, "FLOPs") and report.flops < report.dense_flops
    assert "LABEL_" in told(out, "classes, pruned")


@pytest.mark.ci
def test_throughput_of_timm(run, pictures, tmp_path):
    model = timm.create_model("test_vit")
    timm.models.save_for_hf(model, tmp_path / "vit", safe_serialization=True)
    shown = [f"--image={path}" for path in pictures]
    source = f"local-dir:{tmp_path / 'vit'}"
    names, out = run("timm_vit_throughput", "--model", source, *shown, "--batch", 4, "--budgets", 0.5, 1.0)
    half, whole = re.findall(
        r"(?m)^keep +(\d+)%: .*?(\d+)% of the FLOPs, (\d+) -> (\d+) patches, (\d) of 4 classes", out
    )
    assert half[0] == "50" and int(half[1]) < 100 and int(half[3]) == int(half[2]) // 2
    assert whole[1] == "100" and whole[2] == whole[3] and whole[4] == "4"


@pytest.mark.ci
def test_zero_shot_with_open_clip(run, pictures, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    tower = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    sizes = {"embed_dim": 24, "vision_cfg": tower, "text_cfg": {"width": 32, "heads": 2, "layers": 1}}
    torch.manual_seed(0)
    (tmp_path / "clip").mkdir()
    save_file(open_clip.CLIP(**sizes).state_dict(), tmp_path / "clip" / "open_clip_model.safetensors")
    about = {"model_cfg": sizes, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(about), encoding="utf-8")
    more = ["--image", pictures[0], "--label", "a cat", "--label", "a dog"]
    names, out = run("open_clip_zero_shot", "--model", f"local-dir:{tmp_path / 'clip'}", *more)
    assert bind(names["model"]).geometry.family == "open-clip"
    assert re.fullmatch(r"a cat \d+%, a dog \d+%", told(out, "labels, pruned"))
    assert told(out, "patches") == "16 -> 8" and names["report"].flops < names["report"].dense_flops
    assert -1 <= float(told(out, "embedding").split()[1]) < 0.9999


@pytest.fixture
def registered():
    """What an example registers is gone afterwards."""
    before = {name: dict(getattr(METHODS, name)) for name in ("_entries", "_owners", "_modules")}
    recipes = {name: dict(getattr(RECIPES, name)) for name in before}
    yield
    for registry, was in ((METHODS, before), (RECIPES, recipes)):
        for name, entries in was.items():
            setattr(registry, name, entries)


@pytest.mark.ci
def test_a_method_of_ones_own(run, registered, folders, pictures):
    more = ["--image", pictures[0], "--question", "what is it ?"]
    names, out = run("own_method", "--model", folders("qwen2.5-vl"), *more)
    assert told(out, "visual tokens") == "28 -> 7" and "off-mean" in vtprune.methods()
    assert told(out, "the contract") == "holds" and sum(c.passed is True for c in names["checked"].checks) >= 10


@pytest.fixture
def questions(pictures):
    """A file of questions beside the pictures."""
    rows = [{"image": p.name, "question": f"what is {w} ?", "answer": "it"} for p in pictures for w in ("w40", "w41")]
    path = pictures[0].parent / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.ci
def test_methods_compared(run, folders, questions, tmp_path):
    asked = ["--questions", questions, "--methods", "divprune", "random", "--budgets", 0.5]
    names, out = run("compare_methods", "--model", folders("qwen2.5-vl"), *asked)
    head, *rows = out.splitlines()[-4:]
    assert [row.split()[:2] for row in rows] == [["dense", "100%"], ["divprune", "50%"], ["random", "50%"]]
    assert [row.split()[-3] for row in rows] == ["28.0", "14.0", "14.0"]
    assert list((tmp_path / "out" / "compare" / "runs").glob("divprune*.json"))
    assert main(["report", "out/compare"]) == 0 and (tmp_path / "out" / "compare" / "report.html").is_file()


@pytest.mark.ci
def test_a_server_is_asked(run, folders, pictures):
    for name in ("openai", "uvicorn", "fastapi"):
        pytest.importorskip(name)
    # no Qwen: transformers' server finds its answers by marks of a chat template that tiny ones do not have
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    how = ["--recipe", "divprune", "--keep", "0.25", "--offer", "pyramiddrop", "--port", str(port)]
    command = [sys.executable, "-m", "vtprune", "serve", "--model", str(folders("llava")), *how]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 180
        while server.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.2)
        asked = ["--url", f"http://127.0.0.1:{port}/v1", "--image", pictures[0], "--recipe", "pyramiddrop"]
        names, out = run("serve_client", *asked, "--question", "what is it ?")
    finally:
        server.terminate()
        server.communicate(timeout=60)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folders("llava")).eval()
    processor = transformers.AutoProcessor.from_pretrained(folders("llava"))
    inputs = prepare(processor, [Image.open(pictures[0])], ["what is it ?"])
    with vtprune.attach(model, "pyramiddrop", keep=0.25):
        assert told(out, "answer, pruned") == generate(model, processor, inputs, 64)[0]
    assert told(out, "answer, dense") == generate(model, processor, inputs, 64)[0]
    assert names["report"]["recipe"].startswith("pyramiddrop") and names["report"]["visual_tokens"] == [16]
    assert 0 < int(told(out, "prefill FLOPs").split("%")[0]) < 100


@pytest.mark.ci
def test_a_part_is_trained(run, folders, pictures, questions, tmp_path):
    for name in ("accelerate", "easy_vqa"):
        pytest.importorskip(name)
    more = ["--data", questions, "--image", pictures[0], "--question", "what is it ?", "--steps", 4, "--batch", 2]
    names, out = run("train_module", "--model", folders("qwen2.5-vl"), *more)
    assert (tmp_path / "module.safetensors").is_file() and told(out, "visual tokens") == "28 -> 7"
    assert names["handle"].recipe.stages[0].options["weights"] == "module.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# the folder


PROGRAMS = sorted(EXAMPLES.glob("*.py"))
INDEX = (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_every_program_is_listed_once_and_every_family_has_one():
    listed = re.findall(r"(?m)^\| \[(\w+\.py)\]\((\w+\.py)\) \| ([^|]+) \|", INDEX)
    assert sorted(name for name, *_ in listed) == [path.name for path in PROGRAMS]
    assert all(name == link for name, link, _ in listed)
    named = {family for *_, what in listed for family in re.findall(r"`([\w.-]+)`", what)}
    assert set(vtprune.adapters()) - {"outer"} <= named


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_stands_alone_and_is_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"python examples/{path.name} --" in ast.get_docstring(ast.parse(text))
    others = {other.stem for other in PROGRAMS}
    imported = {
        n.module if isinstance(n, ast.ImportFrom) else n.names[0].name
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.Import | ast.ImportFrom)
    }
    assert not {str(name).split(".")[0] for name in imported} & others
    defaults = re.findall(r'"--model", default="(?:hf-hub:)?([^"]+)"', text)
    assert path.stem == "serve_client" or (len(defaults) == 1 and re.fullmatch(r"[\w-]+/[\w.-]+", defaults[0]))


@pytest.mark.ci
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_explains_itself(path, run, capsys):
    with pytest.raises(SystemExit) as ended:
        run(path.stem, "--help")
    assert ended.value.code == 0 and f"python examples/{path.name}" in capsys.readouterr().out
