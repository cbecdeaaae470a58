"""timm ``VisionTransformer``: class, distillation and register tokens, LayerScale, token or average pooling."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ledger import UndoLedger
from ..types import Geometry, UnsupportedError
from ._cost import Shapes
from ._hf_vit import randomise
from ._tower import Run, Tower, TowerEngine
from .base import ADAPTERS, AdapterInfo, PlannedCut


def _attend(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=mask)))


def _feed(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _capture(block: Any) -> dict[str, nn.Module]:
    return {"qkv": block.attn.qkv}


def _project(block: Any, caught: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, float]:
    a = block.attn
    b, n, _ = caught["qkv"].shape
    q, k, v = caught["qkv"].reshape(b, n, 3, a.num_heads, a.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return a.q_norm(q), a.k_norm(k), v, a.scale


class TimmVit:
    """One bound timm ViT. ``forward_features`` returns the surviving tokens; with average pooling after merges every original token counts, so sizes weigh
    the mean."""

    def __init__(self, model: Any):
        self.model = model
        block = model.blocks[0]
        if not all(hasattr(block, name) for name in ("norm1", "attn", "norm2", "mlp", "ls1", "ls2")) or not hasattr(block.attn, "qkv"):
            raise UnsupportedError(
                f"timm blocks of type {type(block).__name__} are not supported; there is the standard Block (norm1, attn, ls1, norm2, mlp, ls2)"
            )
        depth, grid = len(model.blocks), tuple(model.patch_embed.grid_size)
        prefix = model.num_prefix_tokens
        provides = frozenset({"projections", "prefix"} | ({"class_token"} if model.cls_token is not None else set()))
        sites = {"vision": provides} | ({"pixels": frozenset()} if model.dynamic_img_size else {})
        self.geometry = Geometry(
            family="timm-vit",
            arch="vit",
            tokens=grid[0] * grid[1],
            grid=grid,
            prefix=prefix,
            vision_layers=depth,
            vision_depth=depth,
            llm_layers=0,
            provides=sites,
        )
        patch = model.patch_embed.proj
        gated = hasattr(block.mlp, "fc1_g")
        self.cost = Shapes(
            vd=model.embed_dim,
            vf=block.mlp.fc2.in_features if hasattr(block.mlp, "fc2") else 4 * model.embed_dim,
            vheads=block.attn.num_heads,
            vdepth=depth,
            patch=patch.weight.numel(),
            prefix=prefix,
            vmlp=3 if gated else 2,
        )

    tower_mask = "attn_mask"

    def tower_blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def decoder_layers(self) -> list[nn.Module]:
        return []

    def all_layers(self) -> list[nn.Module]:
        return self.tower_blocks()

    def branch(self, layer: int) -> nn.Module:
        raise UnsupportedError("a bare vision tower has no language model")

    def reseed(self, seed: int) -> None:
        self.engine.seed = seed

    def install(self, cuts: list[PlannedCut], ledger: UndoLedger, recorder: Any, *, positions: str, per: str, seed: int) -> None:
        model = self.model
        size = model.patch_embed.patch_size

        def resize(pixels: Tensor, rows: int, columns: int) -> tuple[Tensor, dict[str, Any]]:
            return F.interpolate(pixels, size=(rows * size[0], columns * size[1]), mode="bicubic", antialias=True, align_corners=False), {}

        tower = Tower(
            root=model,
            blocks=list(model.blocks),
            prefix=self.geometry.prefix,
            grid=self.geometry.grid,
            mask="attn_mask",
            attend=_attend,
            feed=_feed,
            capture=_capture,
            project=_project,
            resize=resize if model.dynamic_img_size else None,
            pixels="x",
        )
        self.engine = TowerEngine(tower, cuts, ledger, seed=seed, done=recorder.vision, tokens=self.geometry.tokens)
        if model.global_pool == "avg" and any(c.inside or c.site == "pixels" for c in cuts):
            ledger.before(model.norm, self._weigh)

    def _weigh(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Average pooling after merges: each original token contributes its slot (ToMe, arXiv 2210.09461, MAE pooling: sum of size times token over N)."""
        run: Run | None = self.engine.run
        if run is None or not run.merges or not bool((run.slot >= 0).all()):
            return None
        x, p = args[0], self.geometry.prefix
        return (torch.cat([x[:, :p], run.spread(x[:, p:])], dim=1), *args[1:]), kwargs


def _tiny(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A random ViT with 16 patches; ``distilled=True`` builds DeiT's two-token model."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    kind = VisionTransformerDistilled if options.pop("distilled", False) else VisionTransformer
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = kind(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=10, **options).eval()
    torch.random.set_rng_state(state)
    randomise(model, 1)
    return model, {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


_VARIANTS: dict[str, dict[str, Any]] = {
    "class": {},
    "layerscale-registers": {"init_values": 0.5, "reg_tokens": 4, "no_embed_class": True, "dynamic_img_size": True},
    "distilled": {"distilled": True},
    "avg-pool": {"class_token": False, "global_pool": "avg", "qk_norm": True},
}

ADAPTERS.register(
    "timm-vit",
    AdapterInfo(
        name="timm-vit",
        idea="timm VisionTransformer: class / distillation / register tokens, LayerScale, average pooling",
        matches=lambda m: any(c.__name__ == "VisionTransformer" and c.__module__.startswith("timm.") for c in type(m).__mro__),
        bind=TimmVit,
        tiny={k: partial(_tiny, **o) for k, o in _VARIANTS.items()},
    ),
)
