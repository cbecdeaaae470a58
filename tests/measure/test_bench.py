"""Answers and measurements."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import vtprune
from choice import of_pictures
from fake import IMAGE, FakeProcessor, picture, tiny
from vtprune.inputs.chats import ask, prepare
from vtprune.inputs.images import open_image
from vtprune.measure import bench, standings, statistics, text
from vtprune.measure import run as run_module
from vtprune.measure import samples as samples_module
from vtprune.measure.samples import Sample


@pytest.fixture(scope="module")
def vlm():
    return tiny()


def samples(n: int = 5) -> list[Sample]:
    texts = ["what is it", "is it there now", "where", "how many of them are there", "what color"]
    return [Sample(picture(i), texts[i % 5], "w5", ("one", "two")[i % 2], source=f"set/{i // 2}") for i in range(n)]


# ---------------------------------------------------------------------------------------------------------------
# answers


def test_a_batch_answers_as_single_questions_do(vlm):
    part = samples()
    together = ask(*vlm, [s.picture() for s in part], [s.question for s in part])
    assert together == [ask(*vlm, [s.picture()], [s.question])[0] for s in part]
    assert len({*together}) > 1 and all(len(t.split()) <= 5 and t == t.strip() for t in together)


def test_prepare_says_what_is_wrong():
    processor = FakeProcessor()
    with pytest.raises(vtprune.VtpruneError, match="one question per image"):
        prepare(processor, [picture()], [])
    processor.chat_template = ""
    with pytest.raises(vtprune.VtpruneError, match="chat template"):
        prepare(processor, [picture()], ["a"])


def test_a_prompt_without_a_place_for_the_picture_is_refused():
    """Not every processor counts: with some releases such a prompt ends in the middle of the model."""
    processor = FakeProcessor()
    processor.image_token, processor.tokenizer = (
        "<image>",
        SimpleNamespace(convert_tokens_to_ids=["", "", "", "<image>"].index, unk_token_id=2),
    )
    assert len(prepare(processor, [picture()] * 2, ["a", "b c"])["input_ids"]) == 2

    class Forgets(FakeProcessor):
        def __call__(self, **given):
            inputs = super().__call__(**given)
            inputs["input_ids"][1][inputs["input_ids"][1] == IMAGE] = 5
            return inputs

    processor.__class__ = Forgets
    with pytest.raises(vtprune.VtpruneError, match="chat template of Forgets leaves no place for the image"):
        prepare(processor, [picture()] * 2, ["a", "b c"])


def bad_files(folder):
    good = folder / "good.png"
    picture(side=200).save(good)
    data = good.read_bytes()
    files = {
        "missing.png": (None, "no such"),
        "words.png": (b"only words", "not an image"),
        "empty.png": (b"", "not an image"),
        "cut.png": (data[:2000], "cannot read"),
        "damaged.png": (data[:60] + bytes(140) + data[200:], "cannot read"),
    }
    for name, (content, reason) in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
        yield folder / name, reason
    for side in (9000, 20000):
        Image.new("1", (side, side)).save(folder / f"{side}.png")
        yield folder / f"{side}.png", "megapixels"
    yield folder, "folder"


def test_open_image_refuses_in_one_line(tmp_path):
    for path, reason in bad_files(tmp_path):
        with pytest.raises(vtprune.VtpruneError, match=reason) as caught:
            open_image(path)
        assert "\n" not in str(caught.value)


def test_open_image_turns_and_converts(tmp_path):
    path = tmp_path / "turned.jpg"
    image = Image.new("L", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # stored lying on its side
    image.save(path, exif=exif)
    assert (open_image(path).size, open_image(path).mode) == ((20, 30), "RGB")


# ---------------------------------------------------------------------------------------------------------------
# samples


def test_easy_vqa_samples_are_balanced_and_stable():
    pytest.importorskip("easy_vqa")
    found = samples_module.easy_vqa_samples(60)
    assert found == samples_module.easy_vqa_samples(90)[:60]
    kinds = [s.ability for s in found]
    assert {k: kinds.count(k) for k in set(kinds)} == {"color": 20, "shape": 20, "yes/no": 20}
    assert sum(s.answer == "yes" for s in found) == 10


def test_scenes_samples_carry_boxes_and_their_scene():
    found = samples_module.scenes_samples(2)
    assert {s.source for s in found} == {"scenes/0", "scenes/1"} and {s.set for s in found} == {"scenes"}
    assert any(s.boxes for s in found) and found[0].picture().size == (168, 168)
    with pytest.raises(vtprune.VtpruneError):
        samples_module.scenes_samples(0)


def test_a_sample_belongs_to_its_picture():
    one, two = (Sample(picture(i), "q", "a", "x") for i in range(2))
    assert (
        one.source != two.source
        and one.source == Sample(picture(0), "other", "b", "y").source
        and one.set == "questions"
    )
    assert Sample("a.png", "q", "a", "x").source == "questions/a.png"


def test_exact_match_ignores_spaces_and_case():
    assert samples_module.matches("k X 7", "kx7") and not samples_module.matches("kx", "kx7")


# -------------------------------------------------------------------------------------------------------------
# measuring


def test_evaluate_dense_and_full_budget_agree(vlm):
    part = samples()
    dense = run_module.evaluate(*vlm, part, None, batch=2)
    full = run_module.evaluate(*vlm, part, "uniform", batch=2, keep=1.0)
    assert dense["answers"] == full["answers"] == ask(*vlm, [s.picture() for s in part], [s.question for s in part])
    assert (
        dense["flops"] == dense["dense_flops"] == full["flops"]
        and dense["kv_bytes"] == full["kv_bytes"] == full["dense_kv_bytes"]
    )
    assert dense["effective_tokens"] == 16 and dense["rows"] is None and dense["key"] == "dense"


def test_evaluate_counts_and_leaves_the_model_clean(vlm):
    seen = []
    out = run_module.evaluate(
        *vlm, samples(), "pyramiddrop", batch=2, keep=4, layers=[2], timing=1, progress=seen.append
    )
    assert seen == [2, 2, 1]
    assert out["effective_tokens"] == pytest.approx((2 * 16 + 4 * 4) / 6)
    assert out["flops"] < out["dense_flops"] and out["kv_bytes"] < out["dense_kv_bytes"]
    assert sum(out["rows"]) == 5 * 4 and len(out["rows"]) == 4
    assert (
        out["prefill_range"][0] == out["prefill_ratio"] == out["prefill_range"][1] and out["prefill_verdict"] == "noise"
    )  # one round tells nothing
    with pytest.raises(vtprune.VtpruneError):
        run_module.evaluate(*vlm, samples(), "pyramiddrop", keep=99)
    with pytest.raises(vtprune.VtpruneError):
        run_module.evaluate(*vlm, [], None)
    vtprune.attach(vlm[0], "random").remove()


def test_merged_groups_spread_over_the_rows_they_cover(vlm):
    rows = run_module.evaluate(*vlm, samples(), "pool", keep=4)["rows"]
    assert rows == [5, 5, 5, 5]


def test_random_draws_differ_between_seeds_and_batches(vlm):
    part = [samples()[0]] * 8
    rows = [run_module.evaluate(*vlm, part[:1], "random", keep=5, seed=s)["rows"] for s in range(6)]
    assert len({tuple(r) for r in rows}) > 1
    many = run_module.evaluate(*vlm, part, "random", keep=5, batch=1, seed=0)["rows"]
    assert many != [8 * v for v in rows[0]] and sum(many) == 40
    assert many == run_module.evaluate(*vlm, part, "random", keep=5, batch=1, seed=0)["rows"]


def test_bootstrap_contains_the_difference_and_respects_groups():
    a, b = [1.0, 1, 0, 1, 1, 0, 1, 1] * 10, [1.0, 0, 0, 1, 0, 0, 1, 1] * 10
    low, high = statistics.bootstrap(a, b)
    assert 0 < low < 0.25 < high and (low, high) == statistics.bootstrap(a, b)
    assert statistics.bootstrap(a, a) == (0, 0)
    alike = [str(i // 20) for i in range(80)]
    values = [float(i < 40) for i in range(80)]
    wide, narrow = statistics.interval(values, groups=alike), statistics.interval(values)
    assert wide[1] - wide[0] > narrow[1] - narrow[0]
    with pytest.raises(vtprune.VtpruneError, match="paired"):
        statistics.bootstrap([1], [])


def test_the_interval_of_an_average_weighs_abilities_alike():
    part = [Sample(picture(), "q", "a", "rare" if i % 10 == 0 else "common", source=f"s/{i}") for i in range(200)]
    correct = [float(s.ability == "common") for s in part]
    assert statistics.average_interval(correct, part) == (0.5, 0.5)  # the mean over questions is 0.9
    noisy = [float(i % 3 == 0) for i in range(200)]
    low, high = statistics.average_interval(noisy, part)
    assert low < statistics.score(noisy, part)["average"] < high and high - low > 0.15
    assert statistics.score(noisy, part)["average_interval"] == (low, high)


def test_table_has_every_row_and_says_what_is_impossible(vlm, tmp_path):
    names, seen = ["random", "pyramiddrop", "drop-all"], []
    own = vtprune.Recipe(name="mine", stages=(vtprune.Stage(method="uniform", keep=9),))
    kwargs = {
        "seeds": 3,
        "batch": 3,
        "timing": 1,
        "labels": {"random": "chance"},
        "fixed": [(own, "as it is")],
        "progress": seen.append,
    }
    out = bench.table(*vlm, samples(), names, [0.5, 0.05], command="test", **kwargs)
    assert [(r["method"], r["budget"]) for r in out["rows"]] == [
        ("dense", 1.0),
        *((n, b) for n in names for b in (0.5, 0.05)),
        ("mine", None),
    ]
    assert sum(seen) == 5 * bench.runs(names, [0.5, 0.05], 3, 1)
    by = {(r["method"], r["budget"]): r for r in out["rows"]}
    assert "cannot reach" in by["pyramiddrop", 0.05]["error"]
    assert by["random", 0.5]["effective_tokens"] == 8 and len(by["random", 0.5]["seed_accuracies"]) == 3
    assert by["mine", None]["effective_tokens"] == 9 and by["mine", None]["budget"] is None
    assert set(by["dense", 1.0]["abilities"]) == {"one", "two"}
    assert {"python", "torch", "transformers", "vtprune"} <= set(out["versions"]) and out["device"]["type"] == "cpu"
    text.save(out, tmp_path / "t.md")
    page = (tmp_path / "t.md").read_text()
    assert "not possible: pyramiddrop cannot reach" in page and "| mine | own | " in page and "layer 3" in page
    columns = {len(line.split(" | ")) for line in page.split("Per ability")[1].splitlines() if line.startswith("| ")}
    assert len(columns) == 1 and page.count("\n| random | ") == 3
    assert (
        list(text.kept_per_row(out)) == ["random 50%", "pyramiddrop 50%", "drop-all 50%"][: len(text.kept_per_row(out))]
    )
    text.save(out, tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["rows"][1]["recipe"]["type"] == "vtprune.Recipe"
    for wide in (True, False):
        cells = text.cells(out, abilities=wide)
        assert len({len(row) for row in cells}) == 1 and len(text.text(cells).splitlines()) == len(cells) + 1
    with pytest.raises(vtprune.VtpruneError, match="cannot write"):
        text.save(out, tmp_path / "no" / "t.json")
    with pytest.raises(vtprune.VtpruneError, match="budgets"):
        bench.table(*vlm, samples(), names, [2.0])


def test_the_docs_quote_the_committed_table():
    root = Path(__file__).resolve().parents[2]
    result = json.loads((root / "benchmarks/results/bench.json").read_text())
    text = (root / "docs" / "measured.md").read_text()
    assert standings.page(text, result) == text, "run python -m vtprune.measure.standings"
    known = {(r["method"], r["budget"]): r for r in result["rows"] if "error" not in r}
    lines = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == 8]
    quoted = {line.split("`")[1]: [cell.strip(" *") for cell in line.split("|")[-5:-1]] for line in lines}
    assert len(quoted) > 10 and {*quoted} == {*vtprune.methods()}
    apart = {method for method in quoted if not of_pictures(method)}
    assert all(quoted[method] == [""] * 4 for method in apart)
    for method, values in quoted.items():
        if method in apart:
            continue
        rows = [known.get((method, b)) for b in (0.75, 0.5, 0.25, 0.11)]
        assert values == [f"{100 * r['sets']['scenes']['accuracy']:.1f}" if r else "–" for r in rows], method
    for row in result["rows"]:  # what the runs hold
        if "error" not in row and row["budget"] is not None and row["method"] not in ("dense", "random"):
            run = json.loads((root / f"benchmarks/results/runs/{row['method']}-{row['budget']:g}-0.json").read_text())
            assert run["correct"] == [bool(c) for c in row["correct"]] and run["key"] == row["key"]


@pytest.mark.slow
def test_the_bundled_model_knows_the_questions_and_needs_the_image():
    """Seeing, it answers both sets; blind, it is no better than guessing (measured at size:
    models/demo_vlm/README.md)."""
    model, processor = vtprune.load_demo_model()
    easy, scenes = samples_module.easy_vqa_samples(24), samples_module.scenes_samples(6)
    out = run_module.evaluate(model, processor, [*easy, *scenes], None)
    assert sum(out["correct"][:24]) >= 22 and out["visual_tokens"] == 144
    assert sum(out["correct"][24:]) >= 0.9 * len(scenes)
    blind = run_module.evaluate(model, processor, scenes, "drop-all", layer=0)
    assert sum(blind["correct"]) <= 0.5 * len(scenes) and blind["effective_tokens"] == 0
