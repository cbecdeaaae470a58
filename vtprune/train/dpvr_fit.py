"""Fits the side branch of DPVR-LF beside the frozen model."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ..check.attach import attach
from ..core.types import VtpruneError
from ..version import __version__
from .dpvr_lf import BRANCH, METHOD, Say, tell
from .dpvr_questions import Questions, Row
from .frozen import arithmetic, frozen

WARM_UP = 0.03  # share of the run; the cosine, weight decay 0 and AdamW are the paper's, the clipping norm is ours
CLIP = 1.0


def train(
    model: Any,
    data: Questions,
    *,
    split: int,
    steps: int,
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    minutes: float = math.inf,
    dtype: torch.dtype = torch.float32,
    say: Say = tell,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains ``handle.modules["dpvr-lf"]`` of ``attach(model, "dpvr-lf", split=split, **options)`` on ``data``; the
    model is left exactly as it was.

    AdamW without weight decay over float32 copies of the branch's weights, linear warm-up, cosine to zero over
    ``steps`` or ``minutes`` of wall clock, whichever ends first. ``options``: ``fusion``, ``branch_layers``, ``init``,
    ``variant`` and ``weights`` (to go on from).

    Returns:
        the branch and JSON-safe facts; ``facts["loss"]`` is the answer loss (nats per token), at most 100 means over
        equal parts of the run.
    """
    _check(options, steps=steps, batch=batch, lr=lr, minutes=minutes)
    options = {"split": split, **options}
    device, began = next(model.parameters()).device, time.monotonic()
    rng, order, losses = random.Random(seed), list[Row](), list[float]()
    with frozen(model), attach(model, METHOD, **options) as handle:
        branch: nn.Module = handle.modules[METHOD]
        masters = _Masters(list(branch.parameters()), lr)
        for step in range(steps):
            done = max(step / steps, (time.monotonic() - began) / (60 * minutes))
            if done >= 1:
                break
            if len(order) < batch:
                order = rng.sample(data.rows, len(data.rows)) + order
            rows, order = order[-batch:], order[:-batch]
            with arithmetic(model, dtype):
                loss = model(**data.batch(rows, device), use_cache=False).loss
            loss.backward()
            norm = masters.collect()
            if step == 0 and not norm > 0:
                raise VtpruneError(
                    "the branch gets no gradient: the layers behind it do not read the visual tokens (a larger fusion= "
                    "may)"
                )
            rate = lr * min(1.0, (done + 1 / steps) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
            masters.step(rate)
            losses.append(float(loss.detach()))
            if step % 20 == 19:
                recent = losses[-20:]
                mean = sum(recent) / len(recent)
                say(f"step {step + 1} t {time.monotonic() - began:.0f}s lr {rate:.1e} loss {mean:.4f}")
    branch.requires_grad_(False)
    settings = {"batch": batch, "lr": lr, "seed": seed, "dtype": str(dtype).removeprefix("torch.")}
    seconds = round(time.monotonic() - began, 1)
    return branch, _facts(model, branch, data, options, settings, losses, seconds)


def _check(options: Mapping[str, Any], **settings: float) -> None:
    """Raises :class:`VtpruneError` for settings that cannot train anything."""
    for name, value in settings.items():
        if not value > 0:
            raise VtpruneError(f"{name}={value} must be above 0")
    if options.get("variant", "lf") == "lf" and options.get("fusion", 1) == 0:
        raise VtpruneError(
            "fusion=0 leaves nothing to train: no layer that sees the answers ever sees what the branch made (use "
            "fusion=1 or more)"
        )


class _Masters:
    """Float32 copies of the branch's weights, which AdamW moves; of float32 weights these are the weights
    themselves."""

    def __init__(self, weights: list[nn.Parameter], lr: float) -> None:
        self.weights = weights
        self.copies: list[Tensor] = [w.detach().float() for w in weights]
        self.optimiser = torch.optim.AdamW(self.copies, lr=lr, weight_decay=0.0)

    def collect(self) -> float:
        """Takes the weights' gradients over, clipped; returns their norm before that."""
        for copy, w in zip(self.copies, self.weights, strict=True):
            copy.grad, w.grad = None if w.grad is None else w.grad.float(), None
        return float(nn.utils.clip_grad_norm_(self.copies, CLIP))

    def step(self, rate: float) -> None:
        """One step at this learning rate, of the weights as well."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        with torch.no_grad():
            for copy, w in zip(self.copies, self.weights, strict=True):
                w.copy_(copy)


def _facts(
    model: nn.Module,
    branch: nn.Module,
    data: Questions,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    losses: Sequence[float],
    seconds: float,
) -> dict[str, Any]:
    """How the branch was trained, as plain data."""
    own, whole = (sum(w.numel() for w in module.parameters()) for module in (branch, model))
    width = max(1, math.ceil(len(losses) / 100))
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    return {
        "method": METHOD,
        **{k: v for k, v in options.items() if k in BRANCH},
        "steps": len(losses),
        "seconds": seconds,
        **settings,
        "images": len(data.images),
        "questions": len(data.rows),
        "parameters": own,
        "parameter_share": own / whole,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"vtprune": __version__},
        "loss": [round(sum(part) / len(part), 5) for part in parts],
    }
