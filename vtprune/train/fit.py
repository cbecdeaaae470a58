"""Fits the trained part of a method beside a frozen model, by transformers' Trainer.

The model is used through :func:`vtprune.attach` and its own forward: labels in, its own loss out. What the Trainer sees
is the trained part alone, in float32: its gradients are what several processes share, its weights what a checkpoint
holds. AdamW without weight decay, linear warm-up over 3 % of the steps, cosine to zero, gradients clipped to a norm of
1 (DPVR-LF's and Router-Tuning's recipes; the norm is ours).
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
from ..core.wrappers import unwrap
from ..version import __version__
from .base import TRAININGS, Say, Step, Training, tell
from .checkpoints import begin, last_of, no_empty
from .data import Data
from .frozen import frozen
from .lora import Lora, inserted

WARM_UP, CLIP, PARTS = 0.03, 1.0, 100


class Trainee(nn.Module):
    """The trained part of a method and the model's adapters, with a forward through the whole model, which is no part
    of it."""

    model: Any

    def __init__(
        self,
        model: Any,
        handle: Handle,
        training: Training,
        settings: Mapping[str, float],
        dtype: torch.dtype,
        data: Data,
        adapters: Sequence[tuple[str, nn.Parameter]] = (),
    ):
        super().__init__()
        own = handle.modules[training.method] if training.part else nn.Module()
        self.part = own.float().requires_grad_(True)
        self.adapters = nn.ParameterList(p for _, p in adapters)
        self.__dict__["model"] = model
        self.handle, self.training_, self.settings, self.dtype, self.data = handle, training, settings, dtype, data
        self.done = 0.0

    def train(self, mode: bool = True) -> Trainee:
        """Always in evaluation mode, as the model around it: a copied layer's dropout is not what is trained."""
        return super().train(False)

    def forward(self, num_items_in_batch: Tensor | int | None = None, **inputs: Any) -> dict[str, Tensor]:
        """``loss``; with ``num_items_in_batch``, the number of answer tokens (or labels) in all processes' batches,
        this process's share of it."""
        device = _place(self.model)
        again = partial(self.data.call, self.model, inputs, self.training_.asks)
        self.training_.prepare(self.handle, self.settings, self.done)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = again()
            step = Step(
                handle=self.handle,
                settings=self.settings,
                model=self.model,
                inputs=inputs,
                output=output,
                again=again,
                done=self.done,
            )
            added = self.training_.losses(step)
        loss = output.loss if self.training_.answers else output.loss.new_zeros(())
        if num_items_in_batch is None:
            return {"loss": loss + sum(added.values())}
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        share = self.data.counted(inputs) / num_items_in_batch
        return {"loss": loss * share + sum(added.values()) / processes}


def _progress(trainee: Trainee, say: Say) -> Any:
    """A callback of the Trainer that tells the loss, and refuses a part that gets no gradient."""
    from transformers import TrainerCallback

    began = time.monotonic()

    class Progress(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainee.done = state.global_step / state.max_steps
            trainee.handle.reseed(args.seed * state.max_steps + state.global_step)  # other draws in every step

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step:
                return
            if trainee.training_.part and not any(_moves(p) for p in trainee.part.parameters()):
                raise VtpruneError(
                    "what is trained gets no gradient: no layer behind it reads what it makes (of dpvr-lf a larger "
                    "fusion= may), or no answer of the first batch earns a reward (ia-red2)"
                )
            if len(trainee.adapters) and not any(_moves(p) for p in trainee.adapters):
                raise VtpruneError(
                    "the adapters get no gradient: nothing behind them reads what they make (adapters in a tower need "
                    "the images themselves, not what it made of them)"
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


def _place(model: Any) -> torch.device:
    return model.device if hasattr(model, "device") else next(model.parameters()).device


def _moves(p: nn.Parameter) -> bool:
    return p.grad is not None and bool((p.grad != 0).any())


def fit(
    model: Any,
    data: Data,
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
    lora: Lora | None = None,
    say: Say = tell,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains ``handle.modules[method]`` of ``attach(model, method, **options)`` on ``data``; the model is left exactly
    as it was. In several processes (``torchrun``) each reads its share of every batch.

    Args:
        batch: rows of ``data`` per step, of all processes together.
        lr: the peak learning rate (default: the method's).
        seed: of the order of the rows, and of the adapters.
        dtype: of the arithmetic, by autocast; what is trained is float32.
        settings: numbers of the method's losses, instead of their defaults.
        folder: where checkpoints go, every ``save_every`` steps (0: none). resume: go on from the last one there.
        lora: adapters that are trained with it; afterwards it holds them (:meth:`~vtprune.train.lora.Lora.save`), and
            the model does not.
        options: of the method.

    Returns:
        the part, without gradients (of a method that has none, an empty module), and JSON-safe facts; ``facts["loss"]``
        is the loss, at most 100 means over equal parts of the run.

    Raises:
        VtpruneError: settings that cannot train anything, an unknown method, checkpoints of another run, no gradient,
            or whatever ``attach`` refuses.
    """
    from transformers import PrinterCallback, Trainer

    training = TRAININGS.get(method)
    if not training.part and lora is None:
        raise VtpruneError(
            f"{method} has no part of its own to train: it trains adapters of the model, lora= (--lora RANK)"
        )
    options = {**{k: v for k, v in training.options.items() if v is not None}, **options}
    lr = training.lr if lr is None else lr
    chosen = _settings(training, settings or {})
    _check(training, options, steps=steps, batch=batch, lr=lr)
    kind = next(model.parameters()).dtype
    arguments = _arguments(_place(model), folder, steps=steps, batch=batch, lr=lr, seed=seed, save_every=save_every)
    arguments.ddp_find_unused_parameters = training.rests or lora is not None  # of a layer that a batch leaves out
    if batch < training.least * arguments.world_size:
        raise VtpruneError(f"batch={batch}: {method} needs {training.least} rows in each process, for their statistics")
    if dtype == torch.float32 and kind != torch.float32:
        raise VtpruneError(f"the model is {kind}, in whose arithmetic float32 is not kept: dtype={kind}")
    if len(data) < batch:
        raise VtpruneError(f"batch={batch} {data.noun} a step, and there are {len(data)}")
    whole = sum(w.numel() for w in model.parameters())
    with (
        frozen(model),
        inserted(model, lora, seed) as adapters,
        attach(model, method, **{**training.during, **options}) as handle,
        _evaluating(model),
    ):
        layers = backbone.layers(handle.adapter)
        plan = {"method": method, "options": options, "steps": steps, "batch": batch, "lr": lr, "seed": seed}
        plan |= {"settings": chosen, data.noun: len(data.rows), "data": data.digest(), "dtype": str(dtype)}
        plan |= {"processes": arguments.world_size, backbone.KEY: backbone.signature(layers)}
        plan |= {} if lora is None else {"lora": lora.plan()}
        last = last_of(folder, plan) if resume else None
        if save_every:
            begin(folder, plan, last)
        trainee = Trainee(model, handle, training, chosen, dtype, data, adapters)
        with _own_numbers(), no_empty(folder, arguments):
            trainer = Trainer(
                model=trainee,
                args=arguments,
                train_dataset=data,  # it has a length and rows by number
                data_collator=lambda rows: data.batch(rows, torch.device("cpu")),
                callbacks=[_progress(trainee, say)],
                optimizers=(_optimizer(trainee, arguments, training, lora), None),
            )
            trainer.remove_callback(PrinterCallback)
            began = time.monotonic()
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds = round(time.monotonic() - began, 1)
        part: nn.Module = trainee.part.requires_grad_(False)
        losses = [round(log["loss"], 5) for log in trainer.state.log_history if "loss" in log]
        if not all(bool(p.isfinite().all()) for p in trainee.parameters()):
            raise VtpruneError("what was trained holds values that are no finite numbers: a smaller lr= may help")
        own, beside = (sum(w.numel() for w in module.parameters()) for module in (part, trainee.adapters))
        signed = backbone.adapters(unwrap(model))
    facts = {
        **{k: v for k, v in plan.items() if k not in (backbone.KEY, "data")},
        "seconds": seconds,
        "dtype": str(dtype).removeprefix("torch."),
        "images": data.shown,
        "parameters": own + beside,
        "parameter_share": (own + beside) / whole,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")}
        | {"vtprune": __version__}
        | ({} if lora is None else {"peft": version("peft")}),
        "loss": losses,
    }
    return part, {**facts, **({backbone.ADAPTERS: signed} if signed else {})}


def _optimizer(trainee: Trainee, arguments: Any, training: Training, lora: Lora | None) -> Any:
    """The Trainer's own, with a rate of their own for adapters beside a part; ``None``: the Trainer makes it."""
    if lora is None or not training.part:
        return None
    from transformers import Trainer

    kind, more = Trainer.get_optimizer_cls_and_kwargs(arguments)
    groups = [{"params": list(trainee.part.parameters())}, {"params": list(trainee.adapters), "lr": lora.lr}]
    return kind(groups, **{**more, "weight_decay": 0.0})


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
def _evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode: its dropout is not what is trained."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _arguments(
    here: torch.device, folder: Path, *, steps: int, batch: int, lr: float, seed: int, save_every: int
) -> Any:
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
            use_cpu=here.type == "cpu",
            ddp_backend="gloo" if together and here.type == "cpu" else None,
            ddp_find_unused_parameters=False,
        )
    except ImportError as e:
        raise VtpruneError(f"training needs accelerate: pip install 'vtprune[train]' ({e})") from e
    processes = arguments.world_size
    if processes == 1:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # else the Trainer replicates the part, and hooks are of one model
    place = torch.device(arguments.device)
    if (here.type, here.index or 0) != (place.type, place.index or 0):
        raise VtpruneError(
            f"the model lies on {here}, and this process trains on {place}: load it there, or hide the other "
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
