"""LoRA adapters (arXiv 2106.09685) that are trained together with a method's part, or without one, through peft.

They are in the model only while it is trained or compared; what is kept of them is peft's own folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import backbone
from ..core.planning import bind
from ..core.types import UnsupportedError, VtpruneError
from ..core.wrappers import unwrap
from .frozen import frozen

NAME = "default"  # peft's own for adapters that nobody named
TOWER = "tower"
LR = 2e-4
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class Lora:
    """What adapters are made, and once they are trained what they hold.

    Attributes:
        rank: of each adapter, ``W + alpha / rank * B A``; ``B`` begins as 0.
        targets: names of linear layers, as ``("q_proj", "v_proj")``, in every decoder layer (of a bare ViT: in every
            block); ``("tower",)``: all of the vision tower's; none: all of the decoder layers'.
        alpha: default: twice the rank.
        lr: the peak learning rate of the adapters; the method's part has its own.
        state: by peft's names, once trained; config: peft's; backbone: which model they belong to.
    """

    rank: int
    targets: Sequence[str] = ()
    alpha: float | None = None
    lr: float = LR
    state: dict[str, Tensor] = field(default_factory=dict, repr=False)
    config: Any = field(default=None, repr=False)
    backbone: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        self.alpha = 2 * self.rank if self.alpha is None else self.alpha
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise VtpruneError(f"rank={self.rank} of LoRA adapters must be a whole number from 1")
        for name, value in (("alpha", self.alpha), ("lr", self.lr)):
            if not (math.isfinite(value) and value > 0):
                raise VtpruneError(f"{name}={value} of LoRA adapters must be a number above 0")
        if TOWER in self.targets and len(self.targets) > 1:
            raise VtpruneError("LoRA targets are names of layers or 'tower', not both")

    @property
    def tower(self) -> bool:
        """Whether the adapters are in the tower of a multimodal model."""
        return TOWER in self.targets

    def plan(self) -> dict[str, Any]:
        """JSON-safe, what tells a run with other adapters apart."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets), "lr": self.lr}

    def save(self, folder: Path) -> None:
        """Writes peft's folder, which ``peft.PeftModel.from_pretrained(model, folder)`` reads. Raises
        :class:`VtpruneError` before anything was trained."""
        from safetensors.torch import save_file

        if not self.state:
            raise VtpruneError("these adapters were not trained yet: there is nothing to save")
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        save_file(self.state, folder / WEIGHTS, metadata={"format": "pt", backbone.KEY: self.backbone})


def folder_of(out: Path) -> Path:
    """Where the adapters lie that were trained beside the weights in ``out``."""
    return out.with_suffix(".lora")


def _peft() -> Any:
    try:
        import peft
    except ImportError as e:
        raise VtpruneError(f"LoRA needs peft: pip install 'vtprune[train]' ({e})") from e
    return peft


def _chosen(model: nn.Module, lora: Lora) -> str:
    """The linear layers that get adapters, as a pattern of their full names. Raises :class:`VtpruneError`."""
    adapter = bind(model)
    decoder, tower = adapter.decoder_layers(), adapter.tower_blocks()
    layers = tower if lora.tower or not decoder else decoder
    if not layers:
        raise VtpruneError(f"{type(model).__name__} has no vision tower for LoRA's adapters")
    whole = {id(module): name for name, module in model.named_modules()}
    inside = [_linear(layer) for layer in layers]
    there = sorted({name.rpartition(".")[2] for names in inside for name in names})
    if strange := [] if lora.tower else sorted(set(lora.targets) - set(there)):
        raise VtpruneError(f"no linear layer is called {strange[0]!r}; there are {', '.join(there) or 'none'}")
    if not there:
        raise UnsupportedError(f"{type(model).__name__} has no linear layers that LoRA's adapters could stand beside")
    every = lora.tower or not lora.targets
    inside = [[n for n in names if every or n.rpartition(".")[2] in lora.targets] for names in inside]
    wanted = {f"{whole[id(layer)]}.{name}" for layer, names in zip(layers, inside, strict=True) for name in names}
    outer = "|".join(re.escape(whole[id(layer)]) for layer in layers)
    inner = "|".join(sorted({re.escape(name) for names in inside for name in names}))
    pattern = f"(?:{outer})\\.(?:{inner})"
    if {name for name in whole.values() if re.fullmatch(pattern, name)} != wanted:
        raise UnsupportedError(
            f"layers of this {type(model).__name__} differ, so that no pattern names what gets adapters: name fewer "
            "targets"
        )
    return pattern


def _linear(layer: nn.Module) -> list[str]:
    """The linear layers in ``layer``, but those whose weights ``nn.MultiheadAttention`` reads past their forward."""
    past = {
        id(m)
        for attention in layer.modules()
        if isinstance(attention, nn.MultiheadAttention)
        for m in attention.modules()
    }
    return [n for n, m in layer.named_modules() if isinstance(m, nn.Linear) and n and id(m) not in past]


def _clean(model: nn.Module) -> None:
    if backbone.tuners(model):
        raise VtpruneError(
            "the model has adapters already: merge them (merge_and_unload) or unload them first, so that what is "
            "trained can be told from them"
        )


@contextmanager
def inserted(model: Any, lora: Lora | None, seed: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """``model`` with fresh adapters, which are given back by name; afterwards it is as it was, and ``lora`` holds what
    they were trained to. Without ``lora`` there are none."""
    if lora is None:
        yield []
        return
    peft = _peft()
    model = unwrap(model)
    _clean(model)
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=_chosen(model, lora))
    with _taken_back(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        tuner = peft.LoraModel(model, config, NAME)
        ours = [(n, p) for n, p in model.named_parameters() if f".{NAME}." in n and "lora_" in n]
        for _, p in ours:
            p.data = p.data.float()
            p.requires_grad_(True)
        yield ours
        state = peft.get_peft_model_state_dict(tuner, adapter_name=NAME, save_embedding_layers=False)
        lora.state = {f"base_model.{n}": t.detach().cpu().clone().contiguous() for n, t in state.items()}
        config.inference_mode = True
        lora.config, lora.backbone = config, backbone.written(backbone.layers(bind(model)))


@contextmanager
def _taken_back(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the children that it had, and the model what it knew of peft."""
    children = {module: dict(module._modules) for module in model.modules()}
    known = {name: model.__dict__[name] for name in ("peft_config",) if name in model.__dict__}
    try:
        yield
    finally:
        for module, before in children.items():
            module._modules.clear()
            module._modules.update(before)
        model.__dict__.pop("peft_config", None)
        model.__dict__.update(known)


@contextmanager
def loaded(model: Any, folder: Path | None) -> Iterator[None]:
    """``model`` with the adapters in ``folder``, in evaluation mode; afterwards it is as it was. Raises
    :class:`VtpruneError` for a folder that holds none of this model's."""
    if folder is None:
        yield
        return
    peft = _peft()
    model = unwrap(model)
    _clean(model)
    told = read_config(folder)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = peft.LoraConfig(**{k: told[k] for k in ("r", "lora_alpha", "target_modules")}, inference_mode=True)
        state = load_file(folder / WEIGHTS)
    except (KeyError, OSError, SafetensorError, TypeError) as e:
        raise VtpruneError(f"{folder} holds no adapters of vtprune's: {e}") from e
    with frozen(model), _taken_back(model), torch.random.fork_rng():
        try:
            tuner = peft.LoraModel(model, config, NAME)
            shaped = {n.removeprefix("base_model."): t for n, t in state.items()}
            want = peft.get_peft_model_state_dict(tuner, adapter_name=NAME, save_embedding_layers=False)
            if {n: t.shape for n, t in want.items()} != {n: t.shape for n, t in shaped.items()}:
                raise VtpruneError(f"the adapters in {folder} are another model's")
            peft.set_peft_model_state_dict(tuner, shaped, adapter_name=NAME)
        except ValueError as e:
            raise (
                e if isinstance(e, VtpruneError) else VtpruneError(f"the adapters in {folder} are another model's: {e}")
            ) from e
        backbone.check("LoRA", str(folder / WEIGHTS), backbone.layers(bind(model)))
        yield


def read_config(folder: Path) -> Mapping[str, Any]:
    """The configuration of the adapters in ``folder``. Raises :class:`VtpruneError` if there are none."""
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise VtpruneError(f"{folder} holds no LoRA adapters: {e}") from e
    return told if isinstance(told, dict) else {}


def read_size(folder: Path) -> int:
    """Parameters of the adapters in ``folder``. Raises :class:`VtpruneError` if there are none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise VtpruneError(f"{folder} holds no LoRA adapters: {e}") from e
