"""MoNE: "Mixture of Nested Experts: Adaptive Processing of Visual Tokens" (arXiv 2407.19985)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.select import placed
from ..core.types import Geometry, Nesting, TokenView
from ..kernels.base import wide
from ._weights import load_weights
from .base import Action, Cut, Method, MethodInfo, option, register

EXPERTS = 4
SHARES = tuple(2.0 ** (i + 1 - EXPERTS) for i in range(EXPERTS))  # of the width: 1/8, 1/4, 1/2, 1
DELTA, BETA = 2.0, 10.0  # section 3.3: incentive of the larger experts, and entropy's weight
MOST = 1 - 2.0**-10  # of alpha, which lies in [0, 1)


def capacities(budget: float, delta: float = DELTA, beta: float = BETA) -> tuple[float, ...]:
    """The shares ``c`` of the tokens that the experts get, narrowest first, for ``sum c_i d_i / D = budget``.

    They maximise ``sum c_i delta^(i-1) - beta sum c_i ln c_i`` (section 3.3, where SLSQP does it); by its Lagrangian
    ``c_i ~ exp((delta^(i-1) + mu d_i / D) / beta)``, with ``mu`` by bisection. For ``delta = 2`` the incentive is the
    same for all that meet the budget, so that ``c`` is the distribution of the greatest entropy.
    """
    if budget >= 1:
        return (0.0,) * (EXPERTS - 1) + (1.0,)

    def at(mu: float) -> list[float]:
        logits = [(delta**i + mu * share) / beta for i, share in enumerate(SHARES)]
        weights = [math.exp(x - max(logits)) for x in logits]
        return [w / sum(weights) for w in weights]

    low, high = -1e6 * beta, 1e6 * beta
    for _ in range(200):
        middle = (low + high) / 2
        spent = sum(c * share for c, share in zip(at(middle), SHARES, strict=True))
        low, high = (middle, high) if spent < budget else (low, middle)
    return tuple(at((low + high) / 2))


def counts(budget: float, tokens: int) -> tuple[int, ...]:
    """How many of so many tokens each expert gets: ``floor(c_j N)``, the narrowest what is left."""
    rest = [math.floor(c * tokens + 1e-9) for c in capacities(budget)[1:]]
    return (tokens - sum(rest), *rest)


def assigned(r: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Expert-preferred routing (section 3.2): from the widest expert down each takes the ``sizes[j]`` tokens that it
    has the highest ``r`` ``[B, N, E]`` for among those not taken yet; the narrowest gets the rest. Ties go to the lower
    index. Returns ``[B, N]``."""
    expert = torch.zeros(r.shape[:2], dtype=torch.long, device=r.device)
    free = torch.ones_like(expert, dtype=torch.bool)
    for j in range(EXPERTS - 1, 0, -1):
        mine = free & (placed(r[..., j], free) < sizes[j])
        expert, free = expert.masked_fill(mine, j), free & ~mine
    return expert


@register(
    MethodInfo(
        name="mone",
        paper="arXiv 2407.19985",
        idea="runs each patch on a nested expert, an eighth to all of the tower's width, that a trained router names",
        kinds=("vision",),
        needs={"vision": frozenset({"matrices"})},
        keep=None,
        budgeted=False,
        nests=True,
        learns=True,
        mean="capacity",
        score="the width of its expert; all stay",
        cases=({"capacity": 0.75}, {"capacity": 0.25}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Mone(Method):
    """Section 3: no token is dropped. In every block a token on expert j has its queries, keys, values and MLP made of
    the first ``d_j`` features of its normalised row, and attention's and the MLP's last matrix write its first ``d_j``
    features only; attention is at full width over all tokens. ``z = x + SA_j(x)`` and ``x' = z + (alpha r_j + 1)
    MLP_j(z)``; ``r = softmax(W x + b)`` of what enters the first block; alpha, one for each block, is 0 before
    training.

    Ours, where the paper is silent: class and register tokens run on the whole width (the paper has none); alpha is
    kept in [0, 1) by clamping, straight through; W begins small and at random, b at zero; where patches are folded
    behind the tower, a square of them shares an expert.

    The backbone has to be trained for it: a checkpoint that was not is ruined by narrow experts whatever the router
    does. ``handle.modules["mone"]`` is the router, trained by ``vtprune train mone``."""

    capacity: float = option(
        0.5, "e_c: what the experts' widths come to on average, as a share of the tower's", above=SHARES[0], most=1
    )
    weights: str | None = option(None, "a trained router (safetensors)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        return (Cut(site="vision.0", action=Action.NEST, widths=self._widths(self.capacity, geometry.tokens)),)

    @staticmethod
    def _widths(budget: float, tokens: int) -> tuple[tuple[float, int], ...]:
        return tuple(zip(SHARES, counts(budget, tokens), strict=True))

    def build(self, branch: Any, geometry: Geometry) -> Router:
        router = Router(geometry.vision_width, geometry.vision_layers)
        if self.weights is not None:
            fits = f"a tower of {geometry.vision_layers} blocks that is {geometry.vision_width} wide"
            load_weights("mone", self.weights, router, {}, fits)
        return router.requires_grad_(False)

    def nest(self, view: TokenView, cut: Cut) -> Nesting:
        router: Router = view.module
        r = router(view.features)
        widths = cut.widths if router.drawn is None else self._widths(router.drawn, view.index.shape[1])
        part = assigned(r.detach(), tuple(n for _, n in widths))
        if not router.alpha.requires_grad and not bool(router.alpha.any()):
            return Nesting(part, widths)
        mine = r.gather(2, part[..., None])[..., 0]
        return Nesting(part, widths, 1 + router.gains().to(mine)[:, None, None] * mine)


class Router(nn.Module):
    """``r`` of tokens that are ``width`` wide, and the weight alpha that it has in each of ``layers`` blocks.

    Attributes:
        drawn: a capacity that stands for the method's own, in training; no weight.
    """

    def __init__(self, width: int, layers: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(EXPERTS, width, generator=generator) * 0.02)
        self.b = nn.Parameter(torch.zeros(EXPERTS))
        self.alpha = nn.Parameter(torch.zeros(layers))
        self.drawn: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, E]`` of tokens ``x`` ``[B, N, C]``, in at least 32 bits."""
        with torch.autocast(x.device.type, enabled=False):
            rows = wide(x)
            return F.linear(rows, self.w.to(rows), self.b.to(rows)).softmax(-1)

    def gains(self) -> Tensor:
        """``[layers]``: alpha in [0, 1), with the gradient as though it were not clamped."""
        return self.alpha + (self.alpha.clamp(0, MOST) - self.alpha).detach()
