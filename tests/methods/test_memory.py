"""What a method's choice takes grows with the number of tokens, not with its square."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import moulds
import vtprune
from vtprune.core.decider import Decider
from vtprune.core.types import VtpruneError
from watch import Largest

SIDES = (64, 90)  # patches: 4,096 and 8,100 tokens


@functools.cache
def llava(side: int) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = moulds.tiny("llava", "clip-llama")
    config = copy.deepcopy(model.config)
    config.vision_config.image_size = side * config.vision_config.patch_size
    torch.manual_seed(0)
    words = inputs["input_ids"][0][inputs["input_ids"][0] > 3][None]
    ids = torch.cat([words[:, :2], torch.full((1, side * side), config.image_token_index), words[:, 2:]], 1)
    pixels = torch.randn(1, 3, config.vision_config.image_size, config.vision_config.image_size)
    return type(model)(config).eval(), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
    }


def largest(method: str, side: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[int, int]:
    """Bytes of the largest tensor in the method's choices and notes, and how many tokens it chose among."""
    model, inputs = llava(side)
    watch = Largest()

    def watched(original: Any) -> Any:
        def call(self: Decider, view: Any) -> Any:
            with watch:
                return original(self, view)

        return call

    with monkeypatch.context() as patch:
        for name in ("__call__", "note"):
            patch.setattr(Decider, name, watched(getattr(Decider, name)))
        with vtprune.attach(model, method, **options) as handle, torch.no_grad():
            model(**inputs, logits_to_keep=1)
            return watch.bytes, handle.report().visual_tokens[0]


@pytest.mark.slow
def test_memory_of_a_choice_grows_with_the_tokens(method_name, monkeypatch):
    info = vtprune.describe(method_name)
    wanted: list[dict[str, Any]] = [{"keep": 64}, {"keep": 0.25}] if info.budgeted else [info.cases[0]]
    for options in wanted:
        try:
            small, large = (largest(method_name, side, monkeypatch, **options) for side in SIDES)
            break
        except VtpruneError as e:
            if options is wanted[-1]:
                pytest.skip(str(e))
    tokens = large[1] / small[1]
    assert large[0] <= 1.15 * tokens * small[0]
    assert large[0] < large[1] ** 2  # a fourth of one map of all tokens in single precision
