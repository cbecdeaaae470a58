"""Checks of what is asked: questions and right answers that a model can take, pictures and videos as parts of a
message."""

from __future__ import annotations

import mimetypes
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vtprune.core.types import VtpruneError
from vtprune.inputs import chats, images, videos

LONGEST_QUESTION = 2000  # characters
LONGEST_TRUTH = 500
LARGEST_SIDE = 2048  # pixels of a picture before it goes to the processor
MOST_NEW_TOKENS = 512
MOST_FRAMES, FEW_FRAMES = 32, 8  # of a video: for a processor that takes videos, and for one that sees pictures
Shown = Image.Image | str | os.PathLike  # a picture, or the path of a picture or video


def short(text: str, what: str, most: int) -> None:
    """Raises :class:`VtpruneError` for a text of more than ``most`` characters, and as :func:`proper` does."""
    if len(text) > most:
        raise VtpruneError(f"{what} has {len(text)} characters; at most {most} are taken")
    proper(text, what)


def proper(text: str, what: str) -> None:
    """Raises :class:`VtpruneError` for a text with half of a character, which no file, picture or page can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise VtpruneError(f"{what} holds half of a character (a lone surrogate)") from e


def checked_question(text: str | None, processor: Any) -> str:
    """``text`` without spaces around it. Raises :class:`VtpruneError` if it is empty, too long, no proper text, or
    holds a token with a meaning of its own."""
    question = (text or "").strip()
    if not question:
        raise VtpruneError("type a question")
    short(question, "the question", LONGEST_QUESTION)
    tokenizer = getattr(processor, "tokenizer", None)
    special = [
        getattr(processor, "image_token", None),
        getattr(processor, "video_token", None),
        *getattr(tokenizer, "all_special_tokens", ()),
    ]
    present = [token for token in special if token and token in question]
    if present:
        raise VtpruneError(f"the question must not contain {present[0]}: it means something else to this model")
    return question


def is_video(path: str | os.PathLike) -> bool:
    """Told by the file's name, or an animated picture. Raises :class:`VtpruneError` for a picture that cannot be
    read."""
    film = (mimetypes.guess_type(os.fspath(path))[0] or "").startswith("video/")
    return film or videos.is_animated(Path(path))


def parts_of(shown: Shown | None, processor: Any) -> list[dict[str, Any]]:
    """Message parts for :func:`vtprune.inputs.chats.prepare_chats`; pictures are upright, in RGB and at most
    :data:`LARGEST_SIDE` pixels long. A video or an animated picture has at most :data:`MOST_FRAMES` frames, for a
    processor that takes no videos :data:`FEW_FRAMES` pictures.

    Raises :class:`VtpruneError` for ``None`` and for files that cannot be read
    (:func:`vtprune.inputs.images.open_image`, :func:`vtprune.inputs.videos.read`)."""
    if shown is None:
        raise VtpruneError("choose a picture")
    if isinstance(shown, Image.Image):
        if shown.width * shown.height > images.MEGAPIXELS * 1_000_000:
            raise VtpruneError(
                f"the picture has {shown.width} x {shown.height} pixels; the limit is {images.MEGAPIXELS} megapixels"
            )
        image = ImageOps.exif_transpose(shown).convert("RGB")
    elif is_video(shown):
        most = MOST_FRAMES if videos.takes_videos(processor) else FEW_FRAMES
        return chats.video_parts(processor, videos.read(Path(shown), most))
    else:
        image = images.open_image(Path(shown))
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))  # leaves smaller ones as they are
    return [chats.image_part(image)]


def check_length(max_new_tokens: int) -> None:
    """Raises :class:`VtpruneError` for anything but a whole number from 1 to :data:`MOST_NEW_TOKENS`."""
    whole = isinstance(max_new_tokens, int) and not isinstance(max_new_tokens, bool)
    if not whole or not 1 <= max_new_tokens <= MOST_NEW_TOKENS:
        raise VtpruneError(f"max_new_tokens={max_new_tokens!r} is not a whole number from 1 to {MOST_NEW_TOKENS}")
