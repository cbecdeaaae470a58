"""``attach``: the handle's, behind the proof that a release nobody has tested owes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..core.errors import VtpruneError
from ..core.handle import Handle, put
from ..core.log import LOG
from ..core.planning import bind
from ..core.recipe import Recipe
from .prove import prove

if TYPE_CHECKING:
    from torch import nn

__all__ = ["attach", "bind"]  # `bind`: read here by programs written against the first layout


def attach(model: nn.Module, recipe: str | os.PathLike | Recipe, **overrides: Any) -> Handle:
    """Puts ``recipe`` into ``model`` and returns the :class:`Handle` that takes it out again (also a context manager).

    Args:
        model: an unmodified Hugging Face MLLM or vision tower, a timm ``VisionTransformer``, or a
            pipeline of transformers around such a model.
        recipe: a registered name, a :class:`Recipe`, or a path to its JSON / YAML form.
        **overrides: ``keep=`` tokens per image after the last cut (int) or their fraction (float in (0, 1]);
            ``effective_tokens=`` / ``flops=`` let the budget solver derive the schedule;
            ``positions="original" | "compact"`` (in-LLM and projector cuts; the default is the method's, mostly
            original ones); ``seed=`` for random methods; ``per=`` what a budget applies to behind the projector:
            ``"image"`` (a video's frame), ``"tile"``, ``"video"`` (all its frames), ``"sample"`` (all images of a
            prompt) or ``"prompt"`` (its text as well: all tokens but the first four and the last), the default being
            the family's first;
            ``shelve=True``: a later turn (more than one new token behind a prompt) chooses again from the whole
            conversation, and gives what a new prompt of it would (stages inside the language model alone; default: it
            goes on with what the prompt kept); all else are the last stage's options.

    Raises:
        VtpruneError: unknown recipe or option, impossible budget, a model that is attached already;
            :class:`UnsupportedError` if the model lacks what a method needs.
    """
    try:
        return put(model, recipe, overrides, prove, level=3)
    except VtpruneError as e:
        LOG.info("vtprune: refused for %s: %s", type(model).__name__, e)
        raise
