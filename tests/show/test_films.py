"""A video in still pictures: frames in rows, the tokens left in each, groups that span frames."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from fake import video_model
from vtprune.core.report import Report, StageReport
from vtprune.inputs import chats
from vtprune.show import pictures, theatre, views

SIDE = (2, 2)


def report(frames: int, *stages: StageReport, more: tuple[tuple[int, int], ...] = ()) -> Report:
    grids = [SIDE] * frames + list(more)
    n = sum(r * c for r, c in grids)
    return Report([n], stages, [[n]], 1, 1, 1, 1, grids=[grids])


def merged(owner: list[int]) -> StageReport:
    kept = [i for i, o in enumerate(owner) if i == o]
    slots = [kept.index(o) if o >= 0 else -1 for o in owner]
    return StageReport("projector", "holitom", [len(owner)], [len(kept)], [torch.tensor(kept)], [torch.tensor(slots)])


def white(frames: int, film: int | None = 0) -> list[Image.Image]:
    out = [Image.new("RGB", (40, 40), "white") for _ in range(frames)]
    for i, view in enumerate(out, 1):
        view.info.update({"label": f"frame {i} of {frames}"} | ({} if film is None else {"film": film}))
    return out


def told(monkeypatch) -> list[str]:
    written: list[str] = []
    monkeypatch.setattr(pictures, "fit", lambda draw, words, *size: (written.append(words), words)[1])
    return written


def test_each_frame_says_how_many_of_its_tokens_are_left(monkeypatch):
    written = told(monkeypatch)
    made = report(3, merged([0, 1, 2, 3, 0, 5, -1, -1, *[-1] * 4]))
    pictures.film_picture(white(3), made)
    assert written == [
        "video",
        "3 pictures, 12 visual tokens",
        "frame 1: 4",
        "frame 2: 4",
        "frame 3: 4",
        "projector  holitom",
        "12 -> 5 tokens",
        "frame 1: 4 of 4",
        "frame 2: 1 of 4",
        "frame 3: 0 of 4",
    ]


def frame(out: Image.Image, block: int, number: int, frames: int) -> np.ndarray:
    """``[2, 2, h, w, 3]``: the patches of a frame of a block."""
    rows = -(-frames // 8)
    top = block * (pictures.TITLE + pictures.GAP + rows * (pictures.FRAME + 16 + pictures.GAP))
    x = pictures.GAP + number % 8 * (pictures.FRAME + pictures.GAP)
    y = top + pictures.GAP + pictures.TITLE + number // 8 * (pictures.FRAME + 16 + pictures.GAP)
    half = pictures.FRAME // 2
    return (
        np.asarray(out)[y : y + 2 * half, x : x + 2 * half].reshape(2, half, 2, half, 3).transpose(0, 2, 1, 3, 4)
    ).astype(float)


def test_a_token_in_another_frame_is_dim_and_hatched_in_the_colour_of_its_group():
    out = pictures.film_picture(white(3), report(3, merged([0, 1, 2, 3, 0, 5, -1, -1, *[-1] * 4])))
    first, second, third = (frame(out, 1, i, 3) for i in range(3))
    inner = slice(6, 20)
    assert (second[0, 1][inner, inner] == 255).all()  # kept
    assert second[0, 0][inner, inner].mean() == pytest.approx(
        np.mean([0.55 * c + 0.45 * 255 for c in pictures.SHADE]), abs=2
    )
    assert third.mean() < 120 and second[1].mean() < 120  # dropped
    diagonal = np.stack([second[0, 0][65 - i, i] for i in range(10, 56)])
    assert (diagonal == pictures.color(0)).all()
    assert (first[0, 0][33, 33] == pictures.color(0)).all() and (first[0, 1][33, 33] == 255).all()  # a dot, or none


def test_frames_wrap_and_many_are_small():
    few, some, many = (pictures.film_picture(white(n), report(n)) for n in (3, 16, 64))
    assert few.width == 3 * (pictures.FRAME + pictures.GAP) + pictures.GAP
    assert some.width == 8 * (pictures.FRAME + pictures.GAP) + pictures.GAP and some.height > 2 * pictures.FRAME
    assert many.width <= some.width + 6 * 16 and many.height < 500
    with pytest.raises(vtprune.VtpruneError, match="at least one frame"):
        pictures.film_picture([], report(1))
    with pytest.raises(vtprune.VtpruneError, match="no stage of this report ranks"):
        pictures.film_picture(white(2), report(2), heat=True)
    with pytest.raises(vtprune.VtpruneError, match="no raster 2"):
        pictures.film_picture(white(3), report(2))


def test_a_sheet_shows_videos_in_rows_and_pictures_alone(monkeypatch):
    written = told(monkeypatch)
    made = report(4, merged([0, 1, 2, 3, 0, 5, -1, -1, *[8, 9, 10, 11], *[-1] * 4, 16]), more=((1, 1),))
    alone = Image.new("RGB", (40, 40), "white")
    alone.info["label"] = "image"
    pictures.sheet([*white(2), *white(2, 1), alone], made, caption="why")
    assert written[0] == "video: why" and "9 of 17 here" not in written
    assert written.count("frame 1: 4 of 4") == 2 and written.count("frame 2: 0 of 4") == 1
    assert "5 of 8 here, 17 -> 10 tokens in all" in written and "1 of 1 here, 17 -> 10 tokens in all" in written
    pictures.sheet(white(2, None), report(2))
    assert written[-2:] == ["frame 2 of 2", "4 of 8 visual tokens"]


def test_views_say_which_pictures_are_a_video():
    model, processor = video_model()
    video = [
        {"type": "video", "video": chats.videos.of_pictures([Image.new("RGB", (64, 64), c) for c in shades])}
        for shades in (("red", "blue"), ("lime", "black", "white"))
    ]
    chat = [{"role": "user", "content": [*video, chats.text_part("what is it")]}]
    with pytest.raises(vtprune.VtpruneError):
        chats.prepare_chats(processor, [chat])  # of unlike lengths this processor makes no batch
    chat[0]["content"][1] = video[0]
    inputs = chats.prepare_chats(processor, [chat])
    with vtprune.attach(model, "uniform", keep=0.5) as handle, torch.no_grad():
        model(**inputs)
        shown = views.views(processor, inputs, handle.report())
    assert [(v.info["label"], v.info["film"]) for v in shown] == [
        (f"{noun}, video {n}", n - 1) for n in (1, 2) for noun in ("frame 1 of 2", "frame 2 of 2", "new line")
    ]


def test_frames_that_share_a_token_are_a_pair(monkeypatch):
    """Qwen: two frames a step; patches of 4 x 4 pixels, 2 x 2 of them a token."""
    part = SimpleNamespace(merge_size=2, patch_size=4, temporal_patch_size=2, do_normalize=False)
    pixels = torch.arange(3).repeat_interleave(16)[:, None].expand(48, 3 * 2 * 4 * 4) / 2
    inputs = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[3, 4, 4]])}
    shown = views.views(SimpleNamespace(video_processor=part), inputs, report(3))
    assert [(v.info["label"], v.info["film"]) for v in shown] == [(f"frame pair {i} of 3", 0) for i in (1, 2, 3)]
    assert [v.getpixel((9, 9))[0] for v in shown] == [0, 128, 255]
    part_ = SimpleNamespace(video_processor=part)
    for many in (5, 6):  # an odd one is shown twice
        timed = views.views(part_, inputs, report(3), times=[0.25 * i for i in range(many)])
        assert [v.info["label"] for v in timed] == [f"frame pair {i} of 3, {0.5 * (i - 1):.1f} s" for i in (1, 2, 3)]
    for many in (3, 4, 7):
        with pytest.raises(vtprune.VtpruneError, match=f"times of {many} frames, which the 3 rasters do not show"):
            views.views(part_, inputs, report(3), times=[0.25 * i for i in range(many)])
    written = told(monkeypatch)
    pictures.film_picture(shown, report(3))
    assert written[2:] == ["pair 1: 4", "pair 2: 4", "pair 3: 4"]


def test_images_are_frames_where_they_are_said_to_be():
    model, processor = vtprune.load_demo_model()
    pictures_ = [Image.new("RGB", (168, 168), c) for c in ("red", "blue", "lime")]
    inputs = chats.prepare(processor, [pictures_], ["what color is it ?"])
    with vtprune.attach(model, "evs", keep=0.5) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    plain, moving = (views.views(processor, inputs, report, frames=f) for f in (False, True))
    assert [v.info["label"] for v in plain] == [f"image {i} of 3" for i in (1, 2, 3)]
    assert not any("film" in v.info for v in plain)
    assert [(v.info["label"], v.info["film"]) for v in moving] == [(f"frame {i} of 3", 0) for i in (1, 2, 3)]
    assert moving[1].getpixel((80, 80)) == (0, 0, 255)
    timed = views.views(processor, inputs, report, frames=True, times=[0, 1.04, 2.5])
    assert [v.info["label"] for v in timed] == [
        f"frame {i} of 3, {at} s" for i, at in ((1, "0.0"), (2, "1.0"), (3, "2.5"))
    ]
    assert theatre.scene(report, timed)["rasters"][1]["label"] == "frame 2 of 3, 1.0 s"
    inputs = chats.prepare(processor, [pictures_[:1]], ["what color is it ?"])
    with vtprune.attach(model, "uniform", keep=0.5) as handle, torch.no_grad():
        model(**inputs)
        (one,) = views.views(processor, inputs, handle.report(), frames=True)
    assert one.info["label"] == "image" and "film" not in one.info
