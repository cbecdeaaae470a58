"""Pictures and pages."""

from __future__ import annotations

import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from fake import FakeProcessor, picture
from vtprune.core.report import Report, StageReport
from vtprune.show import heat, pictures, row_bias, token_states, views, web

GRID = (4, 4)


def report(*stages: StageReport) -> Report:
    return Report([16], stages, [[16]], 1, 1, 1, 1, grids=[[GRID]])


def drop(kept: list[int], before: int = 16) -> StageReport:
    return StageReport("llm.2", "some", [before], [len(kept)], [torch.tensor(kept, dtype=torch.long)])


def merge(kept: list[int], slots: list[int]) -> StageReport:
    return StageReport("vision.1", "other", [16], [len(kept)], [torch.tensor(kept)], [torch.tensor(slots)])


def test_owners_follow_merges_drops_and_returns():
    slots = [0, 0, 1, 1, *[2] * 4, *[-1] * 8]
    first, second, third = token_states.owners(report(merge([0, 2, 5], slots), drop([2, 5], 3), drop([2, 5, 9], 2)), 0)
    assert first.tolist() == [0, 0, 2, 2, 5, 5, 5, 5, *[-1] * 8]
    assert second.tolist() == [-1, -1, 2, 2, 5, 5, 5, 5, *[-1] * 8]
    assert third.tolist() == [-1, -1, 2, 2, 5, 5, 5, 5, -1, 9, *[-1] * 6]
    out, back = token_states.owners(report(drop([]), drop(list(range(16)), 0)), 0)
    assert (out == -1).all() and back.tolist() == list(range(16))


def test_owners_of_the_second_image_of_a_sample():
    stage = StageReport("llm.1", "some", [32], [3], [torch.tensor([1, 16, 31])])
    (second,) = token_states.owners(Report([32], (stage,), [[32]], 1, 1, 1, 1, grids=[[GRID, GRID]]), 0, number=1)
    assert [i for i in range(16) if second[i] >= 0] == [0, 15]


def test_dropped_patches_are_dim_and_kept_ones_are_not():
    white = Image.new("RGB", (40, 40), "white")
    out = np.asarray(pictures.token_picture(white, report(drop([0, 5])), 0, panel=80, boxes=[(2, 2, 9, 9)]))
    panel = out[pictures.GAP + pictures.TITLE :, pictures.GAP * 2 + 80 :][:80, :80]
    means = panel.reshape(4, 20, 4, 20, 3).mean((1, 3, 4))
    assert (means.ravel()[[0, 5]] > 240).all() and (np.delete(means.ravel(), [0, 5]) < 120).all()


def test_groups_get_their_own_colour():
    out = pictures.token_picture(picture(), report(merge([0, 15], [0] * 8 + [1] * 8)), 0, panel=80)
    seen = {tuple(p) for p in np.asarray(out).reshape(-1, 3)}
    assert pictures.color(0) in seen and pictures.color(15) in seen and pictures.color(0) != pictures.color(15)


def test_many_stages_are_thinned_but_the_last_stays():
    stages = [drop(list(range(16 - i)), 17 - i) for i in range(1, 10)]
    out = pictures.token_picture(picture(), report(*stages), 0, panel=40, limit=3)
    assert out.width == 4 * (40 + pictures.GAP) + pictures.GAP
    with pytest.raises(vtprune.VtpruneError, match="no sample 1"):
        pictures.token_picture(picture(), report(*stages), 1)


def test_model_view_undoes_the_normalisation():
    flat = Image.new("RGB", (50, 70), (200, 30, 90))
    view = views.model_view(FakeProcessor(), flat)
    assert view.size == (32, 32) and view.getpixel((5, 5)) == (200, 30, 90)


NAN = float("nan")


def scored(kept: list[int], scores: list[float], units: list[int]) -> StageReport:
    return StageReport(
        "llm.2",
        "some",
        [16],
        [len(kept)],
        [torch.tensor(kept)],
        None,
        [torch.tensor(scores, dtype=torch.float64)],
        [torch.tensor(units)],
    )


def test_ranks_start_at_one_in_every_unit_and_ties_go_to_the_lower_index():
    rank, ranked = token_states.ranks(scored([0], [3, 1, NAN, 3, 2, 9], [0, 0, -1, 0, 1, 1]), 0)
    assert rank.tolist() == [1, 3, 0, 2, 2, 1] and ranked.tolist() == [3, 3, 0, 3, 2, 2]
    assert token_states.ranks(drop([0]), 0) is None


def test_heat_runs_from_dark_blue_to_yellow():
    stages = scored([0, 1], [16.0 - i for i in range(15)] + [NAN], [0] * 15 + [-1]), drop([0], 2)
    grey = Image.new("RGB", (40, 40), (128, 128, 128))
    out = np.asarray(pictures.token_picture(grey, report(*stages), 0, panel=80, heat=True), float)
    for x, gone in ((100, [False, False]), (190, [False, True])):  # the second panel keeps the colours of the first
        cells = (
            out[pictures.GAP + pictures.TITLE :, x:][:80, :80]
            .reshape(4, 20, 4, 20, 3)[:, 8:12, :, 8:12]
            .mean((1, 3))
            .reshape(16, 3)
        )
        best, next_, worst, unranked = cells[0], cells[1], cells[14], cells[15]
        assert best == pytest.approx(0.3 * 128 + 0.7 * np.array(heat.HEAT[-1]), abs=1)
        assert worst == pytest.approx(0.55 * (0.3 * 128 + 0.7 * np.array(heat.HEAT[0])), abs=1)
        assert (next_.sum() < best.sum() * 0.7) == gone[1] and np.ptp(unranked) < 15
    with pytest.raises(vtprune.VtpruneError, match="no stage of this report ranks"):
        pictures.token_picture(grey, report(drop([1])), 0, heat=True)


def test_heat_is_that_of_the_latest_ranking():
    rising, falling = [float(i) for i in range(16)], [16.0 - i for i in range(16)]
    made = report(scored(list(range(16)), rising, [0] * 16), scored(list(range(8)), falling, [0] * 16), drop([0, 1], 8))
    grey = Image.new("RGB", (40, 40), (128, 128, 128))
    out = np.asarray(pictures.token_picture(grey, made, 0, panel=80, heat=True), float)
    yellow = 0.3 * 128 + 0.7 * np.array(heat.HEAT[-1])
    for x in (100, 190):  # the first ranking changed nothing and has no panel
        assert out[pictures.GAP + pictures.TITLE + 10, x + 10] == pytest.approx(yellow, abs=1)
    single = np.asarray(pictures.token_picture(grey, report(*made.stages[:1]), 0, panel=80, heat=True), float)
    assert single[pictures.GAP + pictures.TITLE + 70, 170] == pytest.approx(yellow, abs=1)


def test_a_group_that_reaches_into_another_raster():
    """Its patches there are outlined in its colour; the dot stands in the first raster."""
    slots = [0] * 16 + [0] * 2 + list(range(1, 15))
    stage = StageReport("projector", "pool", [32], [15], [torch.tensor([0, *range(18, 32)])], [torch.tensor(slots)])
    made = Report([32], (stage, drop([0, 31], 15)), [[32]], 1, 1, 1, 1, grids=[[GRID, GRID]])
    first, second = token_states.owners(made, 0, number=1)
    assert first.tolist() == [0, 0, *range(18, 32)] and second.tolist() == [0, 0, *[-1] * 13, 31]
    outer = np.asarray(pictures.token_picture(picture(), made, 0, number=1, panel=80)).reshape(-1, 3)
    assert (outer == pictures.color(0)).all(1).sum() > 50


class Notebook:
    """What a running IPython leaves in ``sys.modules``."""

    def __init__(self, monkeypatch):
        self.shown = []
        for name, parts in (
            ("IPython", {"get_ipython": object}),
            ("IPython.display", {"HTML": str, "display": self.shown.append}),
        ):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(**parts))


def test_show_in_a_notebook(monkeypatch):
    notebook = Notebook(monkeypatch)
    made = Report([32], (drop([1, 17], 32),), [[32, 2]], 1, 1, 1, 1, recipe="<b>", grids=[[GRID, (4, 4)]])
    made.show()
    made.show([picture(), picture(1)], heat=False)
    plain, given = notebook.shown
    assert plain.size == given.size and plain.getcolors(10**6) != given.getcolors(10**6)
    made.show(interactive=True)
    both = [scored(list(range(8)), [16.0 - i for i in range(n)], [0] * n) for n in (16, 32)]
    joined = replace(
        both[0],
        tokens_in=[16, 32],
        tokens_out=[8, 8],
        **{name: [getattr(s, name)[0] for s in both] for name in ("kept", "scores", "units")},
    )
    ranked = Report([16, 32], (joined,), [[16], [32]], 1, 1, 1, 1, grids=[[GRID], [GRID, GRID]])
    ranked.show([picture(), picture(1)], sample=1, heat=True)
    assert notebook.shown.pop().tobytes() == pictures.sheet([picture(), picture(1)], ranked, 1, heat=True).tobytes()
    assert (
        pictures.sheet([picture(), picture(1)], ranked, 1).tobytes()
        != pictures.sheet([picture(), picture(1)], ranked, 1, heat=True).tobytes()
    )
    page = Links()
    page.feed(notebook.shown[2])
    assert page.tags == ["div", "iframe"] and "vt-theatre" not in page.tags
    with pytest.raises(vtprune.VtpruneError, match="2 rasters, but there are 1"):
        made.show(picture())


class Embedded(type("TerminalInteractiveShell", (), {})):
    """IPython in a terminal, which shows no pictures."""


@pytest.mark.parametrize("shell", [None, Embedded()])
def test_show_without_a_notebook(monkeypatch, shell):
    shown = []
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self.size))
    report(drop([1])).show(picture())
    assert shown == [pictures.token_picture(picture(), report(drop([1])), 0).size]
    with pytest.raises(vtprune.VtpruneError, match=r"--picture OUT\.html"):
        report(drop([1])).show(interactive=True)
    with pytest.raises(vtprune.VtpruneError, match="no sample 3"):
        report(drop([1])).show(sample=3)
    with pytest.raises(vtprune.VtpruneError, match="no visual tokens"):
        Report([0], (), [[0]], 1, 1, 1, 1, grids=[[]]).show()


def test_a_sheet_has_a_strip_for_every_raster(monkeypatch):
    made = Report([32], (drop([1, 17], 32),), [[32, 2]], 1, 1, 1, 1, grids=[[GRID, GRID]])
    strips = [
        pictures.token_picture(picture(i), made, 0, number=i, caption=c)
        for i, c in enumerate(("raster 1 of 2", "raster 2 of 2"))
    ]
    written = []
    monkeypatch.setattr(pictures, "fit", lambda draw, words, *size: (written.append(words), words)[1])
    out = np.asarray(pictures.sheet([picture(0), picture(1)], made))
    assert written[::2] == ["raster 1 of 2", "llm.2  some", "raster 2 of 2", "llm.2  some"]
    assert written[1::2] == ["16 of 32 visual tokens", "1 of 16 here, 32 -> 2 tokens in all"] * 2
    assert out.shape[:2] == (sum(s.height for s in strips), strips[0].width)
    assert (out == np.concatenate([np.asarray(s) for s in strips])).all()
    one = report(drop([1]))
    assert (
        pictures.sheet([picture()], one, caption="why").tobytes()
        == pictures.token_picture(picture(), one, 0, caption="why").tobytes()
    )


def test_row_figure():
    figure = row_bias.row_bias_figure({"fastv 25%": [0, 0, 2, 30], "uniform 25%": [8, 8, 8, 8]})
    assert len(figure.getcolors(10**6)) > 4
    for bad in ({}, {"a": [1], "b": [1, 2]}):
        with pytest.raises(vtprune.VtpruneError):
            row_bias.row_bias_figure(bad)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]


def test_report_is_self_contained_and_escaped(tmp_path):
    path = tmp_path / "r.html"
    table = [["method", "note"], ["a<script>", "b & c"]]
    web.html_report(table, [("one <b>", picture())], path, title="t", intro="<i>", facts="f")
    page = path.read_text()
    found = Links()
    found.feed(page)
    assert len(found.links) == 1 and found.links[0].startswith("data:image/png;base64,")
    assert not {"script", "link", "b", "i"} & set(found.tags) and "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    with pytest.raises(vtprune.VtpruneError, match="cannot write"):
        web.html_report(table, [], tmp_path / "no" / "r.html")


def test_contact_sheet(tmp_path):
    sheet = pictures.contact_sheet([("a", picture()), ("b" * 300, picture(1, 60))])
    assert sheet.width == 60
    web.write(tmp_path / "s.png", sheet)
    assert Image.open(tmp_path / "s.png").size == sheet.size
    with pytest.raises(vtprune.VtpruneError):
        pictures.contact_sheet([])
