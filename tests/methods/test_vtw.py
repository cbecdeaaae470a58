"""VTW (arXiv 2405.05803) against the dense decoder, of which the visual rows are taken away by hand."""

from __future__ import annotations

import builders as B
import pytest
import torch

import vtprune
from vtprune.core.types import Geometry
from vtprune.methods.base import make


@pytest.mark.parametrize("layer", [0, 1, 4, None])
@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_text_goes_on_alone(text, layer):
    """Layers in front of K run on everything, those behind on the text rows at their own positions."""
    model, inputs = B.llava("clip", text, blocks=3, layers=6), B.prompts([[4, 9], [7, 2, 5]])
    with vtprune.attach(model, "vtw", **({} if layer is None else {"layer": layer})) as handle:
        got, report = B.final(model, inputs), handle.report()
    k = 3 if layer is None else layer
    assert [(s.site, s.tokens_out) for s in report.stages] == [(f"llm.{k}", [0, 0])]
    assert report.layer_tokens == [[n] * k + [0] * (6 - k) for n in (36, 72)]
    lm = model.model.language_model
    for b, x in enumerate(B.embeddings(model, inputs)):
        rows = list(range(len(x)))
        for index in range(6):
            if index == k:
                visual = {*B.visual_positions(inputs, b).tolist()}
                x, rows = x[[r for r in rows if r not in visual]], [r for r in rows if r not in visual]
            x = B.layer(lm, index, x, rows)
        B.close(got[b][rows], lm.norm(x))


def test_it_is_drop_all():
    model, inputs = B.llava(), B.prompts([[4, 9]])
    outputs = []
    for name in ("vtw", "drop-all"):
        with vtprune.attach(model, name, layer=2), torch.no_grad():
            outputs.append(model(**inputs).logits)
    assert torch.equal(*outputs)


def test_the_paper_s_default():
    """K = 16 of 32 leaves 576 tokens in half of the layers: 288 on average."""
    geometry = Geometry(
        family="x",
        arch="x",
        tokens=576,
        grid=(24, 24),
        prefix=0,
        vision_layers=0,
        vision_depth=0,
        llm_layers=32,
        provides={"llm": frozenset()},
    )
    assert [(c.site, c.keep) for c in make("vtw", {}).plan(geometry, None)] == [("llm.16", 0)]
    with pytest.raises(vtprune.VtpruneError, match="vtw: layers .32. must"):
        make("vtw", {"layer": 32}).plan(geometry, None)


def test_it_takes_no_budget(tiny):
    model, _ = tiny("llava", "clip-llama")
    with pytest.raises(vtprune.VtpruneError, match="takes no keep="):
        vtprune.attach(model, "vtw", keep=3)
    assert vtprune.solve(model, "vtw", effective_tokens=0.5).stages[-1].options == {"layer": 3}
