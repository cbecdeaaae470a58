"""Similarity kernels: one op = a plain PyTorch reference (``<op>_ref.py``) and a Triton kernel (``<op>_triton.py``). No
op makes a map of all tokens against all tokens (maxmin, dpp and coverage: unless it is no larger than the tokens
themselves). Importing this package registers every op file beside it and offers its function; triton is loaded when an
op first runs on a GPU."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

# In a checkout's root transformers, which looks for a package of that name, finds this folder: it must be empty then.
if __name__ != "kernels":
    from .base import KERNELS, KernelInfo, use

    __all__ = ["KERNELS", "KernelInfo", "use"]  # and every registered op: energy, gather, match, …

    for _module in iter_modules(__path__):
        if _module.name.endswith("_ref"):
            import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> Any:
    if __name__ != "kernels" and name in KERNELS:
        return KERNELS.get(name).function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
