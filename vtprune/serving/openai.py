"""Encoded images as parts of a message to an OpenAI-compatible server."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch

from .encoded import Encoded


def content(encoded: Encoded, question: str, *, placed: bool = False) -> list[dict[str, Any]]:
    """The content of a user's message: each image as vLLM takes encoded ones (``--enable-mm-embeds``; a tensor
    ``[K, C]`` as ``torch.save`` writes it, in base64), then the ``question``. Such a server numbers positions anew:
    it answers as ``positions="compact"`` does. With ``placed`` the rows say where they stand, for a server with
    vtprune's plug-in, which keeps them there."""

    def part(rows: torch.Tensor) -> dict[str, Any]:
        file = io.BytesIO()
        torch.save(rows.cpu().contiguous(), file)
        return {"type": "image_embeds", "image_embeds": base64.b64encode(file.getvalue()).decode("ascii")}

    return [*map(part, encoded.placed if placed else encoded.embeds), {"type": "text", "text": question}]
