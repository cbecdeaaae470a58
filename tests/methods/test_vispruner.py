"""VisPruner (arXiv 2412.01818) against a slow transcription of its rounds."""

from __future__ import annotations

import builders as B
import pytest
import torch

import vtprune
from vtprune.core.types import Projections, TokenView
from vtprune.methods.base import Cut, make


def rounds(unit: list[torch.Tensor], order: list[int], keep: int, important: float = 0.5, step: int = 8) -> list[int]:
    """Tokens kept, with lists: ``order`` by falling attention."""
    first = int(keep * important)
    kept, rest = order[:first], order[first:]
    while len(rest) > keep - first:
        a, b = rest[::2], rest[1::2]
        if not b:
            rest = rest[: keep - first]
            break
        most = {x: max(float(unit[x] @ unit[y]) for y in b) for x in a}
        falling = sorted(a, key=lambda x: -most[x])
        gone = min(step, len(rest) - (keep - first), len(rest) // 2)
        rest = falling[gone:] + b
    return sorted(kept + rest)


def view(features: torch.Tensor, attention: torch.Tensor) -> TokenView:
    """A view in which the class token attends as ``attention`` says: keys are its logarithm."""
    b, n = attention.shape
    k = torch.cat([torch.full((b, 1), -30.0), attention.log()], 1)[:, None, :, None]
    index = torch.arange(n).expand(b, n)
    ones = torch.ones(b, n)
    return TokenView(
        features=features,
        valid=ones.bool(),
        index=index,
        size=ones,
        protected=~ones.bool(),
        grid=(1, n),
        prefix=1,
        sources={"projections": lambda: Projections(torch.ones_like(k), k, k, 1.0, 1)},
    )


def chosen(features, attention, keep, **options):
    method = make("vispruner", options)
    cut = Cut(site="vision.2", keep=keep, data={"blocks": (2,)})
    return [row[row >= 0].tolist() for row in method.select(view(features, attention), cut).kept]


def test_the_example_of_the_specification():
    angle = torch.deg2rad(torch.tensor([0.0, 1, 2, 40, 41, 80, 81, 125]))
    features = torch.stack([angle.cos(), angle.sin()], -1)[None]
    attention = torch.tensor([[0.30, 0.20, 0.15, 0.12, 0.09, 0.06, 0.05, 0.03]])
    assert chosen(features, attention, 4) == [[0, 1, 5, 7]]
    assert chosen(features, attention, 4, important=1.0) == [[0, 1, 2, 3]]  # FasterVLM


@pytest.mark.parametrize("important, step", [(0.5, 8), (0.75, 3), (0.0, 5), (1.0, 8)])
@pytest.mark.parametrize("keep", [1, 2, 7, 16, 35, 36])
def test_llava_equals_the_transcription(keep, important, step):
    model, inputs = B.llava("clip", "llama", blocks=4, layers=2), B.prompts([[4, 9], [7, 2, 5]])
    with vtprune.attach(model, "vispruner", keep=keep, important=important, step=step) as handle, torch.no_grad():
        B.final(model, inputs)
        report = handle.report()
        runs = [(run, g) for run, g in handle.passes]
    kept = [run.records[-1].kept[g].tolist() for run, g in runs]
    hidden, attentions = B.watched(model.model.vision_tower, inputs["pixel_values"])
    states, weights = hidden[3], attentions[2]  # the third of four blocks is the last that is used
    for image, got in enumerate(kept):
        attention = weights[image].mean(0)[0, 1:]
        unit = list(torch.nn.functional.normalize(states[image, 1:], dim=-1))
        order = sorted(range(B.N), key=lambda i: -float(attention[i]))
        assert got == rounds(unit, order, keep, important, step)
    assert report.stages[-1].tokens_out == [keep, 2 * keep]


@pytest.mark.parametrize("keep", [1, 3, 8, 12])
def test_duplicates_and_equal_attention_leave_exact_counts(keep):
    same = torch.ones(2, 12, 4)
    for features in (same, torch.eye(12)[None].repeat(2, 1, 1) * 0):
        kept = chosen(features, torch.full((2, 12), 1 / 12), keep)
        assert all(len(set(row)) == len(row) == keep for row in kept)
