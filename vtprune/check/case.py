"""One model under one recipe on one batch: what every check of the contract starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.composition import Planned
from ..core.handle import put
from ..core.ledger import UndoLedger
from ..core.planning import bind, plan_for
from ..core.recipe import Recipe
from ..methods.base import METHODS


@dataclass
class Case:
    """What the checks share."""

    model: nn.Module
    recipe: Recipe
    inputs: dict[str, Any]  # what the model is called with
    options: dict[str, Any]  # of ``attach``: positions, seed, per

    def __post_init__(self) -> None:
        self.adapter = bind(self.model, self.options.get("per"))
        self.geometry = self.adapter.geometry
        self.infos = [METHODS.get(s.method) for s in self.recipe.stages]
        self.mllm = self.geometry.llm_layers > 0

    def attach(self, model: nn.Module | None = None, recipe: Recipe | None = None) -> Any:
        return put(self.model if model is None else model, recipe or self.recipe, self.options)

    def plan(self) -> list[Planned]:
        return plan_for(self.geometry, self.recipe, self.options.get("per"))

    def run(self, model: nn.Module | None = None, inputs: dict[str, Any] | None = None) -> Tensor:
        """Logits, or a tower's last hidden states."""
        with torch.no_grad():
            out = (self.model if model is None else model)(**(self.inputs if inputs is None else inputs))
        return output(out)

    def samples(self) -> list[dict[str, Any]]:
        """The batch as single samples without padding."""
        if not self.mllm:  # images are the inputs of four dimensions; texts to compare them with stay
            images = {name: x for name, x in self.inputs.items() if isinstance(x, Tensor) and x.ndim == 4}
            count = len(next(iter(images.values())))
            return [{**self.inputs, **{name: x[i : i + 1] for name, x in images.items()}} for i in range(count)]
        ids = self.inputs["input_ids"]
        parts = self.adapter.parts(ids, self.inputs)
        out = []
        for b in range(len(ids)):
            real = attention_mask(self.inputs)[b].bool()
            along = {
                k: self.inputs[k][b : b + 1, real] for k in ("input_ids", *self.adapter.follows) if k in self.inputs
            }
            out.append(
                {
                    **along,
                    "attention_mask": torch.ones_like(along["input_ids"]),
                    **self.adapter.slice_(self.inputs, parts, b),
                }
            )
        return out

    def positions(self, mask: Tensor) -> Tensor:
        return (mask.long().cumsum(1) - 1).clamp_min(0) + self.adapter.first_position


def output(out: Any) -> Tensor:
    """The tensor a caller looks at: logits, last hidden state, open_clip's image features (in a dict, or first of a
    tuple), or the model's plain output."""
    for name in ("logits", "last_hidden_state"):
        if hasattr(out, name):
            return getattr(out, name)
    if isinstance(out, dict):
        return out["image_features"]
    return out[0] if isinstance(out, tuple) else out


def behind_tower(c: Case) -> tuple[Tensor, Tensor]:
    """The model's output and, without a language model, what leaves the last block ``[G, P + n, C]``."""
    if c.mllm:
        return c.run(), torch.empty(0)
    last: list[Tensor] = []
    ledger = UndoLedger()
    ledger.after(
        c.adapter.tower_blocks()[-1],
        lambda module, args, kwargs, x: last.append(x[0] if isinstance(x, tuple) else x),
        first=False,
    )
    try:
        return c.run(), last[0]
    finally:
        ledger.undo()


def attention_mask(inputs: dict[str, Any]) -> Tensor:
    """The mask of ``inputs``, all ones where they have none."""
    return (
        inputs["attention_mask"] if inputs.get("attention_mask") is not None else torch.ones_like(inputs["input_ids"])
    )


def positioned(c: Case, inputs: dict[str, Any]) -> dict[str, Any]:
    """With the positions that ``generate`` gives; families with three axes derive theirs from the mask."""
    if not c.mllm or c.geometry.mrope:
        return inputs
    return {**inputs, "position_ids": c.positions(attention_mask(inputs))}
