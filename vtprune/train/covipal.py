"""CoViPAL's pruning modules (arXiv 2508.17243), in two stages; the second one is a reconstruction.

First they are guided by attention: the score of every visual token is to be the attention that it receives, all heads
and all rows behind the image together, in a deeper layer of the unpruned model (standardised over the image, mean
squared error). Nothing is dropped meanwhile.

Then they are trained end to end, the model frozen: while it is soft, every layer behind a module attends to each visual
token by the share ``g = sigmoid(S / tau)`` (``log g`` is added to its logits), the answers' cross-entropy and their
divergence from the unpruned model's say what is missed, and a price of ``(mean(g) - r)^2`` holds the budget; at last
tokens are dropped as in use, and gradients go straight through those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.handle import Handle
from ..core.types import VtpruneError
from ..methods.covipal import HARD, LOOK, SOFT
from ..models.engine.guidance import received
from .base import Control, Step, Training, register, rivals


def phase(settings: Mapping[str, float], done: float) -> str:
    """What happens to the tokens when that share of the steps is done: nothing in the first ``guided`` of them, in the
    last ``hard`` of the others what happens in use."""
    guided = settings["guided"]
    if done < guided:
        return LOOK
    return HARD if done >= 1 - (1 - guided) * settings["hard"] else SOFT


def prepare(handle: Handle, settings: Mapping[str, float], done: float) -> None:
    """Tells the modules. Raises :class:`VtpruneError` for settings that are no shares, or a temperature of 0."""
    for name in ("guided", "hard", "guidance"):
        if settings[name] > 1:
            raise VtpruneError(f"{name}={settings[name]:g} is a share and must not be above 1")
    if settings["temperature"] == 0:
        raise VtpruneError("temperature=0 must be above 0")
    part = handle.modules["covipal"]
    part.phase, part.temperature = phase(settings, done), settings["temperature"]


def losses(step: Step) -> dict[str, Tensor]:
    """Those of the stage; nothing for a batch without images."""
    told, settings = step.handle.told(), step.settings
    if not told:
        return {}
    decoder = step.handle.adapter.describe()
    number = min(int(settings["guidance"] * len(decoder.layers)), len(decoder.layers) - 1)
    places = [int(site.partition(".")[2]) for site in told if site.startswith("llm.")]
    if places and number <= max(places):
        raise VtpruneError(
            f"guidance={settings['guidance']:g} is layer {number}, which must be deeper than every module (in front of "
            f"layer {max(places)})"
        )
    inputs = {**{name: value for name, value in step.inputs.items() if name != "labels"}, "use_cache": False}

    def whole() -> Any:
        with step.handle.unpruned():
            return step.model(**inputs)

    attention, visual, teacher = received(decoder, number, inputs, whole)
    at = phase(settings, step.done)
    if at == LOOK:
        target = standardised(attention, visual)
        return {"guidance": torch.stack([_distance(names["score"], target) for names in told.values()]).mean()}
    out = {"distil": settings["distil_weight"] * divergence(teacher.logits, step.output.logits, step.inputs["labels"])}
    if at == SOFT:
        over = torch.stack([names["over"].square().mean() for names in told.values()]).mean()
        out["budget"] = settings["budget_weight"] * over
    return out


def standardised(attention: Tensor, visual: Tensor) -> Tensor:
    """``[B, N]``: the ``attention`` ``[B, T]`` of the tokens that are ``visual`` ``[B, T]``, N in each sample, less
    their mean, over their deviation. Raises :class:`VtpruneError` for samples with other numbers of them."""
    counts = visual.sum(1)
    if bool((counts != counts[0]).any()):
        raise VtpruneError("pruning modules are trained on prompts with one image each, all of one size")
    told = attention[visual].view(len(visual), -1).float()
    return (told - told.mean(1, keepdim=True)) / told.std(1, correction=0, keepdim=True).clamp_min(1e-12)


def _distance(score: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of ``score`` ``[B, N]``. Raises :class:`VtpruneError` for other images than prompts."""
    if score.shape != target.shape:
        raise VtpruneError("pruning modules are trained on prompts with one image each, all of one size")
    return (score - target.to(score.device)).square().mean()


def divergence(teacher: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """KL from the unpruned model's distributions to those of ``logits`` ``[B, T, V]`` over the tokens of each answer,
    in nats: the mean over its tokens, then over samples."""
    answer = (labels[:, 1:] != -100).to(logits.device)
    p, q = (t[:, :-1].float().log_softmax(-1) for t in (teacher.to(logits.device), logits))
    each = (p.exp() * (p - q)).sum(-1).masked_fill(~answer, 0).sum(1)
    return (each / answer.sum(1).clamp_min(1)).mean()


def controls(options: Mapping[str, Any]) -> list[Control]:
    """Modules that nobody trained, and methods that need no training (none of the tower's: questions come with what the
    projector made)."""
    untrained = {name: value for name, value in options.items() if name not in ("init", "weights")}
    out: list[Control] = [
        ("covipal, untrained: all scores equal, the first tokens stay", "covipal", untrained),
        ("covipal, untrained, random heads", "covipal", {**untrained, "init": "random"}),
    ]
    return out + rivals("random", "divprune", "fastv", "pyramiddrop")


register(
    Training(
        method="covipal",
        what="the pruning modules of CoViPAL (reconstruction)",
        options={"keep": 0.25, "projector": True, "layers": None, "width": None},
        settings={
            "guided": 0.5,
            "guidance": 0.5,
            "hard": 1 / 3,
            "temperature": 1.0,
            "budget_weight": 1.0,
            "distil_weight": 1.0,
        },
        help={
            "keep": "visual tokens that stay behind the last module, a share or a number",
            "guided": "share of the steps in which modules are guided by attention",
            "guidance": "the layer whose attention that is, as a share of the depth",
            "hard": "of the other steps, the last share, in which tokens are dropped as in use",
            "temperature": "tau: a token is retained by sigmoid(S / tau) while it is soft",
            "budget_weight": "price of (mean retention - keep)^2, in nats",
            "distil_weight": "weight of the divergence from the unpruned model's answers",
        },
        lr=1e-3,
        prepare=prepare,
        losses=losses,
        tells=lambda part, options: {"places": ",".join(part.places)},
        controls=controls,
        case={
            "options": {"keep": 0.5, "layers": (1,), "width": 16},
            "settings": {"guidance": 0.5},
            "lr": 3e-3,
            "shared": {"settings": {"guided": 0.25, "hard": 0.4}},
        },
    )
)
