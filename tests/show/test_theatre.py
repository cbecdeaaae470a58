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
from choice import kinds, taken
from fake import picture
from vtprune.core.recipe import Recipe, Stage
from vtprune.core.report import Report, StageReport
from vtprune.data import scenes
from vtprune.inputs.chats import prepare
from vtprune.show import heat, pictures, theatre


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
        assert (
            scene["tokens"] == n and scene["states"][0] == list(range(n)) and {len(s) for s in scene["states"]} == {n}
        )
        covered = [r["start"] + i for r in scene["rasters"] for i in range(r["rows"] * r["columns"])]
        assert covered == list(range(n)) and [(r["rows"], r["columns"]) for r in scene["rasters"]] == [
            tuple(g) for g in grids
        ]
        layers = [i for i, s in enumerate(scene["steps"]) if s["site"].startswith("llm.")]
        assert [scene["steps"][i]["site"] for i in layers] == [
            f"llm.{i}" for i in range(len(report.layer_tokens[sample]))
        ]
        assert [len(theatre.present(scene, i)) for i in layers] == report.layer_tokens[sample]
        assert [s["tokens"] for s in scene["steps"]] == [
            len(theatre.present(scene, i)) for i in range(len(scene["steps"]))
        ]
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
CASES = [(m, i) for m, i in CASES if taken(("llava", "clip-llama", m, i))]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("method", "number"),
    [pytest.param(m, i, marks=() if m in {group[0] for group in kinds()} else pytest.mark.slow) for m, i in CASES],
)
def test_every_method_on_the_bundled_model(method, number):
    model, _, inputs = demo()
    agrees(run(model, inputs, method, **case_options(model, method, number)))


COMPOSED = [
    Recipe(name="flowcut + fastv", stages=(Stage(method="flowcut", keep=0.5), Stage(method="fastv", keep=0.25))),
    Recipe(
        name="tome + dpvr-lf", stages=(Stage(method="tome", keep=0.5), Stage(method="dpvr-lf", options={"split": 3}))
    ),
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


# ------------------------------------------------------------------------------------------------- by hand: four
# tokens, one cut, one return


def hand(scores=None) -> Report:
    first = StageReport("vision.1", "tome", [4], [3], [torch.tensor([0, 2, 3])], [torch.tensor([0, 0, 1, 2])])
    units = None if scores is None else [torch.tensor([0, -1, 0, 0])]
    second = StageReport(
        "llm.1",
        "fastv",
        [3],
        [1],
        [torch.tensor([2])],
        None,
        None if scores is None else [torch.tensor(scores, dtype=torch.float64)],
        units,
    )
    third = StageReport("llm.2", "back", [1], [2], [torch.tensor([0, 2])])
    return Report([4], (first, second, third), [[3, 1, 2]], 1, 2, 1, 2, grids=[[(2, 2)]])


NAN = float("nan")


def moving() -> Report:
    """A video of three frames of 2 x 2 tokens and a picture behind it: token 5 goes into frame 1, frame 3 is dropped,
    then frame 1's first token goes with what is part of it."""
    owner = [0, 1, 2, 3, 4, 0, 4, 7, -1, -1, -1, -1, 12, 13, 14, 15]
    kept = [i for i, o in enumerate(owner) if i == o]
    merged = [kept.index(o) if o >= 0 else -1 for o in owner]
    first = StageReport("projector", "holitom", [16], [len(kept)], [torch.tensor(kept)], [torch.tensor(merged)])
    last = StageReport("llm.1", "fastv", [len(kept)], [len(kept) - 1], [torch.tensor(kept[1:])])
    return Report([16], (first, last), [[10, 9, 9]], 1, 2, 1, 2, grids=[[(2, 2)] * 4])


def film_views() -> list[Image.Image]:
    out = [Image.new("RGB", (64, 64), "white") for _ in range(4)]
    for i, view in enumerate(out[:3], 1):
        view.info.update(label=f"frame {i} of 3", film=0)
    out[3].info["label"] = "image"
    return out


def test_history_names_the_frame_that_a_token_went_to():
    scene = theatre.scene(moving(), film_views())
    assert [r["film"] for r in scene["rasters"]] == [0, 0, 0, None]
    assert theatre.history(scene, 5) == [
        "projector holitom: 16 to 10 tokens: merged into token 0 (frame 1 of 3)",
        "llm.1 fastv: 10 to 9 tokens: dropped with token 0 (frame 1 of 3)",
    ]
    assert theatre.history(scene, 6)[1].endswith("still part of token 4")
    assert theatre.history(scene, 8) == [
        "projector holitom: 16 to 10 tokens: dropped",
        "llm.1 fastv: 10 to 9 tokens: was already gone",
    ]


def test_a_long_video_is_a_page_that_can_be_sent():
    """64 frames of noise, which no format makes small, under a method that acts in each of 28 layers."""
    n = 64 * 196
    stages = tuple(
        StageReport(f"llm.{i}", "framefusion", [n if i == 0 else n // 4], [n // 4], [torch.arange(0, n, 4)])
        for i in range(28)
    )
    report = Report([n], stages, [[n // 4] * 28], 1, 1, 1, 1, grids=[[(14, 14)] * 64])
    views = [Image.effect_noise((448, 448), 60).convert("RGB") for _ in range(64)]
    scene = theatre.scene(report, views)
    page = theatre.page([scene, theatre.scene(theatre.dense(report), views)])
    assert len(page) < 6_000_000 and len(scene["rasters"]) == 64
    alone = theatre.scene(report, views[:1] * 64)["rasters"][0]["picture"]
    assert len(alone) < len(theatre._picture(views[0], 1)) / 4


def test_history_in_plain_words():
    scene = theatre.scene(hand([0.5, NAN, 0.51234567, 0.5]))
    assert theatre.history(scene, 1) == [
        "vision.1 tome: 4 to 3 tokens: merged into token 0",
        "llm.1 fastv: token 0 has rank 2 of 3, score 0.5, 1 kept: dropped with token 0",
        "llm.2 back: 1 to 2 tokens: came back",
    ]
    assert theatre.history(scene, 0)[1:] == [
        "llm.1 fastv: rank 2 of 3, score 0.5, 1 kept: dropped",
        "llm.2 back: 1 to 2 tokens: came back",
    ]
    assert theatre.history(scene, 2)[1] == "llm.1 fastv: rank 1 of 3, score 0.5123, 1 kept: kept"
    assert theatre.history(scene, 3)[1:] == [
        "llm.1 fastv: rank 3 of 3, score 0.5, 1 kept: dropped",
        "llm.2 back: 1 to 2 tokens: was already gone",
    ]
    with pytest.raises(vtprune.VtpruneError, match="no token 4"):
        theatre.history(scene, 4)


def test_dense_shows_everything_everywhere():
    report = theatre.dense(hand())
    agrees(report)
    scene = theatre.scene(report)
    assert [s["tokens"] for s in scene["steps"]] == [4] * 4 and theatre.history(scene, 3) == [
        "no stage: every layer sees this token"
    ]
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


# -------------------------------------------------------------------------------------------------------------------
# HTML


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
    scenes[0]["states"].append(scenes[0]["states"][-1])
    found = Page(theatre.element(scenes))
    assert found.tags == ["vt-theatre"] and found.handlers == []
    told = json.loads(found.data[0])
    assert len(told["pictures"]) == 1 and told["pictures"][0].startswith("data:image/jpeg;base64,")  # shared by both
    for scene, shown in zip(scenes, told["scenes"], strict=True):
        for raster in shown["rasters"]:
            raster["picture"] = told["pictures"][raster["picture"]]
        assert shown["states"].count(None) == (1 if shown["stages"] else 0)  # what changes nothing is not said again
        for i, state in enumerate(shown["states"]):
            shown["states"][i] = shown["states"][i - 1] if state is None else state
        assert shown == scene
    assert told["scenes"][0]["title"] == EVIL


def test_page_is_self_contained():
    page = theatre.page([theatre.scene(hand(), [picture()], title=EVIL)], title=EVIL, facts=EVIL)
    found = Page(page)
    assert (
        set(found.tags) == {"html", "head", "meta", "title", "style", "body", "script", "h1", "vt-theatre", "footer"}
        and found.handlers == []
    )
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
    assert json.dumps([list(c) for c in heat.HEAT]) in script


# ----------------------------------------------------------------------------------------------------------------- in
# a browser


@pytest.fixture
def opened(chromium):
    """``opened(page) -> tab`` of an HTML page; an error in its script fails the test."""
    tab, errors = chromium.new_page(viewport={"width": 360, "height": 800}), []
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    tab.set_default_timeout(10_000)

    def go(page: str):
        tab.set_content(page)
        return tab

    yield go
    tab.close()
    assert errors == []


# Drags the slider through all its places; of each the site shown and every scene's tokens and caption.
WALK = """root => {
  const slider = root.querySelector(".vt-step");
  return Array.from({ length: Number(slider.max) + 1 }, (_, i) => {
    slider.value = i;
    slider.dispatchEvent(new Event("input"));
    return [root.dataset.site, [...root.querySelectorAll(".vt-scene")].map(s => [s.dataset.kept, s.querySelector(".vt-caption").textContent])];
  });
}"""  # noqa: E501
TOLD = """(root, patches) => patches.map(patch => {
  root.choose(patch);
  return [...root.querySelectorAll(".vt-told > div")].map(scene => [...scene.querySelectorAll("li")].map(line => line.textContent));
})"""  # noqa: E501


def test_what_the_browser_shows_is_what_the_report_says(opened, tiny):
    """Also inserted through innerHTML, as Gradio does; every step of every raster, and every patch's history."""
    model, inputs = tiny("llava-next", "clip-llama")
    reports = [run(model, inputs, "fastv", keep=0.4), run(model, inputs, "tome", keep=0.5, per="tile")]
    scenes = [theatre.scene(theatre.dense(reports[0])), *(theatre.scene(r, title=EVIL) for r in reports)]
    tab = opened(f"<!doctype html><html><head>{theatre.head()}</head><body><main></main></body></html>")
    tab.evaluate("text => { document.querySelector('main').innerHTML = text; }", theatre.element(scenes))
    assert tab.locator("script").count() == 1 and tab.locator("h2").first.inner_text().startswith(
        "it's </vt-theatre><script>"
    )
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    sites = sorted(
        {s["site"] for scene in scenes for s in scene["steps"]},
        key=lambda s: (("image", "vision", "llm").index(s.split(".")[0]), s),
    )
    root = tab.locator("vt-theatre")
    for raster, here in enumerate(scenes[0]["rasters"]):
        start, end = here["start"], here["start"] + here["rows"] * here["columns"]
        walked = root.evaluate(WALK)
        assert [site for site, _ in walked] == sites
        for number, (_, shown) in enumerate(walked):
            for scene, (kept, caption) in zip(scenes, shown, strict=True):
                at = max(i for i, s in enumerate(scene["steps"]) if sites.index(s["site"]) <= number)
                wanted = [t for t in theatre.present(scene, at) if start <= t < end]
                assert kept == ",".join(map(str, wanted)), (raster, number)
                assert (
                    f": {scene['steps'][at]['tokens']} of {scene['tokens']} tokens, {len(wanted)} of {end - start} here"
                    in caption
                )
        patches = [0, 7, end - start - 1]
        assert root.evaluate(TOLD, patches) == [
            [theatre.history(scene, start + patch) for scene in scenes] for patch in patches
        ]
        tab.locator(".vt-next").click()


@pytest.mark.ci
def test_keys_clicks_bars_and_play(opened):
    scene = theatre.scene(hand([0.5, NAN, 0.75, 0.25]), [Image.new("RGB", (64, 64), "white")], title="t")
    tab = opened(theatre.page([scene]))
    root, canvas = tab.locator("vt-theatre"), tab.locator("canvas")
    assert root.get_attribute("data-site") == "llm.1"  # the last cut that leaves something
    pixel = (
        "(node, [r, c]) => [...node.getContext('2d').getImageData(node.width * (2 * c + 1) / 4, node.height * (2 * r + "
        "1) / 4 + 20, 1, 1).data].slice(0, 3)"
    )
    assert canvas.evaluate(pixel, [0, 0]) != [255, 255, 255] == canvas.evaluate(pixel, [1, 0])
    tab.locator(".vt-heat").check()
    assert canvas.evaluate(pixel, [1, 0]) == pytest.approx([0.3 * 255 + 0.7 * c for c in heat.HEAT[-1]], abs=2)
    assert "llm.1 fastv" in tab.locator(".vt-note").inner_text()
    canvas.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
        tab.keyboard.press(key)
    assert tab.locator(".vt-details p").inner_text() == "Token 3: row 2, column 2 of image"
    assert tab.locator(".vt-details li").all_inner_texts() == theatre.history(scene, 3)
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 0.7, "y": box["height"] * 0.2})
    assert tab.locator(".vt-details p").inner_text().startswith("Token 1: row 1, column 2")
    tab.locator(".vt-bar").first.click()
    assert root.get_attribute("data-step") == "0" and tab.locator(".vt-scene").get_attribute("data-kept") == "0,1,2,3"
    assert tab.locator(".vt-bar[aria-current]").count() == 1 and tab.locator(".vt-marks .vt-cut").count() == 3
    tab.locator(".vt-play").click()
    tab.wait_for_function("document.querySelector('vt-theatre').dataset.step > 0")
    tab.locator(".vt-play").click()
    assert tab.locator(".vt-play").inner_text() == "Play"


def test_data_may_come_late_and_a_turned_page_forgets_the_patch(opened):
    report = Report([8], (), [[8]], 1, 1, 1, 1, grids=[[(2, 2), (2, 2)]])
    tab = opened(
        f"<!doctype html><html><head>{theatre.head()}</head><body><vt-theatre></vt-theatre>{theatre.element([theatre.scene(report)])}</body></html>"  # noqa: E501
    )
    first, second = tab.locator("vt-theatre").all()
    first.evaluate(
        "(node, data) => { node.remove(); document.body.append(node); node.dataset.scenes = data; }",
        second.get_attribute("data-scenes"),
    )
    assert tab.locator("canvas").count() == 2
    root = tab.locator("vt-theatre").last
    root.locator("canvas").click()
    assert root.locator(".vt-details p").inner_text().startswith("Token ")
    root.locator(".vt-next").click()
    assert (
        root.locator(".vt-details p").inner_text().startswith("Choose a patch")
        and root.locator(".vt-told").count() == 0
    )


def test_groups_have_the_outlines_of_the_still_pictures(opened):
    stage = StageReport("projector", "pool", [4], [2], [torch.tensor([0, 3])], [torch.tensor([0, 0, 1, 1])])
    tab = opened(
        theatre.page(
            [
                theatre.scene(
                    Report([4], (stage,), [[2]], 1, 1, 1, 1, grids=[[(2, 2)]]), [Image.new("RGB", (64, 64), "white")]
                )
            ]
        )
    )
    corner = (
        "(node, [x, y]) => [...node.getContext('2d').getImageData(x * (node.width - 1), y * (node.height - 1), 1, "
        "1).data].slice(0, 3)"
    )
    for bar, colors in ((0, [(255, 255, 255)] * 2), (1, [pictures.color(0), pictures.color(3)])):
        tab.locator(".vt-bar").nth(bar).click()
        for y, color in enumerate(colors):
            for x in (0, 1):
                assert tab.locator("canvas").evaluate(corner, [x, y]) == pytest.approx(color, abs=1)


@pytest.mark.ci
def test_heat_map_names_the_latest_ranking(opened):
    model, _, inputs = demo()
    scene = theatre.scene(run(model, inputs, "pyramiddrop", keep=0.125))
    tab = opened(theatre.page([scene]))
    tab.locator(".vt-heat").check()
    for number, step in enumerate(scene["steps"]):
        tab.locator(".vt-bar").nth(number).click()
        ranked = [s["site"] for s in scene["stages"][: step["state"]]]
        assert tab.locator(".vt-note").inner_text() == (
            f"coloured by rank in {ranked[-1]} pyramiddrop" if ranked else "nothing ranked so far"
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(chromium, scheme):
    tab = chromium.new_page(color_scheme=scheme)
    tab.set_content(theatre.page([theatre.scene(hand(), title="t")]))
    ink, paper = (
        tab.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}")
        for where, what in ((".vt-caption", "color"), ("body", "backgroundColor"))
    )
    light, dark = sorted((sum(map(int, re.findall(r"\d+", c)[:3])) for c in (ink, paper)), reverse=True)
    assert light > 600 and dark < 150 and (sum(map(int, re.findall(r"\d+", paper)[:3])) < 150) == (scheme == "dark")
    accent = tab.evaluate("getComputedStyle(document.querySelector('vt-theatre')).getPropertyValue('--vt-accent')")
    assert accent.strip() == {"light": "#2f6fd0", "dark": "#5b9bf5"}[scheme]
    tab.close()


@pytest.mark.ci
def test_a_video_has_a_slider_through_its_frames(opened):
    scenes = [theatre.scene(theatre.dense(moving()), film_views()), theatre.scene(moving(), film_views(), title="t")]
    tab = opened(theatre.page(scenes))
    root, time = tab.locator("vt-theatre"), tab.locator(".vt-time")
    assert tab.locator(".vt-rasters").is_visible() and tab.locator(".vt-rasters label").inner_text() == "Frame"
    assert time.get_attribute("max") == "3"
    tab.locator(".vt-bar").nth(1).click()  # the projector
    tab.locator(".vt-scene").nth(1).locator(".vt-bar").nth(1).click()
    pruned = tab.locator(".vt-scene").nth(1)
    assert root.get_attribute("data-site") == "projector"
    assert pruned.locator(".vt-frame").all_inner_texts() == ["4/4", "2/4", "0/4", "4/4"]
    assert pruned.locator(".vt-frame").nth(1).get_attribute("title") == "frame 2 of 3: 2 of 4 tokens"
    time.focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".vt-which").inner_text() == "frame 2 of 3" and pruned.get_attribute("data-kept") == "4,7"
    assert "2 of 4 here, 1 hatched: part of tokens in other frames" in pruned.locator(".vt-caption").inner_text()
    assert time.get_attribute("aria-valuetext").startswith("frame 2 of 3: ")
    assert tab.locator(".vt-frame[aria-current]").count() == 2
    canvas = pruned.locator(".vt-picture")
    canvas.focus()
    tab.keyboard.press("ArrowRight")  # token 5, part of frame 1
    assert tab.locator(".vt-where").inner_text().endswith("token 5: kept, part of token 0 (frame 1 of 3)")
    tab.keyboard.press("Enter")
    told = tab.locator(".vt-told > div").nth(1).locator("li").all_inner_texts()
    assert told == theatre.history(scenes[1], 5)
    # its whole group is marked in all frames
    marked = "node => { const d = node.getContext('2d').getImageData(0, 0, node.width, node.height).data; let n = 0; for (let i = 0; i < d.length; i += 4) n += d[i] === 255 && d[i + 1] === 225 && d[i + 2] === 77; return n; }"  # noqa: E501
    counts = [node.evaluate(marked) for node in pruned.locator(".vt-frame canvas").all()]
    assert counts[0] > 0 and counts[1] > 0 and counts[2] == counts[3] == 0
    tab.keyboard.press("PageDown")
    assert tab.locator(".vt-which").inner_text() == "frame 3 of 3" and tab.locator(".vt-told").count() == 0
    tab.keyboard.press("PageDown")
    tab.keyboard.press("PageDown")
    assert tab.locator(".vt-which").inner_text() == "frame 1 of 3"
    pruned.locator(".vt-frame").nth(2).click()
    assert time.input_value() == "2" and pruned.get_attribute("data-kept") == ""


def test_frames_are_dim_where_their_tokens_stand_elsewhere(opened):
    tab = opened(theatre.page([theatre.scene(moving(), film_views())]))
    tab.locator(".vt-bar").nth(1).click()
    tab.locator(".vt-next").click()
    pixel = (
        "(node, [r, c]) => [...node.getContext('2d').getImageData(node.width * (2 * c + 1) / 4 - 45, node.height * "
        "(2 * r + 1) / 4 - 45, 1, 1).data].slice(0, 3)"
    )
    kept, away = (tab.locator(".vt-picture").evaluate(pixel, [0, c]) for c in (0, 1))
    assert kept == [255, 255, 255] and away == pytest.approx([0.55 * c + 0.45 * 255 for c in pictures.SHADE], abs=2)
    small = (
        "node => [0, 1].map(c => node.getContext('2d').getImageData(node.width * (2 * c + 1) / 4, node.height / 4, 1, "
        "1).data[0])"
    )
    shown = tab.locator(".vt-frame canvas").nth(1).evaluate(small)
    assert shown[0] == 255 and shown[1] < 150


@pytest.mark.ci
def test_frames_play_and_stop(opened):
    tab = opened(theatre.page([theatre.scene(moving(), film_views())]))
    step = tab.locator("vt-theatre").get_attribute("data-step")
    tab.locator(".vt-reel").click()
    assert tab.locator(".vt-reel").inner_text() == "Pause"
    tab.wait_for_function("document.querySelector('.vt-time').value > 1")
    tab.locator(".vt-play").click()  # the layers play in its place
    assert tab.locator(".vt-reel").inner_text() == "Play frames" and tab.locator(".vt-play").inner_text() == "Pause"
    tab.locator(".vt-play").click()
    assert tab.locator("vt-theatre").get_attribute("data-step") is not None and step is not None
    still = tab.locator(".vt-time").input_value()
    tab.wait_for_timeout(900)
    assert tab.locator(".vt-time").input_value() == still


def test_pictures_that_are_no_video_have_no_strip(opened):
    tab = opened(theatre.page([theatre.scene(Report([8], (), [[8]], 1, 1, 1, 1, grids=[[(2, 2), (2, 2)]]))]))
    assert tab.locator(".vt-rasters label").inner_text() == "Picture" and tab.locator(".vt-frame").count() == 0
    assert not tab.locator(".vt-reel").is_visible() and not tab.locator(".vt-strip").is_visible()
    tab.locator(".vt-time").press("ArrowRight")
    assert tab.locator(".vt-which").inner_text() == "raster 2 of 2"
