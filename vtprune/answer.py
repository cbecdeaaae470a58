"""Questions about images: reading a file safely, and batched greedy answers through the processor's chat template."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .types import VtpruneError

MEGAPIXELS = 50


def open_image(path: str | Path) -> Image.Image:
    """The image file ``path``, upright and in RGB.

    Raises:
        VtpruneError: the file is missing, is no image, is damaged, or has more than :data:`MEGAPIXELS` million pixels (told from the header, before decoding).
    """
    path = Path(path)
    if path.is_dir():
        raise VtpruneError(f"{path} is a folder, not an image file")
    if not path.is_file():
        raise VtpruneError(f"no such image file: {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
        try:
            with Image.open(path) as image:
                if image.width * image.height > MEGAPIXELS * 1_000_000:
                    raise VtpruneError(f"{path} has {image.width} x {image.height} pixels; the limit is {MEGAPIXELS} megapixels")
                return ImageOps.exif_transpose(image).convert("RGB")
        except VtpruneError:
            raise
        except UnidentifiedImageError as e:
            raise VtpruneError(f"{path} is not an image that Pillow can read") from e
        except Image.DecompressionBombError as e:
            raise VtpruneError(f"{path} has far more than {MEGAPIXELS} megapixels") from e
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as e:
            raise VtpruneError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e


def prepare(processor: Any, images: Sequence[Image.Image | Sequence[Image.Image]], questions: Sequence[str]) -> Any:
    """Left-padded model inputs for one question about each image, or about several: ``input_ids`` and ``attention_mask`` ``[B, T]``, ``pixel_values``
    ``[B, 3, H, W]``.

    Raises :class:`VtpruneError` for lists of unequal or zero length and for a processor without chat template.
    """
    if not images or len(images) != len(questions):
        raise VtpruneError(f"give one question per image; got {len(images)} images and {len(questions)} questions")
    if not getattr(processor, "chat_template", None):
        raise VtpruneError(f"{type(processor).__name__} has no chat template, so it cannot say how a question is put to the model")
    texts = []
    for shown, question in zip(images, questions, strict=True):
        content = [{"type": "image"}] * (1 if isinstance(shown, Image.Image) else len(shown)) + [{"type": "text", "text": question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    start = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    special = not (start and texts[0].startswith(start))  # a template that writes the start token itself must not get a second one
    return processor(images=list(images), text=texts, padding=True, padding_side="left", add_special_tokens=special, return_tensors="pt")


@torch.no_grad()
def generate(model: Any, processor: Any, inputs: Any, max_new_tokens: int = 5) -> list[str]:
    """Greedy continuations of ``inputs`` (see :func:`prepare`), decoded and stripped."""
    out = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    return [text.strip() for text in processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


def ask(model: Any, processor: Any, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int = 5) -> list[str]:
    """The model's greedy answers to one question about each image, as one batch."""
    return generate(model, processor, prepare(processor, images, questions), max_new_tokens)
