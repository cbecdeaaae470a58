"""Frames of videos: files, animated pictures, pictures in order, readers of other packages."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from fake import FakeProcessor, film, picture, video_model
from vtprune.inputs import chats, videos


def shades(n: int = 10, size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    return [Image.new("RGB", size, (20 * i, 0, 0)) for i in range(n)]


def moving(path, n: int = 10, **how) -> str:
    first, *rest = shades(n)
    first.save(path, save_all=True, append_images=rest, **({"duration": 50} | how))
    return str(path)


def reds(frames: np.ndarray) -> list[int]:
    return [round(float(f[..., 0].mean()) / 20) for f in frames]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animated_pictures(tmp_path, name):
    path = moving(tmp_path / name)
    assert videos.is_animated(path)
    frames, facts = videos.read(path, 4)
    assert frames.shape == (4, 32, 48, 3) and frames.dtype == np.uint8 and reds(frames) == [0, 3, 6, 9]
    assert (facts.total_num_frames, facts.width, facts.height) == (10, 48, 32)
    assert facts.fps == pytest.approx(20) and list(facts.frames_indices) == [0, 3, 6, 9]
    frames, _ = videos.read(path, 32)
    assert reds(frames) == list(range(10))
    frames, _ = videos.read(path, 3, start=0.1, end=0.3)
    assert reds(frames) == [2, 4, 6]


def test_a_gif_without_times_plays_as_in_a_browser(tmp_path):
    _, facts = videos.read(moving(tmp_path / "a.gif", duration=0))
    assert facts.fps == pytest.approx(10)


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "mpeg4"), (".mkv", "mpeg4"), (".avi", "mpeg4")])
def test_video_files(tmp_path, suffix, codec):
    """Matroska does not say how many frames it holds."""
    path = film(tmp_path / f"a{suffix}", 0)
    frames, facts = videos.read(path, 3)
    assert frames.shape == (3, 64, 64, 3) and reds(frames) == [0, 4, 8]
    assert facts.total_num_frames == 9 and facts.fps == pytest.approx(8) and not videos.is_animated(path)
    assert len(videos.read(path, 99)[0]) == 9


def test_arrays_pictures_and_readers():
    array = np.stack([np.asarray(p) for p in shades(5)])
    assert reds(videos.read(array, 3)[0]) == [0, 2, 4]
    frames, facts = videos.read(shades(5), 2)
    assert reds(frames) == [0, 4] and facts.fps is None

    class Decord:
        def __len__(self):
            return len(array)

        def __getitem__(self, i):
            return array[i]

        def get_avg_fps(self):
            return 2.0

        def get_batch(self, indices):
            assert all(isinstance(i, int) for i in indices)
            return SimpleNamespace(asnumpy=lambda: array[indices])

    class Torchcodec:
        metadata = SimpleNamespace(average_fps=2.0, height=32, width=48)

        def __len__(self):
            return len(array)

        def get_frames_at(self, indices):
            return SimpleNamespace(data=torch.from_numpy(array[indices]).permute(0, 3, 1, 2))

    for reader in (Decord(), Torchcodec()):
        frames, facts = videos.read(reader, 3)
        assert reds(frames) == [0, 2, 4] and frames.shape == (3, 32, 48, 3) and facts.fps == 2
        assert reds(videos.read(reader, 9, start=1)[0]) == [2, 3, 4]


def test_what_cannot_be_read(tmp_path, monkeypatch):
    picture().save(tmp_path / "still.png")
    (tmp_path / "none.mp4").write_bytes(b"no video")
    (tmp_path / "half.gif").write_bytes(open(moving(tmp_path / "whole.gif", 30), "rb").read()[:900])
    gif, film_ = str(tmp_path / "whole.gif"), np.zeros((2, 4, 4, 3), np.uint8)
    for source, how, words in [
        (tmp_path / "gone.mp4", {}, "no such video file"),
        (tmp_path, {}, "no such video file"),
        (tmp_path / "none.mp4", {}, "cannot read the video"),
        (tmp_path / "half.gif", {"frames": 30}, "cannot read"),
        (tmp_path / "still.png", {}, "still picture, not a video"),
        (gif, {"frames": 0}, "at least one frame"),
        (gif, {"start": 5}, "no frames between 5 and None"),
        (gif, {"start": 1.0, "end": 0.5}, "no frames between 1.0 and 0.5 seconds"),
        (film_, {"start": 1}, "does not say when"),
        (film_.astype(float), {}, "frames are uint8"),
        (film_[:0], {}, "has no frames"),
        ([picture(), picture(0, 20)], {}, r"differ in size \(20 x 20, 40 x 40 pixels\)"),
        (object(), {}, "cannot read a video from object"),
    ]:
        with pytest.raises(vtprune.VtpruneError, match=words):
            videos.read(source, **how)
    monkeypatch.setattr(videos, "MOST_PIXELS", 3 * 48 * 32)
    assert len(videos.read(gif, 3)[0]) == 3
    with pytest.raises(vtprune.VtpruneError, match="4 frames of .*: take fewer frames"):
        videos.read(gif, 4)


def test_processors_see_a_video_or_its_frames(tmp_path):
    video = videos.read(moving(tmp_path / "a.gif", 4))
    (part,) = chats.video_parts(video_model()[1], video)
    assert part["type"] == "video" and part["video"] is video
    parts = chats.video_parts(FakeProcessor(), video)
    assert [p["type"] for p in parts] == ["image"] * 4
    assert [p["image"].getpixel((3, 3))[0] for p in parts] == pytest.approx([0, 20, 40, 60], abs=4)
