"""The model that a command's options name. Every command calls ``models.load(args)``: one place for all of them."""

from __future__ import annotations

import argparse
from typing import Any

from ..inputs import models


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """``(model, processor)`` of ``--model``, ``--device`` and ``--dtype``; where ``--abilities`` asks for clips, the
    bundled model is the one trained on them; with ``args.any_kind`` other models than those of images and text, too.
    Raises as :func:`vtprune.inputs.models.load` does."""
    clips = "clips" in getattr(args, "abilities", ())
    any_kind = getattr(args, "any_kind", False)
    return models.load(args.model, args.device, args.dtype, clips=clips, any_kind=any_kind)
