"""What the adapters of bare vision transformers share: one tower, no language model, and a head that may read every token that is left."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ledger import UndoLedger
from ..types import Geometry, Seed, UnsupportedError
from ._cost import Shapes
from ._tower import Run, Tower, TowerEngine
from .base import PlannedCut


class BareVit:
    """One bound vision transformer. A family describes its tower and, in :meth:`head`, says what reads the tokens behind the last block."""

    engine: TowerEngine

    def __init__(self, tower: Tower, *, family: str, arch: str, class_token: bool, cost: Shapes, class_readout: bool = True):
        """``class_readout``: the output depends on the last tokens through the class token only."""
        self.tower, self.cost, self.class_readout = tower, cost, class_readout
        self.tower_mask = tower.mask  # the blocks' own keyword, for the masked dense model
        self.geometry = Geometry(
            family=family,
            arch=arch,
            tokens=tower.grid[0] * tower.grid[1],
            grid=tower.grid,
            prefix=tower.prefix,
            vision_layers=len(tower.blocks),
            vision_depth=len(tower.blocks),
            llm_layers=0,
            provides={"vision": frozenset({"projections", "prefix"}), **({"pixels": frozenset()} if tower.resize else {})},
            traits=frozenset({"class_token"} if class_token else ()),
        )

    def tower_blocks(self) -> list[nn.Module]:
        return list(self.tower.blocks)

    def decoder_layers(self) -> list[nn.Module]:
        return []

    def all_layers(self) -> list[nn.Module]:
        return self.tower_blocks()

    def branch(self, layer: int) -> nn.Module:
        raise UnsupportedError("a bare vision tower has no language model")

    def reseed(self, seed: Seed) -> None:
        self.engine.seed = seed

    def install(self, cuts: list[PlannedCut], ledger: UndoLedger, recorder: Any, *, positions: str, per: str, seed: int) -> None:
        self.engine = TowerEngine(self.tower, cuts, ledger, seed=seed, done=recorder.vision, tokens=self.geometry.tokens)
        if cuts:
            self.head(ledger)

    def head(self, ledger: UndoLedger) -> None:
        """Hooks what reads all tokens; a head that reads the class token needs nothing."""

    def _running(self) -> Run | None:
        run = self.engine.run
        return run if run is not None and run.head else None

    def average(self, ledger: UndoLedger, module: nn.Module, *, whole: bool = False) -> None:
        """``module`` gives the rows ``[G, P + n, C]`` whose plain mean over the patches (``whole``: over all of them) the head takes: every original token that
        is still represented counts once, so merged tokens count with their sizes, and padding does not count."""

        def weigh(module: nn.Module, args: tuple, kwargs: dict, x: Tensor) -> Tensor | None:
            run = self._running()
            weight = None if run is None else run.weights()
            if weight is None:
                return None
            p, weight = self.tower.prefix, weight.to(torch.promote_types(x.dtype, torch.float32))
            if whole:
                weight = F.pad(weight, (p, 0), value=1.0)
            weight = weight * (weight.shape[1] / weight.sum(1, keepdim=True))
            if not whole:
                weight = F.pad(weight, (p, 0), value=1.0)
            return x * weight[..., None].to(x.dtype)

        ledger.after(module, weigh)

    def maximum(self, ledger: UndoLedger, module: nn.Module) -> None:
        """``module`` gives the rows whose maximum the head takes: padding never is one."""

        def fill(module: nn.Module, args: tuple, kwargs: dict, x: Tensor) -> Tensor | None:
            run = self._running()
            if run is None or run.whole:
                return None
            return x.masked_fill(~F.pad(run.valid, (self.tower.prefix, 0), value=True)[..., None], -torch.inf)

        ledger.after(module, fill)

    def pooler(self, ledger: UndoLedger, module: nn.Module, *, heads: int | None = None, tokens: int = 0) -> None:
        """``module`` attends with learned queries to the tokens: it sees what a block sees, no padding and, with proportional attention, the log sizes.
        ``heads``: it is a ``nn.MultiheadAttention``, whose masks are ``[B * heads, queries, n]``; ``tokens`` which argument holds the tokens."""

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            run = self._running()
            x = args[tokens]
            bias = None if run is None else self.engine.bias(x)
            if bias is None:
                return None
            bias = bias[..., -x.shape[1] :]
            if heads is not None:
                bias = per_head(bias, heads, args[0].shape[1])
            return args, {**kwargs, "attn_mask": bias}

        ledger.before(module, enter)


def mlp_shape(mlp: nn.Module, width: int) -> dict[str, Any]:
    """``vf`` and ``vmlp`` of :class:`Shapes`, read from the matrices: the last one leads back to ``width``."""
    matrices = [m.weight for m in mlp.modules() if isinstance(m, nn.Linear)]
    wide = matrices[-1].shape[1]
    return {"vf": wide, "vmlp": sum(w.numel() for w in matrices) // (width * wide)}


def per_head(mask: Tensor, heads: int, queries: int) -> Tensor:
    """``[B, 1, 1, n]`` as ``nn.MultiheadAttention`` wants it: ``[B * heads, queries, n]``."""
    return mask.expand(-1, heads, queries, -1).flatten(0, 1)
