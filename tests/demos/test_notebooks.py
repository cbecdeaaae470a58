"""The notebooks run from top to bottom, and what they show is what the library does now."""

from __future__ import annotations

import re

import nbformat
import pytest

pytest.importorskip("nbclient")
from notebooks import NOTEBOOKS, THEATRE, run, said


def rounded(texts: list[str]) -> list[str]:
    """Without scores, whose last digits differ between machines."""
    return [re.sub(r"score [-\d.e]+", "score", text) for text in texts]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2


QUICK = "tokens"  # the others are slow


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=pytest.mark.ci if p.stem == QUICK else pytest.mark.slow) for p in NOTEBOOKS],
)
def test_notebook(path, tmp_path):
    kept, fresh = nbformat.read(path, 4), run(path, tmp_path)
    assert rounded(said(fresh)) == rounded(said(kept)), "run `make notebooks` and look at what changed"
    shown = [[sorted(o.data) for o in cell.get("outputs", []) if o.output_type != "stream"] for cell in fresh.cells]
    assert shown == [
        [sorted(o.data) for o in cell.get("outputs", []) if o.output_type != "stream"] for cell in kept.cells
    ]
    assert sum(map(len, shown)) >= 2, "no pictures"


def test_one_plays_the_theatre():
    """:func:`notebooks.run` puts this text only where the page was."""
    assert any(
        THEATRE in o.get("data", {}).get("text/html", "")
        for p in NOTEBOOKS
        for c in nbformat.read(p, 4).cells
        for o in c.get("outputs", [])
    )
