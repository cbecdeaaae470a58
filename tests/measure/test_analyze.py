"""``vtprune analyze``: from which budget on a recipe pays, what it writes, and one line for every mistake."""

from __future__ import annotations

import json

import pytest
import torch
from vtprune.models.base import ADAPTERS

import vtprune
from fake import FakeProcessor, picture, tiny
from vtprune.cli import main, models
from vtprune.core.planning import bind
from vtprune.measure import analyze, break_even, generation, times_text, timing


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny models on a busy machine: two threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(timing, "timer", timing.timer)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vlm(monkeypatch):
    """The tiny model in place of the bundled one."""
    monkeypatch.setattr(models, "load", lambda args: tiny())


@pytest.fixture
def instant(monkeypatch):
    """Times made up: a budget's ratio is the budget, the noise three percent; ``drop-all`` is refused below one
    half."""
    calls = []

    def measure(model, inputs, recipe, *, new_tokens, repeats, seed, effective_tokens):
        calls.append((recipe.name, effective_tokens, len(inputs["input_ids"])))
        if recipe.name == "drop-all" and effective_tokens < 0.5:
            raise vtprune.VtpruneError("drop-all cannot reach it")
        return numbers(effective_tokens)

    monkeypatch.setattr(generation, "measure", measure)
    return calls


def numbers(ratio: float, noise: tuple[float, ...] = (0.97, 1.0, 1.03), scorer: float = 1.0) -> dict:
    """What a measurement gives, as far as the tables and verdicts read it: 100 ms dense."""
    one = {"median": ratio, "p20": ratio - 0.01, "p80": ratio + 0.01}
    ms = {"p20": 0.0, "p80": 0.0}
    out = {
        "tokens": 144.0,
        "effective_tokens": 50.0,
        "attention": "sdpa",
        "ratio": {"e2e": one, "ttft": one, "prefill": one, "decode": None},
    }
    out |= {
        "dense": {"ttft_ms": {"median": 100.0, **ms}},
        "pruned": {"ttft_ms": {"median": 100 * ratio, **ms}, "scorer_ms": {"median": scorer, **ms}},
    }
    return {**out, "dense_over_dense": list(noise)}


def entry(ratios: dict[float, float], **how) -> dict:
    """The break-even of made-up rows."""
    rows = [{"method": "flowcut", "budget": b, "batch": 8, "images": 1, **numbers(r, **how)} for b, r in ratios.items()]
    (found,) = break_even.break_even(rows)
    return found


# ------------------------------------------------------------------------------------------------------------
# break-even


@pytest.mark.parametrize(
    "ratios, below",
    [
        ({0.75: 0.9, 0.5: 0.8, 0.25: 0.7}, 0.75),  # everywhere: nothing is said about budgets above
        ({0.75: 1.1, 0.5: 0.9, 0.25: 0.7}, 0.575),  # 0.96 between 0.9 and 1.1
        ({0.75: 1.1, 0.5: 1.05, 0.25: 0.7}, pytest.approx(0.25 + 0.25 * 0.26 / 0.35)),
        ({0.75: 1.1, 0.5: 1.1, 0.25: 1.0}, None),
        ({0.75: 0.97, 0.5: 0.98, 0.25: 0.965}, None),  # inside the noise
        ({0.5: 0.96}, None),  # at its edge
        ({0.5: 0.95}, 0.5),
        ({0.75: 0.5, 0.5: 1.2, 0.25: 0.7}, pytest.approx(0.25 + 0.25 * 0.26 / 0.5)),  # a dip above is none of it
        ({0.75: 0.5, 0.5: 0.5, 0.25: 1.2}, None),  # not from there on
        ({}, None),
    ],
)
def test_from_which_budget_on(ratios, below):
    got = break_even.pays_below(list(ratios), list(ratios.values()), 0.96)
    assert got == (pytest.approx(below) if isinstance(below, float) else below)
    assert break_even.pays_below([*ratios][::-1], [*ratios.values()][::-1], 0.96) == got


def test_noise_reaches_to_the_wider_side():
    assert entry({0.5: 0.95})["pays_below"] == 0.5
    assert entry({0.5: 0.95}, noise=(0.9, 0.9, 1.0))["pays_below"] is None
    slow = entry({0.5: 0.95}, noise=(1.0, 1.1, 1.1))  # an always slower second turn is noise as well
    assert slow["pays_below"] is None and slow["noise"] == pytest.approx([1.04, 1.1])
    assert entry({0.5: 0.999}, noise=(1.0, 1.0, 1.0))["pays_below"] == 0.5


@pytest.mark.parametrize(
    "ratios, how, says",
    [
        ({0.75: 1.1, 0.5: 0.9, 0.25: 0.7}, {}, "pays below 59 % of the tokens (ttft 0.70x at 25 %, noise 3 %)"),
        (
            {0.5: 0.8, 0.25: 0.6},
            {},
            "pays at every measured budget, up to 50 % of the tokens (ttft 0.60x at 25 %, noise 3 %)",
        ),
        (
            {0.5: 0.99, 0.25: 0.99},
            {},
            "no gain beyond the noise at any measured budget (at best ttft 0.99x at 50 %, noise 3 %)",
        ),
        (
            {0.5: 1.3, 0.25: 1.2},
            {"scorer": 40},
            "does not pay at any measured budget: the scorer costs more than the layers save (at best ttft 1.20x at 25 "
            "%",
        ),
        ({0.5: 1.3, 0.25: 1.2}, {"scorer": 1}, "does not pay at any measured budget: fewer tokens save no time here"),
        (
            {0.5: 0.7, 0.25: 1.2},
            {},
            "pays at 50 % of the tokens, but not at the smallest measured budget: no break-even",
        ),
        ({0.75: 0.3, 0.5: 1.2, 0.25: 0.9}, {}, "pays below 31 % of the tokens (ttft 0.90x at 25 %"),
    ],
)
def test_verdicts(ratios, how, says):
    found = entry(ratios, **how)["verdict"]
    assert found.startswith("flowcut at batch 8, 144 tokens: " + says), found


def test_a_method_that_was_never_measured():
    (found,) = break_even.break_even(
        [{"method": "fastv", "budget": 0.1, "batch": 1, "images": 2, "error": "cannot reach"}]
    )
    assert found["pays_below"] is found["noise"] is found["tokens"] is None and found["budgets"] == []
    assert found["verdict"] == "fastv at batch 1, 2 images: not measured: cannot reach"


# -------------------------------------------------------------------------------------------------------- the command


def test_a_real_run(capsys, vlm, tmp_path):
    out = tmp_path / "t.json"
    words = [
        "analyze",
        "--recipes",
        "uniform",
        "--budgets",
        "0.5",
        "--batches",
        "2",
        "--new-tokens",
        "2",
        "--repeats",
        "3",
        "--cpu-time",
        "--out",
        str(out),
    ]
    assert main.main([*words, "--out", str(tmp_path / "t.md")]) == 0
    printed = capsys.readouterr().out
    told = json.loads(out.read_text())
    assert (
        told["type"] == "vtprune.Times"
        and told["version"] == 1
        and told["command"].startswith("vtprune analyze")
        and told["timer"] == "CPU"
    )
    assert (
        {"torch", "transformers"} <= set(told["versions"])
        and told["device"]["type"] == "cpu"
        and torch.get_num_threads() == 1
    )
    assert [
        (r["method"], r["budget"], r["batch"], r["images"], r["tokens"], r["effective_tokens"]) for r in told["rows"]
    ] == [("uniform", 0.5, 2, 1, 16, 8)]
    for row in told["rows"]:
        for side in ("dense", "pruned"):
            assert set(row[side]) == {*generation.PARTS, "peak_bytes", "kv_bytes"} and set(row[side]["e2e_ms"]) == {
                "median",
                "p20",
                "p80",
            }
        assert set(row["ratio"]) == {"e2e", "ttft", "prefill", "decode"} and len(row["dense_over_dense"]) == 3
    assert [set(e) for e in told["break_even"]] == [
        {"method", "batch", "images", "tokens", "budgets", "ratios", "noise", "pays_below", "verdict"}
    ]
    page = (tmp_path / "t.md").read_text()
    for e in told["break_even"]:
        assert e["verdict"] in printed and f"* {e['verdict']}" in page
    columns = {line.count(" | ") for line in page.splitlines() if line.startswith("| ")}
    assert (
        columns == {len(times_text.HEADS) - 1}
        and "CPU time" in page
        and "unfinished" not in page
        and "8.0 of 16" in printed
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.md"]


def test_defaults(capsys, vlm, instant, monkeypatch):
    """Every method at four budgets, alone and eight at a time."""
    monkeypatch.setenv("COLUMNS", "500")  # so that no note is wrapped
    assert main.main(["analyze"]) == 0
    assert instant == [(m, b, n) for n in (1, 8) for m in vtprune.methods() for b in (0.75, 0.5, 0.25, 0.11)]
    printed = capsys.readouterr().out
    assert (
        "not possible: drop-all cannot reach it" in printed
        and "fastv at batch 8, 144 tokens: pays at every measured budget, up to 75 %" in printed
    )


def test_a_refused_budget_is_a_row_with_the_reason(capsys, vlm, instant):
    assert (
        main.main(["analyze", "--recipes", "drop-all,tome", "--batches", "1", "--budgets", "0.5,0.25", "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert [r.get("error") for r in told["rows"]] == [None, "drop-all cannot reach it", None, None]
    assert [e["budgets"] for e in told["break_even"]] == [[0.5], [0.5, 0.25]]
    assert main.main(["analyze", "--recipes", "drop-all", "--batches", "1", "--budgets", "0.25"]) == 1
    assert "nothing could be measured" in capsys.readouterr().err


def test_what_was_measured_before_an_interruption_is_saved(capsys, vlm, instant, monkeypatch, tmp_path):
    stock, out = generation.measure, tmp_path / "t.json"

    def stop(*args, **kwargs):
        if len(instant) == 2:
            raise KeyboardInterrupt
        return stock(*args, **kwargs)

    monkeypatch.setattr(generation, "measure", stop)
    assert (
        main.main(
            [
                "analyze",
                "--recipes",
                "tome,fastv",
                "--budgets",
                "0.5",
                "--batches",
                "1,8",
                "--out",
                str(out),
                "--out",
                str(tmp_path / "t.md"),
            ]
        )
        == 130
    )
    assert "interrupted" in capsys.readouterr().err
    told = json.loads(out.read_text())
    assert [(r["method"], r["batch"]) for r in told["rows"]] == [("tome", 1), ("fastv", 1)] and len(
        told["break_even"]
    ) == 2
    page = (tmp_path / "t.md").read_text()
    assert "| fastv | 50% |" in page and "unfinished: 2 of 4 rows" in page


def test_out_of_memory_is_a_row(vlm, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation, "measure", full)
    found = analyze.times(*tiny(), ["uniform"], [0.5])
    assert found["rows"][0]["error"] == "out of memory"


class Several(FakeProcessor):
    """Takes several images in a prompt, as its template says; more than two are too many for it."""

    def apply_chat_template(self, messages, add_generation_prompt):
        *images, text = messages[0]["content"]
        return "<image> " * len(images) + text["text"]

    def __call__(self, images, text, **options):
        flat = images if not isinstance(images[0], list) else [i for row in images for i in row]
        if len(flat) > 2 * len(text):
            raise ValueError("too many\nimages")
        rows = [t.replace("<image> ", "") for t in text]
        out = super().__call__(flat, rows, **options)
        count = text[0].count("<image>")
        ids = out["input_ids"]
        # an image's places and a word behind it
        out["input_ids"] = torch.cat([ids[:, :1], *[ids[:, 1:18]] * (count - 1), ids[:, 1:]], 1)
        out["attention_mask"] = torch.ones_like(out["input_ids"])
        return out


def test_several_images_are_more_tokens(instant):
    model, _ = tiny()
    found = analyze.times(model, Several(), ["uniform"], [0.5], batches=[2], images=[1, 2, 3])
    assert (
        found["planned"] == 3
        and [r["images"] for r in found["rows"]] == [1, 2, 3]
        and [("error" in r) for r in found["rows"]] == [False, False, True]
    )
    assert found["rows"][2]["error"] == "Several does not take 3 images in one prompt: too many images"
    shown = analyze.prompts(Several(), picture, 2, 2, "what is it")
    assert shown["pixel_values"].shape[0] == 4 and int((shown["input_ids"] == 3).sum()) == 2 * 2 * 16
    # its template knows of no second image
    found = analyze.times(model, FakeProcessor(), ["uniform"], [0.5], images=[2])
    assert "error" in found["rows"][0] and found["break_even"][0]["method"] == "dense"


def test_two_images_on_the_bundled_model():
    model, processor = vtprune.load_demo_model()
    inputs = analyze.prompts(processor, picture, 2, 2, "what is it ?")
    assert [[len(p.columns) for p in parts] for parts in bind(model).parts(inputs["input_ids"], inputs)] == [
        [144, 144]
    ] * 2
    assert len(inputs["pixel_values"]) == 4 and bool(inputs["attention_mask"].all())


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--recipes", "unifrom"], 1, "did you mean"),
        (["--recipes", "uniform,uniform"], 1, "each once"),
        (["--recipes", ","], 2, "names nothing"),
        (["--budgets", "2"], 2, "budgets"),
        (["--batches", "0"], 2, "whole numbers"),
        (["--batches", "1,x"], 2, "whole numbers"),
        (["--images", ""], 2, "whole numbers"),
        (["--repeats", "2"], 1, "at least 3 rounds"),
        (["--new-tokens", "0"], 2, "at least 1"),
        (["--out", "no/such/place.json"], 1, "cannot write"),
        (["--image", "gone.png"], 1, "no such image"),
        (["--device", "cuda:99", "--cpu-time"], 1, "--device cpu"),
        (["--dtype", "int8"], 2, "invalid choice"),
    ],
)
def test_mistakes_take_one_line(capsys, vlm, words, code, says):
    assert main.main(["analyze", *words]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vtprune: error: ") and says in lines[0], lines


def test_help(capsys):
    assert main.main(["analyze", "--help"]) == 0
    assert "--batches" in capsys.readouterr().out
    with pytest.raises(vtprune.UnsupportedError, match="no language model"):
        analyze.times(ADAPTERS.get("hf-vit").tiny["clip"]()[0], None, ["uniform"], [0.5])
