"""The registered test cases of a method, as keywords."""

from __future__ import annotations

import inspect
from typing import Any

import vtprune
from vtprune.core.planning import bind


def case_options(model: Any, method: str, number: int) -> dict[str, Any]:
    """The keywords of one of a method's test cases; where the tower sees tiles, counts of tokens are per tile."""
    per = bind(model).geometry.per
    info = vtprune.describe(method)
    tiled = "tile" in per[1:] and bool({"pixels", "vision"} & set(info.kinds)) and "projector" not in info.kinds
    return {**info.cases[number], **({"per": "tile"} if tiled else {})}


def mixes_pictures() -> bool:
    """Releases whose ``generate`` encodes pictures after it has repeated prompts, picture by picture: beams of a prompt
    with two see one twice."""
    from transformers import LlavaForConditionalGeneration
    from vtprune.models.engine.host import ENCODED

    return ENCODED not in inspect.signature(LlavaForConditionalGeneration.forward).parameters
