"""Questions about images to train and compare on: generated scenes, easy-VQA or a user's own, tokenised; the tower sees
each image once."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.planning import bind
from ..core.types import UnsupportedError, VtpruneError
from ..data import easyvqa, scenes
from ..inputs.images import open_image
from ..models.engine.host import ENCODED, features
from .data import Answers, padded
from .frozen import arithmetic
from .texts import lines_of

if TYPE_CHECKING:
    from PIL.Image import Image

EASY, OWN = "easy-vqa", "own"
KINDS = (*scenes.ABILITIES, EASY, OWN)

Item = tuple["Image", list[tuple[str, str, str]]]  # an image and its (kind, question, answer)


@dataclass(frozen=True)
class Row:
    """One question about one image, as tokens."""

    image: int  # its number
    kind: str  # one of KINDS
    ids: list[int]  # the prompt with visual placeholders
    answer: list[int]  # the reply with its end token

    @property
    def source(self) -> int:
        return self.image


@dataclass(frozen=True)
class Questions(Answers):
    """Images, and the questions about them."""

    images: Tensor  # [I, N, C] visual tokens behind the projector, or [I, 3, H, W] pixels
    projected: bool  # which of the two
    rows: list[Row]
    pad: int = 0  # the padding token

    @property
    def shown(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """What tells them from others."""
        told = hashlib.sha256(repr(self.rows).encode())
        told.update(self.images.float().numpy().tobytes())
        return told.hexdigest()[:16]

    def batch(self, rows: list[Row], device: torch.device) -> dict[str, Any]:
        """Right-padded keyword arguments of the stock forward for ``rows``; labels are -100 everywhere but on the
        answers."""
        told = padded([(r.ids, r.answer) for r in rows], self.pad)
        out: dict[str, Any] = {name: values.to(device) for name, values in told.items()}
        images = self.images[[r.image for r in rows]].to(device)
        if not self.projected:
            return {**out, "pixel_values": images}
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return {**out, ENCODED: {"image": BaseModelOutputWithPooling(pooler_output=list(images))}}


def takes_projected(model: nn.Module) -> bool:
    """Whether the model's forward accepts visual tokens that were computed before (transformers 5.23 does, 5.17 does
    not)."""
    return ENCODED in inspect.signature(model.forward).parameters


def scene_items(split: str, start: int, stop: int, per_ability: int) -> Iterator[Item]:
    """Generated scenes ``start .. stop`` of ``split``."""
    from PIL import Image

    for i in range(start, stop):
        s = scenes.scene(i, split, per_ability=per_ability)
        yield Image.fromarray(s.image), [(q.ability, q.text, q.answer) for q in s.questions]


def easy_items(split: str, count: int) -> Iterator[Item]:
    """The first ``count`` images of easy-VQA, each with all of its questions."""

    if count == 0:
        return
    try:
        questions = easyvqa.questions(split)
    except ModuleNotFoundError as e:
        raise VtpruneError(f"{e}, or do without it: --easy 0 --eval-easy 0") from e
    grouped: dict[str, list[tuple[str, str, str]]] = {}
    for q in questions:
        if q.image in grouped or len(grouped) < count:
            grouped.setdefault(q.image, []).append((EASY, q.text, q.answer))
    for path, rows in grouped.items():
        yield open_image(path), rows


def own_items(path: Path) -> Iterator[Item]:
    """The questions of a user's file: a JSON object a line, ``{"image": FILE, "question": ..., "answer": ...}``, with
    files beside it or anywhere. Raises :class:`VtpruneError` for a line that is none."""
    grouped: dict[str, list[tuple[str, str, str]]] = {}
    for told in lines_of(path, ("image", "question", "answer")):
        grouped.setdefault(told["image"], []).append((OWN, told["question"], told["answer"]))
    for name, rows in grouped.items():
        yield open_image(path.parent / name), rows


def encode(
    model: Any,
    processor: Any,
    items: Iterable[Item],
    *,
    dtype: torch.dtype = torch.float32,
    size: int = 32,
    pixels: bool = False,
) -> Questions:
    """Tokenises ``items`` with the processor's chat template and, where the model allows it, runs tower and projector
    once per image (``size`` at a time); with ``pixels`` each forward runs the tower instead."""
    adapter = bind(model)
    geometry = adapter.geometry
    if geometry.family != "llava":
        raise UnsupportedError(
            "questions are laid out here for LLaVA, one run of visual tokens per image (of others by their processor; "
            f"options that are 'auto' then need a number); this is a {geometry.family} model"
        )
    tokenizer, tokens, place = processor.tokenizer, geometry.tokens, adapter.image_token
    projected, device = takes_projected(model) and not pixels, next(model.parameters()).device
    stored: list[Tensor] = []
    rows: list[Row] = []
    waiting: list[Image] = []

    def flush() -> None:
        if not waiting:
            return
        shown = processor.image_processor(waiting, return_tensors="pt")["pixel_values"]
        waiting.clear()
        if projected:
            with torch.no_grad(), arithmetic(model, dtype):
                shown = torch.stack(
                    list(features(model.get_image_features(pixel_values=shown.to(device, model.dtype))))
                )
        stored.append(shown.to("cpu", dtype if projected else model.dtype))

    for number, (image, asked) in enumerate(items):
        waiting.append(image)
        for kind, question, answer in asked:
            message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            ids = tokenizer(processor.apply_chat_template(message, add_generation_prompt=True)).input_ids
            if ids.count(place) != 1:
                raise VtpruneError(f"{question!r} stands for {ids.count(place)} images, and one belongs to it")
            at = ids.index(place)
            reply = tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            rows.append(Row(number, kind, ids[:at] + [place] * tokens + ids[at + 1 :], reply))
        if len(waiting) == size:
            flush()
    flush()
    if not rows:
        raise VtpruneError("there are no questions: give more scenes or easy-VQA images")
    return Questions(
        torch.cat(stored), projected, rows, 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
