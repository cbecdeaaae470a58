"""What the demo's page gets from the model's side, without a process of its own and without Gradio."""

from __future__ import annotations

import html
import json
import re
import threading

import pytest
from PIL import Image
from vtprune.demos.desk import Desk
from vtprune.demos.samples import saved

import vtprune
from fake import film, video_model

DENSE = {"recipe": "dense", "file": None, "budget": "own", "share": 0.25, "options": "", "seed": 0}


@pytest.fixture(scope="module")
def desk() -> Desk:
    one = Desk()
    one.load(None, "cpu", "float32")
    return one


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> list[str]:
    return saved(1, tmp_path_factory.mktemp("samples"))[0]


def scenes(element: str) -> list[dict]:
    """The drawing data of a theatre element."""
    (data,) = re.findall(r"data-scenes='([^']*)'", element)
    return json.loads(html.unescape(data))["scenes"]


def test_an_answer_comes_in_pieces_and_ends_with_everything(desk, sample):
    path, question, _ = sample
    found = list(
        desk.ask(
            "page",
            path,
            question,
            [DENSE, {**DENSE, "recipe": "tome", "budget": "effective", "share": 0.5}],
            8,
            "cross",
        )
    )
    assert [u["side"] for u in found if "side" in u] == sorted(u["side"] for u in found if "side" in u)
    last = found[-1]
    assert last["right"] == [answer == "cross" for answer in last["answers"]] and last["heads"] == [
        "A: dense",
        "B: tome",
    ]
    assert "visual tokens gone" in last["headline"]
    assert set(last["files"]) == {"vtprune.png", "theatre.html", "repeat.py", "recipe-b.json"}
    for side in (0, 1):
        assert [u["text"] for u in found if u.get("side") == side][-1] == last["answers"][side]
    dense, tome = scenes(last["theatre"])
    assert (
        dense["title"].startswith("A: dense")
        and tome["title"].startswith("B: tome")
        and tome["title"].endswith(last["answers"][1])
    )
    model, processor = vtprune.load_demo_model()
    from vtprune.inputs.chats import generate, prepare
    from vtprune.inputs.images import open_image

    with vtprune.attach(model, "tome", effective_tokens=0.5) as handle:
        generate(model, processor, prepare(processor, [open_image(path)], [question]), 1)
        stages = handle.report().stages
    assert [s["kept"] for s in tome["stages"]] == [s.kept[0].tolist() for s in stages]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"recipe": "nothing"}, "B: unknown recipe 'nothing'"),
        ({"recipe": "/etc/passwd.json"}, "B: unknown recipe"),
        ({"options": "{]"}, "B: options: not JSON"),
        ({"recipe": "fastv", "chosen": {"number": ["<a>"]}}, "B: fastv: layer='<a>': expected integer"),
        ({"recipe": "pyramiddrop", "chosen": {"text": ["1, x"]}}, "B: layers='1, x': write whole numbers"),
        ({"recipe": "pyramiddrop", "chosen": {"choice": ["<a>"]}}, "B: score_layer='<a>' is not one of"),
        ({"options": "[1]"}, "B: options: a JSON object"),
        ({"file": "{"}, "B: recipe file: not JSON"),
        ({"file": ""}, "B: the recipe file is empty"),
        ({"file": " \n"}, "B: the recipe file is empty"),
        ({"file": " " * 100_001}, "B: the recipe file is empty"),
        ({"file": "[" + "1," * 60_000 + "1]"}, "B: recipe file has 120003 characters; at most 100000"),
        (
            {"file": vtprune.Recipe(name="a\ud800", stages=(vtprune.Stage(method="tome"),)).to_json()},
            "B: recipe file holds half of a character",
        ),
        (
            {"file": vtprune.Recipe(name="n" * 201, stages=(vtprune.Stage(method="tome"),)).to_json()},
            "B: the recipe's name has 201 characters",
        ),
        ({"options": '{"\\ud800": 1}'}, "B: options holds half of a character"),
        ({"file": '{"name": "x"}'}, "B: "),
        ({"recipe": "dpvr-lf", "options": '{"weights": "/some/where.safetensors"}'}, "B: weights="),
        (
            {
                "file": vtprune.Recipe(
                    name="x", stages=(vtprune.Stage(method="dpvr-lf", options={"weights": "y"}),)
                ).to_json()
            },
            "B: weights=",
        ),
        ({"budget": "keep", "share": 0.0}, "B: the share"),
        ({"seed": -1}, "B: seed=-1"),
    ],
)
def test_what_a_side_may_not_say(desk, sample, change, says):
    with pytest.raises(vtprune.VtpruneError, match=says):
        list(desk.ask("page", sample[0], sample[1], [DENSE, {**DENSE, **change}], 4))


def test_a_long_right_answer_is_refused_before_anything_is_compared(desk, sample):
    with pytest.raises(vtprune.VtpruneError, match="at most 500"):
        next(desk.compare("page", sample[0], sample[1], 0.25, "effective", 0, "word " * 1_000_000))


def test_stopping_one_page_leaves_the_others(desk, sample):
    path, question, _ = sample
    mine, other = (
        desk.ask("mine", path, question, [DENSE, DENSE], 8),
        desk.ask("other", path, question, [DENSE, DENSE], 8),
    )
    next(mine), next(other)
    desk.stop("mine")
    assert list(mine)[-1].get("stopped")
    assert list(other)[-1]["answers"]
    desk.stop("nobody")
    left = desk.ask("left", path, question, [DENSE, DENSE], 8)
    next(left)
    left.close()
    assert not desk._running


def test_comparing_tells_how_far_it_is(desk, sample):
    path, question, truth = sample
    steps = desk.compare("page", path, question, 0.25, "effective", 0, truth)
    first = next(steps)
    assert first["done"] == 1 and first["of"] > 12 and "dense" in first["cards"]
    threading.Timer(0, desk.stop, ["page"]).start()
    last = list(steps)[-1]
    assert last["status"] == "stopped" and last["done"] < last["of"]


@pytest.mark.ci
def test_tiles_and_videos(tmp_path):
    """Every tile and frame has its own raster with its own picture."""
    model, processor = video_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    desk = Desk()
    desk.load(str(tmp_path / "model"), "cpu", "float32")
    assert desk.about()["videos"]
    Image.effect_noise((120, 70), 90).convert("RGB").save(tmp_path / "wide.png")
    for shown, nouns in (
        (film(tmp_path / "film.mp4", 40), {"frame"}),
        (str(tmp_path / "wide.png"), {"overview", "tiles"}),
    ):
        last = list(desk.ask("page", shown, "what is it", [DENSE, {**DENSE, "recipe": "uniform"}], 3))[-1]
        assert ("repeat.py" in last["files"]) == shown.endswith(".png")
        drawn = scenes(last["theatre"])[1]
        assert nouns <= {r["label"].split(" ")[0] for r in drawn["rasters"]}
        assert all(r["picture"] is not None for r in drawn["rasters"])
        assert sum(r["rows"] * r["columns"] for r in drawn["rasters"]) == drawn["tokens"]
