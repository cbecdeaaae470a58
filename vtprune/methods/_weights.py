"""Trained parts of methods, read from safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..core.types import VtpruneError


def load_weights(
    name: str, path: str, module: nn.Module, told: Mapping[str, str], fits: str, *, must_tell: bool = False
) -> None:
    """Loads ``path`` into ``module``, the trained part of the method ``name``. What the file's metadata says must be as
    ``told``, if it says so at all (``must_tell``: it has to); ``fits`` says what a file of another shape does not fit.

    Raises:
        VtpruneError: no such file, no safetensors file, trained for something else, values that are no finite numbers,
            or another shape.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise VtpruneError(f"{name}: no such file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            written, state = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        if missing := [key for key in told if must_tell and key not in written]:
            raise VtpruneError(
                f"{name}: {path} does not tell for which {missing[0]} it was trained (metadata, here "
                f"{missing[0]}={told[missing[0]]})"
            )
        for key, value in told.items():
            if written.get(key, value) != value:
                raise VtpruneError(f"{name}: {path} was trained for {key}={written[key][:40]}, this is {key}={value}")
        whole = {key for key, t in module.state_dict().items() if not t.is_floating_point()}  # counters
        if bad := [
            key for key, t in state.items() if key not in whole and not (t.is_floating_point() and t.isfinite().all())
        ]:
            raise VtpruneError(f"{name}: {path} holds values that are no finite numbers, in {bad[0]} for one")
        module.load_state_dict(state)
    except SafetensorError as e:
        raise VtpruneError(f"{name}: {path} is not a safetensors file: {e}") from e
    except OSError as e:
        raise VtpruneError(f"{name}: cannot read {path}: {e.strerror or e}") from e
    except RuntimeError as e:
        raise VtpruneError(f"{name}: {path} does not fit {fits}: {str(e).splitlines()[0]}") from e
