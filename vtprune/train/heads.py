"""A classification head for a tower that has none: a stock model with it, whose head is fitted on the dense frozen
features; and which output of a head that is there means which class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.types import UnsupportedError, VtpruneError
from .frozen import arithmetic
from .pictures import Pictures, logits_of

DECAY, STEPS = 1e-3, 200  # of the features, standardised


def headless(model: Any) -> bool:
    """Whether ``model`` is a tower alone, as ``Dinov2Model`` or a timm model with ``num_classes=0``."""
    if hasattr(model, "reset_classifier"):
        return model.num_classes == 0
    return not type(model).__name__.endswith("ForImageClassification")


def classes_of(model: Any, names: Sequence[str]) -> list[str]:
    """What the outputs of ``model``'s head are called, for pictures of the classes ``names``: the model's own labels,
    or, where it has none but numbers, ``names`` in order. Raises :class:`VtpruneError` for other classes."""
    config = getattr(model, "config", None)
    own = [config.id2label[i] for i in range(config.num_labels)] if config is not None else []
    if own and all(name in own for name in names):
        return own
    count = len(own) or int(model.num_classes)
    plain = not own or all(name == f"LABEL_{i}" for i, name in enumerate(own))
    if plain and count == len(names):
        return list(names)
    told = f", {', '.join(own[:3])}, ..." if not plain else ""
    raise VtpruneError(
        f"the model's head knows {count} classes{told}, and the pictures are of {len(names)}, {', '.join(names[:3])}, "
        "...: give the tower without its head, one is fitted then"
    )


def _bare_and_headed(model: Any, classes: Sequence[str]) -> tuple[nn.Module, nn.Module, nn.Linear]:
    """A model that gives the features which a head reads, one with a head, and that head."""
    if hasattr(model, "reset_classifier"):
        headed = copy.deepcopy(model)
        headed.reset_classifier(len(classes))
        return model, headed.eval(), headed.get_classifier()
    from transformers import AutoModelForImageClassification

    config = copy.deepcopy(getattr(model, "config", None))
    if config is None or type(config) not in AutoModelForImageClassification._model_mapping:
        raise UnsupportedError(
            f"there is no stock model with a classification head around a {type(model).__name__}: give a classifier, "
            "or a ViT, DeiT, DINOv2 or DINOv3 tower"
        )
    made = []
    kind = AutoModelForImageClassification._model_mapping[type(config)]
    with torch.random.fork_rng(devices=[]):
        for labels in ([], classes):
            config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
            whole = kind(copy.deepcopy(config))
            base = getattr(whole, whole.base_model_prefix)
            told = base.load_state_dict(model.state_dict(), strict=False)
            if told.missing_keys:
                raise UnsupportedError(f"a {kind.__name__} needs {told.missing_keys[0]}, which this tower lacks")
            made.append(whole.to(next(model.parameters()).device, next(model.parameters()).dtype).eval())
    heads = [m for m in made[1].children() if isinstance(m, nn.Linear) and m.out_features == len(classes)]
    if len(heads) != 1 or any(isinstance(m, nn.Linear) for m in made[0].children()):
        raise UnsupportedError(f"the head of a {kind.__name__} is no single linear layer")
    return made[0], made[1], heads[0]


@torch.no_grad()
def features(model: Any, data: Pictures, batch: int, dtype: torch.dtype) -> Tensor:
    """``[n, C]`` float64 of all rows."""
    device = next(model.parameters()).device
    found = []
    for lo in range(0, len(data.rows), batch):
        pixels = data.batch(data.rows[lo : lo + batch], device)["pixel_values"]
        with arithmetic(model, dtype):
            output = logits_of(model, pixels)
        found.append((output if isinstance(output, Tensor) else output.logits).double().cpu())
    return torch.cat(found)


def with_head(model: Any, data: Pictures, *, batch: int = 64, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A stock classifier around ``model``'s weights, which are copied: multinomial logistic regression with a ridge of
    ``DECAY`` on its standardised features, always the same."""
    bare, headed, head = _bare_and_headed(model, data.classes)
    x, labels = features(bare, data, batch, dtype), torch.tensor([r.label for r in data.rows])
    if not bool(x.isfinite().all()):
        raise VtpruneError("the tower's features are no finite numbers: no head can be fitted")
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    weight, bias = regression((x - mean) / std, labels, len(data.classes))
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - weight @ (mean / std))
    return headed.requires_grad_(False)


def with_saved_head(model: Any, path: str | Path) -> nn.Module:
    """A stock classifier around a copy of the tower ``model``, with the head that ``vtprune train`` fitted and wrote to
    ``path`` (``OUT.head.safetensors``). Raises :class:`VtpruneError` for a file that holds no head of this tower."""
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as e:
        raise VtpruneError(f"cannot read a head from {path}: {e}") from e
    if set(saved) != {"weight", "bias"}:
        raise VtpruneError(f"{path} holds {', '.join(sorted(saved)[:3])}, and a head has a weight and a bias")
    _, headed, head = _bare_and_headed(model, [str(i) for i in range(len(saved["weight"]))])
    try:
        head.load_state_dict(saved)
    except RuntimeError as e:
        raise VtpruneError(f"{path} is no head of this tower: {str(e).splitlines()[-1].strip()}") from e
    return headed.requires_grad_(False)


def regression(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """``weight`` ``[classes, C]`` and ``bias`` that minimise the mean cross-entropy of ``x`` ``[n, C]`` and ``DECAY / 2
    * |weight| ** 2``, by L-BFGS."""
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    descent = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        descent.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + DECAY / 2 * (weight * weight).sum()
        value.backward()
        return value

    with torch.enable_grad():
        descent.step(loss)
    return weight.detach(), bias.detach()


def head_of(model: Any) -> dict[str, Tensor]:
    """Weight and bias of the head that :func:`with_head` fitted."""
    own = model.get_classifier() if hasattr(model, "get_classifier") else None
    if own is None:
        own = next(m for m in reversed(list(model.children())) if isinstance(m, nn.Linear))
    return {name: p.detach().cpu().contiguous() for name, p in own.state_dict().items()}
