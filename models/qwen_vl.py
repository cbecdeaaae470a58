"""Hugging Face Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense, or with experts): images and video frames of any size, 2 x 2
merger, positions with three axes (M-RoPE), DeepStack.

Stages in the tower work on the squares of patches that the merger folds into one token. Every image, and every step in
time of a video, attends within itself there, in most blocks of Qwen2.5-VL within windows. Rotary positions are those of
the surviving tokens. DeepStack (Qwen3-VL) adds features of earlier vision blocks to the visual rows behind the first
decoder layers; those planes are cut, and merged, like the rows they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.ledger import UndoLedger
from ..core.types import Geometry
from .base import ADAPTERS, AdapterInfo, PlannedCut, named
from .engine.composed import noise_for
from .engine.description import PIXEL_BLOCKS, TOWER, WINDOWED, PackedTower
from .engine.folded import packed_engine
from .engine.layout import Raster, RasterSpan, per_sample, some
from .engine.packed import PackedEngine
from .engine.packing import Packing, in_squares
from .engine.rotary import rotate
from .engine.rows import take
from .parts.mllm import BEHIND, Mllm, known
from .parts.tiny import tiny_build, tiny_prompts, tiny_text

FAMILIES = {
    "Qwen2VLForConditionalGeneration": "qwen2-vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2.5-vl",
    "Qwen3VLForConditionalGeneration": "qwen3-vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3-vl-moe",
}
BLOCKS = (
    "Qwen2VLVisionBlock",
    "Qwen2_5_VLVisionBlock",
    "Qwen3VLVisionBlock",
    "Qwen3VLMoeVisionBlock",
    "Glm4vVisionBlock",
    "Glm4vMoeVisionBlock",
)


def folded(family: str, config: Any, *, windows: bool = False) -> Geometry:
    """Of a family whose merger folds patches together and whose positions have three axes."""
    return Geometry(
        family=family,
        arch=family,
        tokens=256,  # a typical picture, 448 x 448 pixels in patches of 14
        grid=(16, 16),
        prefix=0,
        vision_layers=config.vision_config.depth,
        vision_depth=config.vision_config.depth,
        notes=WINDOWED if windows else TOWER,
        seen_layers=config.vision_config.depth,
        llm_layers=config.text_config.num_hidden_layers,
        provides={"pixels": PIXEL_BLOCKS, "vision": WINDOWED if windows else TOWER, **BEHIND},
        refuses={"resize": "the processor chooses the image's size: set its max_pixels"},
        fold=config.vision_config.spatial_merge_size,
        per=("image", "video", "sample"),
        variable=True,
        mrope=True,
    )


class QwenVL(Mllm):
    """One bound model of these families."""

    follows: ClassVar[dict[str, int]] = {"mm_token_type_ids": 0}
    window: int | None = None  # visual tokens along the side of the windows that some blocks attend within

    def __init__(self, model: Any):
        core, config = model.model, model.config
        v, family = config.vision_config, FAMILIES[str(named(model, *FAMILIES))]
        self.fold = v.spatial_merge_size
        width = v.embed_dim if family == "qwen2-vl" else v.hidden_size
        vision: dict[str, Any] = {
            "vd": width,
            "vf": int(width * v.mlp_ratio) if family == "qwen2-vl" else v.intermediate_size,
            "vheads": v.num_heads,
            "vdepth": v.depth,
            "patch": core.visual.patch_embed.proj.weight.numel(),
            "prefix": 0,
            "group": self.fold**2,
        }
        if family == "qwen2.5-vl":
            vision |= {
                "vmlp": 3,
                "window": (v.window_size // v.patch_size) ** 2,
                "whole": tuple(v.fullatt_block_indexes),
            }
            self.window = v.window_size // v.patch_size // self.fold
        self.tower = core.visual
        projector = nn.ModuleList([core.visual.merger, *getattr(core.visual, "deepstack_merger_list", [])])
        super().__init__(
            model,
            geometry=folded(family, config, windows=self.window is not None),
            projector=projector,
            lm=core.language_model,
            image_token=config.image_token_id,
            video_token=config.video_token_id,
            vision=vision,
        )

    def mlp(self, layer: Any) -> int:
        """A layer of experts sends each token to some of them, chosen by a matrix (Qwen3-VL-MoE); layers between may be
        dense."""
        text = self.lm.config
        if not hasattr(layer.mlp, "experts"):
            return super().mlp(layer)
        return text.hidden_size * (3 * text.moe_intermediate_size * text.num_experts_per_tok + text.num_experts)

    def tower_blocks(self) -> list[nn.Module]:
        return list(self.tower.blocks)

    def packed(self) -> PackedTower:
        blocks = self.tower_blocks()
        known(blocks, *BLOCKS)
        return PackedTower(
            root=self.tower,
            blocks=blocks,
            pack=self.pack,
            capture=_capture,
            project=_project,
            fold=self.fold,
            attend=_attend,
            feed=_feed,
            sample=_sample,
            readers=list(getattr(self.tower, "deepstack_merger_list", ())),
            pixels=self._pixels,
        )

    def tower_engine(self, cuts: list[PlannedCut], ledger: UndoLedger, *, seed: int, done: Any) -> PackedEngine:
        return packed_engine(self.packed(), cuts, ledger, seed=seed, done=done)

    def pack(self, inputs: dict[str, Any]) -> Packing | None:
        """The patches of a visual token stand together; so do, with windows, the tokens of one."""
        pixels, grids = inputs.get("hidden_states"), inputs.get("grid_thw")
        if not isinstance(pixels, Tensor) or not isinstance(grids, Tensor):
            return None
        rasters = [in_squares(h, w, self.fold, self.window) for t, h, w in grids.tolist() for _ in range(t)]
        return Packing(rasters, pixels.device)

    def _pixels(self, inputs: dict[str, Any]) -> Tensor:
        embed = self.tower.patch_embed
        rows = inputs["hidden_states"].view(-1, embed.in_channels, embed.temporal_patch_size, embed.patch_size**2)
        return rows[:, :, 0]

    def images(self, inputs: dict[str, Any]) -> Iterator[list[Raster]]:
        return self._rasters(inputs.get("image_grid_thw"))

    def videos(self, inputs: dict[str, Any]) -> Iterator[list[Raster]]:
        return self._rasters(inputs.get("video_grid_thw"))

    def _rasters(self, grids: Tensor | None) -> Iterator[list[Raster]]:
        """One list per image or video, one raster per step in time, which attends within itself in the tower."""
        for t, h, w in [] if grids is None else grids.tolist():
            yield [Raster((h // self.fold, w // self.fold))] * t

    def slice_(self, inputs: dict[str, Any], samples: list[list[RasterSpan]], b: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for pixels, grid, moving in (
            ("pixel_values", "image_grid_thw", False),
            ("pixel_values_videos", "video_grid_thw", True),
        ):
            counts = per_sample(samples, videos=moving)
            if not counts[b]:
                continue
            first = sum(counts[:b])
            out[grid], out[pixels] = some(inputs[grid], inputs[pixels], first, counts[b])
            if moving and inputs.get("second_per_grid_ts") is not None:
                out["second_per_grid_ts"] = inputs["second_per_grid_ts"][first : first + counts[b]]
        return out

    def install(self, cuts: list[PlannedCut], ledger: UndoLedger, recorder: Any, **options: Any) -> None:
        super().install(cuts, ledger, recorder, **options)
        if not hasattr(self.lm, "_deepstack_process"):
            return
        original = self.lm._deepstack_process

        def process(hidden: Tensor, marks: Tensor, plane: Tensor) -> Tensor:
            call = self.decoder.call
            if call is None or call.level is None or call.level.dense:
                return original(hidden, marks, plane)
            level = call.level.on(hidden.device)
            marks, plane = marks.to(hidden.device), plane.to(hidden.device, hidden.dtype)
            full = hidden.new_zeros(*marks.shape, hidden.shape[-1]).masked_scatter(marks[..., None], plane)
            for stash in call.stash.values():
                if stash.passing:
                    there = stash.level.on(hidden.device)
                    stash.hidden = stash.hidden + take(full, there.rows) * there.valid[..., None]
            return hidden + take(full, level.rows) * level.valid[..., None]

        ledger.replace(self.lm, "_deepstack_process", process)


def _capture(block: Any) -> dict[str, nn.Module]:
    return {"qkv": block.attn.qkv}


def _project(block: Any, caught: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    a, (cos, sin) = block.attn, caught["rope"]
    q, k, v = caught["qkv"].unflatten(-1, (3, a.num_heads, -1)).permute(1, 2, 0, 3).unsqueeze(1)  # [1, H, S, d] each
    q, k = (rotate(t, cos, sin, prefix=0, half=True) for t in (q, k))
    return *(t[0].transpose(0, 1) for t in (q, k, v)), a.scaling


def _attend(block: Any, x: Tensor, caught: dict[str, Any], mix: Callable) -> Tensor:
    caught["qkv"] = block.attn.qkv(block.norm1(x))
    return x + block.attn.proj(mix(*_project(block, caught)).flatten(1))


def _feed(block: Any, x: Tensor) -> Tensor:
    return x + block.mlp(block.norm2(x))


def _sample(block: Any) -> tuple[Tensor, dict[str, Any]]:
    heads, rows = block.attn.num_heads, 12
    noise = noise_for(block, rows, block.norm1.weight.numel())
    angle = torch.linspace(0, 3, rows * (noise.shape[1] // heads // 2), device=noise.device).view(rows, -1).tile(2)
    starts = torch.tensor([0, 8, rows], dtype=torch.int32, device=noise.device)
    return noise, {"cu_seqlens": starts, "position_embeddings": (angle.cos(), angle.sin())}


# ----------------------------------------------------------------------------------------------------------- tiny
# models


def _tiny_config(family: str) -> tuple[Any, Any]:
    """The class of the family's model, and a small configuration."""
    import transformers as hf
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig

    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
    text = tiny_text(rope_parameters=rope)
    vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 4, "in_channels": 3}
    tokens = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    if family == "qwen2-vl":
        config: Any = hf.Qwen2VLConfig(
            vision_config=Qwen2VLVisionConfig(**vision, embed_dim=32, hidden_size=48).to_dict(),
            text_config=Qwen2VLTextConfig(**text).to_dict(),
            **tokens,
        )
        kind: Any = hf.Qwen2VLForConditionalGeneration
    elif family == "qwen2.5-vl":
        config = hf.Qwen2_5_VLConfig(
            vision_config=Qwen2_5_VLVisionConfig(
                **vision,
                hidden_size=32,
                intermediate_size=64,
                out_hidden_size=48,
                window_size=16,
                fullatt_block_indexes=[1],
            ).to_dict(),
            text_config=Qwen2_5_VLTextConfig(**text).to_dict(),
            **tokens,
        )
        kind = hf.Qwen2_5_VLForConditionalGeneration
    else:  # of the layers with experts, one in between is dense
        experts = (
            {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "mlp_only_layers": [3]}
            if family == "qwen3-vl-moe"
            else {}
        )
        tower = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        }
        name = "Qwen3VLMoe" if experts else "Qwen3VL"
        config = getattr(hf, f"{name}Config")(
            vision_config={**vision, **tower}, text_config={**text, "head_dim": 12, **experts}, **tokens
        )
        kind = getattr(hf, f"{name}ForConditionalGeneration")
    return kind, config


def _tiny(family: str, moving: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Random. Images: three of 16, 8 and 12 tokens in two left-padded prompts; ``moving``: a video of 2 x 8 tokens
    beside an image in the first."""
    kind, config = _tiny_config(family)
    stamped = family.startswith("qwen3")  # a time stamp stands between the frames of a video
    frame = 4 if stamped else 8
    video = [(4, frame)] * 4 if stamped else [(4, 16)]
    samples = [[*video, (3, 16)], [(3, 8)]] if moving else [[(3, 16), (3, 8)], [(3, 12)]]
    inputs: dict[str, Any] = tiny_prompts(samples, opening=5)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 3).int() + 2 * (inputs["input_ids"] == 4).int()
    generator = torch.Generator().manual_seed(3)
    grids = {"pixel_values": [[1, 8, 8], [1, 4, 8]] if moving else [[1, 8, 8], [1, 4, 8], [1, 4, 12]]}
    if moving:
        grids["pixel_values_videos"] = [[4, 4, 4]] if stamped else [[2, 8, 4]]
    for name, thw in grids.items():
        inputs["video_grid_thw" if name.endswith("videos") else "image_grid_thw"] = torch.tensor(thw)
        inputs[name] = torch.randn(sum(t * h * w for t, h, w in thw), 3 * 2 * 16, generator=generator)
    return tiny_build(kind, config), inputs


def _is(kind: str, model: nn.Module) -> bool:
    return named(model, *FAMILIES) == kind


for _kind, _name in FAMILIES.items():
    _said = _name.replace("qwen", "Qwen").replace("-vl", "-VL").replace("-moe", "-MoE")
    ADAPTERS.register(
        _name,
        AdapterInfo(
            name=_name,
            idea=f"{_said} on transformers: images and video of any size; squares of patches in the tower, "
            "behind the merger, language model",
            matches=partial(_is, _kind),
            bind=QwenVL,
            tiny={"images": partial(_tiny, _name, False), "video": partial(_tiny, _name, True)},
        ),
    )
