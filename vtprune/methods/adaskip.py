"""AdaSkip: "AdaSkip: Adaptive Sublayer Skipping for Accelerating Long-Context LLM Inference" (arXiv 2501.02336, AAAI
2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.types import Geometry, VtpruneError
from .base import Action, Cut, Method, MethodInfo, layers, option, register

HALVES = ("attention", "mlp")  # the sub-layers of layer i are 2 i and 2 i + 1


@register(
    MethodInfo(
        name="adaskip",
        paper="arXiv 2501.02336",
        idea="leaves out the attentions and MLPs that, as fitted beforehand, change least, and scales what passes by",
        kinds=("llm",),
        keep=None,
        budgeted=False,
        skips=True,
        fitted=True,
        elsewhere={"attention": (2,), "mlp": (3,), "ratio": 1.1},
        cases=(
            {"attention": (2,), "mlp": (3,), "ratio": 1.1},
            {"attention": (2, 4), "mlp": (1, 3, 4), "ratio": 1.25, "online": 3, "beta": -1.0},
        ),
    )
)
@dataclass(frozen=True, kw_only=True)
class AdaSkip(Method):
    """A sub-layer is an attention or an MLP with its residual sum: ``y = x + Attn(norm x)``, ``z = y + MLP(norm y)``.
    It matters by 1 - the cosine similarity of what it is given and what it makes; of a model's 2L sub-layers the
    ``sublayers`` most similar are left out (of equal ones the earlier), in a prompt and in its answer. In the place of
    such a sub-layer stands its input times the ratio of its output's norm to its input's: ``y = ratio x``, of an MLP
    ``z = ratio y``. Similarities and ratios are means over some prompts; ``vtprune fit adaskip`` measures them and
    writes them into a recipe for one model.

    Online, more MLPs go from an answer than from its prompt: of its first ``online`` tokens (official code: 20; 0: none
    are watched) every MLP that is left tells its similarity and its ratio, norms token by token, and those whose mean
    similarity is at least ``beta`` are left out behind them, with their mean ratio; ``beta`` is the least similarity of
    what is left out beforehand. Each answer decides for itself. (In the official code that threshold is there for one
    request only, the 20th; behind it nothing more is left out.) Everything behind a prompt counts as its answer.

    Samples without tokens that could be pruned stay whole."""

    similarity: tuple[float, ...] | None = option(
        None,
        "fitted: how similar output and input of each sub-layer are (attention and MLP of layer 0, of layer 1, ...)",
        least=-1,
        most=1,
    )
    ratio: tuple[float, ...] | float = option(
        1.0,
        "what is left out goes on times this: fitted, a number for each sub-layer, or one for all",
        above=0,
        most=1e4,
    )
    sublayers: int = option(8, "how many sub-layers are left out (paper: 8, 12, 16)", least=0)
    attention: tuple[int, ...] | None = option(
        None, "layers whose attention is left out; with mlp= it replaces similarity= and sublayers="
    )
    mlp: tuple[int, ...] | None = option(None, "layers whose MLP is left out, see attention=")
    online: int = option(
        0,
        "how many of an answer's first tokens are watched, to leave more MLPs out behind them (official code: 20)",
        least=0,
    )
    beta: float | None = option(
        None,
        "how similar an MLP must leave what is watched; by default as the least similar that is fitted to go",
        least=-1,
        most=1,
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        chosen, ratio = self._chosen(geometry), self.ratio
        if isinstance(ratio, tuple | list):
            ratios = self._fitted("ratio", tuple(ratio), geometry)
        else:
            ratios = (float(ratio),) * (2 * geometry.llm_layers)
        cuts = [Cut(site=f"llm.{n // 2}", action=Action.SKIP, half=HALVES[n % 2], scale=ratios[n]) for n in chosen]
        if self.online:
            beta = self._threshold(chosen)
            cuts += [
                Cut(site=f"llm.{i}", action=Action.SKIP, half="mlp", watch=self.online, data={"beta": beta})
                for i in range(geometry.llm_layers)
                if 2 * i + 1 not in chosen
            ]
        elif self.beta is not None:
            raise VtpruneError("adaskip: beta= is the threshold of online=, which watches nothing here")
        return tuple(sorted(cuts, key=lambda cut: (cut.layer, cut.half)))

    def _threshold(self, chosen: list[int]) -> float:
        """How similar an MLP must be that is left out of an answer."""
        if self.beta is not None:
            return self.beta
        if self.similarity is None or not chosen:
            raise VtpruneError(
                "adaskip: online= needs beta=, where no fitted similarity= of what is left out beforehand tells how "
                "similar is similar enough"
            )
        return min(self.similarity[n] for n in chosen)

    def _chosen(self, geometry: Geometry) -> list[int]:
        """The sub-layers that are left out, ascending."""
        if self.attention is not None or self.mlp is not None:
            told = (self.attention, self.mlp)
            return sorted(2 * i + h for h, some in enumerate(told) for i in layers("adaskip", some, geometry, ()))
        if self.similarity is None:
            raise VtpruneError(
                "adaskip leaves out what was found to matter least in a model: 'vtprune fit adaskip' writes that as a "
                "recipe; or name layers by attention= and mlp="
            )
        similar = self._fitted("similarity", tuple(self.similarity), geometry)
        if self.sublayers > len(similar):
            raise VtpruneError(f"adaskip: sublayers={self.sublayers}, and there are {len(similar)} sub-layers")
        return sorted(sorted(range(len(similar)), key=lambda n: -similar[n])[: self.sublayers])

    @staticmethod
    def _fitted(name: str, values: tuple[float, ...], geometry: Geometry) -> tuple[float, ...]:
        """``values``, one of each sub-layer of this model."""
        layers("adaskip", None, geometry, ())
        if len(values) != 2 * geometry.llm_layers:
            raise VtpruneError(
                f"adaskip: {name}= was fitted to a model of {len(values) / 2:g} layers, and this one has "
                f"{geometry.llm_layers}: 'vtprune fit adaskip' once more"
            )
        return values

    def skip(self, rows: Tensor, prompt: Tensor, cut: Cut, module: Any) -> Tensor:
        return prompt.any(1)

    def learn(self, similarity: Tensor, ratio: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
        return similarity.mean(1) >= cut.data["beta"], ratio.mean(1)
