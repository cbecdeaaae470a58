"""One run of lmms-eval in a process of its own, and what it leaves: its file, unless it lies there finished."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..measure.runs import RunError, alike, digest, read, write
from .commands import surroundings
from .errors import FAILED, REFUSED
from .jobs import stem

OURS = ("alias", "samples", " ")  # what lmms-eval puts beside a task's metrics


def one(
    args: argparse.Namespace, job: Mapping[str, Any], tasks: Sequence[str], command: Sequence[str], runs: Path
) -> dict[str, Any]:
    """One run's row. A run that was refused has an ``error`` and no file: it is tried again. Raises :class:`RunError`
    if it broke off, or if the file was made by another run."""
    path, head = runs / f"{stem(job)}.json", _head(args, job, tasks)
    if path.exists():
        finished = read(path)
        alike(path, finished, head)
        return finished["row"]
    print(f"{stem(job)}: {len(tasks)} tasks", file=sys.stderr)
    row = {"method": job["method"], "budget": job["budget"], "seed": job["seed"]}
    code, lines = _launch(args, job, command, runs)
    if refused := [t.partition(REFUSED)[2] for t in lines if REFUSED in t]:
        return {**row, "error": refused[0]}
    results, costs = _results(job, runs, code, lines)
    row |= {"scores": {task: _metrics(scores) for task, scores in results["results"].items()}, "costs": costs}
    logged = sorted((runs / stem(job)).glob("*/*_samples_*.jsonl"))
    answers = {f.name.partition("_samples_")[2].removesuffix(".jsonl"): _samples(f) for f in logged}
    versions = {"lmms_eval": results.get("lmms_eval_version"), **costs["versions"]}
    shutil.rmtree(runs / f"{stem(job)}.journal", ignore_errors=True)
    result = {**head, "command": shlex.join(command), "versions": versions, "row": row, "answers": answers}
    write(path, json.dumps(result) + "\n")
    return row


def _head(args: argparse.Namespace, job: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """What makes this run this run: a file with another head is none of it."""
    return {
        "type": "vtprune.EvalRun",
        "version": 1,
        **job,
        "tasks": list(tasks),
        "limit": args.limit,
        "base": args.base,
        "dtype": args.dtype,
        "system_prompt": args.system_prompt,
        "attention": args.attn_implementation,
        "max_new_tokens": args.max_new_tokens,
        "include_path": args.include_path and str(args.include_path),
        "simple": args.force_simple,
        "releases": _releases(),
        "files": _files(args.model),
        "model": args.model or "bundled VLM",
        "samples": args.samples,
    }


def _launch(
    args: argparse.Namespace, job: Mapping[str, Any], command: Sequence[str], runs: Path
) -> tuple[int, list[str]]:
    """The exit code of a run, and the lines of its log."""
    # what an attempt that broke off left must not pass for this one's results
    shutil.rmtree(runs / stem(job), ignore_errors=True)
    _costs_file(job, runs).unlink(missing_ok=True)
    log = _log_file(job, runs)
    environment = {**os.environ, **surroundings(args)}
    with log.open("wb") as sink:
        code = subprocess.run(command, env=environment, stdout=sink, stderr=subprocess.STDOUT).returncode
    return code, log.read_text(encoding="utf-8", errors="replace").splitlines()


def _results(
    job: Mapping[str, Any], runs: Path, code: int, lines: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What lmms-eval wrote, and the costs. It ends with code 0 also when it failed: raises :class:`RunError` unless
    both are there and the log tells of no error."""
    results, costs = sorted((runs / stem(job)).glob("*/*_results.json")), _costs_file(job, runs)
    errors = [t[t.find(m) :].strip() for t in lines for m in (FAILED, "Error during evaluation: ") if m in t]
    if code or any(t.startswith("Error during evaluation") for t in errors) or not results or not costs.is_file():
        raise RunError(
            f"{stem(job)} failed with code {code}: {errors[-1] if errors else 'no results were written'} (see "
            f"{_log_file(job, runs)}; finished runs are kept in {runs})"
        )
    return read(results[-1]), read(costs)


def _log_file(job: Mapping[str, Any], runs: Path) -> Path:
    return runs / f"{stem(job)}.log"


def _costs_file(job: Mapping[str, Any], runs: Path) -> Path:
    return runs / f"{stem(job)}.costs.json"


def _releases() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "lmms_eval", "vtprune")}


def _files(model: str | None) -> str | None:
    """Tells the contents of a model's folder apart by its files' sizes and times; ``None`` for a hub id and the bundled
    model."""
    if model is None or not Path(model).is_dir():
        return None
    return digest(
        [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(Path(model).iterdir()) if p.is_file()]
    )


def _metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    """``accuracy,none`` -> ``accuracy``; standard errors keep their name."""
    return {
        k.partition(",")[0]: v
        for k, v in scores.items()
        if isinstance(v, int | float) and k.partition(",")[0] not in OURS
    }


def _samples(path: Path) -> list[dict[str, Any]]:
    """Per question: its number, the answer and its scores."""
    out = []
    for text in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(text)
        scores = {k: v for k, v in entry.items() if isinstance(v, int | float) and k != "doc_id"}
        out.append({"doc_id": entry["doc_id"], "answer": entry["filtered_resps"], **scores})
    return sorted(out, key=lambda e: e["doc_id"])
