"""A model with its processor, its recipe and what it has cost so far: what generation and log-likelihood work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..check.attach import attach
from ..core.handle import Handle
from ..core.recipe import Recipe
from ..core.report import Report
from ..inputs.chats import kinds, prepare_chats
from ..measure.run import dense_report
from ..measure.samples import sample_seed
from ..methods.base import METHODS


@dataclass
class PrunedModel:
    """A model, dense until :meth:`attach`.

    Attributes:
        model: what answers; ``None`` once it was let go of.
        processor: of the model; ``None`` where another lmms-eval model holds it.
        device: where inputs go.
        seed: of methods and answers that draw at random.
        handle: of the attached recipe; ``None``: dense.
        draws: whether a method of the recipe draws at random.
        costs: of every batch so far, see :mod:`vtprune.lmms.meter`.
    """

    model: Any
    processor: Any
    device: torch.device
    seed: int = 0
    handle: Handle | None = None
    draws: bool = False
    costs: list[dict[str, Any]] = field(default_factory=list)

    def attach(self, recipe: Recipe, options: dict[str, Any]) -> None:
        self.handle = attach(self.model, recipe, **options)
        self.draws = any(METHODS.get(stage.method).draws for stage in recipe.stages)

    def reseed(self, numbers: Sequence[int], times: int = 1) -> None:
        """Each sample's own draw, from its ``numbers`` in the task; ``times``: of its beams, which keep the same
        tokens."""
        if self.draws:
            assert self.handle is not None
            self.handle.reseed([sample_seed(self.seed, number) for number in numbers for _ in range(times)])

    def inputs(self, chats: Sequence[list[dict[str, Any]]]) -> Any:
        return prepare_chats(self.processor, chats)

    def report(self, inputs: Any, shows: bool = True) -> Report:
        """The report of the prefill that has just run; text alone (not ``shows``) is never pruned."""
        return self.handle.report() if self.handle is not None and shows else dense_report(self.model, inputs)


def same_kinds(chats: Sequence[list[dict[str, Any]]]) -> list[list[int]]:
    """Samples that can share a batch: those that show the same kinds of things."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, chat in enumerate(chats):
        groups.setdefault(kinds(chat), []).append(i)
    return list(groups.values())
