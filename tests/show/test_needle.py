"""The heat maps of benchmarks/needle.py, and its prompts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from vtprune.show.figures.needle import heat_maps
from vtprune.show.figures.style import encode

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def needle():
    spec = importlib.util.spec_from_file_location("needle", ROOT / "benchmarks" / "needle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Words:
    """A tokenizer of words with a chat template."""

    def apply_chat_template(self, chat, **how):
        assert how["add_generation_prompt"]
        return chat[0]["content"].split()


def test_needles_stand_where_they_are_said_to(needle):
    for kind, told in (("needle", "The code of"), ("keys", "The code of"), ("hop", "has the same code as")):
        places = []
        for depth in (0.0, 0.5, 1.0):
            words, answer = needle.prompt(Words(), kind, 400, depth, 3)
            text = " ".join(words)
            assert 400 <= len(words) < 440 and answer in text and text.rstrip().endswith("?")
            assert answer not in text.rpartition("What is")[2]
            places.append(text.index(told) / len(text))
        assert places == sorted(places) and places[0] < 0.2 and places[2] > 0.75
    a, b = (needle.prompt(Words(), "needle", n, 0.5, 1)[1] for n in (100, 400))
    assert a == b != needle.prompt(Words(), "needle", 100, 0.5, 2)[1]


def test_shares_and_intervals(needle):
    low, high = needle.wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert needle.wilson(0, 5)[0] == pytest.approx(0) and needle.wilson(5, 5)[1] == pytest.approx(1)


def test_a_table_and_a_figure(needle):
    rows = []
    for method in ("dense", "gemfilter"):
        for length in (256, 512):
            for depth in (0.0, 1.0):
                good = method == "dense" or depth == 1.0
                row = {"method": method, "kind": "needle", "length": length, "depth": depth, "good": good}
                rows.append({**row, "effective": 0.5, "flops": 0.6, "kv": 0.5, "time": 0.7})
    rows.append({"method": "flowcut", "kind": "needle", "length": 256, "depth": 0.0, "error": "no images"})
    result = {"command": "c", "environment": {"device": {"name": "x"}}, "rows": rows}
    lines = needle.table(result).splitlines()
    assert lines[4] == "| dense | 100 [51, 100] | 1 | 1 | 1 | 1 |"
    assert lines[5] == "| `gemfilter` | 50 [15, 85] | 0.500 | 0.600 | 0.500 | 0.70 |"
    assert lines[6] == "| `flowcut` | no images |"
    figure = heat_maps(rows)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["dense", "gemfilter"]
    assert [t.get_text() for t in figure.axes[1].texts] == ["0", "0", "100", "100"]
    assert all(ax.get_ylim() == (2, 0) for ax in figure.axes), "depth 0 is above"
    assert encode(figure, "png")[:4] == b"\x89PNG"
