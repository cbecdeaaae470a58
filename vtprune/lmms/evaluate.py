"""``vtprune eval``: lmms-eval around every recipe and budget, one process (or several, data-parallel) and one JSON file
per run."""

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

from vtprune.inputs import demo_model

from ..check.versions import conflicts
from ..core.planning import load_recipe
from ..core.types import VtpruneError
from ..measure.bench import baselines, draws
from ..measure.run import portable
from ..measure.runs import RunError, alike, digest, read, slug, write
from ..methods.base import METHODS, make

REFUSED, FAILED = "vtprune: refused: ", "vtprune: error: "  # how a run says that it never began, or broke off
ATTACH = ("positions", "per")  # options of attach() that --option takes as well

OURS = ("alias", "samples", " ")  # what lmms-eval puts beside a task's metrics


def usable() -> None:
    """Raises :class:`VtpruneError` where an installed release is known to stop lmms-eval."""
    if found := conflicts():
        raise VtpruneError("; ".join(found))


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs: the dense model, then every recipe at every budget (and seed, where it draws), then the baselines at
    the same budgets; on its own schedule a recipe is compared with the dense model alone. A wrong recipe or option
    raises :class:`VtpruneError` here."""
    names = list(METHODS) if args.recipes == ["all"] else args.recipes
    options = dict(args.option)
    budgets: list[dict[str, Any]] = (
        [{"effective_tokens": b} for b in dict.fromkeys(args.budgets)] or [{"keep": k} for k in args.keep] or [{}]
    )
    more = [] if args.no_baselines or budgets == [{}] else [b for b in baselines() if b not in names]
    jobs: list[dict[str, Any]] = []
    for name in dict.fromkeys([*([] if args.no_baselines else ["dense"]), *names, *more]):
        if name == "dense":
            jobs.append({"recipe": "dense", "method": "dense", "budget": {}, "seed": args.seed, "options": {}})
            continue
        recipe = load_recipe(name)
        mine = {k: v for k, v in options.items() if name in names}
        make(
            recipe.stages[-1].method,
            {**recipe.stages[-1].options, **{k: v for k, v in mine.items() if k not in ATTACH}},
        )
        for budget in budgets:
            for seed in range(args.seed, args.seed + (args.seeds if draws(recipe) else 1)):
                jobs.append(
                    {
                        "recipe": name,
                        "method": recipe.name,
                        "budget": budget,
                        "seed": seed,
                        "options": mine,
                        "asked": portable(recipe),
                    }
                )
    return jobs


def told(budget: Mapping[str, Any]) -> str:
    """A budget in a table."""
    if "keep" in budget:
        return f"keep {budget['keep']:g}"
    return f"{100 * budget['effective_tokens']:g}%" if budget else "own"


def stem(job: Mapping[str, Any]) -> str:
    """The name of a run's files."""
    if job["method"] == "dense":
        return "lmms-dense"
    budget = "".join(f"{k[:4]}{v!r}" for k, v in job["budget"].items()) or "own"
    return f"lmms-{slug(job['method'])}-{budget}-{job['seed']}"


def line(
    args: argparse.Namespace, job: Mapping[str, Any], tasks: Sequence[str], include: Sequence[Path], runs: Path
) -> list[str]:
    """The command of one run."""
    given: dict[str, Any] = {"pretrained": args.model or str(demo_model.FOLDER), "recipe": job["recipe"]}
    given |= {"base": args.base} if args.base else {"dtype": args.dtype, "journal": runs / f"{stem(job)}.journal"}
    given |= {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    given |= {"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {}
    given |= {} if job["method"] == "dense" else {**job["budget"], "seed": job["seed"]}
    given |= {k: "+".join(map(str, v)) if isinstance(v, list) else v for k, v in job["options"].items()}
    given |= {"report": runs / f"{stem(job)}.costs.json"}
    if bad := [str(v) for v in given.values() if "," in str(v)]:
        raise VtpruneError(f"lmms-eval splits its arguments at commas: {bad[0]!r} cannot be passed")
    if args.system_prompt:
        given["system_prompt"] = f'"{args.system_prompt}"'  # lmms-eval reads commas in quotation marks
        if '"' in args.system_prompt:
            raise VtpruneError('lmms-eval cannot be given a system prompt with " in it')
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.processes)] if args.processes > 1 else []
    out = [
        sys.executable,
        *launcher,
        "-m",
        "lmms_eval",
        "--model",
        "vtprune",
        "--model_args",
        ",".join(f"{k}={v}" for k, v in given.items()),
    ]
    out += [
        "--tasks",
        ",".join(tasks),
        "--batch_size",
        str(args.batch),
        "--device",
        args.device,
        "--log_samples",
        "--output_path",
        str(runs / stem(job)),
    ]
    out += ["--include_path", str(include[0])] if include else []
    out += ["--force_simple"] if args.force_simple else []
    return out + (["--limit", str(args.limit)] if args.limit else [])


def surroundings(args: argparse.Namespace) -> dict[str, str]:
    """What the environment of a run adds."""
    if args.device != "cpu" or args.processes == 1:
        return {}
    return {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.processes))}


def one(
    args: argparse.Namespace, job: Mapping[str, Any], tasks: Sequence[str], command: Sequence[str], runs: Path
) -> dict[str, Any]:
    """One run, unless it lies there finished. lmms-eval ends with code 0 also when it failed, so its results are asked
    for."""
    path = runs / f"{stem(job)}.json"
    head = {
        "type": "vtprune.EvalRun",
        "version": 1,
        **job,
        "tasks": list(tasks),
        "limit": args.limit,
        "base": args.base,
        "dtype": args.dtype,
    }
    head |= {
        "system_prompt": args.system_prompt,
        "attention": args.attn_implementation,
        "max_new_tokens": args.max_new_tokens,
    }
    head |= {
        "include_path": args.include_path and str(args.include_path),
        "simple": args.force_simple,
        "releases": _releases(),
        "files": _files(args.model),
    }
    head |= {"model": args.model or "bundled VLM", "samples": args.samples}
    if path.exists():
        found = read(path)
        alike(path, found, head)
        return found["row"]
    print(f"{stem(job)}: {len(tasks)} tasks", file=sys.stderr)
    log, costs = runs / f"{stem(job)}.log", runs / f"{stem(job)}.costs.json"
    # what an attempt that broke off left must not pass for this one's results
    shutil.rmtree(runs / stem(job), ignore_errors=True)
    costs.unlink(missing_ok=True)
    with log.open("wb") as sink:
        code = subprocess.run(
            command, env={**os.environ, **surroundings(args)}, stdout=sink, stderr=subprocess.STDOUT
        ).returncode
    results = sorted((runs / stem(job)).glob("*/*_results.json"))
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    row = {"method": job["method"], "budget": job["budget"], "seed": job["seed"]}
    if refused := [t.partition(REFUSED)[2] for t in lines if REFUSED in t]:
        return {**row, "error": refused[0]}
    said = [t[t.find(m) :].strip() for t in lines for m in (FAILED, "Error during evaluation: ") if m in t]
    if code or any(t.startswith("Error during evaluation") for t in said) or not results or not costs.is_file():
        raise RunError(
            f"{stem(job)} failed with code {code}: {said[-1] if said else 'no results were written'} (see {log}; "
            f"finished runs are kept in {runs})"
        )
    found = read(results[-1])
    scores = {t: _metrics(s) for t, s in found["results"].items()}
    row |= {"scores": scores, "costs": read(costs)}
    samples = {
        f.name.partition("_samples_")[2].removesuffix(".jsonl"): _samples(f)
        for f in sorted((runs / stem(job)).glob("*/*_samples_*.jsonl"))
    }
    versions = {"lmms_eval": found.get("lmms_eval_version"), **row["costs"]["versions"]}
    shutil.rmtree(runs / f"{stem(job)}.journal", ignore_errors=True)
    write(
        path,
        json.dumps({**head, "command": shlex.join(command), "versions": versions, "row": row, "answers": samples})
        + "\n",
    )
    return row


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


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """``accuracy,none`` -> ``accuracy``; standard errors keep their name."""
    return {
        k.partition(",")[0]: v
        for k, v in found.items()
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


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table: the first metric of every task, and what it cost."""
    done = [r for r in rows if "error" not in r]
    tasks = list(dict.fromkeys(t for r in done for t, scores in r["scores"].items() if scores))
    first = {t: next(m for r in done for m in r["scores"].get(t, {}) if not m.endswith("_stderr")) for t in tasks}
    out = [
        [
            "method",
            "budget",
            "seed",
            *(f"{t} {first[t]}" for t in tasks),
            "tokens",
            "FLOPs %",
            "KV %",
            "ttft ms",
            "note",
        ]
    ]
    for r in rows:
        start = [r["method"], "-" if r["method"] == "dense" else told(r["budget"]), str(r["seed"])]
        if "error" in r:
            out.append([*start, *["-"] * (len(tasks) + 4), "not possible: " + r["error"]])
            continue
        c = r["costs"]
        shares = [f"{100 * c[k] / c[f'dense_{k}']:.1f}" for k in ("flops", "kv_bytes")]
        values = [f"{r['scores'][t][first[t]]:.4g}" if first[t] in r["scores"].get(t, {}) else "-" for t in tasks]
        out.append([*start, *values, f"{c['effective_tokens']:.1f}", *shares, f"{c['ttft_ms']:.0f}", ""])
    return out
