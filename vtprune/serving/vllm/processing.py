"""vLLM's processors with the number of placeholders that a recipe leaves of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from transformers.feature_extraction_utils import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLProcessingInfo
from vllm.model_executor.models.qwen2_vl import Qwen2VLMultiModalProcessor
from vllm.model_executor.models.qwen3_vl import Qwen3VLProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from ...core.types import Recent, VtpruneError
from ..eyes import Sizes
from ..placed import AXES, CHANNELS, check, placed
from .settings import LONGER, OURS, asked, recipe_of


def width(model_config: Any) -> int:
    """Numbers of an encoded row without its place: the language model's, and with DeepStack as many for each plane."""
    planes = getattr(model_config.hf_config.vision_config, "deepstack_visual_indexes", None) or ()
    return (1 + len(planes)) * int(model_config.get_inputs_embeds_size())


SKIPPED: Recent[str, int] = Recent(1_000_000)  # by an image's hash, how many positions of it have no row


class Parser(MultiModalDataParser):
    """Tensors are encoded rows, ``[K, W]`` or ``[1, K, W]`` each; vLLM takes some shapes of them for pictures."""

    def _parse_image_data(self, data: Any) -> Any:
        whole = list(data) if isinstance(data, torch.Tensor) and data.ndim > 2 else data
        each = whole if isinstance(whole, list) else [whole]
        if not any(isinstance(item, torch.Tensor) for item in each):
            return super()._parse_image_data(data)
        rows = [
            item[0] if isinstance(item, torch.Tensor) and item.ndim == 3 and len(item) == 1 else item for item in each
        ]
        if not all(isinstance(item, torch.Tensor) and item.ndim == 2 for item in rows):
            raise ValueError("tensors are taken for encoded rows, [K, W] each: send pictures as pictures")
        return super()._parse_image_data(rows)


class Info(BaseProcessingInfo):
    """What is known of a model with a recipe before any picture is seen."""

    @cached_property
    def recipe(self) -> Any:
        return recipe_of(self.get_hf_config())

    @cached_property
    def sizes(self) -> Sizes:
        """Raises :class:`VtpruneError` for a server that takes encoded images alone."""
        if self.recipe is None:
            raise VtpruneError("this server takes images that vtprune has encoded (Encoded.placed), and no others")
        return Sizes(self.get_hf_config(), self.recipe, self.ctx.model_config.dtype)

    @cached_property
    def width(self) -> int:
        return width(self.ctx.model_config)

    @cached_property
    def image_token(self) -> int:
        return int(self.get_hf_config().image_token_id)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_data_parser(self) -> MultiModalDataParser:
        embeds = self.ctx.model_config.get_multimodal_config().enable_mm_embeds
        return Parser(
            expected_hidden_size=self.width + CHANNELS if embeds else None,
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """A request may ask for every row."""
        return None if self.recipe is None else {"image": self.sizes.whole(self.sizes.rasters({}))}

    @cached_property
    def room(self) -> int:
        """Positions that a request may span."""
        return LONGER * int(self.get_hf_config().get_text_config().max_position_embeddings)


class Processor(BaseMultiModalProcessor):
    """As many placeholders as rows are left; each image's tensors come with a field ``vtprune``: the budget that the
    request asks for (what it is: 0 none, 1 tokens, 2 a fraction; and its value), the rows, and the positions that the
    whole image takes."""

    info: Info

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """A recipe is part of what an image becomes."""
        if self.info.recipe is None:
            return super()._get_mm_hashes(inputs)
        key = self.info.recipe.key()
        return {kind: [f"{h}-{key}" for h in hashes] for kind, hashes in super()._get_mm_hashes(inputs).items()}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        try:
            keep = asked(hf_kwargs)
            out = super()._apply_hf_processor_main(mm_items, _theirs(hf_kwargs))
            if (embeds := out.get("image_embeds")) is not None:
                out[OURS] = torch.stack([self._known(rows, keep) for rows in embeds])
            elif (images := self._images(out)) is not None:
                out[OURS] = torch.stack([self._fact(image, keep) for image in images])
        except VtpruneError as e:
            raise ValueError(str(e)) from e
        return out

    def _images(self, out: BatchFeature) -> list[dict[str, Any]] | None:
        """What the sizes of each image follow from."""
        pixels = out.get("pixel_values")
        return None if pixels is None else [{} for _ in pixels]

    def _fact(self, image: Mapping[str, Any], keep: int | float | None) -> torch.Tensor:
        rasters = self.info.sizes.rasters(image)
        kind = 0 if keep is None else 1 if isinstance(keep, int) else 2
        rows, span = self.info.sizes.left(rasters, keep, image), self.info.sizes.span(rasters)
        return torch.tensor([kind, keep or 0, rows, span], dtype=torch.float64)

    def _known(self, rows: torch.Tensor, keep: int | float | None) -> torch.Tensor:
        if keep is not None:
            raise VtpruneError("these images are encoded already: keep= is for where they are encoded")
        return torch.tensor([0, 0, len(rows), check(rows, self.info.width)], dtype=torch.float64)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            name: MultiModalFieldConfig.batched("image", keep_on_cpu=name == OURS)
            for name in ("pixel_values", "image_embeds", OURS)
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        def replacement(number: int) -> list[int]:
            return [self.info.image_token] * int(out_mm_kwargs["image"][number][OURS].data[2])

        return [PromptReplacement(modality="image", target=[self.info.image_token], replacement=replacement)]

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Raises :class:`ValueError` for prompts whose positions could not be told."""
        out = super().apply(inputs, timing_ctx)
        ids = out["prompt_token_ids"]
        if ids and ids[-1] == self.info.image_token:
            raise ValueError("a prompt has to end with text, behind its last image")
        length = len(ids)
        for name, item in zip(out["mm_hashes"].get("image", ()), out["mm_kwargs"].get("image", ()), strict=True):
            if item is not None:  # else the engine has it already
                SKIPPED[name] = int(item[OURS].data[3] - item[OURS].data[2])
            if name not in SKIPPED:
                raise ValueError("it is not known any more how large one of these images was: send it again")
            length += SKIPPED[name]
        room = self.info.room - self.info.ctx.model_config.max_model_len
        if length > room:
            raise ValueError(f"whole, this prompt would take {length} positions, of which the model has {room} for it")
        return out


def _theirs(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in kwargs.items() if name != OURS}


class DummyInputs(BaseDummyInputsBuilder):
    """Images of the size that all have; for a server of encoded images as many rows as a large image may have."""

    ROWS: ClassVar[int] = 4096

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        image, end = self.info.get_hf_processor().image_token, self.info.get_tokenizer().eos_token
        return str(image) * mm_counts.get("image", 0) + str(end)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> dict[str, Any]:
        count = mm_counts.get("image", 0)
        if self.info.recipe is None:
            return {"image": self._rows(min(seq_len // 2, self.ROWS), count)}
        side = self.info.get_hf_config().vision_config.image_size
        return {"image": self._get_dummy_images(width=side, height=side, num_images=count)}

    def _rows(self, rows: int, count: int) -> list[torch.Tensor]:
        """``count`` times ``rows`` placed rows."""
        offsets = torch.arange(rows).expand(AXES, -1)
        return [placed(torch.zeros(rows, self.info.width), offsets, rows)] * count


class AnySize(Info):
    """Images have as many tokens as their size gives."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_max_image_tokens()}


class QwenInfo(AnySize, Qwen2_5_VLProcessingInfo):
    """Images alone."""


class Qwen3Info(AnySize, Qwen3VLProcessingInfo):
    """Images alone."""

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        supported = BaseProcessingInfo.get_supported_mm_processor_kwargs(self)
        supported["images_kwargs"] |= {"min_pixels", "max_pixels"}
        return supported


class QwenProcessor(Processor, Qwen2VLMultiModalProcessor):
    """Images of any size."""

    info: QwenInfo

    def _images(self, out: BatchFeature) -> list[dict[str, Any]] | None:
        grids = out.get("image_grid_thw")
        if grids is None:
            return None
        each = [{"image_grid_thw": grid[None]} for grid in grids]
        if self.info.sizes.reads_pixels:
            pixels = out["pixel_values"].split(grids.prod(1).tolist())
            each = [{**image, "pixel_values": own} for image, own in zip(each, pixels, strict=True)]
        return each

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        ours = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        if "image_embeds" in hf_inputs:
            return ours
        theirs = Qwen2VLMultiModalProcessor._get_mm_fields_config(self, hf_inputs, _theirs(hf_processor_mm_kwargs))
        return {**theirs, OURS: ours[OURS]}


class QwenDummyInputs(DummyInputs):
    """Images of the largest size."""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> dict[str, Any]:
        if self.info.recipe is None:
            return super().get_dummy_mm_data(seq_len, mm_counts, mm_options)
        size, count = self.info.get_image_size_with_most_features(), mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=size.width, height=size.height, num_images=count)}
