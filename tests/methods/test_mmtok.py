"""MMTok (arXiv 2508.18264) against its sums, one at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import builders as B
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import testing
from vtprune.core.types import Text, TokenView
from vtprune.methods.base import Cut, make


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return dot / length if length else 0.0


def softmax(row: list[float]) -> list[float]:
    weights = [math.exp(s - max(row)) for s in row]
    return [w / sum(weights) for w in weights]


def greedy(v: Tensor, x: Tensor, z: Tensor, keep: int, alpha=0.5, text=0.02, picture=0.2) -> list[int]:
    """In the order of choice, with all of M."""
    v, x, z = v.tolist(), x.tolist(), z.tolist()
    n, m = len(v), len(z)
    words = [[p / m for p in softmax([cosine(a, b) / text for b in v])] for a in z]
    patches = [[alpha * q / n for q in softmax([cosine(a, b) / picture for b in x])] for a in x]
    rows = words + patches
    best, chosen = [0.0] * len(rows), []
    while len(chosen) < min(keep, n):
        gain = {j: sum(max(0.0, row[j] - c) for row, c in zip(rows, best, strict=True)) for j in range(n)}
        gain = {j: g for j, g in gain.items() if j not in chosen}
        chosen.append(next(j for j in gain if gain[j] >= max(gain.values()) - 1e-13))
        best = [max(c, row[chosen[-1]]) for row, c in zip(rows, best, strict=True)]
    return chosen


def view(v: Tensor, z: Tensor, after: Tensor | None = None, x: Tensor | None = None) -> TokenView:
    b, n = v.shape[:2]
    ones, every = torch.ones(b, n), torch.ones(z.shape[:2], dtype=torch.bool)
    text = Text(z, every, every if after is None else after, torch.arange(z.shape[1]).expand(b, -1))
    sources = {"text": lambda: text}
    if x is not None:
        sources["note vision.2"] = lambda: x
    return TokenView(
        features=v,
        valid=ones.bool(),
        index=torch.arange(n).expand(b, n),
        size=ones,
        protected=~ones.bool(),
        grid=(1, n),
        sources=sources,
    )


def chosen(seen: TokenView, keep: int, **options) -> list[list[int]]:
    data = {"noted": "vision.2"} if "note vision.2" in seen.sources else {}
    kept = make("mmtok", options).select(seen, Cut(site="projector", keep=keep, data=data)).kept
    return [row[row >= 0].tolist() for row in kept]


def directions(*degrees: float) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], -1)[None]


def test_the_examples_of_the_specification():
    v = directions(0, 30, 60, 150)
    assert chosen(view(v, directions(150)), 1) == [[3]]
    assert chosen(view(v, directions(62)), 1, alpha=0.0) == [[2]]
    assert greedy(v[0], v[0], directions(150)[0], 1) == [3]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.0}, {"alpha": 3.0, "temperature": 0.1}, {"text_temperature": 0.2}, {"features": "projected"}],
    ids=str,
)
@pytest.mark.parametrize("keep", [1, 2, 7, 16, 36])
def test_llava_equals_the_transcription(keep, options):
    """Of two images in a prompt the first is asked about by everything behind it."""
    model, inputs = B.llava("clip", "llama", blocks=4, layers=2), B.prompts([[4, 9], [7, 2, 5]])
    states = B.watched(model.model.vision_tower, inputs["pixel_values"])[0][3][:, 1:]
    with torch.no_grad():
        projected = model.model.multi_modal_projector(states)
    words = model.get_input_embeddings().weight.detach()
    ids = [row[row != 0] for row in inputs["input_ids"]]
    text = [words[row[row != B.IMAGE]] for row in ids]
    asked = [text[0][4:], text[1][7:], text[1][9:]]
    with vtprune.attach(model, "mmtok", keep=keep, **options) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    more = {"alpha": options.get("alpha", 0.5), "picture": options.get("temperature", 0.2)}
    more["text"] = options.get("text_temperature", 0.02)
    x = projected if options.get("features") == "projected" else states
    want = [sorted(greedy(projected[i], x[i], asked[i], keep, **more)) for i in range(3)]
    assert [row.tolist() for row in report.stages[-1].kept] == [want[0], want[1] + [B.N + i for i in want[2]]]


def test_where_the_tower_is_not_shown_the_projected_features_are_covered(monkeypatch):
    B.hide_the_tower(monkeypatch)
    model, inputs = testing.tiny("qwen2-vl")
    seen = []
    with vtprune.attach(model, "mmtok", keep=3, per="sample") as handle, torch.no_grad():
        hook = handle.adapter.projector[0].register_forward_hook(lambda m, a, o: seen.append(o))
        model(**inputs)
        hook.remove()
        report, visual = handle.report(), handle.adapter.visual(inputs["input_ids"])
    features = torch.cat(seen).double().split(report.visual_tokens)
    for b, v in enumerate(features):
        there = inputs["attention_mask"][b].bool() & ~visual[b]
        there[: int(visual[b].nonzero()[-1])] = False
        z = model.get_input_embeddings()(inputs["input_ids"][b, there]).detach().double()
        assert report.stages[-1].kept[b].tolist() == sorted(greedy(v, v, z, 3))
    with pytest.raises(vtprune.UnsupportedError, match="use features='projected'"):
        vtprune.attach(model, "mmtok", features="encoder")


def test_a_prompt_that_ends_with_its_image_is_asked_by_all_of_its_words():
    generator = torch.Generator().manual_seed(0)
    v, z = (torch.randn(2, n, 6, generator=generator, dtype=torch.float64) for n in (12, 5))
    after = torch.zeros(2, 5, dtype=torch.bool)
    after[1, 3:] = True
    got = chosen(view(v, z, after), 5)
    assert got == [sorted(greedy(v[i], v[i], words, 5)) for i, words in enumerate((z[0], z[1, 3:]))]
    swapped = view(v, z.flip(1), torch.ones_like(after))  # the order of words means nothing
    assert chosen(swapped, 5) == chosen(view(v, z), 5)
    nothing = view(v, z, after)
    text = replace(nothing.source("text"), valid=torch.zeros_like(after))
    silent = replace(nothing, sources={"text": lambda: text})
    assert chosen(silent, 5) == [sorted(greedy(v[i], v[i], z[i, :1] * 0, 5)) for i in range(2)]


@pytest.mark.parametrize("keep", [1, 3, 8, 12])
def test_exact_counts_whatever_the_data(keep):
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 5, 12, generator=generator)
    same = torch.ones(2, 12, 12)
    for v in (same, same * 0, torch.eye(12)[None].repeat(2, 1, 1), torch.full_like(same, torch.nan)):
        for alpha in (0.0, 0.5):
            for x in (None, v, torch.full_like(v, torch.nan)):
                rows = chosen(view(v, z, x=x), keep, alpha=alpha)
                assert all(len(set(row)) == len(row) == keep for row in rows)
    v = torch.randn(2, 12, 12, generator=generator)
    ragged = view(v, z)
    ragged.valid[1, 5:] = False
    protected = torch.zeros(2, 12, dtype=torch.bool)
    protected[:, 4] = True
    rows = chosen(replace(ragged, protected=protected), keep)
    assert [len(set(r)) for r in rows] == [keep, min(keep, 5)] and all(4 in r for r in rows)
    alone = replace(view(v[1:, :5], z[1:]), protected=protected[1:, :5])
    assert chosen(alone, keep)[0] == rows[1]


def test_tokens_that_the_tower_did_not_make_answer_words_only():
    """A new-line token has projected features and none of the encoder."""
    generator = torch.Generator().manual_seed(4)
    v, z, x = (torch.randn(1, n, 6, generator=generator, dtype=torch.float64) for n in (8, 3, 8))
    x[0, [2, 7]] = torch.nan
    z[0] = v[0, 2]
    assert 2 in chosen(view(v, z, x=x), 1)[0]
    assert chosen(view(v, -v[:, 2:3] * 0, x=x), 6) == [[0, 1, 3, 4, 5, 6]]
