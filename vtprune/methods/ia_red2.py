"""IA-RED²: "Interpretability-Aware Redundancy Reduction for Vision Transformers" (arXiv 2106.12620, NeurIPS 2021), a
reconstruction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.select import from_mask, top
from ..core.types import Geometry, Selection, TokenView, UnsupportedError, VtpruneError
from ._weights import load_weights
from .base import Cut, Method, MethodInfo, equal_shares, option, register

GROUPS, OPEN = 3, 2.0  # D; what heads answer before training, sigmoid(2) = 0.88: everything stays


@register(
    MethodInfo(
        name="ia-red2",
        paper="arXiv 2106.12620",
        idea="drops patches in front of groups of tower blocks, by interpreters trained with rewards (reconstruction)",
        kinds=("vision",),
        keep=None,
        learns=True,
        dial=("threshold", 1.0, 0.0),
        score="informativeness that the group's interpreter gives a patch, mean over its heads",
        cases=(
            {"init": "random", "threshold": 0.4},
            {"init": "random", "threshold": 0.55, "heads": 2},
            {"init": "random", "keep": 3},
            {"init": "random", "groups": 1, "keep": 0.75},
        ),
    )
)
@dataclass(frozen=True, kw_only=True)
class IaRed2(Method):
    """The tower's blocks form D groups, and in front of each a multi-head interpreter drops the patches that tell
    little: of patch j in front of group i

        ``I_ij = mean_h sigmoid(F_q^h(x_ij) . F_k^h(P_i))``, dropped where ``I_ij < threshold``,

    with a policy token ``P_i``. How many stay follows from the image; at least one does, the most informative.

    A reconstruction: published are the groups, their interpreters and the training by rewards, group by group; the
    paper's full text is not public. The formula, the threshold of 0.5 and D = 3 are unverified memory. Choices of ours:
    ``P_i`` is a learned vector; ``F_q`` and ``F_k`` are linear layers of ``channels`` a head, products are divided by
    ``sqrt(channels)``, patches are layer-normalised (no weights) first; the first block belongs to no group, since the
    earliest place to drop anything is behind it, and the others form groups of equal size; ``keep``.

    The interpreters are ``handle.modules["ia-red2"]``, float32, trained by ``vtprune train ia-red2``; before that
    nothing is dropped. Once they want gradients (``requires_grad_()``), the patches that the group
    ``handle.modules["ia-red2"].turn`` keeps are drawn, each with probability I, and ``handle.told()`` gives of every
    image, in the order in which the tower saw them: ``log_prob`` of the draw (with its gradient), ``kept`` and
    ``greedy``, the shares of the image's patches that the draw and the threshold leave, and ``grid``, its rows and
    columns. Draws follow the seed alone: a loop of your own calls ``handle.reseed(step)``. The other groups decide by
    the threshold."""

    groups: int | None = option(
        None, "D: groups of blocks (default: 3, fewer in towers with less than 3 blocks behind the first)", least=1
    )
    layers: tuple[int, ...] | int | None = option(
        None, "instead: blocks behind which a group begins (default of 12 blocks: 0, 3, 7)"
    )
    threshold: float = option(0.5, "without keep=: a patch stays where I is at least that", least=0, most=1)
    heads: int = option(4, "heads of an interpreter", least=1, most=64)
    channels: int = option(16, "of each head (reconstruction)", least=1, most=256)
    init: str = option(
        "open", "interpreters before training: 'open' (nothing is dropped) or 'random'", choices=("open", "random")
    )
    weights: str | None = option(None, "trained interpreters (safetensors; metadata: blocks=0,3,7, heads=4)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        sites = [f"vision.{i}" for i in self._blocks(geometry)]
        if keep is None:
            return tuple(Cut(site=s, keep=1, adaptive=True, data={"group": i}) for i, s in enumerate(sites))
        left = equal_shares(geometry.tokens, keep, len(sites))
        return tuple(Cut(site=s, keep=left[i], data={"group": i}) for i, s in enumerate(sites))

    def _blocks(self, geometry: Geometry) -> tuple[int, ...]:
        """The blocks behind which the groups begin, ascending."""
        depth = geometry.vision_layers
        if self.layers is not None:
            if self.groups is not None:
                raise VtpruneError("ia-red2: give groups= or layers=, not both")
            given = (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)
            if not all(0 <= i < depth for i in given) or list(given) != sorted(set(given)):
                raise VtpruneError(f"ia-red2: layers {list(given)} must ascend and lie in 0..{depth - 1}")
            return given
        if depth < 2:
            raise UnsupportedError(
                f"ia-red2 drops patches behind the first block of a tower, and of this one {depth} is used"
            )
        groups = min(GROUPS, depth - 1) if self.groups is None else self.groups
        if groups > depth - 1:
            raise VtpruneError(f"ia-red2: groups={groups}, and there are {depth - 1} blocks behind the first")
        return tuple(i * (depth - 1) // groups for i in range(groups))

    def build(self, branch: Any, geometry: Geometry) -> Interpreters:
        blocks = self._blocks(geometry)
        module = Interpreters(blocks, geometry.vision_width, self.heads, self.channels, self.init)
        if self.weights is not None:
            told = {"blocks": ",".join(map(str, blocks)), "heads": str(self.heads)}
            fits = f"{len(blocks)} interpreters of {self.heads} heads with {self.channels} channels in this model"
            load_weights("ia-red2", self.weights, module, told, fits)
        return module.requires_grad_(False)

    def work(self, tokens: Any, text: Any, cut: Cut, geometry: Geometry) -> Any:
        return self._flops(tokens, geometry.vision_width)

    def _flops(self, tokens: Any, width: int) -> Any:
        """Of an interpreter's queries for so many ``tokens``, two per multiply-add."""
        return 2 * tokens * width * self.heads * self.channels

    def select(self, view: TokenView, cut: Cut) -> Selection:
        module: Interpreters = view.module
        group = cut.data["group"]
        telling = module[group](view.features)  # I [B, N]
        work = self._flops(view.counts, view.features.shape[2])
        if not cut.adaptive:
            if telling.requires_grad:
                raise VtpruneError("ia-red2: training learns how many patches stay: attach without keep=")
            return replace(top(telling, cut.keep or 0, view.valid, view.protected, span=view.extent), work=work)
        kept = _some(telling >= self.threshold, telling, view)
        if telling.requires_grad and group == module.turn:
            greedy, kept = kept, self._drawn(telling, view, cut)
            view.tell("greedy", greedy.sum(1) / (view.grid[0] * view.grid[1]))
            view.tell("grid", torch.tensor(view.grid, device=kept.device).expand(len(kept), 2))
        return replace(from_mask(kept), score=telling.detach(), work=work)

    def _drawn(self, telling: Tensor, view: TokenView, cut: Cut) -> Tensor:
        """``[B, N]`` bool: patches kept with the probabilities ``telling`` ``[B, N]``; what was drawn is told."""
        action = _uniform(view, cut.layer, view.module.process) < telling.detach()
        taken = torch.where(action, telling, 1 - telling)
        log = taken.clamp_min(torch.finfo(taken.dtype).tiny).log()
        view.tell("log_prob", torch.where(view.valid, log, 0).sum(1))
        kept = _some(action, telling.detach(), view)
        view.tell("kept", kept.sum(1) / (view.grid[0] * view.grid[1]))
        return kept


def _some(kept: Tensor, telling: Tensor, view: TokenView) -> Tensor:
    """Those of ``kept`` ``[B, N]`` that exist, what is protected, and where that is nothing the most informative."""
    kept = (kept | view.protected) & view.valid
    best = telling.masked_fill(~view.valid, -1).argmax(1, keepdim=True)
    one = torch.zeros_like(kept).scatter(1, best, ~kept.any(1, keepdim=True))
    return kept | (one & view.valid)


def _uniform(view: TokenView, block: int, process: int) -> Tensor:
    """``[B, N]`` from [0, 1): drawn for every patch of every image, by the seed of the run or of each image. The seed
    of a run draws for the images of all processes together, as many in each, of which these are the ``process``-th."""
    images, n = len(view.index), view.grid[0] * view.grid[1]
    seeds = (view.seed,) if isinstance(view.seed, int) else view.seed
    if len(seeds) not in (1, images):
        raise VtpruneError(f"{len(seeds)} seeds were given for {images} images of the vision tower")
    own, skipped = images // len(seeds), images * process if isinstance(view.seed, int) else 0
    rows = [torch.rand(skipped + own, n, generator=_generator(seed, block))[skipped:] for seed in seeds]
    return torch.cat(rows).to(view.index.device).gather(1, view.index.clamp_min(0))


def _generator(seed: int, block: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1009 + block) % 2**63)


class Interpreter(nn.Module):
    """Of one group, for patches of ``width`` channels; what it is before training is drawn by ``generator``."""

    def __init__(self, width: int, heads: int, channels: int, init: str, generator: torch.Generator):
        super().__init__()
        self.heads = heads
        self.policy = nn.Parameter(torch.randn(width, generator=generator))  # P
        self.query = nn.utils.skip_init(nn.Linear, width, heads * channels)
        self.key = nn.utils.skip_init(nn.Linear, width, heads * channels)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=width**-0.5, generator=generator)
            nn.init.zeros_(linear.bias)
        if init == "open":  # every head's product is OPEN, whatever the patch
            with torch.no_grad():
                k = self.key(self.policy).view(heads, channels)
                self.query.weight.zero_()
                self.query.bias.copy_((OPEN * channels**0.5 * k / k.square().sum(1, keepdim=True)).flatten())

    def forward(self, x: Tensor) -> Tensor:
        """``I`` ``[B, N]`` of the patches ``x`` ``[B, N, C]``, in the weights' precision."""
        with torch.autocast(x.device.type, enabled=False):
            q = self.query(F.layer_norm(x.to(self.policy.dtype), x.shape[-1:])).unflatten(-1, (self.heads, -1))
            k = self.key(self.policy).unflatten(-1, (self.heads, -1))
            return torch.sigmoid((q * k).sum(-1) * k.shape[-1] ** -0.5).mean(-1)


class Interpreters(nn.ModuleList):
    """One for each of the ``blocks`` that a group begins behind. ``turn``: number of the group that is trained now;
    ``process``: of those that train together, this one."""

    def __init__(self, blocks: tuple[int, ...], width: int, heads: int, channels: int, init: str):
        generator = torch.Generator().manual_seed(0)
        super().__init__(Interpreter(width, heads, channels, init, generator) for _ in blocks)
        self.blocks, self.heads, self.turn, self.process = blocks, heads, 0, 0
