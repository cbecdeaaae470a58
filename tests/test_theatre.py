"""The token theatre: its data against reports of real prefills, and pages that are safe and self-contained."""

from __future__ import annotations

import json
import re
from functools import cache
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from vtprune.models.base import ADAPTERS

import vtprune
from cases import case_options
from fake import picture
from vtprune import render, theatre
from vtprune.answer import prepare
from vtprune.data import scenes
from vtprune.recipe import Recipe, Stage
from vtprune.types import Report, StageReport


@cache
def demo():
    """The bundled model with two questions about two scenes."""
    model, processor = vtprune.load_demo_model()
    images = [Image.fromarray(scenes.scene(i, "test").image) for i in range(2)]
    return model, processor, prepare(processor, images, ["what color is it ?", "how many red shapes are there ?"])


def run(model, inputs, recipe, **options) -> Report:
    with vtprune.attach(model, recipe, **options) as handle, torch.no_grad():
        model(**inputs)
        return handle.report()


def agrees(report: Report) -> None:
    """What is drawn for every sample is what the report says, token for token."""
    for sample, grids in enumerate(report.grids):
        scene = theatre.scene(report, sample=sample, title="t")
        assert json.loads(json.dumps(scene, allow_nan=False)) == scene
        n = report.visual_tokens[sample]
        assert scene["tokens"] == n and scene["states"][0] == list(range(n)) and {len(s) for s in scene["states"]} == {n}
        covered = [r["start"] + i for r in scene["rasters"] for i in range(r["rows"] * r["columns"])]
        assert covered == list(range(n)) and [(r["rows"], r["columns"]) for r in scene["rasters"]] == [tuple(g) for g in grids]
        layers = [i for i, s in enumerate(scene["steps"]) if s["site"].startswith("llm.")]
        assert [scene["steps"][i]["site"] for i in layers] == [f"llm.{i}" for i in range(len(report.layer_tokens[sample]))]
        assert [len(theatre.present(scene, i)) for i in layers] == report.layer_tokens[sample]
        assert [s["tokens"] for s in scene["steps"]] == [len(theatre.present(scene, i)) for i in range(len(scene["steps"]))]
        assert sorted(i for s in scene["steps"] for i in s["stages"]) == list(range(len(report.stages)))
        assert all(scene["stages"][i]["site"] == s["site"] for s in scene["steps"] for i in s["stages"])
        for i, (stage, drawn) in enumerate(zip(report.stages, scene["stages"], strict=True)):
            before, after = scene["states"][i], scene["states"][i + 1]
            assert drawn["kept"] == stage.kept[sample].tolist() == [t for t, owner in enumerate(after) if owner == t]
            if stage.assignment is not None:
                slots = stage.assignment[sample].tolist()
                assert after == [drawn["kept"][s] if s >= 0 else -1 for s in slots]
            for t in range(n):
                assert drawn["outcome"][t] == slow_outcome(t, before[t], after[t])
            ranked(stage, drawn, sample)


def slow_outcome(token: int, before: int, after: int) -> int:
    if before < 0:
        return theatre.GONE if after < 0 else theatre.BACK
    return theatre.DROPPED if after < 0 else theatre.KEPT if after == token else theatre.MERGED


def ranked(stage: StageReport, drawn: dict, sample: int) -> None:
    if stage.scores is None:
        assert drawn["scores"] is drawn["rank"] is drawn["unit"] is drawn["units"] is None
        return
    scores, units = stage.scores[sample].tolist(), stage.units[sample].tolist()
    for t, (score, unit) in enumerate(zip(scores, units, strict=True)):
        others = [i for i, u in enumerate(units) if u == unit and scores[i] == scores[i]]
        if unit < 0 or score != score:
            assert drawn["rank"][t] == 0 and drawn["unit"][t] == -1 and drawn["scores"][t] is None
        else:
            assert drawn["rank"][t] == 1 + sorted(others, key=lambda i: (-scores[i], i)).index(t)
            assert drawn["units"][drawn["unit"][t]] == [len(others), len(set(others) & set(drawn["kept"]))]
            assert float(drawn["scores"][t]) == pytest.approx(score, rel=1e-3)


CASES = [(m, i) for m in vtprune.methods() for i in range(len(vtprune.describe(m).cases))]


@pytest.mark.parametrize(("method", "number"), CASES, ids=lambda v: str(v))
def test_every_method_on_the_bundled_model(method, number):
    model, _, inputs = demo()
    agrees(run(model, inputs, method, **case_options(model, method, number)))


COMPOSED = [
    Recipe(name="flowcut + fastv", stages=(Stage(method="flowcut", keep=0.5), Stage(method="fastv", keep=0.25))),
    Recipe(name="tome + dpvr-lf", stages=(Stage(method="tome", keep=0.5), Stage(method="dpvr-lf", options={"split": 3}))),
    Recipe(name="pool + pyramiddrop", stages=(Stage(method="pool", keep=0.5), Stage(method="pyramiddrop", keep=0.1))),
]


@pytest.mark.parametrize("recipe", COMPOSED, ids=lambda r: r.name)
def test_composed_recipes(recipe):
    model, _, inputs = demo()
    agrees(run(model, inputs, recipe))


TILED = [
    ("llava-next", "clip-llama", "fastv", {"keep": 0.4}),
    ("llava-next", "clip-llama", "pool", {"keep": 0.4, "per": "sample"}),
    ("llava-next", "clip-llama", "tome", {"keep": 0.5, "per": "tile"}),
    ("llava-onevision", "video", "pyramiddrop", {"keep": 0.3, "per": "video"}),
    ("qwen2-vl", "video", "fastv", {"keep": 0.5}),
    ("qwen3-vl", "video", "dpvr-lf", {"split": 2}),
    ("internvl", "qwen2", "uniform", {"keep": 0.5, "per": "tile"}),
    ("smolvlm", "smolvlm", "fastv", {"keep": 0.5, "per": "sample"}),
]


@pytest.mark.parametrize(("family", "kind", "method", "options"), TILED, ids=lambda v: v if isinstance(v, str) else "")
def test_tiles_and_videos(tiny, family, kind, method, options):
    report = run(*tiny(family, kind), method, **options)
    assert max(map(len, report.grids)) > 1
    agrees(report)


def test_a_bare_tower_has_no_layers(tiny):
    report = run(*tiny("hf-vit", next(iter(ADAPTERS.get("hf-vit").tiny))), "tome", keep=0.5)
    scene = theatre.scene(report)
    assert [s["site"] for s in scene["steps"]] == ["image", *dict.fromkeys(s.site for s in report.stages)]
    assert scene["steps"][-1]["tokens"] == len(report.stages[-1].kept[0])


# ------------------------------------------------------------------------------------------------- by hand: four tokens, one cut, one return


def hand(scores=None) -> Report:
    first = StageReport("vision.1", "tome", [4], [3], [torch.tensor([0, 2, 3])], [torch.tensor([0, 0, 1, 2])])
    units = None if scores is None else [torch.tensor([0, -1, 0, 0])]
    second = StageReport("llm.1", "fastv", [3], [1], [torch.tensor([2])], None, None if scores is None else [torch.tensor(scores, dtype=torch.float64)], units)
    third = StageReport("llm.2", "back", [1], [2], [torch.tensor([0, 2])])
    return Report([4], (first, second, third), [[3, 1, 2]], 1, 2, 1, 2, grids=[[(2, 2)]])


NAN = float("nan")


def test_history_in_plain_words():
    scene = theatre.scene(hand([0.5, NAN, 0.51234567, 0.5]))
    assert theatre.history(scene, 1) == [
        "vision.1 tome: 4 to 3 tokens: merged into token 0",
        "llm.1 fastv: 3 to 1 tokens: dropped with token 0",
        "llm.2 back: 1 to 2 tokens: came back",
    ]
    assert theatre.history(scene, 0)[1:] == ["llm.1 fastv: rank 2 of 3, score 0.5, 1 kept: dropped", "llm.2 back: 1 to 2 tokens: came back"]
    assert theatre.history(scene, 2)[1] == "llm.1 fastv: rank 1 of 3, score 0.5123, 1 kept: kept"
    assert theatre.history(scene, 3)[1:] == ["llm.1 fastv: rank 3 of 3, score 0.5, 1 kept: dropped", "llm.2 back: 1 to 2 tokens: was already gone"]
    with pytest.raises(vtprune.VtpruneError, match="no token 4"):
        theatre.history(scene, 4)


def test_dense_shows_everything_everywhere():
    report = theatre.dense(hand())
    agrees(report)
    scene = theatre.scene(report)
    assert [s["tokens"] for s in scene["steps"]] == [4] * 4 and theatre.history(scene, 3) == ["no stage: every layer sees this token"]
    assert (report.flops, report.kv_bytes) == (2, 2)


def test_infinite_scores_are_json():
    scene = theatre.scene(hand([float("-inf"), NAN, 1.0, 0.5]))
    assert json.loads(json.dumps(scene, allow_nan=False))["stages"][1]["scores"] == ["-inf", None, 1.0, 0.5]
    assert scene["stages"][1]["rank"] == [3, 0, 1, 2]


def test_scene_refuses():
    for call, words in [
        (lambda: theatre.scene(hand(), sample=1), "no sample 1"),
        (lambda: theatre.scene(hand(), [picture(), picture()]), "1 rasters, but there are 2"),
        (lambda: theatre.scene(Report([0], (), [[0]], 1, 1, 1, 1, grids=[[]])), "no visual tokens"),
        (lambda: theatre.element([]), "at least one scene"),
    ]:
        with pytest.raises(vtprune.VtpruneError, match=words):
            call()


# ------------------------------------------------------------------------------------------------------------------- HTML


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.data, self.handlers = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.data += [v for k, v in attrs if k == "data-scenes"]
        self.handlers += [k for k, _ in attrs if k.startswith("on") or k in ("src", "href")]


EVIL = "it's </vt-theatre><script>alert(1)</script> \" & <img src=x onerror=alert(1)> ${value} \u2028"


def test_element_is_escaped_and_brings_its_data_back():
    view = picture()
    view.info["label"] = EVIL
    scenes = [theatre.scene(hand(), [view], title=EVIL), theatre.scene(theatre.dense(hand()), [view])]
    found = Page(theatre.element(scenes))
    assert found.tags == ["vt-theatre"] and found.handlers == []
    told = json.loads(found.data[0])
    assert len(told["pictures"]) == 1 and told["pictures"][0].startswith("data:image/jpeg;base64,")  # shared by both
    for scene, shown in zip(scenes, told["scenes"], strict=True):
        for raster in shown["rasters"]:
            raster["picture"] = told["pictures"][raster["picture"]]
        assert shown == scene
    assert told["scenes"][0]["title"] == EVIL


def test_page_is_self_contained():
    page = theatre.page([theatre.scene(hand(), [picture()], title=EVIL)], title=EVIL, facts=EVIL)
    found = Page(page)
    assert set(found.tags) == {"html", "head", "meta", "title", "style", "body", "script", "h1", "vt-theatre", "footer"} and found.handlers == []
    assert found.tags.count("script") == 1
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert "url(" not in page and "@import" not in page and "innerHTML" not in page
    assert "prefers-color-scheme: dark" in page and ".dark vt-theatre" in page and "width=device-width" in page


def test_head_holds_style_and_script():
    found = Page(theatre.head())
    assert found.tags == ["style", "script"] and 'customElements.define("vt-theatre"' in theatre.head()


def test_script_and_module_agree_on_numbers():
    """The outcomes' numbers and the heat colours are written down twice."""
    script = theatre.head()
    for name in ("KEPT", "MERGED", "DROPPED", "BACK", "GONE"):
        assert f"{name} = {getattr(theatre, name)}" in script
    assert json.dumps([list(c) for c in render.HEAT]) in script
