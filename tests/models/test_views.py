"""The pictures under rasters of visual tokens, with transformers' own image processors and the adapters' own
rasters."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vtprune
from fake import FakeProcessor, picture
from vtprune.core.planning import bind
from vtprune.core.report import Report
from vtprune.inputs.chats import prepare
from vtprune.show import views as views_module

PINPOINTS = [[32, 64], [64, 32], [64, 64]]
SIZES = [(60, 40), (20, 64), (60, 60), (33, 64)]  # width, height


def report(*grids) -> Report:
    tokens = [sum(r * c for r, c in sample) for sample in grids]
    return Report(tokens, (), [[n] for n in tokens], 1, 1, 1, 1, grids=[list(sample) for sample in grids])


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def plain(part, pixels: torch.Tensor) -> np.ndarray:
    """``[3, H, W]`` back to 0..255, ``[H, W, 3]``."""
    mean, std = (torch.tensor(getattr(part, f"image_{n}"))[:, None, None] for n in ("mean", "std"))
    return ((pixels * std + mean) * 255).permute(1, 2, 0).numpy()


def near(view: Image.Image, wanted: np.ndarray) -> bool:
    return view.size == (wanted.shape[1], wanted.shape[0]) and bool(np.abs(np.asarray(view, float) - wanted).max() <= 1)


def grids_of(adapter, inputs, count: int) -> list[list[tuple[int, int]]]:
    images = adapter.images(inputs)
    return [[r.grid for r in next(images)] for _ in range(count)]


@pytest.mark.parametrize(
    ("family", "variant"),
    [("llava-next", "clip-llama"), ("llava-onevision", "images"), ("llava-onevision", "interpolated")],
)
def test_unpadded_tiles_lie_under_the_tokens_made_of_them(tiny, family, variant):
    model, _ = tiny(family, variant)
    adapter = bind(model)
    if family == "llava-next":
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        processor = SimpleNamespace(
            image_processor=transformers.LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **sizes)
        )
    else:
        part = transformers.LlavaOnevisionImageProcessor(
            image_grid_pinpoints=PINPOINTS, size={"height": 32, "width": 32}
        )
        processor = SimpleNamespace(image_processor=part, vision_aspect_ratio=model.config.vision_aspect_ratio)
    inputs = processor.image_processor(images=[[noise(s, i)] for i, s in enumerate(SIZES)], return_tensors="pt")
    made = report(*grids_of(adapter, inputs, len(SIZES)))
    for sample in range(len(SIZES)):
        first, second = views_module.views(processor, inputs, made, sample)
        assert (first.info["label"], second.info["label"]) == ("overview", "tiles")
        tiles = [plain(processor.image_processor, t) for t in inputs["pixel_values"][sample]]
        assert near(first, tiles[0])
        rows, columns = made.grids[sample][1]
        packed = adapter.packed(inputs["image_sizes"][sample], True)
        seen = np.asarray(second, float)
        side = second.width / columns
        assert (seen[:, round(side * (columns - 1)) :] == 255).all()
        if variant == "interpolated" and bool((packed != packed.round()).any()):
            assert abs(side - second.height / rows) < 0.2 * side  # still whole, in larger cells
            continue
        assert second.size == (8 * columns, 8 * rows)
        for i, token in enumerate(packed[16:].long().tolist()):
            r, c = divmod(i, columns)
            here = seen[8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
            tile, patch = divmod(token, 16)
            y, x = 8 * (patch // 4), 8 * (patch % 4)
            assert (c == columns - 1) == (token < 0)
            assert token < 0 or np.abs(here - tiles[tile][y : y + 8, x : x + 8]).max() <= 1


def test_images_that_share_a_sample_stay_whole(tiny):
    model, _ = tiny("llava-onevision", "images")
    part = transformers.LlavaOnevisionImageProcessor(image_grid_pinpoints=PINPOINTS, size={"height": 32, "width": 32})
    inputs = part(images=[[noise(SIZES[0]), noise(SIZES[1])], [noise(SIZES[2])]], return_tensors="pt")
    one, two, three = grids_of(bind(model), inputs, 3)
    made = report([*one, *two], three)
    processor = SimpleNamespace(image_processor=part, vision_aspect_ratio="anyres_max_9")
    labels = [[v.info["label"] for v in views_module.views(processor, inputs, made, i)] for i in range(2)]
    assert labels == [
        ["overview 1 of 2", "new line 1 of 2", "overview 2 of 2", "new line 2 of 2"],
        ["overview", "tiles"],
    ]


def test_tiles_one_by_one():
    part = transformers.GotOcr2ImageProcessor(crop_to_patches=True, size={"height": 32, "width": 32}, max_patches=6)
    inputs = part(images=[noise((60, 32)), noise((32, 32)), noise((64, 64), 1)], return_tensors="pt")
    counts = inputs["num_patches"].tolist()
    made = report([(4, 4)] * (counts[0] + counts[1]), [(4, 4)] * counts[2])
    views = views_module.views(SimpleNamespace(image_processor=part), inputs, made, 1)
    assert counts[2] > 1 and views[1].info["label"] == f"tile 2 of {counts[2]}"
    for view, pixels in zip(views, inputs["pixel_values"][counts[0] + counts[1] :], strict=True):
        assert near(view, plain(part, pixels))


@pytest.mark.parametrize("name", ["SmolVLM", "Idefics3"])
def test_tiles_that_only_fill_up_are_no_rasters(name):
    part = getattr(transformers, f"{name}ImageProcessor")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    inputs = part(images=[[noise((64, 20))], [noise((60, 40))]], return_tensors="pt")
    real = [int((sample != 0).flatten(1).any(1).sum()) for sample in inputs["pixel_values"]]
    made = report(*([(4, 4)] * n for n in real))
    assert real[0] < real[1] == inputs["pixel_values"].shape[1]
    for sample, n in enumerate(real):
        last = views_module.views(SimpleNamespace(image_processor=part), inputs, made, sample)[-1]
        assert (
            near(last, plain(part, inputs["pixel_values"][sample, n - 1])) and last.info["label"] == f"tile {n} of {n}"
        )


def test_patches_become_the_image_and_the_first_frame_of_each_pair():
    part = transformers.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=10**6)
    film = transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=10**6)
    frames = torch.from_numpy(np.random.RandomState(1).randint(0, 255, (4, 3, 16, 24), dtype=np.uint8))
    images = [noise((64, 40)), noise((16, 24), 2)]
    inputs = {
        **part(images=images, return_tensors="pt"),
        **film(videos=[frames], do_sample_frames=False, return_tensors="pt"),
    }
    inputs["input_ids"] = torch.tensor([[9] * 6 + [3] * 40 + [9], [4] * 12 + [9] + [3] * 6 + [9] * 28])
    processor = SimpleNamespace(image_processor=part, video_processor=film, image_token_id=3, video_token_id=4)
    made = report([(5, 8)], [(2, 3), (2, 3), (3, 2)])
    (first,) = views_module.views(processor, inputs, made, 0)
    one, two, image = views_module.views(processor, inputs, made, 1)
    assert [v.info["label"] for v in (first, one, two, image)] == ["image", "frame 1 of 2", "frame 2 of 2", "image"]
    for view, wanted in ((first, images[0]), (image, images[1])):
        assert near(view, np.asarray(wanted, float))
    for view, wanted in ((one, frames[0]), (two, frames[2])):
        assert near(view, wanted.permute(1, 2, 0).numpy().astype(float))
    with pytest.raises(vtprune.VtpruneError, match="placeholders"):
        views_module.views(SimpleNamespace(image_processor=part, video_processor=film), inputs, made, 0)


def test_images_of_any_size_lose_their_padding():
    part = transformers.PixtralImageProcessor(patch_size=8, size={"longest_edge": 64})
    inputs = part(images=[noise((64, 40)), noise((24, 32), 2)], return_tensors="pt")
    first, second = views_module.views(SimpleNamespace(image_processor=part), inputs, report([(5, 8), (4, 3)]))
    assert near(first, np.asarray(noise((64, 40)), float)) and near(second, np.asarray(noise((24, 32), 2), float))


def test_frames_and_the_new_line_behind_them(tiny):
    film = transformers.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32})
    frames = torch.from_numpy(np.random.RandomState(1).randint(0, 255, (3, 3, 32, 32), dtype=np.uint8))
    inputs = film(videos=[frames], do_sample_frames=False, return_tensors="pt")
    views = views_module.views(SimpleNamespace(video_processor=film), inputs, report([(2, 2)] * 3 + [(1, 1)]))
    assert [v.info["label"] for v in views] == ["frame 1 of 3", "frame 2 of 3", "frame 3 of 3", "new line"]
    assert near(views[2], frames[2].permute(1, 2, 0).numpy().astype(float)) and views[3].getpixel((0, 0)) == (
        255,
        255,
        255,
    )


def test_one_picture_per_sample_in_half_precision():
    processor = FakeProcessor()
    inputs = prepare(processor, [picture(0, 32), picture(1, 32)], ["a", "b"]).to(torch.bfloat16)
    (view,) = views_module.views(processor, inputs, report([(4, 4)], [(4, 4)]), 1)
    assert (
        view.info["label"] == "image" and np.abs(np.asarray(view, float) - np.asarray(picture(1, 32), float)).max() <= 2
    )


def test_what_does_not_match_is_refused():
    processor = FakeProcessor()
    inputs = prepare(processor, [picture(), picture()], ["a", "b"])
    for made, words in [
        (report([(4, 4)]), "1 rasters of images"),
        (report([(1, 16)], [(1, 16)]), "nothing true to draw"),
        (report([(4, 4)], [(4, 4)] * 2), "3 rasters of images"),
    ]:
        with pytest.raises(vtprune.VtpruneError, match=words):
            views_module.views(processor, inputs, made)
    with pytest.raises(vtprune.VtpruneError, match="no sample 2"):
        views_module.views(processor, inputs, report([(4, 4)], [(4, 4)]), 2)
    with pytest.raises(vtprune.VtpruneError, match="2 dimensions"):
        views_module.views(processor, {"pixel_values": torch.zeros(3, 4)}, report([(4, 4)]))
