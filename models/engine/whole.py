"""Models whose whole prompt may be pruned: those without images, and with ``per="prompt"`` the others, text and all.

The first :data:`HEAD` tokens of a prompt stay, to which attention clings wherever it has nothing to say (sinks: arXiv
2309.17453), and so does the last, from which the answer follows. All others are what methods and reports call visual
tokens, one row of them in each prompt; budgets are of those.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.types import UnsupportedError
from .description import Decoder
from .layout import RasterSpan, prompts
from .prompt import prunable_tokens
from .request import Call

HEAD, TAIL = 4, 1  # tokens of a prompt that stay
INSIDE = "per='prompt' chooses among all tokens of a prompt, which come together in the language model"


class OfPrompts:
    """Makes an adapter of a language model one whose visual tokens are those of the whole prompt; ``own`` is the same
    model's that knows its images (``None``: it reads none)."""

    own: Any = None

    def prunable(self, inputs: dict[str, Any]) -> Tensor:
        call = Call(labels=inputs.get("labels"), mask=inputs.get("attention_mask"))
        return prunable_tokens(call, inputs["input_ids"], HEAD, TAIL)

    def parts(self, ids: Tensor, inputs: dict[str, Any]) -> list[list[RasterSpan]]:
        return prompts(self.prunable({**inputs, "input_ids": ids}), None)

    def slice_(self, inputs: dict[str, Any], samples: list[list[RasterSpan]], b: int) -> dict[str, Any]:
        return self.own.slice_(inputs, self.own.parts(inputs["input_ids"], inputs), b)

    def describe(self) -> Decoder:
        own: Decoder = super().describe()  # type: ignore[misc]  # of the adapter that this is mixed into
        return replace(own, visual=every, parts=self.parts, text=(HEAD, TAIL), pictures=self._pictures)

    def _pictures(self, ids: Tensor, inputs: dict[str, Any]) -> list[list[RasterSpan]]:
        """The rasters of each sample's images; none of a model of text."""
        seen = self.own is not None and bool(self.own.visual(ids).any())
        return self.own.parts(ids, inputs) if seen else [[] for _ in ids]


def every(ids: Tensor) -> Tensor:
    """All of ``ids`` ``[B, T]``: which of them the prompt's are, is told by what the model is called with."""
    return torch.ones_like(ids, dtype=torch.bool)


def of_prompts(adapter: Any) -> Any:
    """An adapter like ``adapter``, of the same model, whose text may go as well.

    Raises :class:`UnsupportedError` for one without a language model known here."""
    if isinstance(adapter, OfPrompts):
        return adapter
    if adapter.geometry.llm_layers == 0:
        raise UnsupportedError(f"per='prompt' is for language models, and {adapter.geometry.family} has none")
    family, own = type(adapter), adapter.geometry
    mixed: Any = type(family.__name__, (OfPrompts, family), {"__module__": family.__module__})
    geometry = replace(
        own,
        tokens=256,
        grid=(256, 1),
        variable=True,
        raster=False,
        rasters=(),
        notes=frozenset(),
        seen_layers=0,
        per=("prompt",),
        provides={"llm": own.provides["llm"]},
        refuses={**own.refuses, **dict.fromkeys(("pixels", "vision", "projector"), INSIDE)},
        traits=own.traits | {"prompt"},
    )
    out = mixed.__new__(mixed)
    vars(out).update(vars(adapter), own=adapter, geometry=geometry)
    return out
