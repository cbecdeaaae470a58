"""CLCA: "Cross-Layer Cache Aggregation for Token Reduction in Ultra-Fine-Grained Image Recognition" (arXiv
2501.00243)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.select import merged, placed, top
from ..core.types import Geometry, Mix, Selection, TokenView, UnsupportedError, VtpruneError
from ._tower import class_attention
from ._weights import load_weights
from .base import Action, Cut, Method, MethodInfo, option, register


@register(
    MethodInfo(
        name="clca",
        paper="arXiv 2501.00243",
        idea="drops most patches of a classifier three times, and gives back what it remembers of the blocks between",
        kinds=("vision",),
        needs={"vision": frozenset({"classifier", "insert", "projections", "class_token"})},
        keep=None,
        budgeted=False,
        learns=True,
        merges=True,
        score="attention of the class token, mean over heads",
        cases=({"ratio": 0.5}, {"ratio": 0.25, "carriers": 2, "fused": True}, {"ratio": 0.2, "carriers": 0}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Clca(Method):
    """Between attention and MLP of each block in ``layers`` a ``ratio`` of the tokens that are there stays, those that
    the class token attends to most (``fused``: the others become one token more, the sum of ``a_j x_j``, EViT's, which
    is not normalised).

    CLC, the cache: ``carriers`` tokens (CLR) join in front of the first block. Behind every block i up to the last
    recovery it remembers the mean of the tokens (``GAP``, without the class token) and the last ``carriers`` tokens of
    the sequence; behind the reducing blocks and the last but one it puts all that was remembered back at the end of the
    sequence, as tokens like any other, and forgets it. The mean is over those that were there before the last recovery.

    CLA, the head: the class token behind each reducing block and behind the last one, ``Z [B, C, K]`` without the final
    norm, goes through BatchNorm, a depthwise convolution over the K (C to 2C), BatchNorm, GELU and a linear layer to
    the classes.

    A carrier begins as the class token's row with an offset of its own, ``N(0, 0.02^2)`` (the official code copies the
    class token's parameter and gives the copy a position of its own; with ``no_embed_class`` none). Before training the
    classifier is the model's own (``head="own"``), which also is what the cache alone is measured with; ``"cla"`` needs
    weights that were trained. The trained part is ``handle.modules["clca"]``."""

    layers: tuple[int, ...] | None = option(
        None, "blocks that reduce (default: a quarter, a half and three quarters of the depth: 3, 6, 9 of 12)", least=0
    )
    ratio: float = option(0.25, "share of the tokens that each of them keeps, rounded up", above=0, most=1)
    fused: bool = option(False, "the others become one token more (EViT) instead of going (top-k)")
    carriers: int = option(1, "CLR tokens; 0: none, the cache holds the means alone", least=0)
    cache: bool = option(True, "CLC: what the blocks between leave is put back")
    head: str = option("own", "the classifier: the model's 'own', or 'cla', trained", choices=("own", "cla"))
    weights: str | None = option(None, "trained carriers and head (safetensors; metadata: layers=3,6,9)")

    def _blocks(self, geometry: Geometry) -> tuple[int, ...]:
        depth = geometry.vision_layers
        default = tuple(sorted({min(max(1, round(depth * i / 4)), depth - 1) for i in (1, 2, 3)}))
        blocks = default if self.layers is None else tuple(self.layers)
        if list(blocks) != sorted(set(blocks)) or blocks[-1] >= depth:
            raise VtpruneError(f"clca: layers {list(blocks)} must ascend and lie in 0..{depth - 1}")
        if self.cache and blocks[0] == 0:
            raise VtpruneError("clca: the cache remembers nothing yet in front of layer 0, which cannot reduce with it")
        return blocks

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        depth = geometry.vision_layers
        if self.head == "cla" and geometry.classes == 0:
            raise UnsupportedError(
                f"clca: head='cla' needs a linear classifier, which this {geometry.family} has not: head='own', or "
                "train it on a tower that classifies (vtprune train clca --data digits)"
            )
        back = (
            sorted({*(i for i in self._blocks(geometry) if i < depth - 1), depth - 2})
            if self.cache and depth > 1
            else []
        )
        cuts = [Cut(site=f"vision.{i}", action=Action.INSERT, data={"back": back}) for i in range(depth)]
        cuts += [Cut(site=f"vision.{i}", inside=True) for i in self._blocks(geometry)]
        if self.head == "cla":
            cuts.append(Cut(site=f"vision.{depth - 1}", action=Action.ANSWER))
        return tuple(cuts)

    def build(self, branch: Any, geometry: Geometry) -> Aggregation:
        blocks = self._blocks(geometry)
        classes = geometry.classes if self.head == "cla" else 0
        module = Aggregation(self.carriers, geometry.vision_width, blocks, classes)
        if self.weights is not None:
            load_weights("clca", self.weights, module, self.belongs(blocks), "this classifier", must_tell=True)
        return module.requires_grad_(False)

    def belongs(self, blocks: tuple[int, ...]) -> dict[str, str]:
        """What trained weights are asked for: all that the head has learned to read."""
        told = {name: str(getattr(self, name)) for name in ("ratio", "carriers", "head", "cache", "fused")}
        return {"layers": ",".join(map(str, blocks)), **told}

    def insert(self, view: TokenView, cut: Cut) -> Tensor | None:
        memory, module, x = view.memory, view.module, view.features
        first = view.source("prefix")[:, :1]
        block = cut.layer - 1  # the one that has just run
        if block < 0:
            memory["length"] = x.shape[1]
            return None if module.carriers is None else first + module.carriers.to(first.dtype)
        if block in module.blocks:
            memory.setdefault("classes", []).append(first[:, 0])
        back, rows = cut.data["back"], None
        if block in back:
            memory["length"] = x.shape[1]
            rows = torch.cat(memory.pop("cache", []) or [x[:, :0]], 1)
            x = torch.cat([x, rows], 1)
        if back and block < back[-1]:
            mean = x[:, : memory["length"]].mean(1, keepdim=True)
            last = x[:, x.shape[1] - self.carriers :]
            memory.setdefault("cache", []).append(torch.cat([mean, last], 1))
        return rows

    def select(self, view: TokenView, cut: Cut) -> Selection | None:
        score = class_attention(view)
        n = view.features.shape[1]
        left = math.ceil(self.ratio * n)
        if not self.fused or left >= n - 1:
            return top(score, left, view.valid)
        place = placed(score)
        kept, host = place < left, place == left
        at = host.int().argmax(1, keepdim=True)
        whole = merged(kept | host, torch.where(kept, torch.arange(n, device=at.device), at))
        assert whole.target is not None
        weight = torch.where(kept, 1, score.to(torch.float32))
        mix = Mix(torch.arange(n, device=at.device).expand_as(place), whole.target, weight)
        return replace(whole, mix=mix, score=score)

    def answer(self, view: TokenView, cut: Cut) -> Tensor:
        last = view.source("prefix")[:, 0]
        states = [*view.memory.get("classes", []), last]
        if cut.layer in view.module.blocks:  # the last block reduces as well
            states.append(last)
        return view.module.head(torch.stack(states, 2))


class Aggregation(nn.Module):
    """Carriers, and the head over the class tokens behind ``blocks`` and the last one."""

    def __init__(self, carriers: int, width: int, blocks: tuple[int, ...], classes: int):
        super().__init__()
        self.blocks = blocks
        noise = torch.randn(carriers, width, generator=torch.Generator().manual_seed(0))
        self.carriers = nn.Parameter(0.02 * noise) if carriers else None
        self.head = Head(width, len(blocks) + 1, classes) if classes else None


class Head(nn.Module):
    """CLA: ``Z`` ``[B, C, K]`` to ``[B, classes]``."""

    def __init__(self, width: int, states: int, classes: int):
        super().__init__()
        self.before, self.after = nn.BatchNorm1d(width), nn.BatchNorm1d(2 * width)
        self.across = nn.Conv1d(width, 2 * width, states, groups=width)
        self.out = nn.Linear(2 * width, classes)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for m in (self.across, self.out):
                m.weight.copy_(torch.randn(m.weight.shape, generator=generator) * m.weight[0].numel() ** -0.5)
                assert m.bias is not None
                m.bias.zero_()

    def forward(self, states: Tensor) -> Tensor:
        # statistics of the batch while it is being trained, those that were seen then in use
        self.train(torch.is_grad_enabled() and self.out.weight.requires_grad)
        z = self.across(self.before(states.to(self.out.weight.dtype)))
        return self.out(F.gelu(self.after(z))[:, :, 0])
