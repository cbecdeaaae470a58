"""A model's tower and projector without its language model: what an engine that has one of its own needs of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.composition import Planned
from ..core.planning import bind, for_rasters, plan
from ..core.recipe import Recipe
from ..core.types import Action, Cut, Geometry, TokenView, UnsupportedError, VtpruneError
from ..inputs.loading import quiet
from .encode import Encoder, check_stages

TEXT = 0  # in prompts for such a model: any token that is no picture
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")

Rasters = tuple[tuple[int, int], ...]


def without_language_model(config: Any) -> Any:
    """``config`` with a language model of the same width that has one layer, no memory to speak of, and a handful of
    tokens: :data:`TEXT`, and one for each of :data:`TOKENS` that the family has."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.intermediate_size = 1, 8
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    text.vocab_size, text.pad_token_id, text.bos_token_id, text.eos_token_id = 2 * len(TOKENS), TEXT, TEXT, TEXT
    small.tie_word_embeddings = text.tie_word_embeddings = False
    for number, name in enumerate(TOKENS, start=TEXT + 1):
        if getattr(small, name, None) is not None:
            small.update({name: number})
    return small


def load(folder: str, config: Any, dtype: torch.dtype, device: torch.device | str, **where: Any) -> Any:
    """Tower and projector of the checkpoint in ``folder``, in a model of :func:`without_language_model`. ``where``:
    keywords of ``from_pretrained`` that say where the files are.

    Raises:
        VtpruneError: a checkpoint that lacks a weight of them, or has one of another shape.
    """
    from transformers import AutoModelForImageTextToText

    small = without_language_model(config)
    with quiet():
        model, told = AutoModelForImageTextToText.from_pretrained(
            folder, config=small, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **where
        )
    spared = {id(p) for part in (model.model.language_model, model.lm_head) for p in part.parameters()}
    needed = {name for name, p in model.named_parameters() if id(p) not in spared}
    wrong = sorted(needed & {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])})
    if wrong:
        raise VtpruneError(f"the checkpoint in {folder} has no {wrong[0]} of the shape that its configuration says")
    model.to(device).eval().requires_grad_(False)
    model.model.language_model.layers.to("meta")  # never run
    return model


class Sizes:
    """How many rows a recipe leaves of an image, by the model's configuration and, for methods that decide in front of
    the tower, by what the processor makes of the image; no weight is read.

    Args:
        config: the model's.
        recipe: what its images are encoded with.
        dtype: the tower's, in which it is given the pixels.

    Raises:
        UnsupportedError: a recipe that cannot be encoded; whose numbers of rows follow from what the tower makes of the
            picture; that reads the question, or weighs images against each other: an engine's encoder sees one image
            alone.
    """

    def __init__(self, config: Any, recipe: Recipe, dtype: torch.dtype = torch.float32):
        from transformers import AutoModelForImageTextToText

        self.dtype = dtype
        with torch.device("meta"):
            self.adapter = bind(AutoModelForImageTextToText.from_config(without_language_model(config)))
        layers = config.get_text_config().num_hidden_layers
        self.geometry, self.recipe = replace(self.adapter.geometry, llm_layers=layers), recipe
        if "tile" in self.geometry.per:
            raise UnsupportedError(
                f"{self.geometry.family} ends the rows of its pictures with tokens that leave with the last of a row: "
                "how many rows are left is known only behind the recipe; send images that vtprune has encoded"
            )
        check_stages(self.geometry, recipe, None)
        self._counted(self.geometry, recipe)

    @staticmethod
    def _counted(geometry: Geometry, recipe: Recipe) -> list[Planned]:
        """The stages of a recipe whose numbers of rows are known beforehand."""
        stages = plan(geometry, recipe)
        for stage, method, cuts in stages:
            info = method.info
            if info.video:
                raise UnsupportedError(
                    f"{info.name} compares the frames of a video, and an engine's encoder is asked for images here: "
                    "send videos that vtprune has encoded"
                )
            read = {need for cut in cuts for need in method.info.needs.get(cut.kind, ())}
            if "text" in read:
                raise UnsupportedError(
                    f"{info.name} reads the question, which an encoder inside an engine is not given (images are "
                    "cached without it): send images that vtprune has encoded"
                )
            if _by_pixels(method):
                continue
            budget = info.keep if stage.keep is None else stage.keep
            counted = all(cut.keep is not None for cut in cuts if cut.action is not Action.NOTE)
            if not info.exact or (info.budgeted and budget is None) or not counted:
                raise UnsupportedError(
                    f"how many rows {info.name} leaves is not known before it has seen the picture, and an engine "
                    "wants to know: give it a budget keep=, or send images that vtprune has encoded"
                )
        return stages

    def rasters(self, inputs: Mapping[str, Any]) -> Rasters:
        """Of the first image in ``inputs``, rows and columns of each raster."""
        return tuple(raster.grid for raster in next(self.adapter.images(dict(inputs))))

    def whole(self, rasters: Rasters) -> int:
        """Visual tokens of an image of these rasters."""
        return sum(rows * columns for rows, columns in rasters)

    def span(self, rasters: Rasters) -> int:
        """Positions that such an image takes: with three axes those of its longest side."""
        return max(max(grid) for grid in rasters) if self.geometry.mrope else self.whole(rasters)

    @cached_property
    def reads_pixels(self) -> bool:
        """Whether :meth:`left` has to be given the image."""
        return any(_by_pixels(method) for _, method, _ in self._counted(self.geometry, self.recipe))

    def left(self, rasters: Rasters, keep: int | float | None = None, image: Mapping[str, Tensor] | None = None) -> int:
        """Rows that are left of an image of these rasters, with another budget ``keep``; ``image`` is what the family's
        processor makes of it (:attr:`reads_pixels`)."""
        here = for_rasters(self.geometry, rasters) if self.geometry.variable else self.geometry
        recipe = self.recipe if keep is None else self.recipe.override(keep=keep)
        counts = [here.tokens]
        for _, method, cuts in self._counted(here, recipe):
            for cut in cuts:
                if _by_pixels(method):
                    assert image is not None
                    counts.append(self._unlike(method, cut, rasters, image))
                elif cut.keep is not None:
                    counts.append(cut.keep)
        return min(counts)

    def _unlike(self, method: Any, cut: Cut, rasters: Rasters, image: Mapping[str, Tensor]) -> int:
        """Rows of an image that a cut in front of the tower leaves."""
        tower = self.adapter.packed()
        pixels = tower.pixels({"hidden_states": image["pixel_values"].to(self.dtype)})
        blocks, first, left = pixels.unflatten(0, (-1, tower.fold**2)), 0, 0  # [N, group, channels, pixels of a patch]
        for rows, columns in rasters:
            n = rows * columns
            own = blocks[None, first : first + n]
            view = TokenView(
                features=own.flatten(2),
                valid=torch.ones(1, n, dtype=torch.bool),
                index=torch.arange(n)[None],
                size=torch.ones(1, n),
                protected=torch.zeros(1, n, dtype=torch.bool),
                grid=(rows, columns),
                sources={"pixel_blocks": lambda own=own: own},
            )
            left, first = left + int((method.select(view, cut).kept >= 0).sum()), first + n
        return left


def _by_pixels(method: Any) -> bool:
    """Whether it decides on what the processor makes of an image, in front of the tower."""
    return "pixel_blocks" in method.info.needs.get("pixels", ())


class Eyes:
    """Tower and projector of a ``model`` of :func:`load`, with a recipe: pixels in, placed rows out."""

    def __init__(self, model: Any, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self.adapter = bind(model)
        self.encoder: Encoder | None = None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def see(self, images: Sequence[Mapping[str, Tensor]], keep: int | float | None = None) -> list[Tensor]:
        """Of every image its rows, with DeepStack's planes behind each and their places, ``[K, W + CHANNELS]``.

        Args:
            images: of each what the family's processor makes of it, a batch of one.
            keep: another budget than the recipe's.
        """
        self._attach(self.recipe if keep is None else self.recipe.override(keep=keep))
        sizes = [sum(raster.tokens for raster in next(self.adapter.images(dict(image)))) for image in images]
        out: list[Tensor | None] = [None] * len(images)
        for size in dict.fromkeys(sizes):
            at = [i for i, n in enumerate(sizes) if n == size]
            for i, wide in zip(at, self._alike([images[i] for i in at], size), strict=True):
                out[i] = wide
        return [wide for wide in out if wide is not None]

    def _attach(self, recipe: Recipe) -> None:
        if self.encoder is not None and self.encoder.handle.recipe.key() != recipe.key():
            self.encoder.handle.remove()
            self.encoder = None
        if self.encoder is None:
            self.encoder = Encoder(self.model, recipe)

    def _alike(self, images: Sequence[Mapping[str, Tensor]], tokens: int) -> list[Tensor]:
        """Images of as many ``tokens``, in one batch of prompts that hold a picture and a word behind it."""
        assert self.encoder is not None
        ids = torch.full((len(images), tokens + 1), self.model.config.image_token_id)
        ids[:, -1] = TEXT
        ids = ids.to(self.device)
        inputs = {name: torch.cat([image[name] for image in images]).to(self.device) for name in images[0]}
        inputs = {n: v.to(self.model.dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        along = {name: (ids != TEXT).long() for name in self.adapter.follows}
        encoded = self.encoder({"input_ids": ids, "attention_mask": torch.ones_like(ids), **along, **inputs})
        return list(encoded.placed)
