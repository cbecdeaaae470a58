"""Videos as frames: video files, animated pictures, pictures in order, and the readers that other packages hand out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from ..core.types import VtpruneError
from . import images

ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # formats whose further pictures are later ones, no other views or pages
MOST_PIXELS = 4 * images.MEGAPIXELS * 1_000_000  # of all frames that are taken of one video
STILL = 0.1  # seconds that a frame of an animated picture stands where its file says nothing, as browsers do it
Video = tuple[np.ndarray, Any]  # frames [T, H, W, 3] uint8 and their ``transformers.video_utils.VideoMetadata``


def read(
    source: Any, frames: int = 32, *, start: float | None = None, end: float | None = None, name: str = "the video"
) -> Video:
    """``frames`` evenly spaced frames of a video (all, if it has fewer).

    Args:
        source: a video file, an animated picture file (GIF, PNG, WebP, AVIF), pictures in order, an array of frames
            ``[T, H, W, 3]`` uint8, decord's ``VideoReader`` or torchcodec's ``VideoDecoder``.
        start, end: seconds; only frames between them are taken.
        name: what messages call a source that is no file.

    Raises:
        VtpruneError: it cannot be read, holds no frame (between ``start`` and ``end``), is a still picture, its frames
            differ in size, or those taken have more than :data:`MOST_PIXELS` pixels together.
    """
    if frames < 1:
        raise VtpruneError(f"at least one frame of a video must be taken, not {frames}")

    def chosen(there: int, rate: float | None, width: int, height: int) -> np.ndarray:
        return _chosen(name, there, rate, (width, height), frames, start, end)

    if isinstance(source, str | Path):
        path = Path(source)
        name = str(path)
        if not path.is_file():
            raise VtpruneError(f"no such video file: {path}")
        return _pictures(path, chosen) if _is_picture(path) else _film(path, chosen)
    if isinstance(source, np.ndarray):
        return _array(source, chosen, name)
    if isinstance(source, list | tuple) and source and all(isinstance(p, Image.Image) for p in source):
        return of_pictures(source, frames, name=name)
    if hasattr(source, "get_batch") or hasattr(source, "get_frames_at"):
        return _reader(source, chosen)
    raise VtpruneError(f"cannot read a video from {type(source).__name__}: give a file, pictures or an array of frames")


def of_pictures(pictures: Sequence[Image.Image], frames: int = 32, *, name: str = "the video") -> Video:
    """``frames`` evenly spaced ones of ``pictures`` in order as a video without times. Raises as :func:`read` does."""
    sizes = {p.size for p in pictures}
    if len(sizes) > 1:
        told = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)[:3])
        raise VtpruneError(f"the frames of {name} differ in size ({told} pixels): a video's frames have one")
    indices = _chosen(name, len(pictures), None, pictures[0].size if pictures else (1, 1), frames, None, None)
    return _video([np.asarray(pictures[i].convert("RGB")) for i in indices], len(pictures), None, indices, "pictures")


def is_animated(path: str | Path) -> bool:
    """Whether ``path`` is a picture file that holds several frames, one after the other in time."""
    path = Path(path)
    if not path.is_file() or not _is_picture(path):
        return False
    with images.opened(path, str(path)) as image:
        return image.format in ANIMATED and getattr(image, "n_frames", 1) > 1


def takes_videos(processor: Any) -> bool:
    """Whether ``processor`` has a place for videos; where it has none, their frames can be shown as pictures."""
    return getattr(processor, "video_processor", None) is not None


def pictures_of(video: Video) -> list[Image.Image]:
    """The frames as pictures; ``info["seconds"]``: when each is shown, where that is known."""
    pictures = [Image.fromarray(frame) for frame in video[0]]
    for picture, at in zip(pictures, seconds(video), strict=False):
        picture.info["seconds"] = at
    return pictures


def seconds(video: Video) -> list[float]:
    """When its frames are shown, where the file tells it of each of them; none otherwise. (A mean rate does not: frames
    of animated pictures, and of many videos, stand unequally long.)"""
    return list(getattr(video[1], "shown_at", ()))


def _chosen(
    name: str,
    there: int,
    rate: float | None,
    size: tuple[int, int],
    frames: int,
    start: float | None,
    end: float | None,
) -> np.ndarray:
    """Ascending numbers of the frames to take of ``there``, ``rate`` of them a second."""
    first, last = 0, there - 1
    if start is not None or end is not None:
        if not rate:
            raise VtpruneError(f"{name} does not say when its frames are shown, so none can be chosen by time")
        first = max(first, int(np.ceil(round((start or 0) * rate, 6))))
        last = last if end is None else min(last, int(np.floor(round(end * rate, 6))))
    if first > last:
        raise VtpruneError(f"{name} has no frames" + ("" if there < 1 else f" between {start or 0} and {end} seconds"))
    indices = np.linspace(first, last, min(last - first + 1, frames)).round().astype(int)
    if len(indices) * size[0] * size[1] > MOST_PIXELS:
        raise VtpruneError(
            f"{len(indices)} frames of {name}, {size[0]} x {size[1]} pixels each, are more than the limit of "
            f"{MOST_PIXELS // 1_000_000} megapixels: take fewer frames"
        )
    return indices


def _video(
    frames: Sequence[np.ndarray],
    there: int,
    rate: float | None,
    indices: np.ndarray,
    by: str,
    shown_at: Sequence[float] = (),
) -> Video:
    from transformers.video_utils import VideoMetadata

    height, width = frames[0].shape[:2]
    facts = VideoMetadata(
        total_num_frames=there,
        fps=rate,
        width=width,
        height=height,
        duration=there / rate if rate else None,
        video_backend=by,
        frames_indices=indices,
    )
    facts.shown_at = list(shown_at)  # seconds of each frame, of our own
    return np.stack(frames), facts


def _is_picture(path: Path) -> bool:
    """Whether Pillow knows the file by its first bytes, in one of :data:`vtprune.inputs.images.RASTER`'s formats."""
    with path.open("rb") as file:
        head = file.read(16)
    if head[4:12] == b"ftypavis" or head[4:12] == b"ftypavif":
        return True
    signs = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
    return head.startswith(signs) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _pictures(path: Path, chosen: Callable[..., np.ndarray]) -> Video:
    """Of an animated picture."""
    with images.opened(path, str(path)) as image:
        there = getattr(image, "n_frames", 1)
        if image.format not in ANIMATED or there < 2:
            raise VtpruneError(f"{path} is a still picture, not a video: give it as an image, or several as frames")
        seconds, kept = [], dict[int, np.ndarray]()
        # times first: they are in the frames, for WebP once these are read
        for frame in ImageSequence.Iterator(image):
            frame.load()
            seconds.append(frame.info.get("duration", 0) / 1000 or STILL)
        rate = there / sum(seconds)
        indices = chosen(there, rate, image.width, image.height)
        for i in indices.tolist():
            image.seek(i)
            kept[i] = np.asarray(images.eight_bits(image, str(path)).convert("RGB"))
        starts = [sum(seconds[:i]) for i in indices.tolist()]
        return _video([kept[i] for i in indices.tolist()], there, rate, indices, "pillow", starts)


def _film(path: Path, chosen: Callable[..., np.ndarray]) -> Video:
    """Of a video file, through PyAV."""
    try:
        import av
    except ImportError as e:
        raise VtpruneError("reading videos needs PyAV: pip install av") from e
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VtpruneError(f"cannot read the video {path}: it holds no pictures")
            stream = container.streams.video[0]
            # Matroska and WebM do not say how many there are
            there = stream.frames or sum(packet.pts is not None for packet in container.demux(stream))
            rate = float(stream.average_rate) if stream.average_rate else None
            indices = chosen(there, rate, stream.width, stream.height)
            kept, times = dict[int, np.ndarray](), dict[int, float | None]()
        wanted = set(indices.tolist())
        with av.open(str(path)) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if i in wanted:
                    kept[i], times[i] = frame.to_ndarray(format="rgb24"), frame.time
                if len(kept) == len(wanted):
                    break
    except (OSError, ValueError, IndexError) as e:
        raise VtpruneError(f"cannot read the video {path}: {str(e).strip() or type(e).__name__}") from e
    if len(kept) < len(wanted):
        raise VtpruneError(f"cannot read the video {path}: of {there} frames that it says it holds some are missing")
    shown_at = [at for at in times.values() if at is not None]  # in order; all of them or none
    timed = shown_at if len(shown_at) == len(kept) else []
    return _video([kept[i] for i in indices.tolist()], there, rate, indices, "pyav", timed)


def _array(frames: np.ndarray, chosen: Callable[..., np.ndarray], name: str) -> Video:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise VtpruneError(
            f"{name} is an array of {frames.dtype} {list(frames.shape)}; frames are uint8 [frames, height, width, 3]"
        )
    indices = chosen(len(frames), None, frames.shape[2], frames.shape[1])
    return _video(list(frames[indices]), len(frames), None, indices, "array")


def _reader(source: Any, chosen: Callable[..., np.ndarray]) -> Video:
    """decord's ``VideoReader``, torchcodec's ``VideoDecoder``."""
    if hasattr(source, "get_batch"):
        rate, (height, width) = float(source.get_avg_fps()), source[0].shape[:2]
    else:
        facts = source.metadata
        rate, height, width = float(facts.average_fps), facts.height, facts.width
    indices = chosen(len(source), rate, width, height)
    if hasattr(source, "get_batch"):
        return _video(list(source.get_batch(indices.tolist()).asnumpy()), len(source), rate, indices, "decord")
    frames = source.get_frames_at(indices=indices.tolist()).data.permute(0, 2, 3, 1).cpu().numpy()
    return _video(list(frames), len(source), rate, indices, "torchcodec")
