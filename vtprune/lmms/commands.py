"""The command of one run of lmms-eval, and what its environment adds."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.plugins import IMPORTS
from ..core.types import VtpruneError
from ..inputs import demo_model
from .jobs import stem


def line(
    args: argparse.Namespace, job: Mapping[str, Any], tasks: Sequence[str], include: Sequence[Path], runs: Path
) -> list[str]:
    """The command of one run."""
    model_args = ",".join(f"{k}={v}" for k, v in _model_args(args, job, runs).items())
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.processes)] if args.processes > 1 else []
    out = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "vtprune", "--model_args", model_args]
    out += ["--tasks", ",".join(tasks), "--batch_size", str(args.batch), "--device", args.device]
    out += ["--log_samples", "--output_path", str(runs / stem(job))]
    out += ["--include_path", str(include[0])] if include else []
    out += ["--force_simple"] if args.force_simple else []
    return out + (["--limit", str(args.limit)] if args.limit else [])


def _model_args(args: argparse.Namespace, job: Mapping[str, Any], runs: Path) -> dict[str, Any]:
    """What ``--model_args`` holds. Raises :class:`VtpruneError` for what lmms-eval would read in another way."""
    out: dict[str, Any] = {"pretrained": args.model or str(demo_model.bundled()), "recipe": job["recipe"]}
    out |= {"base": args.base} if args.base else {"dtype": args.dtype, "journal": runs / f"{stem(job)}.journal"}
    out |= {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    out |= {"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {}
    out |= {} if job["method"] == "dense" else {**job["budget"], "seed": job["seed"]}
    out |= {k: "+".join(map(str, v)) if isinstance(v, list) else v for k, v in job["options"].items()}
    out |= {"report": runs / f"{stem(job)}.costs.json"}
    if bad := [str(v) for v in out.values() if "," in str(v)]:
        raise VtpruneError(f"lmms-eval splits its arguments at commas: {bad[0]!r} cannot be passed")
    if args.system_prompt:
        out["system_prompt"] = f'"{args.system_prompt}"'  # lmms-eval reads commas in quotation marks
        if '"' in args.system_prompt:
            raise VtpruneError('lmms-eval cannot be given a system prompt with " in it')
    return out


def surroundings(args: argparse.Namespace) -> dict[str, str]:
    """What the environment of a run adds."""
    brought = {IMPORTS: os.environ[IMPORTS]} if os.environ.get(IMPORTS) else {}
    if args.device != "cpu" or args.processes == 1:
        return brought
    return {
        **brought,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.processes)),
    }
