"""Models inside other libraries' wrappers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .types import UnsupportedError

if TYPE_CHECKING:
    pass

WRAPPERS = {
    "PeftModel": "base_model",
    "LoraModel": "model",
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
}

REPLICATING = {
    "DataParallel": "copies the model for every batch; use DistributedDataParallel",
    "FullyShardedDataParallel": "flattens the parameters that adapters look at; use fully_shard (FSDP2)",
}


def check_model(model: Any) -> None:
    """Raises :class:`UnsupportedError` for what is no module at all."""
    if not hasattr(type(model), "named_modules"):
        raise UnsupportedError(
            f"a model is a torch.nn.Module that has been loaded, got {type(model).__name__} {str(model)[:60]!r}"
        )


def unwrap(model: Any) -> Any:
    """The model inside a ``PeftModel``, a compiled model, ``DistributedDataParallel`` or a pipeline of transformers:
    they call it with everything that is hooked into it. Raises :class:`UnsupportedError` for wrappers that call
    something else."""
    if any(k.__name__ == "Pipeline" and k.__module__.startswith("transformers.") for k in type(model).__mro__):
        model = model.model
    check_model(model)
    while True:
        kinds = [k.__name__ for k in type(model).__mro__]
        for name, why in REPLICATING.items():
            if name in kinds:
                raise UnsupportedError(f"{name} {why}")
        inner = next(
            (
                getattr(model, attribute)
                for name, attribute in WRAPPERS.items()
                if name in kinds and hasattr(model, attribute)
            ),
            None,
        )
        if inner is None:
            if "BaseTuner" in kinds and hasattr(model, "model"):  # peft's other tuners
                inner = model.model
            else:
                return model
        model = inner
