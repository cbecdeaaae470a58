"""The pictures under the tokens, as the vision tower saw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..core.types import VtpruneError
from ..models.engine import pixels as pixels_engine
from .token_states import check_sample

if TYPE_CHECKING:
    from ..core.report import Report

PLAIN = (217, 220, 225)  # under patches without a picture


def model_view(processor: Any, image: Image.Image, overview: int = 0) -> Image.Image:
    """``image`` as the vision tower sees it (resized and cropped by the processor), so that patches lie where they
    should; of several tiles the one that shows all of it, ``overview``. Processors that cut the whole image into
    patches leave it as it is."""
    part = processor.image_processor
    pixels = pixels_engine.numbers(part(images=[image], return_tensors="np")["pixel_values"])
    if pixels.ndim < 4:
        return image.convert("RGB")
    return pixels_engine.picture(part, (pixels[0] if pixels.ndim == 5 else pixels)[overview])


def views(
    processor: Any,
    inputs: Mapping[str, Any],
    report: Report,
    sample: int = 0,
    *,
    frames: bool = False,
    times: Sequence[float] = (),
) -> list[Image.Image]:
    """What lies under each raster of a sample, as the vision tower saw it: an image, each of its tiles, LLaVA-NeXT's
    tiles put together (with a blank column where its new-line tokens are), the frames of a video (Qwen: the first of
    each pair). Their ``info["label"]`` says which: ``"tile 2 of 5"``; those of a video have its number as
    ``info["film"]``.

    Args:
        inputs: what ``processor`` returned and the model was given, the whole batch of ``report``; any device and type.
        frames: the images of the prompt are the frames of one video.
        times: of the frames of the sample's only video (Qwen: of both of each pair), in seconds; the labels tell them.

    Raises:
        VtpruneError: there is no such sample, the rasters cannot be matched with the pixels, or the times with them.
    """
    check_sample(report, sample)
    pieces = pixels_engine.rasters(processor, inputs, report)[sample]
    if frames and len(pieces) > 1 and {p.noun for p in pieces} == {"image"}:
        pieces = [replace(p, noun="frame", film=0) for p in pieces]
    # of each video its own
    names = [(p.film, p.noun) for p in pieces]
    films = sorted({p.film for p in pieces if p.film is not None})
    when = _times(pieces, times) if times and films else {}
    for i, (name, piece) in enumerate(zip(names, pieces, strict=True)):
        of = f" {names[: i + 1].count(name)} of {names.count(name)}" if names.count(name) > 1 else ""
        where = f", video {films.index(piece.film) + 1}" if piece.film is not None and len(films) > 1 else ""
        at = f", {when[i]:.1f} s" if i in when else ""
        piece.picture.info["label"] = piece.noun + of + where + at
        if piece.film is not None:
            piece.picture.info["film"] = piece.film
    return [p.picture for p in pieces]


def _times(pieces: Sequence[pixels_engine.Piece], times: Sequence[float]) -> dict[int, float]:
    """When each frame of a video is shown, by its place in ``pieces``; ``times`` of single frames."""
    frames = [i for i, piece in enumerate(pieces) if piece.film is not None and piece.noun.startswith("frame")]
    step = 2 if frames and pieces[frames[0]].noun == "frame pair" else 1
    if -(-len(times) // step) != len(frames):
        raise VtpruneError(f"there are times of {len(times)} frames, which the {len(frames)} rasters do not show")
    return dict(zip(frames, times[::step], strict=True))


def views_or_blank(
    processor: Any,
    inputs: Mapping[str, Any],
    report: Report,
    *,
    frames: bool = False,
    times: Sequence[float] = (),
) -> tuple[list[Image.Image], str]:
    """The :func:`views` of the first sample; or plain light grey, and why."""
    try:
        return views(processor, inputs, report, frames=frames, times=times), ""
    except VtpruneError as e:
        return blank(report, 0), str(e)


def blank(report: Report, sample: int) -> list[Image.Image]:
    """Plain light grey in the place of :func:`views`."""
    return [Image.new("RGB", (16 * columns, 16 * rows), PLAIN) for rows, columns in report.grids[sample]]
