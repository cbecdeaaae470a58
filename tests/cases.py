"""What tests ask about a release or a case."""

from __future__ import annotations

import inspect

from vtprune.testing import case_options

__all__ = ["case_options", "mixes_pictures"]


def mixes_pictures() -> bool:
    """Releases whose ``generate`` encodes pictures after it has repeated prompts, picture by picture: beams of a prompt
    with two see one twice."""
    from transformers import LlavaForConditionalGeneration
    from vtprune.models.engine.host import ENCODED

    return ENCODED not in inspect.signature(LlavaForConditionalGeneration.forward).parameters
