"""Compiles every Triton kernel, as its launcher launches it, to machine code of GPUs that need not be there: what the
interpreter lets pass (shapes that are no power of two, types, shared memory) fails here. ``python compile_kernels.py
CASES DTYPES CONFIGS ARCH...``, each of the first three ``first`` or ``all``."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vtprune.kernels import KERNELS, _triton

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.uint8: "u8"}
SHARED = {
    "80": 166912,
    "89": 101376,
    "90": 232448,
}  # bytes of shared memory that a program may have: A100, L4 and RTX 40, H100
launched: list[tuple[Any, tuple, dict]] = []


def record(kernel: Any, grid: Any, *arguments: Any, sizes: dict, **constants: Any) -> None:
    launched.append((kernel, arguments, constants))


def source(function: Any, values: dict[str, Any]) -> ASTSource:
    kinds: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    for i, name in enumerate(function.arg_names):
        value = values[name]
        if function.params[i].is_constexpr or value is None:
            kinds[name], constants[(i,)] = "constexpr", value
        else:
            kinds[name] = (
                "*" + TYPES[value.dtype]
                if isinstance(value, torch.Tensor)
                else "fp32"
                if isinstance(value, float)
                else "i32"
            )
    return ASTSource(fn=function, signature=kinds, constexprs=constants)


def main(cases: str, dtypes: str, configs: str, *archs: str) -> None:
    for name in KERNELS:
        module = importlib.import_module(f"vtprune.kernels.{name}_triton")
        for part in {
            module,
            *(
                sys.modules[m]
                for m in sys.modules
                if m.startswith("vtprune.kernels.") and hasattr(sys.modules[m], "launch")
            ),
        }:
            part.launch = record  # type: ignore[attr-defined]
    for name in KERNELS:
        info = KERNELS.get(name)
        for case in info.cases if cases == "all" else info.cases[:1]:
            for dtype in (torch.bfloat16, torch.float32, torch.float16)[: None if dtypes == "all" else 1]:
                info.triton()(*info.example(case, 63, dtype, torch.Generator().manual_seed(0)))
    done: dict[str, int] = {}
    seen = set()
    fits: dict[Any, list[bool]] = {}
    for kernel, arguments, constants in launched:
        options = kernel.configs if hasattr(kernel, "configs") else [triton.Config({})]
        function = kernel.fn if hasattr(kernel, "configs") else kernel
        for config in options if configs == "all" else options[-1:]:
            values = {**dict(zip(function.arg_names, arguments, strict=False)), **constants, **config.kwargs}
            text = source(function, values)
            fixed = str({k: v for k, v in text.constants.items() if function.arg_names[k[0]] not in config.kwargs})
            key = (function, str(text.signature), fixed, str(config.kwargs), config.num_warps, config.num_stages)
            for arch in archs:
                if (arch, *key) in seen:
                    continue
                seen.add((arch, *key))
                made = triton.compile(
                    text,
                    target=GPUTarget("cuda", int(arch), 32),
                    options={"num_warps": config.num_warps, "num_stages": config.num_stages},
                )
                where = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
                fits.setdefault((arch, key[:3]), []).append(made.metadata.shared <= SHARED[arch])
                done[where] = max(done.get(where, 0), made.metadata.shared)
    # A size that does not fit is left out by the autotuner; one has to.
    assert all(any(found) for found in fits.values()), [key for key, found in fits.items() if not any(found)]
    assert not _triton.INTERPRETED
    print(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
