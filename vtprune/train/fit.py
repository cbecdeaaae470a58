"""Fits the trained part of a method beside a frozen model, by transformers' Trainer.

The model is used through :func:`vtprune.attach` and its own forward: labels in, its own loss out. What the Trainer sees
is the trained part alone, in float32: its gradients are what several processes share, its weights what a checkpoint
holds. AdamW without weight decay, linear warm-up over 3 % of the steps, cosine to zero, gradients clipped to a norm of
1 (DPVR-LF's and Router-Tuning's recipes; the norm is ours).
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..check.attach import attach
from ..core import backbone
from ..core.handle import Handle
from ..core.types import VtpruneError
from ..measure.runs import read
from ..version import __version__
from .base import TRAININGS, Say, Step, Training, tell
from .frozen import frozen
from .questions import Questions

WARM_UP, CLIP, PARTS = 0.03, 1.0, 100
PLAN = "plan.json"  # in the folder of checkpoints: what they belong to


class Trainee(nn.Module):
    """The trained part of a method, with a forward through the whole model, which is no part of it."""

    model: Any

    def __init__(
        self, model: Any, handle: Handle, training: Training, settings: Mapping[str, float], dtype: torch.dtype
    ):
        super().__init__()
        self.part = handle.modules[training.method].float().requires_grad_(True)
        self.__dict__["model"] = model
        self.handle, self.training_, self.settings, self.dtype = handle, training, settings, dtype
        self.done = 0.0

    def train(self, mode: bool = True) -> Trainee:
        """Always in evaluation mode, as the model around it: a copied layer's dropout is not what is trained."""
        return super().train(False)

    def forward(self, num_items_in_batch: Tensor | int | None = None, **inputs: Any) -> dict[str, Tensor]:
        """``loss``; with ``num_items_in_batch``, the number of answer tokens in all processes' batches, this process's
        share of it."""
        device = self.model.device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(**inputs, use_cache=False, **self.training_.asks)
            step = Step(
                handle=self.handle,
                settings=self.settings,
                model=self.model,
                inputs=inputs,
                output=output,
                done=self.done,
            )
            added = self.training_.losses(step)
        loss = output.loss if self.training_.answers else output.loss.new_zeros(())
        if num_items_in_batch is None:
            return {"loss": loss + sum(added.values())}
        mine = (inputs["labels"][:, 1:] != -100).sum()
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return {"loss": loss * (mine / num_items_in_batch) + sum(added.values()) / processes}


def _progress(trainee: Trainee, say: Say) -> Any:
    """A callback of the Trainer that tells the loss, and refuses a part that gets no gradient."""
    from transformers import TrainerCallback

    began = time.monotonic()

    class Progress(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainee.done = state.global_step / state.max_steps

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0 and not any(_moves(p) for p in trainee.part.parameters()):
                raise VtpruneError(
                    "what is trained gets no gradient: no layer behind it reads what it makes (of dpvr-lf a larger "
                    "fusion= may)"
                )

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                if not math.isfinite(logs["loss"]):
                    raise VtpruneError(
                        f"the loss of step {state.global_step} is no finite number: a smaller lr= may help"
                    )
                rate = f"lr {logs['learning_rate']:.1e} " if "learning_rate" in logs else ""
                if state.is_world_process_zero:
                    say(f"step {state.global_step} t {time.monotonic() - began:.0f}s {rate}loss {logs['loss']:.4f}")

    return Progress()


def _moves(p: nn.Parameter) -> bool:
    return p.grad is not None and bool((p.grad != 0).any())


def fit(
    model: Any,
    data: Questions,
    method: str,
    *,
    steps: int,
    batch: int = 32,
    lr: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    settings: Mapping[str, float] | None = None,
    folder: Path,
    save_every: int = 0,
    resume: bool = False,
    say: Say = tell,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains ``handle.modules[method]`` of ``attach(model, method, **options)`` on ``data``; the model is left exactly
    as it was. In several processes (``torchrun``) each reads its share of every batch.

    Args:
        batch: questions per step, of all processes together.
        lr: the peak learning rate (default: the method's).
        seed: of the order of the questions.
        dtype: of the arithmetic, by autocast; the trained part is float32.
        settings: numbers of the method's losses, instead of their defaults.
        folder: where checkpoints go, every ``save_every`` steps (0: none). resume: go on from the last one there.
        options: of the method.

    Returns:
        the part, without gradients, and JSON-safe facts; ``facts["loss"]`` is the loss, at most 100 means over equal
        parts of the run.

    Raises:
        VtpruneError: settings that cannot train anything, an unknown method, checkpoints of another run, no gradient,
            or whatever ``attach`` refuses.
    """
    from transformers import PrinterCallback, Trainer

    training = TRAININGS.get(method)
    options = {**{k: v for k, v in training.options.items() if v is not None}, **options}
    lr = training.lr if lr is None else lr
    chosen = _settings(training, settings or {})
    _check(training, options, steps=steps, batch=batch, lr=lr)
    arguments = _arguments(model, folder, steps=steps, batch=batch, lr=lr, seed=seed, save_every=save_every)
    if dtype == torch.float32 and model.dtype != torch.float32:
        raise VtpruneError(f"the model is {model.dtype}, in whose arithmetic float32 is not kept: dtype={model.dtype}")
    if len(data) < batch:
        raise VtpruneError(f"batch={batch} questions a step, and there are {len(data)}")
    with frozen(model), attach(model, method, **options) as handle, _evaluating(model):
        layers = handle.adapter.decoder_layers()
        plan = {"method": method, "options": options, "steps": steps, "batch": batch, "lr": lr, "seed": seed}
        plan |= {"settings": chosen, "questions": len(data.rows), "data": data.digest(), "dtype": str(dtype)}
        plan |= {"processes": arguments.world_size, backbone.KEY: backbone.signature(layers)}
        last = _last(folder, plan) if resume else None
        if save_every:
            _begin(folder, plan, last)
        made = not folder.exists()
        trainee = Trainee(model, handle, training, chosen, dtype)
        trainer = Trainer(
            model=trainee,
            args=arguments,
            train_dataset=data,  # it has a length and rows by number
            data_collator=lambda rows: data.batch(rows, torch.device("cpu")),
            callbacks=[_progress(trainee, say)],
        )
        trainer.remove_callback(PrinterCallback)
        began = time.monotonic()
        with _own_numbers(), _no_empty(folder, made, arguments):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds = round(time.monotonic() - began, 1)
        part: nn.Module = trainee.part.requires_grad_(False)
        losses = [round(log["loss"], 5) for log in trainer.state.log_history if "loss" in log]
    if not all(bool(p.isfinite().all()) for p in part.parameters()):
        raise VtpruneError("what was trained holds values that are no finite numbers: a smaller lr= may help")
    own, whole = (sum(w.numel() for w in module.parameters()) for module in (part, model))
    facts = {
        **{k: v for k, v in plan.items() if k not in (backbone.KEY, "data")},
        "seconds": seconds,
        "dtype": str(dtype).removeprefix("torch."),
        "images": len(data.images),
        "parameters": own,
        "parameter_share": own / whole,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")}
        | {"vtprune": __version__},
        "loss": losses,
    }
    return part, facts


@contextmanager
def _own_numbers() -> Iterator[None]:
    """The Trainer seeds every generator of random numbers; afterwards the caller's go on."""
    ours = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(ours[0])
        np.random.set_state(ours[1])


@contextmanager
def _no_empty(folder: Path, made: bool, arguments: Any) -> Iterator[None]:
    """The Trainer makes its folder at once; one that was ``made`` for nothing goes."""
    try:
        yield
    finally:
        if made and arguments.process_index == 0 and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode: its dropout is not what is trained."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _arguments(model: Any, folder: Path, *, steps: int, batch: int, lr: float, seed: int, save_every: int) -> Any:
    """Of the Trainer. Raises :class:`VtpruneError` for a batch that the processes cannot share."""
    from transformers import TrainingArguments

    together = int(os.environ.get("WORLD_SIZE", "1")) > 1  # as torchrun says
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=round(WARM_UP * steps),
            weight_decay=0.0,
            max_grad_norm=CLIP,
            logging_nan_inf_filter=False,
            logging_steps=max(1, math.ceil(steps / PARTS)),
            save_strategy="steps" if save_every else "no",
            save_steps=save_every or 500,
            save_total_limit=2,
            seed=seed,
            data_seed=seed,
            dataloader_pin_memory=False,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            ddp_backend="gloo" if together and model.device.type == "cpu" else None,
            ddp_find_unused_parameters=False,
        )
    except ImportError as e:
        raise VtpruneError(f"training needs accelerate: pip install 'vtprune[train]' ({e})") from e
    processes = arguments.world_size
    if processes == 1:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # else the Trainer replicates the part, and hooks are of one model
    place = torch.device(arguments.device)
    here, there = ((d.type, d.index or 0) for d in (model.device, place))
    if here != there:
        raise VtpruneError(
            f"the model lies on {model.device}, and this process trains on {place}: load it there, or hide the other "
            "devices (CUDA_VISIBLE_DEVICES)"
        )
    if batch % processes:
        raise VtpruneError(f"batch={batch} is not divisible among {processes} processes")
    arguments.per_device_train_batch_size = batch // processes
    return arguments


def _settings(training: Training, given: Mapping[str, float]) -> dict[str, float]:
    """The numbers of the method's losses."""
    if strange := sorted(set(given) - set(training.settings)):
        known = ", ".join(training.settings) or "none"
        raise VtpruneError(f"training {training.method} takes no {strange[0]}=; it takes: {known}")
    out = {**training.settings, **given}
    for name, value in out.items():
        if not (math.isfinite(value) and value >= 0):
            raise VtpruneError(f"{name}={value} must not be negative")
    return out


def _check(training: Training, options: Mapping[str, Any], **numbers: float) -> None:
    """Raises :class:`VtpruneError` for what cannot train anything."""
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise VtpruneError(f"{name}={value} must be a number above 0")
        if name != "lr" and not isinstance(value, int):
            raise VtpruneError(f"{name}={value} must be a whole number")
    training.check({**training.options, **options})
    if auto := [name for name, value in options.items() if value == "auto"]:
        raise VtpruneError(f"{auto[0]}='auto' is measured by the command alone: give a number")


def _newest(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def _last(folder: Path, plan: Mapping[str, Any]) -> Path:
    """The newest checkpoint in ``folder``. Raises :class:`VtpruneError` if there is none, or one of another run."""
    last = _newest(folder)
    if last is None or not (folder / PLAN).is_file():
        raise VtpruneError(f"no checkpoint to go on from in {folder}")
    before = read(folder / PLAN)
    now = json.loads(json.dumps(plan))
    if other := [key for key in now if before.get(key) != now[key]]:
        raise VtpruneError(f"the checkpoints in {folder} are of another run: {other[0]} was another")
    return last


def _begin(folder: Path, plan: Mapping[str, Any], last: Path | None) -> None:
    """Writes what the checkpoints in ``folder`` belong to. Raises :class:`VtpruneError` if there are some of an earlier
    run that is not gone on with."""
    if last is None and _newest(folder) is not None:
        raise VtpruneError(f"{folder} holds checkpoints already: --resume goes on with them, or remove the folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN).write_text(json.dumps(plan) + "\n", encoding="utf-8")
