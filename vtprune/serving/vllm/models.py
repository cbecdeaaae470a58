"""vLLM's models with vtprune's tower in front: their language models are vLLM's own, and so is everything that serves
them. Rows come with their places (:mod:`..placed`), of which the engine makes positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.model_executor.models.interfaces import (
    SupportsMRoPE,
    SupportsMultiModal,
    SupportsMultiModalPruning,
    SupportsPP,
)
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    StageMissingLayer,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.types import UnsupportedError
from .. import eyes
from ..placed import AXES, parted
from .processing import DummyInputs, Info, Processor, Qwen3Info, QwenDummyInputs, QwenInfo, QwenProcessor, width
from .settings import LONGER, OURS, recipe_of

# Weights that vtprune's tower loads, and what the others' names begin with; more files may lie beside them.
SKIPPED = ("vision_tower.", "multi_modal_projector.", "visual.", "image_newline")
TAKEN = ("model.", "language_model.", "lm_head.")


class Pruned:
    """What the models here have in common."""

    config: Any
    width: int  # numbers of a row without its place
    eyes: tuple[eyes.Eyes, ...] = ()  # a tuple: no module of this one, whose weights vLLM would load
    # what vLLM's own towers can do, and classes below inherit
    supports_mm_device_do_normalize: ClassVar[bool] = False
    supports_encoder_tp_data: ClassVar[bool] = False
    supports_tower_connector_lora: ClassVar[bool] = False

    def open_eyes(self, vllm_config: Any) -> None:
        """Loads tower and projector, unless images come encoded."""
        told, files = vllm_config.model_config, vllm_config.load_config
        self.width = width(told)
        recipe = recipe_of(told.hf_config)
        if recipe is None:
            return
        if told.multimodal_config.mm_device_do_normalize:
            raise UnsupportedError("mm_device_do_normalize gives the tower raw pixels: switch it off")
        if files.load_format not in ("auto", "hf", "safetensors"):
            raise UnsupportedError(f"--load-format {files.load_format} is not known to have a tower's weights")
        model = eyes.load(
            told.model,
            told.hf_config,
            told.dtype,
            vllm_config.device_config.device,
            revision=told.revision,
            cache_dir=files.download_dir,
            trust_remote_code=False,
        )
        self.eyes = (eyes.Eyes(model, recipe),)

    def embed_multimodal(self, **inputs: Any) -> list[Tensor]:
        """Of each image its rows and their places, ``[K, W + CHANNELS]``."""
        facts = inputs.pop(OURS, None)
        if facts is None:
            return []
        rows = inputs.get("image_embeds")
        if rows is None:
            rows = self._seen(inputs, [(int(fact[0]), float(fact[1])) for fact in facts])
        for wide, fact in zip(rows, facts, strict=True):
            left, span = len(wide), int(parted(wide[:1])[2])
            if left != int(fact[2]) or span != int(fact[3]):
                raise RuntimeError(
                    f"{left} rows of {span} positions are left of an image where the prompt has placeholders for "
                    f"{int(fact[2])} of {int(fact[3])}: this recipe cannot be served"
                )
        return list(rows)

    def _seen(self, inputs: dict[str, Any], budgets: list[tuple[int, float]]) -> list[Tensor]:
        """``budgets`` as the processor writes them: what they are (0 none, 1 tokens, 2 a fraction), and how much."""
        (seeing,) = self.eyes
        images = self._apart(inputs)
        out: list[Tensor | None] = [None] * len(images)
        for kind, value in dict.fromkeys(budgets):
            at = [i for i, other in enumerate(budgets) if other == (kind, value)]
            keep = (None, int(value), value)[kind]
            for i, wide in zip(at, seeing.see([images[i] for i in at], keep), strict=True):
                out[i] = wide
        return [wide for wide in out if wide is not None]

    def _apart(self, inputs: dict[str, Any]) -> list[dict[str, Tensor]]:
        """What the processor made of each image, as a batch of one."""
        return [{"pixel_values": pixels[None]} for pixels in inputs["pixel_values"]]

    # -------------------------------------------------------------------------------------------------------- positions

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Positions ``[3, T]`` of a prompt whose images are pruned: text stands where it stands in the whole prompt.
        Rows of an image, whose places are known when they are, have -1 less the image's first position."""
        position, column, parts = 0, 0, []
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            span, at = int(feature.data[OURS].data[3]), feature.mm_position
            parts.append(torch.arange(position, position + at.offset - column))
            position += at.offset - column
            parts.append(torch.full((at.length,), -1 - position))
            position, column = position + span, at.offset + at.length
        parts.append(torch.arange(position, position + len(input_tokens) - column))
        out = torch.cat(parts).expand(AXES, -1).contiguous()
        return out, position - column

    def recompute_mrope_positions(
        self,
        input_ids: Sequence[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Rows without their places, and positions with them: the rows are those of the first placeholders behind
        ``num_computed_tokens``."""
        positions = mrope_positions.clone()
        delta = int(positions[:, -1].max()) + 1 - len(input_ids)  # the last token is no image's
        if not multimodal_embeddings:
            return [], positions, delta
        parts = [parted(wide) for wide in multimodal_embeddings]
        offsets = torch.cat([o for _, o, _ in parts], 1).to(positions.device)
        ids = torch.as_tensor(input_ids, device=positions.device)
        marks = (ids == self.config.image_token_id).nonzero()[:, 0]
        at = marks[marks >= num_computed_tokens][: offsets.shape[1]]
        if len(at) != offsets.shape[1]:
            raise RuntimeError(f"{offsets.shape[1]} rows of images for {len(at)} placeholders")
        begun = positions[:, at]  # what is there already stays: a chunk may be computed again
        positions[:, at] = torch.where(begun < 0, -1 - begun + offsets, begun).to(positions.dtype)
        return [rows for rows, *_ in parts], positions, delta

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Raises :class:`RuntimeError` for an engine that did not ask :meth:`recompute_mrope_positions`."""
        if any(rows.shape[1] != self.width for rows in multimodal_embeddings or ()):
            raise RuntimeError(
                "this vLLM does not ask embeddings for their positions: it is not one that vtprune knows"
            )
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Those of the language model: :meth:`open_eyes` has loaded the others."""
        ours = (
            (name, w)
            for name, w in weights
            if name.startswith(TAKEN) and not name.removeprefix("model.").startswith(SKIPPED)
        )
        return AutoWeightsLoader(self).load_weights(ours, mapper=self.hf_to_vllm_mapper)  # type: ignore[attr-defined]


class OneAxis(Pruned, nn.Module, SupportsMultiModal, SupportsPP, SupportsMultiModalPruning, SupportsMRoPE):
    """A language model whose positions have one axis, of which the engine hands over three that are equal."""

    hf_to_vllm_mapper: ClassVar[WeightsMapper] = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "model.image_newline": "image_newline",
            "lm_head.": "language_model.lm_head.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<image>"

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        SupportsMultiModal.configure_mm_token_handling(self, config.text_config.vocab_size, [config.image_token_id])
        self.open_eyes(vllm_config)
        trained = config.text_config.max_position_embeddings
        with SupportsMultiModal._mark_language_model(self, vllm_config):
            # rows stand further back than there are tokens: the rotary table has to reach there
            config.text_config.max_position_embeddings = LONGER * trained
            try:
                self.language_model = init_vllm_registered_model(
                    vllm_config=vllm_config,
                    hf_config=config.text_config,
                    prefix=maybe_prefix(prefix, "language_model"),
                )
            finally:
                config.text_config.max_position_embeddings = trained
        _check_tables(self.language_model, LONGER * trained)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """``positions`` ``[3, T]``, three times the same."""
        if positions.ndim == 2:
            positions = positions[0]
        if intermediate_tensors is not None:
            inputs_embeds = None
        lm: Any = self.language_model
        return lm.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        lm: Any = self.language_model
        return lm.compute_logits(hidden_states)


def _check_tables(model: nn.Module, rows: int) -> None:
    """Every rotary table of a language model reaches as far as positions may."""
    tables = [t for m in model.modules() if isinstance(t := getattr(m, "cos_sin_cache", None), Tensor)]
    if not tables or any(len(t) < rows for t in tables):
        raise UnsupportedError(
            f"vLLM's {type(model).__name__} keeps no rotary table of {rows} positions, which pruned prompts may span"
        )


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class Llava(OneAxis):
    """LLaVA-1.5, with a CLIP, SigLIP or DINOv2 tower."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class LlavaOnevision(OneAxis):
    """LLaVA-OneVision, whose images have to come encoded."""


class _ThreeAxes(Pruned):
    """vLLM's own Qwen-VL without its tower."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.visual = StageMissingLayer("vision_tower")
        language_model: Any = self.language_model  # type: ignore[attr-defined]
        _check_tables(language_model, LONGER * vllm_config.model_config.hf_config.text_config.max_position_embeddings)
        self.open_eyes(vllm_config)

    def _apart(self, inputs: dict[str, Any]) -> list[dict[str, Tensor]]:
        pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"].cpu()
        flat = pixels if isinstance(pixels, Tensor) and pixels.ndim == 2 else torch.cat(list(pixels))
        parts = flat.split(grids.prod(1).tolist())
        return [{"pixel_values": p, "image_grid_thw": grid[None]} for p, grid in zip(parts, grids, strict=True)]


@MULTIMODAL_REGISTRY.register_processor(QwenProcessor, info=QwenInfo, dummy_inputs=QwenDummyInputs)
class Qwen25VL(_ThreeAxes, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(QwenProcessor, info=Qwen3Info, dummy_inputs=QwenDummyInputs)
class Qwen3VL(_ThreeAxes, Qwen3VLForConditionalGeneration):
    """Qwen3-VL, dense, with DeepStack."""
