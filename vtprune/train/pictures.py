"""Pictures with labels, for bare vision transformers with a classification head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.types import UnsupportedError, VtpruneError
from ..inputs.images import open_image
from .data import Rows

if TYPE_CHECKING:
    from PIL.Image import Image

DIGITS = "digits"  # scikit-learn's
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN_DIGITS, INK = 1297, 0.7  # of 1797; of a digit's square, the rest is margin

Prepare = Callable[[Sequence["Image"]], Tensor]  # images to [n, 3, H, W]
Labelled = tuple[Callable[[], "Image"], str]  # what opens a picture, and the name of its class


@dataclass(frozen=True)
class Picture:
    """One picture and the number of its class."""

    source: int
    kind: str
    label: int


@dataclass(frozen=True)
class Classified:
    """What a model gives for a batch: ``loss``, ``logits`` ``[B, classes]`` and the model's own ``output``."""

    loss: Tensor
    logits: Tensor
    output: Any


@dataclass(frozen=True)
class Pictures(Rows):
    """``images`` ``[I, 3, H, W]``, and which class each is of."""

    images: Tensor
    rows: list[Picture]
    classes: tuple[str, ...]
    noun = "pictures"

    @property
    def shown(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """What tells them from others."""
        told = hashlib.sha256(repr((self.rows, self.classes)).encode())
        told.update(self.images.float().numpy().tobytes())
        return told.hexdigest()[:16]

    def batch(self, rows: list[Picture], device: torch.device) -> dict[str, Any]:
        """``pixel_values`` ``[B, 3, H, W]`` and ``labels`` ``[B]``."""
        labels = torch.tensor([r.label for r in rows])
        return {"pixel_values": self.images[[r.source for r in rows]].to(device), "labels": labels.to(device)}

    def call(self, model: Any, inputs: Mapping[str, Any], asks: Mapping[str, Any]) -> Classified:
        """The model's own forward, without the labels; the loss is the mean cross-entropy of the pictures. Raises
        :class:`UnsupportedError` for a model without a classification head."""
        output = logits_of(model, inputs["pixel_values"], **asks)
        logits = output if isinstance(output, Tensor) else output.logits
        if logits.shape[-1] != len(self.classes):
            raise VtpruneError(f"the model knows {logits.shape[-1]} classes, and the pictures {len(self.classes)}")
        return Classified(F.cross_entropy(logits.float(), inputs["labels"]), logits, output)

    def counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """Of how many pictures the loss is the mean."""
        return torch.tensor(len(inputs["labels"]), device=inputs["labels"].device)

    def right(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """``[B]`` bool: the picture's class has the highest logit."""
        return output.logits.argmax(-1) == inputs["labels"]


def logits_of(model: Any, pixels: Tensor, **asks: Any) -> Any:
    """What ``model`` gives for ``pixels``: a tensor of logits, or an output with ``logits``. Raises
    :class:`UnsupportedError` if there are none."""
    output = model(pixel_values=pixels, **asks) if hasattr(model, "main_input_name") else model(pixels, **asks)
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise UnsupportedError(f"a {type(model).__name__} gives no logits: it has no classification head")
    return output


# ------------------------------------------------------------------------------------------------ where they come from


def folder_items(path: Path) -> list[Labelled]:
    """The pictures of a folder with one sub-folder for each class, by name. Raises :class:`VtpruneError` for no such
    folder, less than two classes and a class without pictures."""
    if not path.is_dir():
        raise VtpruneError(f"no such folder {path}: pictures lie in one sub-folder for each class")
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise VtpruneError(f"{path} holds {len(classes)} sub-folders: at least two classes, each in one of its own")
    found: list[Labelled] = []
    for folder in classes:
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        if not files:
            raise VtpruneError(f"{folder} holds no pictures")
        found += [(_opener(file), folder.name) for file in files]
    return found


def _opener(file: Path) -> Callable[[], Image]:
    return lambda: open_image(file)


def digit_items(split: str) -> list[Labelled]:
    """scikit-learn's 1797 digits, black on white, 192 x 192: 1297 to train on and 500 to compare on, as many of each
    class in proportion, always the same. ``split``: ``"train"`` or ``"test"``."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as e:
        raise VtpruneError(f"the digits come with scikit-learn: pip install 'vtprune[train]' ({e})") from e
    data = load_digits()
    numbers = train_test_split(
        np.arange(len(data.target)), train_size=TRAIN_DIGITS, stratify=data.target, random_state=0
    )[split == "test"]
    return [(_drawn(data.images[i]), str(data.target[i])) for i in numbers]


def _drawn(ink: Any) -> Callable[[], Image]:
    def draw() -> Image:
        from PIL import Image

        inner, side = round(INK * 192), 192
        paper = Image.new("L", (side, side), 255)
        digit = Image.fromarray((255 - ink * (255 / 16)).astype(np.uint8))
        paper.paste(digit.resize((inner, inner), Image.Resampling.BICUBIC), ((side - inner) // 2,) * 2)
        return paper.convert("RGB")

    return draw


def aside_by_class(items: Sequence[Labelled], every: int) -> tuple[list[Labelled], list[Labelled]]:
    """``items`` to train on, and of each class every so many-th to compare on. Raises :class:`VtpruneError` for a class
    of which nothing would be left."""
    counts: dict[str, int] = {}
    kept: list[Labelled] = []
    other: list[Labelled] = []
    for item in items:
        counts[item[1]] = counts.get(item[1], 0) + 1
        (kept if counts[item[1]] % every else other).append(item)
    if few := [name for name, count in counts.items() if count < every]:
        raise VtpruneError(
            f"class {few[0]} has {counts[few[0]]} pictures, too few to keep one in {every} for the comparison: give "
            "more, or --eval-data"
        )
    return kept, other


# --------------------------------------------------------------------------------------------------------- as a tensor


def encode(items: Iterable[Labelled], prepare: Prepare, classes: Sequence[str], *, size: int = 64) -> Pictures:
    """``items`` as ``prepare`` makes them, ``size`` at a time. Raises :class:`VtpruneError` for a class that is not one
    of ``classes``, and for pictures of unlike shapes."""
    stored: list[Tensor] = []
    rows: list[Picture] = []
    numbers = {name: i for i, name in enumerate(classes)}
    for part in _parts(items, size):
        stored.append(prepare([draw() for draw, _ in part]))
        for _, name in part:
            if name not in numbers:
                raise VtpruneError(f"there is a class {name!r}, which is none of {', '.join(classes)[:200]}")
            rows.append(Picture(len(rows), "accuracy", numbers[name]))
    if not rows:
        raise VtpruneError("there are no pictures")
    if len({t.shape[1:] for t in stored}) > 1:
        raise VtpruneError("the model's processor gives pictures of unlike sizes, which cannot share a batch")
    return Pictures(torch.cat(stored), rows, tuple(classes))


def _parts(items: Iterable[Labelled], size: int) -> Iterator[list[Labelled]]:
    part: list[Labelled] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def squared(side: int) -> Prepare:
    """Resized bicubically to ``side`` x ``side`` and normalised as ImageNet's pictures are."""

    def prepare(images: Sequence[Image]) -> Tensor:
        from PIL import Image

        rows = [torch.from_numpy(np.array(i.resize((side, side), Image.Resampling.BICUBIC))) for i in images]
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        return (torch.stack(rows).permute(0, 3, 1, 2) / 255 - mean) / std

    return prepare
