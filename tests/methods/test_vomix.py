"""VoMix (arXiv 2408.17062; a reconstruction) in CLIP and SigLIP towers, bare and inside LLaVA, against its equations,
one pair of tokens at a time."""

from __future__ import annotations

import math
from typing import Any

import builders as B
import pytest
import torch
from test_tome import Mixed, Rule, merging
from torch import Tensor

import oracles as O
import vtprune
from vtprune.core.types import Geometry, Projections, TokenView
from vtprune.methods.base import make


def mixing(counts: list[int], temperature: float = 0.1, into: int = 8) -> Rule:
    """Leaves ``counts[i]`` patches behind block i; of every ``into``-th retained patch the nearest takes a share."""

    def rule(layer: int, keys: Tensor, attention: list[list[float]], prefix: int, size: list[float]) -> Mixed:
        n = len(keys)
        unit = [k / k.norm() for k in keys]
        patches = range(prefix, n)
        votes = [
            sum(math.exp((O._dot(unit[i], unit[j]) - 1) / temperature) for j in patches if j != i) / (len(patches) - 1)
            for i in patches
        ]
        ranked = sorted(patches, key=lambda i: -votes[i - prefix])
        gone = ranked[: n - prefix - counts[layer]]
        kept = [*range(prefix), *sorted(set(patches) - set(gone))]
        shares, merges = {t: {t: size[t]} for t in kept}, []
        for i in gone:
            near = {t: O._dot(unit[i], unit[t]) for t in kept[prefix:]}
            merges.append((i, max(near, key=near.__getitem__)))
            groups = [kept[prefix + g :: into] for g in range(into) if prefix + g < len(kept)]
            best = [max(group, key=near.__getitem__) for group in groups]
            for t, w in zip(best, O._softmax([near[t] / temperature for t in best]), strict=True):
                shares[t][i] = size[i] * w
        return merges, kept, [{i: w / sum(row.values()) for i, w in row.items()} for row in shares.values()]

    return rule


def compare(kind: str, rule: Rule, **options: Any) -> Any:
    """Survivors, who is counted with whom, and last rows of a tower."""
    model, pixels = B.tower(kind, 5), B.images(3)
    with vtprune.attach(model, "vomix", **options) as handle, torch.no_grad():
        out = model(pixels).last_hidden_state
        report = handle.report()
    for b in range(3):
        want = merging(model, pixels[b], 5, rule, options.get("proportional", True))
        for stage, state in zip(report.stages, want, strict=True):
            assert stage.kept[b].tolist() == state["kept"]
            assert stage.kept[b][stage.assignment[b]].tolist() == state["owner"]
        rows = want[-1]["rows"]
        B.close(out[b], model.post_layernorm(rows).detach() if kind == "siglip" else rows)
    return report


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 0.02])
def test_equals_the_equations(kind: str, temperature: float) -> None:
    compare(kind, mixing([32, 28, 24, 20, 16], temperature), r=4, temperature=temperature)


def test_options_equal_the_equations() -> None:
    compare("clip", mixing([30, 24, 18, 12, 6]), keep=6)
    compare("clip", mixing([33, 30, 27, 24, 21]), r=3, proportional=False)
    compare("siglip", mixing([36, 26, 25, 3, 1]), r=(0, 10, 1, 22, 9))
    compare("clip", mixing([31, 26, 21, 16, 11], 0.5, 3), r=5, temperature=0.5, into=3)
    compare("siglip", mixing([31, 26, 21, 16, 11], 0.5, 1000), r=5, temperature=0.5, into=1000)  # all of them


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_llava_equals_the_equations(vision: str) -> None:
    """Mixed tokens stand at the places of the retained ones."""
    model, inputs = B.llava(vision, "qwen2", blocks=4, layers=3), B.prompts([[4, 9], [2, 3]])
    x = B.embeddings(model, inputs)
    with vtprune.attach(model, "vomix", keep=9) as handle:
        hidden, last = B.final(model, inputs), handle.report().stages[-1]
    for b in range(2):
        at = B.visual_positions(inputs, b)
        want = merging(model.model.vision_tower, inputs["pixel_values"][b], 3, mixing([27, 18, 9]))[-1]
        assert last.kept[b].tolist() == want["kept"]
        with torch.no_grad():
            x[b][at[want["kept"]]] = model.model.multi_modal_projector(want["rows"][int(vision == "clip") :])
        rows = sorted({*range(len(x[b]))} - {*at.tolist()} | {*at[want["kept"]].tolist()})
        B.close(hidden[b][rows], B.stack(model.model.language_model, x[b][rows], rows))


def test_by_hand() -> None:
    """Angles 0, 0, 60 and 180 degrees: one of the twins goes, nearly all of it into the other."""
    angles = torch.tensor([0.0, 0.0, 60.0, 180.0], dtype=torch.float64).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], 1)[None, None]
    sizes = torch.tensor([[2.0, 1.0, 1.0, 1.0]])
    view = TokenView(
        features=torch.zeros(1, 4, 3, dtype=torch.float64),
        valid=torch.ones(1, 4, dtype=torch.bool),
        index=torch.arange(4)[None],
        size=sizes,
        protected=torch.zeros(1, 4, dtype=torch.bool),
        grid=(2, 2),
        sources={"projections": lambda: Projections(keys, keys, keys, 1.0, 0)},
    )
    method = make("vomix", {"r": 1, "temperature": 0.5})
    (cut,) = method.plan(Geometry("x", "vit", 4, (2, 2), 0, 1, 1, 0, {"vision": frozenset()}), None)
    selection = method.select(view, cut)
    assert selection.kept.tolist() == [[1, 2, 3]] and selection.target.tolist() == [[0, 0, 1, 2]]
    e = math.exp
    votes = [(1 + e(-1) + e(-4)) / 3] * 2 + [(2 * e(-1) + e(-3)) / 3, (2 * e(-4) + e(-3)) / 3]
    B.close(selection.score[0], -torch.tensor(votes, dtype=torch.float64))
    total = 1 + e(-1) + e(-4)
    given = [2 * w / total for w in (1, e(-1), e(-4))]  # the one that goes stands for two
    want = torch.zeros(3, 4, dtype=torch.float64)
    for t in range(3):
        want[t, t + 1], want[t, 0] = 1 / (1 + given[t]), given[t] / (1 + given[t])
    got = torch.zeros(3, 4, dtype=torch.float64)
    mix = selection.mix
    got.index_put_((mix.slot[0], mix.token[0]), mix.weight[0], accumulate=True)
    B.close(got, want)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("keep", [36, 35, 17, 2, 1])
def test_keep_is_met_exactly(kind: str, keep: int) -> None:
    """Random images, and one whose patches are all the same."""
    model, pixels = B.tower(kind, 5), B.images(2)
    pixels[1] = 0.3
    with vtprune.attach(model, "vomix", keep=keep) as handle, torch.no_grad():
        out = model(pixels).last_hidden_state
        last = handle.report().stages[-1]
    assert last.tokens_out == [keep, keep] and bool(out.isfinite().all())
    assert all(len(set(k.tolist())) == keep for k in last.kept)


def test_one_target_is_a_merge() -> None:
    """The report tells of each token the nearest retained one; mixed into that alone it is an average by sizes."""
    model, pixels = B.tower("clip", 4), B.images(2)
    soft = mixing([26, 16, 10, 4], into=1)

    def hard(*seen: Any) -> tuple[list[O.Merge], list[int]]:
        merges, kept, _ = soft(*seen)
        return merges, kept

    with vtprune.attach(model, "vomix", r=(10, 10, 6, 6), into=1), torch.no_grad():
        out = model(pixels).last_hidden_state
    for b in range(2):
        B.close(out[b], merging(model, pixels[b], 4, hard)[-1]["rows"])


def test_more_than_there_are() -> None:
    """r beyond what is there leaves one token; nothing mixed away is the dense model."""
    model, pixels = B.tower("clip", 3), B.images(1)
    with torch.no_grad():
        dense = model(pixels).last_hidden_state
        with vtprune.attach(model, "vomix", r=0):
            B.close(model(pixels).last_hidden_state, dense, 1e-12)
        with vtprune.attach(model, "vomix", r=30) as handle:
            assert bool(model(pixels).last_hidden_state.isfinite().all())
            assert [s.tokens_out for s in handle.report().stages] == [[6], [1], [1]]
    with pytest.raises(vtprune.VtpruneError, match="vomix: r has 2 entries"):
        vtprune.attach(model, "vomix", r=(1, 2))


def test_it_says_that_it_is_a_reconstruction() -> None:
    info = vtprune.describe("vomix")
    assert "reconstruction" in info.idea and "our" in info.option_help["temperature"]
