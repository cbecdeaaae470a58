"""ApET (arXiv 2602.19870) against a slow transcription: normal equations, token by token, and means by hand."""

from __future__ import annotations

from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor, nn

import vtprune
from vtprune.core.select import combine
from vtprune.core.types import Geometry, TokenView
from vtprune.methods.base import Cut, make


def sampling(x: list[Tensor], count: int, first: int) -> list[int]:
    """Farthest-point sampling."""
    chosen = [first]
    while len(chosen) < min(count, len(x)):
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float((x[i] - x[j]).norm()) for j in chosen)))
    return chosen[:count]


def errors(x: list[Tensor], basis: list[int], ridge: float) -> list[float]:
    """By the normal equations."""
    b = torch.stack([x[i] for i in basis])  # [k, C]
    inverse = (b @ b.T + ridge * torch.eye(len(b), dtype=b.dtype)).inverse()
    return [float((v - b.T @ (inverse @ (b @ v))).norm()) for v in x]


def start(x: list[Tensor]) -> int:
    mean = torch.stack(x).mean(0)
    return max(range(len(x)), key=lambda i: float((x[i] - mean).norm()))


def apet(
    x: list[Tensor], keep: int, *, basis: int = 10, ridge: float = 1e-5, first: int | None = None, into: str = "all"
) -> tuple[list[int], list[int]]:
    """Tokens kept, and of each token the one that it went into."""
    chosen = sampling(x, min(basis, keep), start(x) if first is None else first)
    error = errors(x, chosen, ridge)
    ranked = sorted((i for i in range(len(x)) if i not in chosen), key=lambda i: -error[i])[: keep - len(chosen)]
    kept = sorted(chosen + ranked)
    absorbers = kept if into == "all" or not ranked else sorted(ranked)
    cosine = lambda i, j: float(x[i] @ x[j] / x[i].norm() / x[j].norm())  # noqa: E731
    gone_into = [i if i in kept else max(absorbers, key=lambda j: cosine(i, j)) for i in range(len(x))]
    return kept, gone_into


def means(x: list[Tensor], kept: list[int], into: list[int], size: list[float] | None = None) -> Tensor:
    size = size or [1.0] * len(x)
    rows = []
    for k in kept:
        mine = [i for i in range(len(x)) if into[i] == k]
        rows.append(sum(size[i] * x[i] for i in mine) / sum(size[i] for i in mine))
    return torch.stack(rows)


def view(x: Tensor, counts: list[int] | None = None, protected: list[int] | None = None, **more: Any) -> TokenView:
    b, n, _ = x.shape
    valid = torch.arange(n) < torch.tensor(counts or [n] * b)[:, None]
    held = torch.zeros(b, n, dtype=torch.bool)
    held[:, protected or []] = True
    known: dict[str, Any] = {
        "features": x,
        "valid": valid,
        "index": torch.where(valid, torch.arange(n), -1),
        "size": valid.float(),
        "protected": held & valid,
        "grid": (1, n),
    }
    return TokenView(**{**known, **more})


def select(shown: TokenView, keep: int, **options: Any) -> Any:
    return make("apet", options).select(shown, Cut(site="projector", keep=keep))


def behind_the_third(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the third of four blocks leaves, by the attention that the model runs with: transformers' eager one has a
    softmax in single precision."""
    with torch.no_grad():
        return model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[3]


OPTIONS = [
    {"keep": 14},
    {"keep": 11},
    {"keep": 10},
    {"keep": 4},
    {"keep": 1},
    {"keep": 36},
    {"keep": 12, "basis": 3, "ridge": 5.0},
    {"keep": 12, "basis": 4, "into": "ranked"},
    {"keep": 12, "basis": 1, "start": "first"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("site", ["tower", "projector"])
def test_llava_equals_the_transcription(site, options):
    """Tokens kept, whom the others went into, and what the language model makes of them."""
    model, inputs = B.llava("clip", "llama", blocks=4, layers=2), B.prompts([[4, 9], [7, 2, 5]])
    hidden = behind_the_third(model, inputs)
    projector, lm = model.model.multi_modal_projector, model.model.language_model
    with torch.no_grad():
        patches = hidden[:, 1:] if site == "tower" else projector(hidden[:, 1:])
    dense = B.embeddings(model, inputs)
    with vtprune.attach(model, "apet", site=site, **options) as handle:
        final, report = B.final(model, inputs), handle.report()
    how = {k: v for k, v in options.items() if k in ("basis", "ridge", "into")}
    how["first"] = 0 if options.get("start") == "first" else None
    for b, images in enumerate(([0], [1, 2])):
        sequence, visual = dense[b].clone(), B.visual_positions(inputs, b).tolist()
        left = [i for i in range(len(sequence)) if i not in visual]
        want = []
        for place, image in enumerate(images):
            kept, into = apet(list(patches[image]), options["keep"], **how)
            with torch.no_grad():
                rows = means(list(patches[image]), kept, into)
                rows = projector(rows) if site == "tower" else rows
            want += [place * B.N + k for k in kept]
            sequence[[visual[place * B.N + k] for k in kept]] = rows
            slots = report.stages[-1].assignment[b][place * B.N : (place + 1) * B.N]
            assert [want.index(place * B.N + i) for i in into] == slots.tolist()
        assert report.stages[-1].kept[b].tolist() == want
        left = sorted(left + [visual[i] for i in want])
        B.close(final[b][left], B.stack(lm, sequence[left], left))


@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_the_second_stage_equals_the_transcription(text):
    """15 tokens behind the tower, 5 in front of layer 2, by its input; sizes of merged tokens count."""
    model, inputs = B.llava("clip", text, blocks=4, layers=4), B.prompts([[4, 9]])
    hidden = behind_the_third(model, inputs)
    projector, lm = model.model.multi_modal_projector, model.model.language_model
    (dense,) = B.embeddings(model, inputs)
    with vtprune.attach(model, "apet", keep=5, layer=2, basis=3) as handle:
        (final,), report = B.final(model, inputs), handle.report()
    patches = list(hidden[0, 1:])
    kept, into = apet(patches, 15, basis=3)
    visual = B.visual_positions(inputs, 0).tolist()
    sequence = dense.clone()
    with torch.no_grad():
        sequence[[visual[k] for k in kept]] = projector(means(patches, kept, into))
    left = sorted({*range(len(dense))} - {visual[i] for i in range(B.N) if i not in kept})
    x = sequence[left]
    for layer in (0, 1):
        x = B.layer(lm, layer, x, left)
    at = [left.index(visual[k]) for k in kept]
    size = [float(into.count(k)) for k in kept]
    again, where = apet([x[i] for i in at], 5, basis=3)
    assert [s.kept[0].tolist() for s in report.stages] == [kept, [kept[i] for i in again]]
    rows = means([x[i] for i in at], again, where, size)
    x = x.clone()
    x[[at[i] for i in again]] = rows
    stay = [i for i in range(len(left)) if i not in at or at.index(i) in again]
    x, left = x[stay], [left[i] for i in stay]
    for layer in (2, 3):
        x = B.layer(lm, layer, x, left)
    B.close(final[left], lm.norm(x))


def test_a_token_in_the_span_of_the_basis_has_no_error():
    """Twelve tokens: three far apart, eight of their span, and one of its own."""
    torch.manual_seed(1)
    corners = 10 * torch.eye(6, dtype=torch.float64)[:3]
    inside = torch.rand(8, 3, dtype=torch.float64) @ corners / 4
    alone = torch.tensor([[0, 0, 0, 1.0, 0, 0]], dtype=torch.float64)
    x = torch.cat([inside[:4], corners, alone, inside[4:]])[None]
    answer = select(view(x), 4, basis=3)
    assert answer.kept.tolist() == [[4, 5, 6, 7]]
    assert float(answer.score[0, [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]].max()) < 1e-5
    assert abs(float(answer.score[0, 7]) - 1) < 1e-6


@pytest.mark.parametrize("ridge", [1e-5, 5.0])
def test_errors_equal_the_normal_equations(ridge):
    """Also of an image with fewer tokens than a basis has."""
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    score = select(view(x, [20, 4]), 12, ridge=ridge).score
    for b, n in enumerate((20, 4)):
        mine = list(x[b, :n])
        want = errors(mine, sampling(mine, 10, start(mine)), ridge)
        B.close(score[b, :n], torch.tensor(want, dtype=torch.float64), 1e-8)


def test_single_precision_and_a_degenerate_basis():
    """Twenty tokens that two directions span: ten basis tokens are dependent."""
    torch.manual_seed(2)
    x = 30 * torch.randn(1, 20, 2) @ torch.randn(2, 64)
    error = select(view(x), 15).score
    assert float(error.max()) < 0.05
    x[0, 3] = x[0, 3] / 30 + torch.randn(64)  # near the middle, so that it is no basis token
    assert int(select(view(x), 15).score.argmax()) == 3


@pytest.mark.parametrize("start", ["mean", "first", "seed"])
@pytest.mark.parametrize("into", ["all", "ranked"])
@pytest.mark.parametrize("keep", [1, 2, 7, 11, 12])
def test_counts_are_exact(keep, into, start):
    """Tokens that are all alike, zero or not numbers, images of one to twelve, and some that must stay."""
    broken = torch.randn(3, 12, 4)
    broken[:, [0, 5]] = torch.nan
    broken[0, 7] = torch.inf
    for x in (torch.ones(3, 12, 4), torch.zeros(3, 12, 4), broken, torch.randn(3, 12, 4)):
        for held in ([], [0], [0, 3]):
            answer = select(view(x, [12, 5, 1], held), keep, into=into, start=start, basis=4)
            kept = [row[row >= 0].tolist() for row in answer.kept]
            assert [len(set(row)) for row in kept] == [len(row) for row in kept] == [keep, min(keep, 5), 1]
            assert all(row == sorted(row) for row in kept)
            if keep >= 2:
                assert set(held) <= set(kept[0])
            for b, n in enumerate((12, 5, 1)):
                assert all(0 <= t < len(kept[b]) for t in answer.target[b, :n].tolist())
                assert answer.target[b, kept[b]].tolist() == list(range(len(kept[b])))
                assert bool((answer.target[b, n:] == -1).all())
        if not bool(x.isnan().any()):
            assert torch.isfinite(combine(x, answer, torch.ones(3, 12))[0]).all()


def test_an_image_does_not_see_its_batch():
    x = torch.randn(3, 40, 8, dtype=torch.float64)
    counts = [40, 23, 11]
    whole = select(view(x, counts), 9, basis=4)
    for b, n in enumerate(counts):
        alone = select(view(x[b : b + 1, :n]), 9, basis=4)
        assert torch.equal(alone.kept[0], whole.kept[b]) and torch.equal(alone.target[0], whole.target[b, :n])


def test_the_start_may_be_drawn():
    """One draw per seed, wherever the image stands."""
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    found = {s: select(view(x, seed=s), 6, start="seed", basis=3).kept for s in range(6)}
    assert len({str(k.tolist()) for k in found.values()}) > 1
    assert torch.equal(select(view(x, seed=(4, 2)), 6, start="seed", basis=3).kept[1], found[2][1])
    with pytest.raises(vtprune.VtpruneError, match="3 seeds were given for 2 images"):
        select(view(x, seed=(1, 2, 3)), 6, start="seed")


def geometry(**more: Any) -> Geometry:
    known: dict[str, Any] = {
        "family": "x",
        "arch": "x",
        "tokens": 576,
        "grid": (24, 24),
        "prefix": 1,
        "vision_layers": 23,
        "vision_depth": 24,
        "llm_layers": 32,
        "provides": dict.fromkeys(("vision", "projector", "llm"), frozenset()),
    }
    return Geometry(**{**known, **more})


def test_the_schedule_of_two_stages():
    """96 tokens, then 32, as the official code."""
    cuts = make("apet", {"layer": 16}).plan(geometry(), 32)
    assert [(c.site, c.keep) for c in cuts] == [("vision.22", 96), ("llm.16", 32)]
    assert [(c.site, c.keep) for c in make("apet", {"site": "projector"}).plan(geometry(), 64)] == [("projector", 64)]
    assert [c.keep for c in make("apet", {"layer": 16}).plan(geometry(), 500)] == [576, 500]


def test_sites_that_are_not_there_are_refused():
    bare = geometry(provides={"vision": frozenset()}, llm_layers=0)
    with pytest.raises(vtprune.UnsupportedError, match="has no projector"):
        make("apet", {"site": "projector"}).plan(bare, 9)
    with pytest.raises(vtprune.UnsupportedError, match="in the tower, where x has no stages"):
        make("apet", {"site": "tower"}).plan(geometry(provides={"projector": frozenset()}), 9)
    with pytest.raises(vtprune.UnsupportedError, match="has none"):
        make("apet", {"layer": 3}).plan(bare, 9)
