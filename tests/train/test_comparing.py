"""Comparisons: intervals of what was asked, and several seeds in one table."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from trained import PARTS, QUIET, made

from vtprune.cli import main
from vtprune.core.types import VtpruneError
from vtprune.train import compare, questions
from vtprune.train.base import TRAININGS


@pytest.fixture(scope="module")
def table():
    """Sixteen questions about eight images, half of which the unpruned model answers."""
    model, data = made()
    rows = [replace(r, kind=kind) for r in data.rows for kind in ("existence", "own")]
    with torch.no_grad():
        logits = model(**data.batch(data.rows, torch.device("cpu"))).logits
    said = [logits[r.image, len(r.ids) - 1].argmax().item() for r in rows]
    rows = [replace(r, answer=[a if r.image % 2 or r.kind == "own" else 63]) for r, a in zip(rows, said, strict=True)]
    data = questions.Questions(data.images, data.projected, rows)
    return compare.compare(model, data, TRAININGS.get("mindskip"), PARTS["mindskip"], **QUIET), data, model


def test_intervals_are_bootstraps_over_images(table):
    """By hand: images drawn with their questions, kinds averaged."""
    found, data, model = table
    first, second = found["rows"][:2]
    assert first["mean"] == 0.75 and first["difference"] == 0 and first["difference_interval"] == (0.0, 0.0)
    hits = {
        name: np.array(compare.evaluate(model, data, recipe, **options)["hits"], float)
        for name, recipe, options in (
            ("whole", None, {}),
            ("random", "mindskip", {**PARTS["mindskip"], "init": "random"}),
        )
    }
    assert second["difference"] == pytest.approx(hits["random"].mean() - 0.75)
    for row, values, key in (
        (first, hits["whole"], "interval"),
        (second, hits["random"], "interval"),
        (second, hits["random"] - hits["whole"], "difference_interval"),
    ):
        by_image = values.reshape(8, 2)
        rng = np.random.RandomState(0)
        means = [by_image[rng.randint(8, size=8)].mean(0).mean() for _ in range(2000)]
        assert row[key] == pytest.approx(tuple(np.percentile(means, (2.5, 97.5)))), key
    low, high = first["interval"]
    assert low < 0.75 < high
    text = compare.markdown(found)
    assert "| unpruned |" in text and f"75.0 [{100 * low:.1f}, {100 * high:.1f}]" in text
    json.dumps(found)


def seed(folder, name, table, change=lambda t: None):
    other = json.loads(json.dumps(table))
    change(other)
    (folder / name).write_text(json.dumps(other))
    return folder / name


def test_seeds_are_joined(table, tmp_path, capsys):
    found = table[0]

    def better(t):
        t["rows"][1].update(mean=0.5, difference=-0.25, flops=0.8)

    def worse(t):
        t["rows"][1].update(mean=0.25, difference=-0.5, flops=0.6)

    paths = [seed(tmp_path, "a.compare.json", found, better), seed(tmp_path, "b.compare.json", found, worse)]
    out = compare.joined(paths)
    assert out["seeds"] == 2 and [row["name"] for row in out["rows"]] == [row["name"] for row in found["rows"]]
    assert out["rows"][1]["mean"] == {"mean": 0.375, "least": 0.25, "most": 0.5}
    assert out["rows"][1]["difference"] == {"mean": -0.375, "least": -0.5, "most": -0.25}
    assert out["rows"][1]["flops"]["mean"] == pytest.approx(0.7)
    target = tmp_path / "joined.json"
    assert main.main(["train", "table", *map(str, paths), "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "mean of 2 seeds" in printed and "37.5 [25.0, 50.0]" in printed and "-37.5 [-50.0, -25.0]" in printed
    assert json.loads(target.read_text()) == json.loads(json.dumps(out))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t["options"].update(layers=[1]), "no other seed of .*: its options differ"),
        (lambda t: t["questions"].update(own=9), "its questions differ"),
        (lambda t: t["rows"].pop(), "compares something else"),
        (lambda t: t.pop("rows"), "no comparison of this release"),
        (lambda t: t["rows"][0].pop("difference"), "no comparison of this release"),
        (lambda t: t.pop("noun"), "no comparison of this release"),
    ],
)
def test_what_is_no_other_seed(table, tmp_path, change, says):
    paths = [seed(tmp_path, "a.compare.json", table[0]), seed(tmp_path, "b.compare.json", table[0], change)]
    with pytest.raises(VtpruneError, match=says):
        compare.joined(paths)


def test_one_comparison_is_no_table(table, tmp_path, capsys):
    one = seed(tmp_path, "a.compare.json", table[0])
    for paths in ([one], [one, one]):
        with pytest.raises(VtpruneError, match="two or more comparisons"):
            compare.joined(paths)
    with pytest.raises(VtpruneError, match="cannot read"):
        compare.joined([one, tmp_path / "none.compare.json"])
    (tmp_path / "odd.json").write_text("[")
    with pytest.raises(VtpruneError, match="is not a result"):
        compare.joined([one, tmp_path / "odd.json"])
