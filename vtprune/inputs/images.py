"""Reading image files safely."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..core.ledger import UndoLedger
from ..core.types import VtpruneError

MEGAPIXELS = 50

# Formats that are pixels and nothing else: Pillow also reads PostScript (through Ghostscript), PDF-like containers and
# formats that nobody sends as a picture.
RASTER = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")


@contextmanager
def whole_pictures() -> Iterator[None]:
    """Damaged pictures are errors inside, also where another library has told Pillow to fill them up (lmms-eval
    does)."""
    ledger = UndoLedger()
    ledger.replace(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    try:
        yield
    finally:
        ledger.undo()


def open_image(path: str | Path) -> Image.Image:
    """The image file ``path``, upright and in RGB.

    Raises:
        VtpruneError: the file is missing, is no image of :data:`RASTER`'s formats, is damaged, has more than
            :data:`MEGAPIXELS` million pixels (as the header says, before decoding), or has values beyond 16 bits.
    """
    path = Path(path)
    if path.is_dir():
        raise VtpruneError(f"{path} is a folder, not an image file")
    if not path.is_file():
        raise VtpruneError(f"no such image file: {path}")
    return read_image(path, str(path))


def read_image(file: Path | BinaryIO, name: str) -> Image.Image:
    """As :func:`open_image`, from a file that is there; messages call it ``name``."""
    with opened(file, name) as image:
        return eight_bits(ImageOps.exif_transpose(image), name).convert("RGB")


@contextmanager
def opened(file: Path | BinaryIO, name: str) -> Iterator[Image.Image]:
    """A picture as Pillow opens it, its pixels not read yet; raises as :func:`open_image` does, also for what is read
    of it inside."""
    Image.init()  # else only some formats are known yet
    formats = [name for name in RASTER if name in Image.OPEN]  # AVIF, WEBP and JPEG2000 are not in every build
    with warnings.catch_warnings(), whole_pictures():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
        try:
            with Image.open(file, formats=formats) as image:
                if image.width * image.height > MEGAPIXELS * 1_000_000:
                    raise VtpruneError(
                        f"{name} has {image.width} x {image.height} pixels; the limit is {MEGAPIXELS} megapixels"
                    )
                yield image
        except VtpruneError:
            raise
        except UnidentifiedImageError as e:
            raise VtpruneError(f"{name} is not an image in a format that is read here ({', '.join(formats)})") from e
        except Image.DecompressionBombError as e:
            raise VtpruneError(f"{name} has far more than {MEGAPIXELS} megapixels") from e
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as e:
            raise VtpruneError(f"cannot read {name}: {getattr(e, 'strerror', None) or e}") from e


def eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey values of 16 bits as 8: Pillow's own conversion would cut them off at 255, which makes nearly everything
    white."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise VtpruneError(f"{name} has grey values of 32 bits, whose range is not known")
    return Image.fromarray((values // 257).astype(np.uint8))
