"""Questions about images for families whose processor alone knows how an image is laid out: tiles, patches of any
number, grids. Each step runs the tower on the processor's own output."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.planning import bind
from ..core.types import UnsupportedError, VtpruneError
from ..inputs import chats
from .data import Answers, Spoken, padded
from .questions import Item

PLAIN = ("input_ids", "attention_mask")
OTHERWISE = {"paligemma": "its prompts are read in both directions, and what is answered needs token types of its own"}


@dataclass(frozen=True)
class Asked(Spoken):
    """One question; ``follows``: what else the processor says of every token of the prompt."""

    follows: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Processed(Answers):
    """Images as the processor gives them (tensors by name, images along the first axis), and the questions."""

    images: list[dict[str, Tensor]]
    rows: list[Asked]
    pad: int = 0

    @property
    def shown(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """What tells them from others."""
        told = hashlib.sha256(repr(self.rows).encode())
        for image in self.images:
            for name, values in sorted(image.items()):
                told.update(f"{name}{tuple(values.shape)}".encode() + values.float().numpy().tobytes())
        return told.hexdigest()[:16]

    def batch(self, rows: list[Asked], device: torch.device) -> dict[str, Any]:
        """Right-padded keyword arguments of the stock forward for ``rows``; labels are -100 everywhere but on the
        answers."""
        out = padded([(r.ids, r.answer) for r in rows], self.pad)
        width = out["input_ids"].shape[1]
        for name in rows[0].follows:
            values = [r.follows[name] + [0] * (width - len(r.ids)) for r in rows]
            out[name] = torch.tensor(values)
        out |= together([self.images[r.source] for r in rows])
        return {name: values.to(device) for name, values in out.items()}


def together(images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several images as the processor gives them in one call: along the first axis, zeros behind the shorter ones."""
    out = {}
    for name in images[0]:
        parts = [image[name] for image in images]
        most = [max(p.shape[d] for p in parts) for d in range(1, parts[0].ndim)]
        out[name] = torch.cat(
            [F.pad(p, [n for m, s in zip(most[::-1], p.shape[:0:-1], strict=True) for n in (0, m - s)]) for p in parts]
        )
    return out


def encode(model: Any, processor: Any, items: Iterable[Item]) -> Processed:
    """``items`` through the processor and its chat template, question by question.

    Raises:
        UnsupportedError: a family whose answers are read in another way, or a processor whose batches are not its
            single outputs put together.
        VtpruneError: no questions, no end token, or whatever the processor refuses.
    """
    family, tokenizer = bind(model).geometry.family, processor.tokenizer
    if family in OTHERWISE:
        raise UnsupportedError(f"{family} cannot be trained here: {OTHERWISE[family]}")
    if tokenizer.eos_token_id is None:
        raise VtpruneError("the tokenizer has no end token (eos_token), which an answer is trained to end with")
    kind = next(model.parameters()).dtype
    images: list[dict[str, Tensor]] = []
    rows: list[Asked] = []
    samples: list[tuple[Any, str]] = []
    for number, (image, asked) in enumerate(items):
        for label, question, answer in asked:
            inputs = chats.prepare(processor, [image], [question])
            media, follows = _parts(inputs, kind)
            if len(images) == number:
                images.append(media)
                samples.append((image, question))
            reply = tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            rows.append(Asked(number, label, inputs["input_ids"][0].tolist(), reply, follows))
        if len(images) == number:
            raise VtpruneError(f"image {number + 1} has no question")
    if not rows:
        raise VtpruneError("there are no questions: give more scenes or easy-VQA images")
    _check_batches(processor, images, samples, kind)
    return Processed(images, rows, 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _parts(inputs: Any, kind: torch.dtype) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Of one prompt: what belongs to its image, and what follows its tokens."""
    strange = [name for name, values in inputs.items() if not isinstance(values, Tensor)]
    if strange or not inputs["attention_mask"].all():
        raise UnsupportedError(
            f"the processor gives {strange[0]} as no tensor: this family cannot be trained here"
            if strange
            else "the processor pads single prompts: this family cannot be trained here"
        )
    more = {name: values for name, values in inputs.items() if name not in PLAIN}
    follows = {name: v[0].tolist() for name, v in more.items() if _follows(v, inputs["input_ids"])}
    return {
        name: values.to(kind) if values.is_floating_point() else values
        for name, values in more.items()
        if name not in follows
    }, follows


def _follows(values: Tensor, ids: Tensor) -> bool:
    return values.shape == ids.shape and not values.is_floating_point()


def _check_batches(
    processor: Any, images: Sequence[dict[str, Tensor]], samples: Sequence[tuple[Any, str]], kind: torch.dtype
) -> None:
    """Raises :class:`UnsupportedError` if two images of unlike shapes are put together otherwise than the processor
    does it."""
    for one, other in _pairs(images):
        shown, asked = zip(samples[one], samples[other], strict=True)
        inputs = chats.prepare(processor, shown, asked)
        mine = together([images[one], images[other]])
        for name, values in mine.items():
            whole = inputs[name].to(kind) if inputs[name].is_floating_point() else inputs[name]
            if whole.shape != values.shape or not torch.equal(whole, values):
                raise UnsupportedError(
                    f"{type(processor).__name__} gives {name} of two images otherwise than of each alone: this family "
                    "cannot be trained here"
                )


def _pairs(images: Sequence[dict[str, Tensor]]) -> Iterator[tuple[int, int]]:
    """The first image beside the second, and beside the first of another shape."""
    if len(images) > 1:
        yield 0, 1
    shape = [values.shape for values in images[0].values()]
    for number, image in enumerate(images[2:], 2):
        if [values.shape for values in image.values()] != shape:
            yield 0, number
            return
