"""What the demo draws and writes: figures, cards, pictures, recipe files and programs that repeat a run."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vtprune.demos import TRAINED, cards, drawings, metrics, repeat
from vtprune.demos.engine import Engine
from vtprune.demos.results import Entry, Result, Rounds
from vtprune.demos.samples import number, samples, saved
from vtprune.demos.sides import Side

import vtprune
from fake import picture
from vtprune import Stage
from vtprune.cli import main
from vtprune.core.report import Report, StageReport
from vtprune.inputs import chats, images

EVIL = '<script>alert(1)</script> & "quoted"\n\'\'\' """ \\ {0} #'


def result(name="some", kept=(0, 5, 9, 15), answer="red", **changes) -> Result:
    """A result without a model: 16 tokens on a 4 x 4 grid, cut to ``kept`` in the third of four layers."""
    stages = (
        ()
        if kept is None
        else (StageReport("llm.2", "fastv", [16], [len(kept)], [torch.tensor(kept, dtype=torch.long)]),)
    )
    left = 16 if kept is None else len(kept)
    report = Report(
        [16],
        stages,
        [[16, 16, left, left]],
        int(2e9) * (8 + left // 2) // 16,
        int(2e9),
        512 * (8 + left // 2),
        8192,
        grids=[[(4, 4)]],
    )
    recipe = None if kept is None else vtprune.Recipe(name=name, stages=(Stage(method="fastv", keep=left),))
    facts = {"new_tokens": 3, "ttft_ms": 100.0, "prefill_ms": 80.0, "token_ms": 10.0, "total_ms": 120.0}
    made = Result(
        Side(recipe),
        name,
        "what is it ?",
        answer,
        False,
        report,
        recipe,
        (Image.new("RGB", (32, 32), "white"),),
        0,
        **facts,
    )
    return replace(made, **changes)


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def named(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


# ---------------------------------------------------------------------------------------------------------------
# figures


def test_layers_are_told_in_runs():
    assert (
        metrics.layers_text([144, 144, 144, 72, 36, 36, 144]) == "144 x 3, 72 x 1, 36 x 2, 144 x 1"
        and metrics.layers_text([7]) == "7 x 1"
    )


def cards_page(entries) -> str:
    return cards.cards_html([cards.card(e) for e in entries])


def test_rows_hold_both_sides_and_their_difference():
    a, b = result("dense", None), result(ttft_ms=60.0, prefill_ms=40.0, token_ms=None)
    rows = [(r.first, r.second, r.difference, r.ratio) for r in metrics.metrics(a, b)]
    assert rows == [
        ("100.0", "60.0", "", ""),
        ("80.0", "40.0", "", ""),
        ("16 x 4", "16 x 2, 4 x 2", "", ""),
        ("16.0", "10.0", "-6.0", "x 0.62"),
        ("2.000", "1.250", "-0.750", "x 0.62"),
        ("8.0", "5.0", "-3.0", "x 0.62"),
    ]
    timed = metrics.metrics(a, b, Rounds(((50, 30), (40, 20), (60, 30)), ((70, 40), (60, 39), (80, 40))))
    assert [(r.first, r.second, r.difference, r.ratio) for r in timed[:2]] == [
        ("70.0", "40.0", "-30.0", "x 0.57 (0.50 to 0.65)"),
        ("60.0", "30.0", "-30.0", "x 0.50 (0.50 to 0.60)"),
    ]
    assert "median of 3 in turns" in timed[0].name and all("one run each" in r.name for r in metrics.metrics(a, b)[:2])
    assert [(r.name, r.first) for r in metrics.metrics(a, a)[2:3]] == [
        ("later tokens, median ms, one run each", "10.0")
    ]
    assert metrics.figures_of(b)["effective_tokens"] == 10 and metrics.figures_of(b)["layer_tokens"] == [16, 16, 4, 4]


def test_the_headline_tells_what_is_gained_or_lost():
    a, b = result("dense", None), result(kept=(3,), answer="blue")

    def told(first, second, *pairs):
        return metrics.headline(first, second, Rounds(pairs, pairs))

    sooner, noise = [(100, 50 + i) for i in range(6)], [(100, 50), *[(100, 150)] * 5]
    assert told(a, b, *sooner) == "5 of 10 visual tokens gone, another answer, first token 1.9× sooner."
    assert told(b, a, *[(y, x) for x, y in sooner]).endswith("first token 1.9× later.")
    assert told(b, a, *sooner).startswith("1.9× the visual tokens, ")
    assert told(a, a, *noise) == "as many visual tokens, same answer, first token as soon, within noise."
    assert told(a, a, *sooner[:5]).endswith("too few rounds (5) to compare times.")
    rare = replace(b, report=replace(b.report, layer_tokens=[[16, 16, 16, 15]]), note="no such size")
    assert told(a, rare, *sooner).startswith("1.56 % of the visual tokens gone, ")
    assert told(replace(a, note="no such size"), a, *noise).endswith(". Patches are drawn on grey: no such size.")


def test_long_answers_are_folded_and_marked():
    assert "<details>" not in cards.answer_html("A", "red", True) and "✓ right" in cards.answer_html("A", "red", True)
    page = Page(cards.answer_html(EVIL, "word " * 60 + EVIL, False))
    assert page.named("details") and not page.named("script")
    shown = "".join(page.text)
    assert "✗ wrong" in shown and shown.count("alert(1)") == 2, "all of it is there"


def test_a_ratio_is_told_with_what_it_is_worth():
    """No bare number where noise explains it, or where it runs against the FLOPs; as a busy machine gives them."""
    a, b = result("dense", None), result()

    def told(*pairs, sides=(a, b)):
        return next(
            (r.difference, r.ratio)
            for r in metrics.metrics(*sides, Rounds(pairs, pairs))
            if r.name.startswith("prefill, ms")
        )

    assert b.report.flops < a.report.flops
    assert told((30, 60), (40, 73), (90, 80), (30, 55)) == ("", "x 1.83 (0.89 to 2.00): within noise")
    assert told((30, 54), (30, 55), (30, 56)) == (
        "+25.0",
        "x 1.83 (1.80 to 1.87): against the FLOPs, so overhead decides here",
    )
    assert told((54, 30), (55, 30), (56, 30), sides=(b, a))[1].endswith("against the FLOPs, so overhead decides here")
    assert told((30, 54), (30, 55), (30, 56), sides=(b, a)) == ("+25.0", "x 1.83 (1.80 to 1.87)")
    assert told((30, 30), (30, 10), (30, 20)) == ("", "x 0.67 (0.33 to 1.00): within noise")
    assert told((30, 55)) == ("", "too few rounds (1) to compare") and told((30, 55), (30, 55)) == (
        "",
        "too few rounds (2) to compare",
    )


def test_the_table_has_heads_and_no_foreign_markup():
    rows = [*metrics.metrics(result(), result()), metrics.Row(EVIL, EVIL, "1", "", "")]
    page = Page(metrics.metrics_html(rows, EVIL, "b"))
    scopes = [th["scope"] for th in page.named("th")]
    assert (
        scopes == ["col"] * 5 + ["row"] * len(rows)
        and len(page.named("td")) == 4 * len(rows)
        and not page.named("script")
    )
    assert "".join(page.text).count("alert(1)") == 3 and metrics.EFFECTIVE in "".join(page.text)
    css = "".join(page.text)
    assert all(name in css for name in ("--body-text-color,", "--border-color-primary,", "max-width"))


# -----------------------------------------------------------------------------------------------------------------
# cards


def entries() -> list[Entry]:
    return [
        Entry("dense", result("dense", None), True, 80.0),
        Entry("fastv <b>", result(answer=EVIL), False, 40.0),
        Entry("tome", result(), None, 40.0, note="at its own budget"),
        Entry("pool", note="cannot reach 3 <effective> tokens " * 20),
    ]


def test_cards_tell_right_and_wrong_without_colour():
    page = Page(cards_page(entries()))
    text = " ".join(page.text)
    assert (
        len(page.named("li")) == 4
        and len(page.named("img")) == 3
        and not page.named("script")
        and not page.named("b")
        and not page.named("effective")
    )
    assert "✓ right" in text and "✗ wrong" in text and len(page.named("strong")) == 2
    assert all(i["alt"] and i["src"].startswith("data:image/png;base64,") for i in page.named("img"))
    assert page.named("img")[1]["alt"] == "visual tokens that fastv <b> kept: 10.0 of 16 tokens"
    assert "not run" in text and "cannot reach 3 <effective> tokens" in text and "at its own budget" in text


def test_a_card_shows_the_tokens_that_were_left():
    cut = result()
    stages = (
        *cut.report.stages,
        StageReport("llm.3", "fastv", [4], [4], cut.report.stages[0].kept),
    )  # a last stage that changes nothing
    for report in (cut.report, replace(cut.report, stages=stages)):
        small = (
            np.asarray(cards.thumb(replace(cut, report=report), 80)).reshape(4, 20, 4, 20, 3).mean((1, 3, 4)).ravel()
        )
        assert [i for i in range(16) if small[i] > 200] == [0, 5, 9, 15] and small.min() < 120
    assert np.asarray(cards.thumb(result("dense", None))).min() == 255
    two = replace(
        cut,
        views=(Image.new("RGB", (8, 8), "black"), cut.views[0]),
        overview=1,
        report=replace(cut.report, visual_tokens=[32], grids=[[(4, 4)] * 2]),
    )
    assert np.asarray(cards.thumb(two)).max() < 120  # the second raster, of which nothing is left


def test_pictures_to_keep():
    few, many = drawings.sheet(entries(), EVIL), drawings.sheet(entries() * 3, "word " * 500, truth="red")
    assert (
        few.width == many.width and many.height > 2.5 * (few.height - 100) and few.getpixel((0, 0)) == (255, 255, 255)
    )
    refused = drawings.sheet([entries()[3]], "what is it ?")
    assert len(refused.getcolors(10**6)) > 2
    one, two = (
        drawings.picture("what is it ?", result()),
        drawings.picture(EVIL + "x" * 3000, result("dense", None), result(answer="word " * 300, stopped=True)),
    )
    assert one.width == two.width and two.height > 1.8 * one.height
    assert (
        np.asarray(drawings.picture("q", result(answer="a"))).tolist()
        != np.asarray(drawings.picture("q", result(answer="b"))).tolist()
    )
    for draw in (lambda: drawings.sheet([], "a"), lambda: drawings.picture("a")):
        with pytest.raises(vtprune.VtpruneError):
            draw()


# -------------------------------------------------------------------------------------------------------------
# repeating


@pytest.fixture(scope="module")
def engine():
    made = Engine(*vtprune.load_demo_model())
    yield made
    made.close()


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """``(file name, question)``, the file in the current folder."""
    sample = samples(9)[8]
    sample.image.resize((2100, 900)).save(tmp_path / 'a "scene".png')
    monkeypatch.chdir(tmp_path)
    return 'a "scene".png', sample.question


def answered(engine, side, asked) -> Result:
    *_, turn = engine.stream(side, asked[0], asked[1])
    assert turn.result.answer
    return turn.result


STAGES = (Stage(method="flowcut", keep=0.5), Stage(method="fastv", keep=20, options={"layer": 3}))
MINE = vtprune.Recipe(name=EVIL.replace("\n", " "), stages=STAGES, source=EVIL)
SIDES = [
    Side("pyramiddrop", "effective", 0.3),
    Side("tome", "keep", 0.25),
    Side("flowcut", "keep", 0.1, {"window": 2})
    if "window" in vtprune.describe("flowcut").options
    else Side("flowcut", "keep", 0.1),
    Side("random", "keep", 0.2, {"positions": "compact"}, seed=11),
    Side(TRAINED),
    Side(MINE, "effective", 0.2),
    Side(),
]


def test_a_program_repeats_what_is_on_screen(engine, asked, monkeypatch, capsys):
    # loading it again would change nothing
    monkeypatch.setattr(vtprune, "load_demo_model", lambda device: (engine.model, engine.processor))
    there = {"__name__": "snippet"}
    exec(compile(repeat.snippet(SIDES, asked[1], None, asked[0], trained=engine.trained), "snippet", "exec"), there)
    for side, (said, report) in zip(SIDES, there["results"], strict=True):
        on_screen = answered(engine, side, asked)
        assert (said, report.to_dict()) == (on_screen.answer, on_screen.report.to_dict()), side
    assert len({r.flops for _, r in there["results"]}) == len(SIDES) and capsys.readouterr().out.count(
        "effective tokens"
    ) == len(SIDES)


def test_the_program_of_a_sample_needs_no_file(engine, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    path, question, _ = saved(2, tmp_path / "there")[1]
    assert number(Path(path)) == 2 and number(Path(path).rename(tmp_path / "mine.png")) is None
    Image.new("RGB", (168, 168)).save(path)
    assert number(Path(path)) is None, "another picture of that name"
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(vtprune, "load_demo_model", lambda device: (engine.model, engine.processor))
    there = {"__name__": "snippet"}
    code = repeat.snippet([Side(), Side("flowcut")], question, None, "sample-2.png", sample=2)
    exec(compile(code, "snippet", "exec"), there)
    shown = [answered(engine, side, (tmp_path / "mine.png", question)).answer for side in (Side(), Side("flowcut"))]
    assert [said for said, _ in there["results"]] == shown


def test_a_program_for_a_folder_and_a_recipe_file(engine, asked, tmp_path):
    MINE.save(tmp_path / "mine.json")
    code = repeat.snippet([Side("mine.json", "keep", 0.1)], EVIL, engine.model.name_or_path, asked[0], max_new_tokens=2)
    there = {"__name__": "snippet"}
    exec(compile(code, "snippet", "exec"), there)
    ((said, report),) = there["results"]
    *_, turn = engine.stream(Side("mine.json", "keep", 0.1), asked[0], EVIL, max_new_tokens=2)
    assert there["question"] == EVIL and (said, report.flops) == (turn.result.answer, turn.result.report.flops)
    with pytest.raises(vtprune.VtpruneError, match="bundled"):
        repeat.snippet([Side(TRAINED)], "a", "some/model", "a.png")


@pytest.mark.ci
def test_a_recipe_file_repeats_what_ran(engine, asked, tmp_path, capsys):
    image = images.open_image(asked[0])
    image.thumbnail((2048, 2048))
    inputs = chats.prepare(engine.processor, [image], [asked[1]])
    for side in SIDES[:-1]:
        ran = answered(engine, side, asked)
        path = tmp_path / "saved.json"
        path.write_text(repeat.recipe_json(ran))
        extra = {k: v for k, v in side.options.items() if k == "positions"}
        loaded = vtprune.Recipe.load(path)
        assert loaded.key() == ran.recipe.key() and ("--seed 11" in loaded.source) == (side.seed == 11)
        with vtprune.attach(engine.model, path, seed=side.seed, **extra) as handle:
            assert (
                chats.generate(engine.model, engine.processor, inputs, 32)[0] == ran.answer
                and handle.report().to_dict() == ran.report.to_dict()
            )
    picture().save(tmp_path / "small.png")
    path.write_text(repeat.recipe_json(answered(engine, SIDES[0], ("small.png", asked[1]))))
    assert main.main(["run", "--image", "small.png", "--question", asked[1], "--recipe", str(path), "--json"]) == 0
    told, ran = json.loads(capsys.readouterr().out), answered(engine, SIDES[0], ("small.png", asked[1]))
    assert told["pruned"] == ran.answer and told["flops"] == ran.report.flops
    with pytest.raises(vtprune.VtpruneError, match="dense"):
        repeat.recipe_json(answered(engine, Side(), asked))
