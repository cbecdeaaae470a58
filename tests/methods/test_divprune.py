"""DivPrune (arXiv 2503.02175) against a slow transcription of its greedy rule."""

from __future__ import annotations

import math

import builders as B
import pytest
import torch

import vtprune
from vtprune.core.types import TokenView
from vtprune.methods.base import Cut, make


def distances(tokens: list[list[float]]) -> list[list[float]]:
    """``1 - cos``, number by number."""
    length = [math.sqrt(sum(a * a for a in t)) for t in tokens]
    return [
        [1 - sum(a * b for a, b in zip(s, t, strict=True)) / (length[i] * length[j]) for j, t in enumerate(tokens)]
        for i, s in enumerate(tokens)
    ]


def chosen_in_turn(tokens: list[list[float]], keep: int) -> list[int]:
    """First the largest second smallest entry of a column, then the largest distance to the nearest chosen one."""
    d = distances(tokens)
    n = len(tokens)
    nearest = [sorted(d[i][j] for i in range(n))[1] if n > 1 else 0.0 for j in range(n)]
    picks = [max(range(n), key=lambda j: nearest[j])]
    while len(picks) < keep:
        left = [j for j in range(n) if j not in picks]
        picks.append(max(left, key=lambda j: min(d[i][j] for i in picks)))
    return picks


def view(features: torch.Tensor, counts: list[int] | None = None, protected: list[int] | None = None) -> TokenView:
    b, n, _ = features.shape
    index = torch.arange(n).expand(b, n)
    valid = index < torch.tensor(counts or [n] * b)[:, None]
    held = torch.zeros(b, n, dtype=torch.bool)
    held[:, protected or []] = True
    return TokenView(
        features=features, valid=valid, index=index, size=torch.ones(b, n), protected=held & valid, grid=(1, n)
    )


def kept(view: TokenView, keep: int) -> list[list[int]]:
    selection = make("divprune", {}).select(view, Cut(site="projector", keep=keep))
    return [row[row >= 0].tolist() for row in selection.kept]


@pytest.mark.parametrize("keep", [1, 2, 9, 35, 36])
@pytest.mark.parametrize("tower, text", [("clip", "llama"), ("siglip", "mistral")])
def test_llava_equals_the_transcription(tower, text, keep):
    """On what a dense run gives the language model, image by image."""
    model, inputs = B.llava(tower, text, blocks=3, layers=2), B.prompts([[4, 9], [7, 2, 5]])
    dense = B.embeddings(model, inputs)
    with vtprune.attach(model, "divprune", keep=keep) as handle:
        B.final(model, inputs)
        (stage,) = handle.report().stages
    for b, x in enumerate(dense):
        at, want = B.visual_positions(inputs, b), []
        for start in range(0, len(at), B.N):
            picks = chosen_in_turn(x[at[start : start + B.N]].tolist(), keep)
            want += [start + i for i in sorted(picks)]
        assert stage.kept[b].tolist() == want
    assert stage.site == "projector" and stage.tokens_out == [keep, 2 * keep]


def test_the_images_of_a_prompt_are_one_pool_per_sample():
    model, inputs = B.llava(blocks=3, layers=2), B.prompts([[7, 2, 5]])
    (x,), at = B.embeddings(model, inputs), B.visual_positions(inputs, 0)
    with vtprune.attach(model, "divprune", keep=9, per="sample") as handle:
        B.final(model, inputs)
        (stage,) = handle.report().stages
    assert stage.kept[0].tolist() == sorted(chosen_in_turn(x[at].tolist(), 9))


def test_tiles_and_new_lines_are_one_pool(tiny):
    """An image of several rasters is decided as a whole: all its tokens, new lines among them."""
    model, inputs = tiny("llava-next", "clip-llama")
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    with vtprune.attach(model, "divprune", keep=7) as handle, torch.no_grad():
        model(**inputs)
        (stage,) = handle.report().stages
        images = [[u.columns for u in sample] for sample in handle.adapter.parts(inputs["input_ids"], inputs)]
        number = [[u.image for u in sample] for sample in handle.adapter.parts(inputs["input_ids"], inputs)]
    for b, (parts, numbers) in enumerate(zip(images, number, strict=True)):
        columns = torch.cat(parts).sort().values
        want = []
        for image in sorted(set(numbers)):
            mine = torch.cat([p for p, i in zip(parts, numbers, strict=True) if i == image]).sort().values
            picks = chosen_in_turn(seen[0][b, mine].double().tolist(), 7)
            want += torch.searchsorted(columns, mine[picks].sort().values).tolist()
        assert stage.kept[b].tolist() == want


def test_a_duplicate_is_never_chosen_twice():
    """42 tokens made of six vectors, of which the official code returns one five times among ten."""
    generator = torch.Generator().manual_seed(0)
    six = torch.randn(6, 8, generator=generator)
    features = six[torch.arange(42) % 6][None]
    (row,) = kept(view(features), 10)
    assert len(set(row)) == len(row) == 10 and {i % 6 for i in row} == set(range(6))
    assert {i % 6 for i in kept(view(features), 6)[0]} == set(range(6))  # each of them first


@pytest.mark.parametrize("keep", [1, 3, 7, 12])
@pytest.mark.parametrize("value", [1.0, 0.0, torch.nan])
def test_equal_tokens_leave_exact_counts(keep, value):
    rows = kept(view(torch.full((2, 12, 4), value), [12, 5]), keep)
    assert [len(set(row)) for row in rows] == [len(row) for row in rows] == [keep, min(keep, 5)]
    assert all(i < 5 for i in rows[1])


def test_padding_changes_nothing():
    features = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    both = kept(view(features, [12, 7]), 5)
    assert both == [
        sorted(chosen_in_turn(features[0].tolist(), 5)),
        sorted(chosen_in_turn(features[1, :7].tolist(), 5)),
    ]


def test_tokens_that_must_stay_take_the_last_places():
    features = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    order = chosen_in_turn(features[0].tolist(), 12)
    held = order[-1]
    assert kept(view(features, protected=[held]), 4) == [sorted([held, *order[:3]])]
    assert kept(view(features, protected=[order[1]]), 4) == [sorted(order[:4])]


def test_the_order_of_choice_is_the_score():
    features = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    score = make("divprune", {}).select(view(features), Cut(site="projector", keep=4)).score[0]
    order = chosen_in_turn(features[0].tolist(), 4)
    assert [score[i].item() for i in order] == [0, -1, -2, -3]
    assert [score[i].item() for i in range(9) if i not in order] == [-4] * 5


def test_lengths_do_not_matter():
    features = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scaled = features * torch.linspace(0.1, 9, 12, dtype=torch.float64)[None, :, None]
    assert kept(view(features), 5) == kept(view(scaled), 5)


def test_the_usual_budget_is_the_paper_s():
    assert vtprune.describe("divprune").keep == 0.098
