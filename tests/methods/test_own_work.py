"""FLOPs of the modules that methods bring along: in reports, and in what budgets are planned with."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

import vtprune
from vtprune import testing
from vtprune.methods.base import METHODS

C, V, TOKENS, IMAGES = 48, 32, 16, 2  # of the tiny LLaVA: channels of language model and tower, visual tokens
CASES = {
    "gamma-mod": ({"layers": (1, 2), "keep": 4}, 2 * 2 * (2 * TOKENS * C)),  # two layers of 2 x C per token
    "focusllava": ({"text": False}, 2 * 1 * 3 * C),  # one block of 4 x 4 tokens at three scales
    "llava-mini": ({"grid": 2, "fusion": 1}, 2 * 2 * (TOKENS * 4 * C)),  # A, and A H_v
    "ia-red2": (
        {"layers": (0, 1), "keep": 4, "heads": 2, "channels": 8},
        2 * (16 + 8) * V * 16,  # queries; 16, 8, 4 tokens
    ),
}


def spent(method: str, options: dict) -> tuple[int, vtprune.Handle]:
    model, inputs = testing.tiny("llava", "clip-llama")
    with torch.no_grad(), vtprune.attach(model, method, **options) as handle:
        model(**inputs)
        return handle.report().flops, handle


@pytest.mark.parametrize("method", CASES)
def test_the_module_counts(method, monkeypatch):
    options, want = CASES[method]
    whole, handle = spent(method, options)
    geometry, home = replace(handle.geometry, vision_width=handle.adapter.cost.vd), METHODS.get(method).cls
    assert (geometry.tokens, geometry.width, geometry.vision_width) == (TOKENS, C, V)
    made = home(**{k: v for k, v in options.items() if k != "keep"})
    now = planned = 0
    for cut in made.plan(geometry, options.get("keep")):
        now = TOKENS if method == "gamma-mod" else now or TOKENS
        planned += made.work(now, 10, cut, geometry)
        now = cut.keep
    assert planned == want
    if hasattr(home, "_flops"):
        monkeypatch.setattr(home, "_flops", lambda self, n, width: n * 0)
    else:
        monkeypatch.setattr(sys.modules[home.__module__], "flops", lambda n, *rest: n * 0)
    assert whole - spent(method, options)[0] == IMAGES * want
