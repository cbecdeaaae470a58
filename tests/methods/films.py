"""Videos for the tests of methods that compare frames: random ones, views and plans of them, and what is left of
them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.core.select import combine
from vtprune.core.types import Cut, Geometry, Selection, TokenView
from vtprune.methods.base import METHODS

Vector = list[float]
Frame = list[Vector]
FAMILIES = [("qwen2.5-vl", "video"), ("smolvlm", "smolvlm"), ("llava-onevision", "video")]


def cosine(a: Vector, b: Vector) -> float:
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def mean(vectors: list[Vector]) -> Vector:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def repeating(f: int, p: int, c: int, seed: int, moving: float, cuts: tuple[int, ...], noise: float) -> Tensor:
    """``[f * p, c]``: frames that repeat up to a little ``noise``, a share ``moving`` of the places new in each; other
    ones at ``cuts``."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    still, out = draw(p, c), []
    for i in range(f):
        if i in cuts:
            still = draw(p, c)
        new = torch.rand(p, 1, generator=generator) < moving
        out.append(torch.where(new, draw(p, c), still + noise * draw(p, c)))
    return torch.cat(out)


def framed(x: Tensor, f: int, p: int) -> list[Frame]:
    return x[: f * p].unflatten(0, (f, p)).tolist()


def attention_of(x: Tensor, loose: int = 0) -> Tensor:
    """Random, of the tokens ``x`` ``[B, N, C]``; the ``loose`` last were not made by the tower."""
    b, n, _ = x.shape
    out = torch.rand(b, n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out[:, n - loose :] = torch.nan if loose else out[:, n:]
    return out


def view(x: Tensor, f: int, p: int, protected: Any = (), sources: dict[str, Callable] | None = None) -> TokenView:
    """Videos ``x`` ``[B, F P + loose, C]``."""
    b, n, _ = x.shape
    held = torch.zeros(b, n, dtype=torch.bool)
    held[:, list(protected)] = True
    return TokenView(
        features=x,
        valid=torch.ones(b, n, dtype=torch.bool),
        index=torch.arange(n).expand(b, n),
        size=torch.ones(b, n, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32),
        protected=held,
        grid=(1, p),
        frames=((p,) * f,) * b,
        sources=sources or {},
    )


def geometry(f: int, p: int, loose: int = 0, **more: Any) -> Geometry:
    return Geometry(
        **{
            "family": "x",
            "arch": "x",
            "tokens": f * p + loose,
            "grid": (1, p),
            "prefix": 0,
            "vision_layers": 2,
            "vision_depth": 2,
            "llm_layers": 2,
            "provides": {"projector": frozenset()},
            "rasters": ((1, p),) * f + ((1, 1),) * loose,
            "frames": f,
            "variable": True,
            **more,
        }
    )


def rows(made: TokenView, selection: Selection | None) -> list[dict[int, Tensor]]:
    """Of each video what is left, by position."""
    if selection is None:
        return [dict(enumerate(x)) for x in made.features]
    values, _ = combine(made.features, selection, made.size)
    return [
        {int(i): value for i, value in zip(kept, row, strict=True) if i >= 0}
        for kept, row in zip(selection.kept, values, strict=True)
    ]


def same_rows(got: dict[int, Tensor], want: dict[int, Vector], limit: float = 1e-9) -> None:
    assert list(got) == list(want)
    if want:
        B.close(torch.stack(list(got.values())), torch.tensor(list(want.values()), dtype=torch.float64), limit)


# --------------------------------------------------------------------------------------------------------------------
# models


def of_type(model: Any, inputs: dict[str, Tensor], dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    return model.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def moving(inputs: dict[str, Tensor], patches: int = 12) -> dict[str, Tensor]:
    """``inputs`` whose images are one, but for noise in some patches of each; the last two are another one."""
    noise, first = B.images(len(inputs["pixel_values"]), seed=8), inputs["pixel_values"][1]
    pixels = first.repeat(len(noise), 1, 1, 1)
    pixels[-2:] = -first
    generator = torch.Generator().manual_seed(1)
    for image in range(len(noise)):
        pixels[image] += 1e-3 * noise[image]
        for patch in torch.randperm(B.N, generator=generator)[:patches].tolist():
            y, x = patch // B.SIDE * 8, patch % B.SIDE * 8
            pixels[image, :, y : y + 8, x : x + 8] = 2 * noise[image, :, y : y + 8, x : x + 8]
    return {**inputs, "pixel_values": pixels}


def alone(inputs: dict[str, Tensor], b: int, counts: list[int]) -> dict[str, Tensor]:
    """Prompt ``b`` of a batch whose prompts have ``counts`` images."""
    there = inputs["attention_mask"][b].bool()
    out = {k: inputs[k][b : b + 1, there] for k in ("input_ids", "attention_mask", "position_ids")}
    begin = sum(counts[:b])
    return {**out, "pixel_values": inputs["pixel_values"][begin : begin + counts[b]]}


def decisions(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[TokenView, Cut, Selection | None]]:
    """What the method ``name`` is shown and answers from now on."""
    cls, seen = METHODS.get(name).cls, []
    real = cls.select
    monkeypatch.setattr(cls, "select", lambda self, v, cut: (seen.append((v, cut, s := real(self, v, cut))), s)[1])
    return seen


def equals_dense(model: Any, inputs: dict[str, Tensor], name: str, **budget: Any) -> None:
    with torch.no_grad():
        dense = model(**inputs).logits
        with vtprune.attach(model, name, **budget):
            torch.testing.assert_close(model(**inputs).logits, dense, rtol=1e-9, atol=1e-9)


def finite(model: Any, inputs: dict[str, Tensor], name: str, **options: Any) -> None:
    with torch.no_grad(), vtprune.attach(model, name, **options):
        logits = model(**inputs).logits
    assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()
