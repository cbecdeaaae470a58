"""CoViPAL: "Layer-wise Contextualized Visual Token Pruning for Large Vision-Language Models" (arXiv 2508.17243)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.select import from_mask, top
from ..core.types import Geometry, Selection, Text, TokenView, UnsupportedError, VtpruneError
from ._weights import load_weights
from .base import Cut, Method, MethodInfo, equal_shares, layers, option, register

HEAD = 64  # channels of a head, as 512 channels in 8 heads
LOOK, SOFT, HARD = "look", "soft", "hard"  # what happens to the tokens while the modules are trained


@register(
    MethodInfo(
        name="covipal",
        paper="arXiv 2508.17243",
        idea="small trained modules read visual tokens and question together and keep the best for the LLM",
        kinds=("projector", "llm"),
        needs={"projector": frozenset({"text"}), "llm": frozenset({"text"})},
        keep=0.25,
        learns=True,
        score="the pruning module's score",
        cases=(
            {"keep": 0.75, "init": "random"},
            {"keep": 2, "init": "random", "layers": (1, 3), "width": 24},
            {"keep": 3, "init": "random", "projector": False, "layers": (2,)},
        ),
    )
)
@dataclass(frozen=True, kw_only=True)
class CoViPAL(Method):
    """A plug-and-play pruning module (PPM) gives every visual token a score ``S = p(H_v, H_t)`` from the visual and the
    text rows at its place, and the best stay: ``I = TopK(S, r n_v)``. By default one stands behind the projector, so
    that the language model never reads the others; with ``layers=`` also in front of decoder layers, each leaving the
    same share of what it finds, down to ``keep``.

    Reconstruction: the paper's full text was not at hand, and its abstract does not say how a PPM is built. Ours is
    :class:`Module`. Untrained its head is zero: all scores are equal, and the first tokens stay. Train with ``vtprune
    train covipal``; the modules are ``handle.modules["covipal"]``. Once they want gradients they decide as before, and
    kept tokens are multiplied by ``1 + g - stop(g)``, ``g = sigmoid(S / tau)`` (straight through)."""

    projector: bool = option(True, "whether a module stands behind the projector")
    layers: tuple[int, ...] | int | None = option(None, "decoder layers with a module in front (default: none)")
    width: int | None = option(
        None,
        "channels of a module, 64 to a head (reconstruction; default: half the model's, in steps of 64, up to 512)",
        least=1,
        most=4096,
    )
    init: str = option(
        "zeros", "heads before training: 'zeros' (all scores equal) or 'random'", choices=("zeros", "random")
    )
    weights: str | None = option(None, "trained modules (safetensors)")

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        assert keep is not None
        places = self._places(geometry)
        counts = equal_shares(geometry.tokens, keep, len(places))
        return tuple(Cut(site=site, keep=k) for site, k in zip(places, counts, strict=True))

    def _places(self, geometry: Geometry) -> tuple[str, ...]:
        if "projector" not in geometry.provides:  # no visual tokens
            raise UnsupportedError(
                f"covipal works at projector; this model ({geometry.family}, {geometry.arch}) offers "
                f"{' / '.join(geometry.provides)}"
            )
        if not self.projector and self.layers is None:
            raise VtpruneError("covipal: projector=False leaves no module; give layers= too")
        inside = () if self.layers is None else layers("covipal", self.layers, geometry, ())
        return (*(("projector",) if self.projector else ()), *(f"llm.{i}" for i in inside))

    def work(self, tokens: Any, text: Any, cut: Cut, geometry: Geometry) -> Any:
        return flops(tokens, text, geometry.width, self._width(geometry.width))

    def _width(self, channels: int) -> int:
        return min(512, -(-channels // (2 * HEAD)) * HEAD) if self.width is None else self.width

    def build(self, branch: Any, geometry: Geometry) -> Modules:
        width = self._width(geometry.width)
        with torch.random.fork_rng(devices=[]):  # layers draw as they are made
            made = Modules(self._places(geometry), geometry.width, width, random=self.init == "random")
        if self.weights is not None:
            told, fits = {"places": ",".join(made.places)}, f"{len(made.places)} modules {width} wide of this model"
            load_weights("covipal", self.weights, made, told, fits, must_tell=True)
        return made.requires_grad_(False)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        made: Modules = view.module
        text: Text = view.source("text")
        score = made(cut.site, view.features, view.valid, text.hidden, text.valid)
        chosen = top(score, cut.keep or 0, view.valid, view.protected, span=view.extent)
        work = flops(view.counts, text.valid.sum(1), view.features.shape[2], made.width)
        chosen = replace(chosen, work=work)
        if not score.requires_grad:
            return chosen
        view.tell("score", score.masked_fill(~view.valid, torch.nan))
        share = torch.sigmoid(score / made.temperature)
        if made.phase == HARD:
            return replace(chosen, gate=1 + share - share.detach())
        all_of_them = replace(from_mask(view.valid, view.extent), work=work)
        if made.phase == LOOK:
            return all_of_them
        counts = view.counts.clamp_min(1)
        kept = share.masked_fill(~view.valid, 0).sum(1) / counts
        view.tell("over", kept - view.counts.clamp_max(cut.keep or 0) / counts)
        return replace(all_of_them, retention=share)


def flops(tokens: Any, text: Any, channels: int, width: int) -> Any:
    """What a PPM runs for so many ``tokens`` and rows of ``text``, two per multiply-add."""
    rows = tokens + text
    block = 24 * rows * width**2 + 4 * rows * rows * width  # projections and MLP; the attention's two products
    return 2 * rows * channels * width + 2 * block + 2 * tokens * width


class Modules(nn.Module):
    """A PPM for each of the ``places``. ``phase`` says what happens to the tokens while gradients are wanted: ``look``
    all stay, ``soft`` all stay and are attended to by the share ``g = sigmoid(S / temperature)``, ``hard`` as in
    use."""

    def __init__(self, places: tuple[str, ...], channels: int, width: int, *, random: bool):
        super().__init__()
        self.places, self.width, self.phase, self.temperature = places, width, HARD, 1.0
        generator = torch.Generator().manual_seed(0)
        self.ppm = nn.ModuleList(Module(channels, width, generator, random=random) for _ in places)

    def forward(self, place: str, visual: Tensor, valid: Tensor, text: Tensor, there: Tensor) -> Tensor:
        score: Tensor = self.ppm[self.places.index(place)](visual, valid, text, there)
        return score


class Module(nn.Module):
    """One PPM (reconstruction): every row is projected to ``width`` channels, two pre-norm transformer blocks run over
    text and visual rows together, in which every row reads every other, and a linear head gives each visual row a
    number. No positions: a permutation of the visual tokens permutes their scores. Drawn from ``generator``; the head
    is zero unless ``random``."""

    def __init__(self, channels: int, width: int, generator: torch.Generator, *, random: bool):
        super().__init__()
        self.enter = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
                elif name.endswith("bias"):
                    p.zero_()
            if not random:
                self.head.weight.zero_()

    def forward(self, visual: Tensor, valid: Tensor, text: Tensor, there: Tensor) -> Tensor:
        """Scores ``[B, N]`` of ``visual`` ``[B, N, C]``; ``valid`` ``[B, N]`` and ``there`` ``[B, T]`` say what of it
        and of ``text`` ``[B, T, C]`` is no padding."""
        hidden = torch.cat([there, valid], 1).logical_not()
        hidden = hidden & ~hidden.all(1, keepdim=True)  # a unit of which nothing is left reads its padding
        with torch.autocast(visual.device.type, enabled=False):  # 16 bits tell too few scores apart
            rows: Tensor = self.enter(torch.cat([text, visual.to(text.dtype)], 1).to(self.enter.weight.dtype))
            for block in self.blocks:
                rows = block(rows, hidden)
            score: Tensor = self.head(self.norm(rows[:, text.shape[1] :]))[..., 0]
        return score


class Block(nn.Module):
    """A pre-norm transformer block, its MLP four times as wide."""

    def __init__(self, width: int):
        super().__init__()
        heads = width // HEAD if width % HEAD == 0 else 1
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """``rows`` ``[B, M, width]``, of which ``hidden`` ``[B, M]`` are read by none."""
        x = self.norms[0](rows)
        rows = rows + self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        out: Tensor = rows + self.mlp(self.norms[1](rows))
        return out
