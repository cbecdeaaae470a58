"""What lies under each raster of visual tokens, read back from the pixels that a processor made: whole images, tiles,
unpadded tiles, video frames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...core.types import VtpruneError
from .layout import Grid

if TYPE_CHECKING:
    from ...core.report import Report

WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Piece:
    """A picture and what to call it (``noun``); ``grid`` is the raster it must lie under, if the pixels tell; ``film``
    numbers the video that it belongs to."""

    noun: str
    picture: Image.Image
    grid: Grid | None = None
    film: int | None = None


def numbers(values: Any) -> np.ndarray:
    """A tensor of any device and type, or an array, as float32."""
    return np.asarray(values.detach().float().cpu() if hasattr(values, "detach") else values, dtype=np.float32)


def picture(part: Any, pixels: np.ndarray) -> Image.Image:
    """Normalised ``pixels`` ``[3, H, W]`` as the picture they were; ``part`` is the image or video processor that made
    them."""
    if getattr(part, "do_normalize", True):
        mean, std = (np.asarray(getattr(part, f"image_{n}"), dtype=np.float32)[:, None, None] for n in ("mean", "std"))
        pixels = pixels * std + mean
    return Image.fromarray(np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0))


def rasters(processor: Any, inputs: Mapping[str, Any], report: Report) -> list[list[Piece]]:
    """Per sample of the batch ``inputs`` one piece per raster of ``report``.

    Raises:
        VtpruneError: the rasters of this family, or of this report, cannot be matched with the pixels.
    """
    moving = _moving(processor, inputs, report)
    first = next(
        (
            g
            for grids, moves in zip(report.grids, moving, strict=True)
            for g, m in zip(grids, moves, strict=True)
            if not m
        ),
        (1, 1),
    )
    images, videos = list(_images(processor, inputs, first[0])), list(_videos(processor, inputs))
    flat = [m for sample in moving for m in sample]
    want, have = (flat.count(False), flat.count(True)), (len(images), len(videos))
    if want != have:
        raise VtpruneError(
            f"the report has {want[0]} rasters of images and {want[1]} of videos, but the inputs hold {have[0]} and "
            f"{have[1]} pictures: "
            "these are not the inputs of this report, or this family's rasters cannot be matched with pictures"
        )
    still, frames = iter(images), iter(videos)
    out = [[next(frames if m else still) for m in sample] for sample in moving]
    for grids, pieces in zip(report.grids, out, strict=True):
        for grid, piece in zip(grids, pieces, strict=True):
            skew = math.log(grid[0] * piece.picture.width / (grid[1] * piece.picture.height))
            if tuple(grid) != piece.grid if piece.grid is not None else abs(skew) > math.log(1.5):
                size = (
                    f"{piece.picture.width} x {piece.picture.height} pixels"
                    if piece.grid is None
                    else f"{piece.grid[0]} x {piece.grid[1]} patches"
                )
                raise VtpruneError(
                    f"a raster of {grid[0]} x {grid[1]} visual tokens does not lie on a picture of {size}; there is "
                    "nothing true to draw"
                )
    return out


def _moving(processor: Any, inputs: Mapping[str, Any], report: Report) -> list[list[bool]]:
    """Per sample which rasters come from a video, told by their placeholders where there are both."""
    still, film = (inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
    if not (still and film):
        return [[film] * len(grids) for grids in report.grids]
    image, video = (getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video"))
    if image is None or video is None:
        raise VtpruneError(
            f"{type(processor).__name__} does not say which placeholders stand for images and which for videos"
        )
    out = []
    for ids, grids in zip(inputs["input_ids"].tolist(), report.grids, strict=True):
        marks = [i == video for i in ids if i in (image, video)]
        starts = [sum(r * c for r, c in grids[:k]) for k in range(len(grids))]
        out.append([marks[start] for start in starts])
    return out


def _images(processor: Any, inputs: Mapping[str, Any], rows: int) -> Iterator[Piece]:
    """``rows``: of the first raster, which is a whole tile where there are tiles."""
    if inputs.get("pixel_values") is None:
        return
    part, pixels, sizes = processor.image_processor, numbers(inputs["pixel_values"]), inputs.get("image_sizes")
    if "image_grid_thw" in inputs:
        yield from _patches("image", part, pixels, inputs["image_grid_thw"])
    elif pixels.ndim == 5 and sizes is not None:
        alone = [True] * len(pixels)
        if inputs.get("batch_num_images") is not None:  # LLaVA-OneVision leaves images whole that share a sample
            alone = [n == 1 for n in inputs["batch_num_images"].tolist() for _ in range(n)]
        for tiles, size, tiled in zip(pixels, sizes.tolist(), alone, strict=True):
            yield Piece("overview", picture(part, tiles[0]))
            yield (
                _unpadded(processor, tiles[1:], size, rows)
                if tiled
                else Piece("new line", Image.new("RGB", (8, 8), WHITE), (1, 1))
            )
    elif pixels.ndim == 5:  # SmolVLM: tiles of zeros only fill up
        yield from (Piece("tile", picture(part, tile)) for sample in pixels for tile in sample if tile.any())
    elif pixels.ndim == 4 and sizes is not None:  # Mistral 3: padded on the right and below
        yield from (
            Piece("image", picture(part, tile[:, : int(h)][..., : int(w)]))
            for tile, (h, w) in zip(pixels, sizes.tolist(), strict=True)
        )
    elif pixels.ndim == 4:
        noun = "tile" if hasattr(part, "crop_to_patches") else "image"
        yield from (Piece(noun, picture(part, tile)) for tile in pixels)
    else:
        raise VtpruneError(
            f"{type(part).__name__} gives pixels of {pixels.ndim} dimensions, which cannot be matched with rasters"
        )


def _videos(processor: Any, inputs: Mapping[str, Any]) -> Iterator[Piece]:
    if inputs.get("pixel_values_videos") is None:
        return
    part, pixels = processor.video_processor, numbers(inputs["pixel_values_videos"])
    if "video_grid_thw" in inputs:
        yield from _patches("frame", part, pixels, inputs["video_grid_thw"])
    elif pixels.ndim == 5:  # LLaVA-OneVision: a new-line token ends a video
        for number, video in enumerate(pixels):
            yield from (Piece("frame", picture(part, frame), film=number) for frame in video)
            yield Piece("new line", Image.new("RGB", (8, 8), WHITE), (1, 1), number)
    else:
        raise VtpruneError(
            f"{type(part).__name__} gives pixels of {pixels.ndim} dimensions, which cannot be matched with rasters"
        )


def _patches(noun: str, part: Any, pixels: np.ndarray, grids: Any) -> Iterator[Piece]:
    """Qwen: rows of ``pixels`` are patches ``[channel, time, y, x]``, in blocks of ``merge_size`` squared; of frames
    that share a step the first is shown."""
    at, m, p, moving = 0, part.merge_size, part.patch_size, noun == "frame"
    if moving and part.temporal_patch_size == 2:
        noun = "frame pair"
    for number, (t, h, w) in enumerate(grids.tolist()):
        steps = pixels[at : at + t * h * w].reshape(t, h // m, w // m, m, m, -1, part.temporal_patch_size, p, p)[
            :, ..., 0, :, :
        ]
        for step in steps.transpose(0, 5, 1, 3, 6, 2, 4, 7).reshape(t, -1, h * p, w * p):
            yield Piece(noun, picture(part, step), (h // m, w // m), number if moving else None)
        at += t * h * w


def _unpadded(processor: Any, tiles: np.ndarray, size: list[int], n: int) -> Piece:
    """LLaVA-NeXT, LLaVA-OneVision: ``tiles`` (``n`` x ``n`` patches each) of an image of ``size`` (height, width) put
    together, cut where the model cuts its features, and a blank column for the new-line tokens."""
    from transformers.image_processing_utils import select_best_resolution

    part, side = processor.image_processor, tiles.shape[-1]
    high, wide = (length // side for length in select_best_resolution(tuple(size), part.image_grid_pinpoints))
    whole = (
        tiles[: high * wide]
        .reshape(high, wide, -1, side, side)
        .transpose(2, 0, 3, 1, 4)
        .reshape(-1, high * side, wide * side)
    )
    rows, columns, above, left = high * n, wide * n, 0, 0
    if size[1] / size[0] > wide / high:
        above = (rows - int(round(size[0] * columns / size[1], 7))) // 2
    else:
        left = (columns - int(round(size[1] * rows / size[0], 7))) // 2
    top, bottom, start, end = (round(k * side / n) for k in (above, rows - above, left, columns - left))
    rows, columns = rows - 2 * above, columns - 2 * left
    seen = picture(part, whole[:, top:bottom, start:end])
    limit = getattr(processor, "vision_aspect_ratio", None)
    if limit is not None:  # LLaVA-OneVision interpolates large images
        ratio = math.sqrt(rows * columns / (int(limit.removeprefix("anyres_max_")) * n * n))
        rows, columns = (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
    out = Image.new("RGB", (seen.width + round(seen.width / columns), seen.height), WHITE)
    out.paste(seen)
    return Piece("tiles", out, (rows, columns + 1))
