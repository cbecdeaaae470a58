"""What a model is trained and compared on: rows, how they become a batch, what the model is called with, and when its
answer is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.types import VtpruneError

EVERY = 5  # one row in so many is kept aside where nothing else is there to compare on


class Data(Protocol):
    """Rows with a ``kind`` and a ``source`` (what several rows may share: an image)."""

    @property
    def rows(self) -> Sequence[Any]: ...

    @property
    def noun(self) -> str: ...

    @property
    def shown(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Any: ...

    def digest(self) -> str: ...

    def batch(self, rows: list[Any], device: torch.device) -> dict[str, Any]: ...

    def call(self, model: Any, inputs: Mapping[str, Any], asks: Mapping[str, Any]) -> Any: ...

    def counted(self, inputs: Mapping[str, Any]) -> Tensor: ...

    def right(self, output: Any, inputs: Mapping[str, Any]) -> Tensor: ...


class Rows:
    """What is counted and fetched by its rows."""

    rows: list[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]


class Answers(Rows):
    """Of a language model: the loss is the mean over the answers' tokens."""

    noun = "questions"

    def call(self, model: Any, inputs: Mapping[str, Any], asks: Mapping[str, Any]) -> Any:
        """The model's own forward; ``output.loss`` and ``output.logits`` ``[B, T, V]``."""
        return model(**inputs, use_cache=False, **asks)

    def counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """Of how many tokens the loss is the mean."""
        return (inputs["labels"][:, 1:] != -100).sum()

    def right(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """``[B]`` bool: the answer's tokens are all the arg-max, which is when greedy decoding gives exactly that
        answer."""
        labels = inputs["labels"]
        return ((output.logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1)


def padded(sequences: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` and ``attention_mask`` ``[B, T]`` of ``(prompt, answer)``, padded on the right; labels
    are -100 everywhere but on the answers."""
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.full((len(sequences), width), pad)
    labels = torch.full((len(sequences), width), -100)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for b, (prompt, answer) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(answer)
        ids[b, :end] = torch.tensor(prompt + answer)
        labels[b, start:end] = torch.tensor(answer)
        mask[b, :end] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def aside(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """``items`` to train on, and every fifth of them to compare on. Raises :class:`VtpruneError` for too few."""
    if len(items) < EVERY:
        raise VtpruneError(
            f"{len(items)} are too few to keep one in {EVERY} for the comparison: give more, or --eval-data"
        )
    kept = [item for i, item in enumerate(items) if i % EVERY != EVERY - 1]
    return kept, list(items[EVERY - 1 :: EVERY])


@dataclass(frozen=True)
class Spoken:
    """One prompt and its reply, as tokens."""

    source: int
    kind: str
    ids: list[int]
    answer: list[int]
