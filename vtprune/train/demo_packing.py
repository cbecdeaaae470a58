"""Batches for the bundled VLM: many question-answer pairs behind each image, with the targets of its training-only
heads."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor

from ..core.types import VtpruneError
from ..data import scenes
from .demo_model import PREFIX, TOKENS


def _places(index: int) -> dict[tuple[str, str], tuple[float, float]]:
    """(colour, shape) -> centre in pixels of every shape in training scene ``index``: what the mention and comparison
    heads learn (training only)."""
    rng = np.random.RandomState([0, index])
    return {(i.color, i.kind): i.center for i in scenes.layout(rng, 3 if index % 4 == 0 else 6) if i.kind != "sign"}


def cell_number(x: float, y: float) -> int:
    return int(y // scenes.CELL) * scenes.CELLS + int(x // scenes.CELL)


def _side(gap: float) -> int:
    """0 before, 1 about level, 2 behind (the generator asks for a relation from 24 pixels on)."""
    return 0 if gap < -24 else 2 if gap > 24 else 1


TURNED = {"left": "right", "right": "left", "above": "below", "below": "above"}


def turned(words: list[str]) -> list[str]:
    """The same relation the other way round: "is the A left of the B ?" becomes "is the B right of the A ?"."""
    k = next(i for i, w in enumerate(words) if w in TURNED)
    of = words[k + 1 : k + 2] if words[k + 1] == "of" else []
    return ["is", "the", *words[-3:-1], TURNED[words[k]], *of[:1], "the", *words[2:4], "?"]


@dataclass(frozen=True)
class Pair:
    """A question and its answer."""

    kind: str
    ids: list[int]  # tokens of the question
    answer: list[int]  # of the answer, with the end mark
    mention: list[int]  # per token of the question the cell of the object that it names (-100: none)
    dx: list[int]  # how the first object lies to the one that this token names, from left to right (-100: none)
    dy: list[int]  # and from top to bottom
    simple: Pair | None = None  # a relation said with "left of" or "above"


def mask_of(group: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask ``[B, 1, T, T]``, float32 with the least number of ``dtype``, under which every pair sees
    itself and the prefix, causally; ``group`` ``[B, T]``: 0 the shared prefix, k pair k, -1 padding."""
    total = group.shape[1]
    same = (group[:, :, None] == group[:, None, :]) | (group[:, None, :] == 0)
    mask = torch.tril(torch.ones(total, total, dtype=torch.bool)) & same | torch.eye(total, dtype=torch.bool)
    return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(dtype).min)[:, None]


def judge(logits: Tensor, labels: Tensor, group: Tensor, kinds: list[list[str]], hits: dict[str, list[bool]]) -> None:
    """Adds to ``hits``, by kind, whether all answer tokens of each pair are the arg-max; ``labels`` and ``group``
    ``[B, T]`` behind the prefix, ``logits`` ``[B, T + 1, words]`` from its last token on."""
    right = (logits[:, :-1].argmax(-1) == labels) | (labels == -100)
    for row, named in enumerate(kinds):
        for k, kind in enumerate(named, 1):
            hits.setdefault(kind, []).append(bool(right[row][group[row] == k].all()))


class Packed:
    """Batches of images with as many question-answer pairs as fit into ``room`` tokens behind each image."""

    def __init__(self, shards: list[Path], tokenizer, seed: int, room: int = 208):
        self.tokenizer, self.room, self.rng = tokenizer, room, random.Random(seed)
        self.simple = 0.0  # chance that a relation is turned to "left of" / "above" (curriculum)
        self.items: list[tuple[Tensor, list, Tensor | None]] = []
        self.seen: set[Path] = set()
        self.load(shards)

    def load(self, shards: list[Path]) -> None:
        for path in sorted(set(shards) - self.seen):
            self.seen.add(path)
            try:
                shard = torch.load(path, weights_only=True)  # tensors, lists and words: no file of the cache runs code
                shard["features"], shard["dense"], shard["rows"]
            except (OSError, RuntimeError, EOFError, TypeError, LookupError, UnpicklingError, struct.error) as e:
                raise VtpruneError(f"{path} is no shard of features; delete it and make it anew with 'cache'") from e
            dense = shard["dense"]
            split, _, first = path.stem.rpartition("-")
            for k, rows in enumerate(shard["rows"]):
                places = _places(int(first) + k) if split == "train" else {}
                pairs = [self._pair(kind, q.split(), a, places) for kind, q, a in rows]
                self.items.append((shard["features"][k], pairs, None if dense is None else dense[k]))

    def _pair(self, kind: str, words: list[str], answer: str, places: dict) -> Pair:
        ids = self.tokenizer(" ".join([*words, "assistant", ":"])).input_ids
        named = [places.get((words[i - 1], w)) if i else None for i, w in enumerate(words)] + [None, None]
        mention = [-100 if n is None else cell_number(*n) for n in named]
        dx, dy = [-100] * len(ids), [-100] * len(ids)
        words_named = [i for i, n in enumerate(named) if n is not None]
        simple = None
        if kind == "relation" and len(words_named) == 2:
            (ax, ay), (bx, by) = (places[(words[i - 1], words[i])] for i in words_named)
            dx[words_named[1]], dy[words_named[1]] = _side(ax - bx), _side(ay - by)
            if "right" in words or "below" in words:
                simple = self._pair(kind, turned(words), answer, places)
        return Pair(
            kind, ids, self.tokenizer(answer).input_ids + [self.tokenizer.eos_token_id], mention, dx, dy, simple
        )

    def _weight(self, pair: Pair) -> float:
        # 27 of 39 easy-VQA questions are yes/no; relations are the hardest
        return {"yes/no": 0.35, "relation": 3.0}.get(pair.kind, 1.0)

    def batch(self, chosen: list, shuffle: bool = True) -> dict:
        n, total = len(chosen), PREFIX + self.room
        ids = torch.full((n, total), self.tokenizer.pad_token_id)
        labels = torch.full((n, total), -100)
        group = torch.full((n, total), -1)  # 0: shared prefix, k: pair k, -1: padding
        position = torch.arange(total).repeat(n, 1)
        targets = torch.full((3, n, total), -100)  # mention, dx, dy
        kinds: list[list[str]] = [[] for _ in range(n)]
        ids[:, :3] = torch.tensor(self.tokenizer("<s> user :").input_ids)
        group[:, :PREFIX] = 0
        for b, (_, pairs, _) in enumerate(chosen):
            at, k = PREFIX, 0
            if shuffle:
                pairs = sorted(pairs, key=lambda p: self.rng.random() ** (1 / self._weight(p)), reverse=True)
            for pair in pairs:
                if pair.simple is not None and self.rng.random() < self.simple:
                    pair = pair.simple
                kind, q, a = pair.kind, pair.ids, pair.answer
                end = at + len(q) + len(a)
                if end > total:
                    continue
                k += 1
                ids[b, at:end] = torch.tensor(q + a)
                labels[b, at + len(q) : end] = torch.tensor(a)
                targets[:, b, at : at + len(q)] = torch.tensor([pair.mention, pair.dx, pair.dy])
                group[b, at:end] = k
                position[b, at:end] = PREFIX + torch.arange(end - at)
                kinds[b].append(kind)
                at = end
        dense = [torch.zeros(2, TOKENS) - 1 if d is None else d for *_, d in chosen]
        return {
            "features": torch.stack([f for f, *_ in chosen]).float(),
            "ids": ids,
            "labels": labels,
            "group": group,
            "targets": targets,
            "position": position,
            "mask": mask_of(group, torch.bfloat16),
            "dense": torch.stack(dense).long(),
            "kinds": kinds,
        }
