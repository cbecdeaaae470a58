"""What a model, a processor or a file may raise while it is used: reported, never hidden."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

# What a model or a picture raises when it fails in the middle of the work; ours to locate, not to hide.
FAILURES: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
FAILURES += (EOFError, SyntaxError, Image.DecompressionBombError, struct.error, zlib.error)  # Pillow on damaged files
