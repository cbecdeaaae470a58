"""V²Drop (arXiv 2509.01552) against the update that transformers' own hidden states show."""

from __future__ import annotations

import builders as B
import pytest
import torch

import vtprune
from vtprune.core.types import Geometry
from vtprune.methods.base import make


def geometry(tokens: int, depth: int) -> Geometry:
    return Geometry(
        family="x",
        arch="x",
        tokens=tokens,
        grid=(1, tokens),
        prefix=0,
        vision_layers=0,
        vision_depth=0,
        llm_layers=depth,
        provides={"llm": frozenset({"states"})},
    )


def test_the_official_schedule():
    """576 to 288 to 144 to 1 before layers 3, 17 and 22 of 32: 202.8 tokens a layer."""
    cuts = make("v2drop", {}).plan(geometry(576, 32), 1)
    assert [(c.site, c.keep) for c in cuts] == [("llm.3", 288), ("llm.17", 144), ("llm.22", 1)]
    kept, mean = 576, 0.0
    for layer in range(32):
        kept = next((c.keep for c in cuts if c.layer == layer), kept)
        mean += kept / 32
    assert round(mean, 1) == 202.8
    same = make("v2drop", {"ratios": (0.5, 0.5, 0.0)}).plan(geometry(576, 32), None)
    assert [c.keep for c in same] == [288, 144, 1]


@pytest.mark.parametrize("keep", [1, 5, 20, 36])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_llava_equals_the_transcription(text, keep):
    """Between two cuts the tokens left run as in the dense model with the others hidden, so a fresh dense run with the
    sequence shortened by hand gives the states."""
    model, inputs = B.llava("clip", text, blocks=3, layers=6), B.prompts([[4, 9], [7, 2, 5]])
    with vtprune.attach(model, "v2drop", keep=keep, layers=(1, 3, 5)) as handle, torch.no_grad():
        B.final(model, inputs)
        report = handle.report()
    lm = model.model.language_model
    for b, x in enumerate(B.embeddings(model, inputs)):
        visual = B.visual_positions(inputs, b).tolist()
        images = len(visual) // B.N
        rows, state, last, counts = list(range(len(x))), x, x, []
        for layer in range(6):
            before = state
            if layer in (1, 3, 5):
                stage = report.stages[len(counts)]
                counts.append(stage)
                kept = []
                for image in range(images):
                    mine = [r for r in rows if r in visual[image * B.N : (image + 1) * B.N]]
                    change = {r: float((state[rows.index(r)] - last[rows.index(r)]).norm()) for r in mine}
                    wanted = {1: max(18, keep), 3: max(9, keep), 5: keep}[layer]
                    kept += sorted(sorted(mine, key=lambda r: -change[r])[:wanted])
                assert [visual[i] for i in stage.kept[b].tolist()] == kept
                left = [r for r in rows if r not in visual or r in kept]
                before = torch.stack([state[rows.index(r)] for r in left])
                rows = left
            last, state = before, B.layer(lm, layer, before, rows)


def test_what_does_not_change_goes_first(tiny):
    """A token whose state a layer leaves as it is has no variation."""
    from vtprune.core.types import TokenView
    from vtprune.methods.base import Cut

    features = torch.randn(1, 5, 4)
    before = features.clone()
    before[0, [0, 3]] += 1
    ones = torch.ones(1, 5)
    view = TokenView(
        features=features,
        valid=ones.bool(),
        index=torch.arange(5)[None],
        size=ones,
        protected=~ones.bool(),
        grid=(1, 5),
        sources={"states": lambda layer: before},
    )
    assert make("v2drop", {}).select(view, Cut(site="llm.3", keep=2)).kept.tolist() == [[0, 3]]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"layers": (0, 2)}, "no layer in front of layer 0"),
        ({"ratios": (0.5,)}, "must be 3 fractions"),
        ({"layers": (2, 1)}, "must ascend"),
    ],
)
def test_impossible_schedules_are_refused(options, says):
    with pytest.raises(vtprune.VtpruneError, match=says):
        make("v2drop", options).plan(geometry(16, 8), 1)
