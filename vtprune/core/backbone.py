"""Which model trained weights belong to: a few numbers of its layers, written beside them and compared with a model's;
and which adapters (peft's) it had in it meanwhile.

A cast to half precision changes them by less than a percent, another model by all there is. Parts that another form
took the place of (quantised) are not compared; norms usually are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .types import VtpruneError

LOG = logging.getLogger(__name__)
KEY, ADAPTERS = "backbone", "adapters"  # of a file's metadata
VALUES, CLOSE, PLACES = 8, 0.02, 12
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Signature = dict[str, list[float]]
Layers = Mapping[str, Sequence[nn.Module]]  # by the name of the stack


def layers(adapter: Any) -> Layers:
    """Those of a model that tell it from others: of its language model, and of its tower, or of that alone."""
    text, tower = adapter.decoder_layers(), adapter.tower_blocks()
    return {"": text, "tower.": tower} if text else {"": tower}


def signature(layers: Layers) -> Signature:
    """A few values of each parameter of the first, middle and last of the ``layers`` of each stack, by its name behind
    the stack's; adapters and what they put around a layer's own do not count."""
    out = {}
    for stack, those in layers.items():
        for number in sorted({0, len(those) // 2, len(those) - 1}) if those else ():
            added = {id(p) for _, module in tuners(those[number]) for _, p in _added(module)}
            for name, p in those[number].named_parameters():
                if id(p) not in added and _plain(p):
                    out[f"{stack}{number}.{name.replace('.base_layer', '')}"] = _values(p)
    return out


def _plain(p: Tensor) -> bool:
    return p.dtype in PLAIN and type(p.data) is Tensor and not p.is_meta and p.numel() > 0


def _values(p: Tensor) -> list[float]:
    last = p.numel() - 1
    place = sorted({i * last // (VALUES - 1) for i in range(VALUES)})
    return [float(f"{v:.4g}") for v in p.detach().flatten()[place].float().tolist()]


def tuners(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers in ``model`` that peft has put adapters beside, by name."""
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "adapter_layer_names") and hasattr(m, "base_layer")]


def _added(module: Any) -> Iterator[tuple[str, Tensor]]:
    return ((n, p) for n, p in module.named_parameters() if not n.startswith("base_layer."))


def adapters(model: nn.Module) -> Signature:
    """A few values of the adapters that are at work in ``model``, beside how many layers have one; nothing if none has.
    Adapters that are merged into the weights, or switched off, are not at work."""
    at_work = [
        (name, module) for name, module in tuners(model) if not module.disable_adapters and not module.merged_adapters
    ]
    out: Signature = {}
    for i in sorted({i * (len(at_work) - 1) // (PLACES - 1) for i in range(PLACES)} if at_work else ()):
        name, module = at_work[i]
        for number, active in enumerate(module.active_adapters):
            for own, p in _added(module):
                pieces = own.split(".")
                if active in pieces and _plain(p):
                    kind = ".".join(piece for piece in pieces if piece != active)
                    out[f"{name}.{kind}" + (f".{number}" if number else "")] = _values(p)
            scaling = getattr(module, "scaling", {}).get(active)
            if scaling is not None:
                out[f"{name}.scaling" + (f".{number}" if number else "")] = [float(scaling)]
    return {"count": [float(len(at_work))], **out} if out else {}


def written(layers: Layers) -> str:
    """The signature as a file's metadata holds it."""
    return json.dumps(signature(layers))


def check(method: str, path: str, layers: Layers, model: nn.Module | None = None) -> None:
    """Raises :class:`VtpruneError` if the weights in ``path`` were trained beside another model, or beside adapters
    that are not at work in ``model``. A file that does not tell is named in the log, and one that tells only of what
    cannot be compared here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise VtpruneError(f"{method}: cannot read {path}: {e}") from e
    if model is not None and ADAPTERS in metadata:
        _check_adapters(method, path, metadata[ADAPTERS], adapters(model))
    if KEY not in metadata:
        LOG.warning("vtprune: %s: %s does not tell which model it was trained beside", method, path)
    else:
        _check_layers(method, path, metadata[KEY], signature(layers))


def _read(method: str, path: str, key: str, told: str) -> Mapping[str, Any]:
    try:
        known = json.loads(told)
    except (ValueError, RecursionError) as e:
        raise VtpruneError(f"{method}: {path} has metadata {key}= that is none: {e}") from e
    if not isinstance(known, dict):
        raise VtpruneError(f"{method}: {path} has metadata {key}= that is none: {told[:40]!r}")
    return known


def _far(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[int, int]:
    """How many of so many values are others. Raises ``ValueError`` or ``TypeError`` for what are no such values."""
    far = sum(not _close(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))
    return far, sum(len(one) for one, _ in pairs)


def _check_layers(method: str, path: str, told: str, here: Signature) -> None:
    known = _read(method, path, KEY, told)
    try:
        pairs = [(known[name], values) for name, values in here.items() if name in known]
        far, compared = _far(pairs)
    except (ValueError, TypeError) as e:
        raise VtpruneError(f"{method}: {path} has metadata {KEY}= that is none: {e}") from e
    if not pairs:
        LOG.warning("vtprune: %s: which model %s was trained beside cannot be compared with this one", method, path)
    if far > 0.1 * compared:
        raise VtpruneError(
            f"{method}: {path} was trained beside another model than this one ({far} of {compared} weights that were "
            "compared are others)"
        )


def _check_adapters(method: str, path: str, told: str, here: Signature) -> None:
    known = _read(method, path, ADAPTERS, told)
    how = (
        "model = peft.PeftModel.from_pretrained(model, FOLDER), not merged, with the folder that was written beside it "
        f"({path.rpartition('.')[0]}.lora), then attach"
    )
    if not here:
        raise VtpruneError(f"{method}: {path} was trained together with adapters that this model does not have: {how}")
    try:
        other = set(known) != set(here) or _far([(known[name], values) for name, values in here.items()])
    except (ValueError, TypeError):  # adapters of another rank have other places
        other = True
    if other is True or (other and other[0] > CLOSE * other[1]):
        raise VtpruneError(f"{method}: {path} was trained together with other adapters than this model has: {how}")


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= CLOSE * max(abs(a), abs(b)) + 1e-6
