"""easy-VQA (PyPI package ``easy-vqa``, MIT): one coloured shape per 64 x 64 image, 4,000 / 1,000 images, 13 answers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

TYPES = ("color", "shape", "yes/no")
_COLORS = {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"}


@dataclass(frozen=True)
class EasyQuestion:
    """``image``: path of a PNG file; ``type``: one of :data:`TYPES`, told by the answer."""

    image: str
    text: str
    answer: str

    @property
    def type(self) -> str:
        return "yes/no" if self.answer in ("yes", "no") else "color" if self.answer in _COLORS else "shape"


@functools.lru_cache(maxsize=2)
def questions(split: str) -> tuple[EasyQuestion, ...]:
    """All questions of ``split`` (``train`` or ``test``), in the package's order. Raises ``ModuleNotFoundError``
    without the package, ``ValueError`` for a split."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; there are train, test")
    try:
        import easy_vqa
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("easy-VQA is not installed: pip install easy-vqa") from e
    texts, answers, ids = getattr(easy_vqa, f"get_{split}_questions")()
    folder = Path(easy_vqa.__file__).parent / "data" / split / "images"
    return tuple(
        EasyQuestion(str(folder / f"{i}.png"), normalise(q), a) for q, a, i in zip(texts, answers, ids, strict=True)
    )


def normalise(question: str) -> str:
    """``"What color is it?"`` becomes ``"what color is it ?"``: lower case, the question mark a word of its own."""
    return question.lower().replace("?", " ?").replace("  ", " ").strip()
