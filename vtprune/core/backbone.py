"""Which model trained weights belong to: a few numbers of its layers, written beside them and compared with a model's.

A cast to half precision changes them by less than a percent, another model by all there is. Parts that another form
took the place of (quantised, wrapped by adapters) are not compared; norms usually are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .types import VtpruneError

LOG = logging.getLogger(__name__)
KEY = "backbone"  # of a file's metadata
VALUES, CLOSE = 8, 0.02
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def signature(layers: Sequence[nn.Module]) -> dict[str, list[float]]:
    """A few values of each parameter of the first, middle and last of ``layers``, by its name."""
    out = {}
    for number in sorted({0, len(layers) // 2, len(layers) - 1}):
        for name, p in layers[number].named_parameters():
            if p.dtype in PLAIN and type(p.data) is Tensor and not p.is_meta and p.numel():
                last = p.numel() - 1
                place = sorted({i * last // (VALUES - 1) for i in range(VALUES)})
                values = p.detach().flatten()[place].float().tolist()
                out[f"{number}.{name}"] = [float(f"{v:.4g}") for v in values]
    return out


def written(layers: Sequence[nn.Module]) -> str:
    """The signature as a file's metadata holds it."""
    return json.dumps(signature(layers))


def check(method: str, path: str, layers: Sequence[nn.Module]) -> None:
    """Raises :class:`VtpruneError` if the weights in ``path`` were trained beside another model. A file that does not
    tell is named in the log, and one that tells only of what cannot be compared here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get(KEY)
    except (OSError, SafetensorError) as e:
        raise VtpruneError(f"{method}: cannot read {path}: {e}") from e
    if told is None:
        LOG.warning("vtprune: %s: %s does not tell which model it was trained beside", method, path)
        return
    try:
        known: Any = json.loads(told)
        pairs = [(known[name], values) for name, values in signature(layers).items() if name in known]
        far = sum(not _close(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))
    except (ValueError, TypeError) as e:
        raise VtpruneError(f"{method}: {path} has metadata {KEY}= that is none: {e}") from e
    if not pairs:
        LOG.warning("vtprune: %s: which model %s was trained beside cannot be compared with this one", method, path)
    if far > 0.1 * sum(len(one) for one, _ in pairs):
        raise VtpruneError(
            f"{method}: {path} was trained beside another model than this one ({far} of "
            f"{sum(len(one) for one, _ in pairs)} weights that were compared are others)"
        )


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= CLOSE * max(abs(a), abs(b)) + 1e-6
