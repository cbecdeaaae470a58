"""IA-RED²'s interpreters (arXiv 2106.12620; a reconstruction, see the method): which patches a tower can do without.

Trained by REINFORCE, group by group. Of the group in turn every patch is kept with the probability I that its
interpreter gives, ``log pi`` being the sum of the logarithms over the patches; with ``k`` the share of a sample's
patches that stay behind that group, the reward is ``1 - k^2`` where the answer is right and ``-tau`` where it is not.
The baseline is the reward of the greedy decision, of a second forward (self-critical). What is minimised is minus the
mean reward, with the gradient of ``-(reward - baseline) * log pi``.

Ours: each group has the same share of the learning rate summed over the run, which falls like a cosine; k is of the
image's patches, and of all images of a sample; tau.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.handle import Handle
from ..core.types import VtpruneError
from ..methods.ia_red2 import Interpreters
from .base import Control, Step, Training, register, rivals

NAME = "ia-red2"


def take_turns(handle: Handle, settings: Mapping[str, float], done: float) -> None:
    """Says which group draws, and for which share of a batch."""
    part: Interpreters = handle.modules[NAME]
    part.turn = turn(done, len(part.blocks))
    part.process = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def turn(done: float, groups: int) -> int:
    """The group that is trained when ``done`` of the steps are: each gets the same area under the cosine."""
    return min(int(groups * (done + math.sin(math.pi * done) / math.pi)), groups - 1)


def reinforce(step: Step) -> dict[str, Tensor]:
    """Minus the mean reward of the samples that have an image and an answer, with the gradient of REINFORCE.

    Raises:
        VtpruneError: images of several sizes and samples, which cannot be told apart.
    """
    told = next(iter(step.handle.told().values()), None)
    if told is None:  # a batch without images
        return {}
    counts, labels = step.handle.images, step.inputs["labels"]
    if sum(counts) != len(told["log_prob"]) or (len(counts) > 1 and len(told["grid"].unique(dim=0)) > 1):
        raise VtpruneError(
            "ia-red2: which image belongs to which sample cannot be told here: train with single samples"
        )
    with torch.no_grad(), step.handle.unreported():
        calm = step.again()
    images = torch.tensor(counts, device=labels.device)
    who = torch.arange(len(counts), device=labels.device).repeat_interleave(images)

    def by_sample(name: str) -> Tensor:
        values = told[name].to(labels.device)
        return torch.zeros(len(counts), dtype=values.dtype, device=labels.device).index_add(0, who, values)

    tau, most = step.settings["tau"], images.clamp_min(1)
    gain = reward(by_sample("kept") / most, right(step.output.logits, labels), tau)
    base = reward(by_sample("greedy") / most, right(calm.logits, labels), tau)
    counted = (images > 0) & answered(labels)
    n = counted.sum().clamp_min(1)
    surprise = -(torch.where(counted, gain - base, 0) * by_sample("log_prob")).sum() / n
    return {"reward": -torch.where(counted, gain, 0).sum() / n + surprise - surprise.detach()}


def reward(kept: Tensor, right: Tensor, tau: float) -> Tensor:
    """``[B]``, of the share ``kept`` ``[B]`` of the patches where the answer is ``right`` ``[B]`` or not."""
    return torch.where(right, 1 - kept.square(), torch.full_like(kept, -tau))


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B]`` bool. Of classes, ``logits`` ``[B, K]`` and ``labels`` ``[B]``: the label's is the largest; of tokens
    ``[B, T, V]`` and ``[B, T]`` (-100: no answer): so it is for every token of the answer."""
    if labels.ndim == 1:
        return logits.argmax(-1) == labels
    return ((logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1)


def answered(labels: Tensor) -> Tensor:
    """``[B]`` bool: which samples have a label."""
    return labels != -100 if labels.ndim == 1 else (labels[:, 1:] != -100).any(1)


def controls(options: Mapping[str, Any]) -> list[Control]:
    """Interpreters that nobody trained, and what needs no training."""
    untrained: list[Control] = [("ia-red2, untrained", NAME, dict(options))]
    return untrained + rivals("random", "flowcut", "divprune", "tome", "pitome")


register(
    Training(
        method=NAME,
        what="the interpreters of IA-RED² (reconstruction)",
        options={"groups": None, "layers": None, "threshold": 0.5, "heads": 4, "channels": 16},
        settings={"tau": 20.0},
        help={"tau": "what a wrong answer costs; a right one is worth up to 1"},
        lr=1e-3,
        losses=reinforce,
        answers=False,
        prepare=take_turns,
        rests=True,
        tells=lambda part, options: {"blocks": ",".join(map(str, part.blocks)), "heads": str(part.heads)},
        controls=controls,
        case={"options": {"groups": 2}, "lr": 1e-2, "own": True},
    )
)
