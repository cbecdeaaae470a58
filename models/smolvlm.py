"""Hugging Face SmolVLM, SmolVLM2 and Idefics3: tiles of one size, pixel shuffle in the ``connector``, Llama text.

Text tokens stand between the tiles of an image as they do between images:
budgets are per tile (a video's frame is one) or per sample. Pixel shuffle folds several patches into one visual token,
so stages in the tower work on such squares, of whole tiles. Of a tile that is partly hidden (``pixel_attention_mask``)
the tower sees the upper left corner alone: notes of patches travel behind the connector as the mean over those of a
token that it saw.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..core.ledger import UndoLedger
from ..core.types import Action, Geometry, UnsupportedError
from .base import ADAPTERS, AdapterInfo, PlannedCut, named
from .engine.description import MATRICES, TOWER, PackedTower, Tower
from .engine.layout import RasterSpan
from .engine.packed import PackedEngine
from .engine.packing import Packing, in_corner
from .engine.tower import TowerEngine
from .parts import hf_vit
from .parts.matrices import of_block
from .parts.mllm import BEHIND, Mllm, known, tower_shapes
from .parts.tiny import tiny_build, tiny_prompts, tiny_text

CLASSES = {"SmolVLMForConditionalGeneration": "smolvlm", "Idefics3ForConditionalGeneration": "idefics3"}


class SmolVLM(Mllm):
    """One bound SmolVLM or Idefics3."""

    tower_mask = "attention_mask"

    def __init__(self, model: Any):
        core, config = model.model, model.config
        v, fold = config.vision_config, config.scale_factor
        side = v.image_size // v.patch_size // fold
        geometry = Geometry(
            family="smolvlm",
            arch=CLASSES[str(named(model, *CLASSES))],
            tokens=side * side,
            grid=(side, side),
            prefix=0,
            vision_layers=v.num_hidden_layers,
            vision_depth=v.num_hidden_layers,
            notes=TOWER,
            seen_layers=v.num_hidden_layers,
            llm_layers=config.text_config.num_hidden_layers,
            provides={"vision": TOWER, **BEHIND},
            refuses={"pixels": "pixel shuffle needs the whole raster"},
            per=("tile", "sample"),
            fold=fold,
            traits=frozenset({"layers", MATRICES}),
        )
        self.tower, self.fold = core.vision_model, fold
        vision = tower_shapes(v, group=fold * fold)
        super().__init__(
            model,
            geometry=geometry,
            projector=core.connector,
            lm=core.text_model,
            image_token=config.image_token_id,
            vision=vision,
        )

    def tower_blocks(self) -> list[nn.Module]:
        return list(self.tower.encoder.layers)

    def tower_engine(
        self, cuts: list[PlannedCut], ledger: UndoLedger, *, seed: int, done: Any
    ) -> PackedEngine | TowerEngine:
        blocks = self.tower_blocks()
        known(blocks, "SmolVLMEncoderLayer", "Idefics3EncoderLayer")
        if any(c.cut.action is not Action.NOTE for c in cuts):
            whole = Tower(
                root=self.tower,
                blocks=blocks,
                prefix=0,
                grid=(self.geometry.grid[0] * self.fold, self.geometry.grid[1] * self.fold),
                mask=self.tower_mask,
                masked=True,
                attend=hf_vit.attend,
                feed=hf_vit.feed,
                capture=hf_vit.capture,
                project=hf_vit.project,
                width=self.model.config.vision_config.hidden_size,
                raster=lambda pixels: (
                    pixels.shape[2] // self.tower.patch_size,
                    pixels.shape[3] // self.tower.patch_size,
                ),
                fold=self.fold,
                matrices=of_block,
            )
            return TowerEngine(whole, cuts, ledger, seed=seed, done=done, tokens=self.geometry.tokens)
        described = PackedTower(
            root=self.tower, blocks=blocks, pack=self.pack, capture=hf_vit.capture, project=_project, fold=self.fold
        )
        return PackedEngine(described, cuts, ledger, seed=seed, done=done)

    def pack(self, inputs: dict[str, Any]) -> Packing | None:
        """Tiles of one size, of which only the corner that ``patch_attention_mask`` ``[G, R, C]`` shows is seen."""
        pixels, mask = inputs.get("pixel_values"), inputs.get("patch_attention_mask")
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            return None
        whole = (pixels.shape[2] // self.tower.patch_size, pixels.shape[3] // self.tower.patch_size)
        sizes = [list(whole)] * len(pixels)
        if mask is not None:
            rows, columns = mask.bool().any(2).sum(1), mask.bool().any(1).sum(1)  # [G] each
            row, column = (torch.arange(n, device=mask.device) for n in whole)
            corner = (row[:, None] < rows[:, None, None]) & (column < columns[:, None, None])
            if mask.shape[1:] != whole or not torch.equal(corner, mask.bool()):
                raise UnsupportedError(
                    "pixel_attention_mask shows something else of a tile than a rectangle in its upper left corner, "
                    "so the patches that are left form no raster"
                )
            sizes = torch.stack([rows, columns], 1).tolist()
        return Packing([in_corner(r, c, whole, self.fold) for r, c in sizes], pixels.device, batched=True)

    def parts(self, ids: Tensor, inputs: dict[str, Any]) -> list[list[RasterSpan]]:
        """Tiles are told from whole images by the token in front of them: that of an image's small version, which is
        the last of a prompt's rasters, of a whole image and of a video's frame is the same, each tile has another."""
        out = []
        for row, sample in zip(ids, super().parts(ids, inputs), strict=True):
            ahead = [int(row[int(p.columns[0]) - 1]) if int(p.columns[0]) else -1 for p in sample]
            number = accumulate([0, *(a == ahead[-1] for a in ahead[:-1])])
            out.append([replace(p, image=n) for p, n in zip(sample, number, strict=bool(sample))])
        return out

    def slice_(self, inputs: dict[str, Any], samples: list[list[RasterSpan]], b: int) -> dict[str, Any]:
        """The tiles of sample ``b``: pixels are ``[B, n, 3, H, W]``, and tiles of zeros only fill up."""
        tiles = [len(sample) for sample in samples]
        if not tiles[b]:
            return {}
        real = (inputs["pixel_values"] != 0).flatten(2).any(2)  # [B, n]
        at = sum(tiles[:b])
        return {
            k: inputs[k][real][at : at + tiles[b]][None]
            for k in ("pixel_values", "pixel_attention_mask")
            if inputs.get(k) is not None
        }


def _project(block: Any, caught: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    a = block.self_attn
    q, k, v = (caught[n].unflatten(-1, (-1, a.head_dim)).flatten(0, 1) for n in "qkv")
    return q, k, v, a.scale


def _tiny(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Random; 16 visual tokens a tile: one prompt with three tiles, one with a single one (lower half masked, unless
    ``whole``), left-padded."""
    import transformers as t

    name, vision = ("Idefics3", "Idefics3VisionConfig") if kind == "idefics3" else ("SmolVLM", "SmolVLMVisionConfig")
    config = getattr(t, f"{name}Config")(
        vision_config=getattr(t, vision)(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
        ).to_dict(),
        text_config=t.LlamaConfig(**tiny_text()).to_dict(),
        image_token_id=3,
        scale_factor=2,
    )
    prompts = tiny_prompts([[(3, 16)] * 3, [(3, 16)]], opening=7)
    pixels = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    pixels[1, 1:] = 0
    mask = torch.ones(2, 3, 32, 32, dtype=torch.long)
    mask[1, 0, 32 if kind == "whole" else 16 :] = 0
    return tiny_build(getattr(t, f"{name}ForConditionalGeneration"), config), {
        **prompts,
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
    }


ADAPTERS.register(
    "smolvlm",
    AdapterInfo(
        name="smolvlm",
        idea=(
            "SmolVLM, SmolVLM2 and Idefics3 on transformers (tiles; squares of patches in the tower, behind the "
            "connector, language model), Llama text"
        ),
        matches=lambda m: named(m, *CLASSES) is not None,
        bind=SmolVLM,
        tiny={k: partial(_tiny, k) for k in ("smolvlm", "idefics3", "whole")},
    ),
)
